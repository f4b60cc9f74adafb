"""Parts of a student that can have a weight of their own in the merge: kinds of parameters, and ranges of layers.

`gates` and the like are kinds; `7` and `0-9` are layers, counted from 0. Where both name a tensor, the kind decides.
"""

import re
from collections.abc import Iterable, Mapping
from difflib import get_close_matches

KINDS = {
    "gates": r"\.((input|forget|output)_gate|[ifzo]gate)\.",
    "feature_maps": r"\.(query|key)_map$",
    "projections": r"\.self_attn\.[qkvo]_proj\.",
    "mlp": r"\.mlp\.",
    "norms": r"norm\.weight$",
    "embeddings": r"(^|\.)(embed_tokens|lm_head)\.",
}
"""Kind → what the names of its tensors match; no name matches two."""
LAYER = re.compile(r"\.layers\.(\d+)\.")


def layers_of(part: str) -> range | None:
    """The layers that a part names; None where it names none."""
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
    return range(int(match[1]), int(match[2] or match[1]) + 1) if match else None


def part_of(name: str, parts: Iterable[str]) -> str:
    """The part among `parts` whose weight the tensor `name` has; empty where none names it."""
    kind = next((kind for kind in parts if kind in KINDS and re.search(KINDS[kind], name)), "")
    layer = LAYER.search(name)
    if kind or not layer:
        return kind
    return next((part for part in parts if int(layer[1]) in (layers_of(part) or ())), "")


def problem_of(parts: Mapping[str, float], layers: int) -> str:
    """What is wrong with a mapping part → weight, beginning with the part; empty: nothing.

    Args:
        parts: as in `merge.weights.EXPERT`.
        layers: of the student; 0: unknown.
    """
    taken: set[int] = set()
    for part, weight in parts.items():
        named = layers_of(part)
        if part not in KINDS and named is None:
            nearest = get_close_matches(part, KINDS, n=1, cutoff=0.0)[0]
            return f"{part}: no such part; the nearest is {nearest} (all: {', '.join(KINDS)}, layers as 7 or 0-9)"
        if named is not None and (not named or (layers and named[-1] >= layers)):
            return f"{part}: expected layers" + (f" from 0 to {layers - 1}" if layers else "") + ", as 7 or 0-9"
        if named is not None and taken & set(named):
            return f"{part}: another part names a layer of it too"
        taken |= set(named or ())
        if not 0 <= weight < float("inf"):
            return f"{part}={weight}: expected a number ≥ 0"
    return ""
