"""Cases for Triton's kernel, on a GPU, or through Triton's interpreter: `TRITON_INTERPRET=1 python triton_support.py`.

The interpreter is chosen when triton is imported, for the whole process, so that the unit tests call it as a program:
it prints {case: {tensor: relative error}}.
"""

import json
import math
import sys
from functools import partial
from pathlib import Path

import test_mlstm as reference
import torch

WIDE = (72, 80)
"""D and E of more than one tile, the last one not full."""


def case(
    length, *, chunk=64, dtype=torch.float32, autocast=False, widths=(8, 6), edit=None, torch_form=False, **choices
):
    settings = {"length": length, "chunk": chunk, "dtype": dtype, "autocast": autocast, "widths": widths}
    return {**settings, "edit": edit, "torch_form": torch_form, "choices": choices}


def soft_cap(gate):
    def edit(given):
        given["log_input"].fill_(gate)
        given["log_input"][..., ::7] = -gate

    return edit


def documents(given):
    """Everything is forgotten in the middle of a chunk, at its start and twice in a row."""
    given["log_forget"][..., [5, 16, 40, 41]] = -math.inf


def padding(given):
    given["log_input"][..., 3::9], given["log_forget"][..., 3::9] = -math.inf, 0.0


def left_padding(given):
    """Before the first real position h is 0, where the recurrence has 0 / 0."""
    given["log_input"][..., :19], given["log_forget"][..., :19] = -math.inf, 0.0


def jumps(given):
    """Enormous forgetting, none and slow one by turns: sums of thousands, of which differences of 0.01 count."""
    given["log_forget"][..., ::5], given["log_forget"][..., 1::5] = -9000.0, 0.0


CASES = {
    **{f"length {n}": case(n) for n in (1, 7, 64, 65, 130)},
    "chunk 1": case(37, chunk=1),
    "chunk 24": case(70, chunk=24),
    "chunk 1000": case(130, chunk=1000),
    "wide heads": case(70, widths=WIDE),
    "no state": case(70, with_state=False),
    "input gates at the lower cap": case(130, edit=soft_cap(-15.0)),
    "input gates at the upper cap": case(130, edit=soft_cap(15.0)),
    **{f"forget gates {low} {high}": case(130, forget=(low, high)) for low, high in ((-20, -8), (15, 30), (-20, 30))},
    "documents": case(70, chunk=16, edit=documents),
    "padding": case(70, chunk=32, edit=padding),
    "left padding": case(70, chunk=16, edit=left_padding, with_state=False, torch_form=True),
    "jumps": case(70, edit=jumps),
    "bfloat16": case(130, dtype=torch.bfloat16),
    "bfloat16, wide heads": case(70, dtype=torch.bfloat16, widths=WIDE),
    "bfloat16, forget gates near 0": case(130, dtype=torch.bfloat16, forget=(-20, -8)),
    "autocast": case(130, autocast=True),
}


def bound(name):
    narrow = CASES[name]["autocast"] or CASES[name]["dtype"] == torch.bfloat16
    return 2e-2 if narrow else 1e-4


def errors(name, device):
    """‖a − b‖/‖b‖ against the float64 recurrence (or the torch form), of output, last state and gradients."""
    from xlstm_distill.model.triton_mlstm import triton_mlstm

    chosen = CASES[name]
    reference.D, reference.E = chosen["widths"]
    given = reference.inputs(chosen["length"], **chosen["choices"])
    if chosen["edit"]:
        chosen["edit"](given)
    given = {tensor: x.to(chosen["dtype"]).double() for tensor, x in given.items()}

    def on_device(*given, chunk):
        return (x.cpu() for x in triton_mlstm(*(x.to(device) for x in given), chunk))

    with torch.autocast(device, torch.bfloat16, enabled=chosen["autocast"]):
        found = reference.run(on_device, given, chosen["dtype"], chunk=chosen["chunk"])
    cell = partial(reference.mlstm, chunk=64) if chosen["torch_form"] else reference.recurrence
    wanted = reference.run(cell, given, torch.float64)
    error = lambda a, b: float(((a.double() - b).norm() / b.norm().clamp_min(1e-30)).detach())  # noqa: E731
    return {tensor: error(found[tensor], expected) for tensor, expected in wanted.items()}


def multiply_bfloat16_as_it_is_meant():
    """The interpreter keeps bfloat16 as its bits in uint16, and multiplies those."""
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def widened(x):
        if x.dtype.scalar != tl.bfloat16:
            return x
        return TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    plain = InterpreterBuilder.create_dot
    InterpreterBuilder.create_dot = lambda self, a, b, *rest: plain(self, widened(a), widened(b), *rest)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))
    multiply_bfloat16_as_it_is_meant()
    print(json.dumps({name: errors(name, "cpu") for name in CASES}))
