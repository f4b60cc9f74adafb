"""What accelerators can do and hold, by the makers' data sheets."""

import re
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Device:
    """One GPU."""

    name: str
    """Words of what its driver calls it, in small letters."""
    flops: float
    """FLOP/s in bfloat16 with float32 accumulation, dense."""
    memory: float
    """GB as the maker counts them. Cards hold some 7 % more bytes than 10⁹ of each, or lose as much to the context of
    CUDA, to NCCL and to gaps between allocations: 10⁹ is what a plan may use."""


DEVICES = tuple(
    Device(name, tera * 1e12, memory)
    for name, tera, memory in (
        ("gb200", 2500, 186),
        ("b200", 2250, 180),
        ("gh200", 989, 96),
        ("h200 nvl", 836, 141),
        ("h200", 989, 141),
        ("h100 nvl", 835, 94),
        ("h100 pcie", 756, 80),
        ("h100", 989, 80),
        ("h800", 989, 80),
        ("a100", 312, 80),
        ("a800", 312, 80),
        ("a30", 165, 24),
        ("a40", 149.7, 48),
        ("rtx a6000", 154.8, 48),
        ("a10", 125, 24),
        ("l40s", 362, 48),
        ("l40", 181, 48),
        ("l4", 121, 24),
        ("rtx 4090", 165.2, 24),
        ("rtx 3090", 71, 24),
        ("mi355x", 2500, 288),
        ("mi325x", 1307.4, 256),
        ("mi300x", 1307.4, 192),
        ("mi300a", 980.6, 128),
        ("mi250x", 191.5, 64),  # one of the card's two chips: each is a device
    )
)
"""The first whose words stand in a name counts. Absent: what has no matrix units for bfloat16 (V100), or is given in
several ways (A10G)."""


def find_device(name: str) -> Device | None:
    """The device that `name` means: a driver's (`NVIDIA H100 80GB HBM3`) or a short one (`h100`, `a100-40`). A number
    of GB behind the words wins over the table's."""
    words = re.split(r"[^a-z0-9]+", name.lower())
    text = f" {' '.join(words)} "
    found = next((device for device in DEVICES if f" {device.name} " in text), None)
    if found is None:
        return None
    size = re.search(rf" {found.name} (?:[a-z]+\d? )?(\d+)(?:gb)? ", text)
    return replace(found, memory=float(size[1])) if size else found
