"""Which implementation of the mLSTM runs (`model.kernel`), and its check against float64 before anything is trained."""

import os
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from .configuration import CHOICES
from .mlstm import mlstm

Kernel = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, int], tuple[Tensor, Tensor]]
"""What computes the cell: arguments and results of `mlstm.mlstm`."""
KERNELS = CHOICES["kernel"]
BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
"""Largest ‖a − b‖/‖b‖ of a tensor against float64, by the dtype of the products."""


def choose(name: str, device: torch.device) -> Kernel:
    """The kernel called `name` on `device`; `auto`: Triton's on GPUs with bfloat16 tensor cores, else torch's.

    Raises:
        ValueError: no such kernel, or it cannot run there.
    """
    if name not in KERNELS:
        raise ValueError(f"kernel={name!r}: expected one of {', '.join(KERNELS)}")
    if name == "torch" or (name == "auto" and not _made_for_triton(device)):
        return mlstm
    found, problem = _triton()
    if found is None and name == "triton":
        raise ValueError(f"kernel=triton: {problem}; use kernel=auto")
    if name == "triton" and device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            f"kernel=triton: needs a CUDA device, and this is {device.type}; use kernel=auto (or, to test the kernel, "
            f"Triton's interpreter: TRITON_INTERPRET=1)"
        )
    return found or mlstm


def _made_for_triton(device: torch.device) -> bool:
    return device.type == "cuda" and (bool(torch.version.hip) or torch.cuda.get_device_capability(device) >= (8, 0))


@cache
def _triton() -> tuple[Kernel | None, str]:
    """Triton's kernel, or None and why there is none."""
    try:
        from .triton_mlstm import triton_mlstm
    except ImportError as error:
        return None, str(error)
    return triton_mlstm, ""


def name_of(kernel: Kernel) -> str:
    """`torch` or `triton`."""
    name = getattr(kernel, "__name__", repr(kernel))
    return {"mlstm": "torch", "triton_mlstm": "triton"}.get(name, name)


@cache
def check(
    kernel: Kernel,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    key_width: int = 64,
    value_width: int = 64,
    chunk: int = 64,
) -> float:
    """Compare `kernel` with float64 on a small random case: output, last state and every gradient.

    Args:
        kernel: what to check.
        device: where it will run.
        dtype: of the products (float32, or bfloat16 by autocast), as in training.
        key_width: D, as in training: a kernel is compiled for its widths.
        value_width: E.
        chunk: as in training.

    Returns:
        The largest relative error. Found once per process.

    Raises:
        ValueError: the kernel fails, or is wrong; one line with kernel, tensor and error.
    """
    given, weights = _random_case(key_width, value_width, 2 * chunk + 17)
    wanted = _results(_closed_form, given, weights)
    there = [x.to(device, torch.float32) for x in given]
    there[2] = there[2].to(dtype)
    which = f"kernel={name_of(kernel)}: on {device.type} in {str(dtype).removeprefix('torch.')}"
    try:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            found = _results(
                lambda q, k, v, i, f, s: kernel(q, k, v, i, f, s, chunk),
                there,
                [w.to(device, torch.float32) for w in weights],
            )
    except Exception as error:  # whatever a compiler or a driver raises
        first = (str(error).strip() or "no message").splitlines()[0]
        raise ValueError(f"{which} it fails, {type(error).__name__}: {first}; use another kernel") from error
    errors = {name: _error(found[name], x) for name, x in wanted.items()}
    worst = max(errors, key=lambda name: errors[name])
    if not errors[worst] <= BOUNDS[dtype]:
        raise ValueError(
            f"{which} it is wrong: relative error {errors[worst]:.1e} of {worst}, at most {BOUNDS[dtype]:.0e} is "
            f"allowed; use another kernel"
        )
    return errors[worst]


def _error(found: Tensor, wanted: Tensor) -> float:
    error = (found.cpu().double() - wanted).norm() / wanted.norm()
    return float(error.nan_to_num(torch.inf))


def _random_case(key_width: int, value_width: int, length: int) -> tuple[list[Tensor], list[Tensor]]:
    """q, k, v, log i, log f, state in float64, and weights of output and last state; one position is padding."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(1, 2, *shape, generator=generator, dtype=torch.float64)

    log_input, log_forget = 2 * draw(length), F.logsigmoid(draw(length) + 4)
    log_input[..., length // 3], log_forget[..., length // 3] = -torch.inf, 0.0
    state = torch.cat([draw(key_width, value_width), draw(key_width, 1).exp()], -1)
    sequence = [draw(length, width) for width in (key_width, key_width, value_width)]
    case = [sequence[0].softmax(-1), sequence[1].softmax(-1), sequence[2], log_input, log_forget, state]
    # As the kernel will see them, so that only its own error is measured.
    case = [x.float().double() for x in case]
    case[2] = case[2].bfloat16().double()
    return case, [draw(length, value_width), draw(key_width, value_width + 1)]


def _closed_form(
    query: Tensor, key: Tensor, value: Tensor, log_input: Tensor, log_forget: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Eq. 8-10 over all pairs of positions at once."""
    value, forget = F.pad(value, (0, 1), value=1.0), log_forget.cumsum(-1)
    pairs = (forget[..., :, None] - forget[..., None, :] + log_input[..., None, :]).exp().tril()
    sums = (query @ key.mT * pairs) @ value + (query * forget.exp()[..., None]) @ state
    into = (forget[..., -1:] - forget + log_input).exp()
    last = forget[..., -1:, None].exp() * state + (key * into[..., None]).mT @ value
    return sums[..., :-1] / sums[..., -1:], last


@torch.enable_grad()
def _results(
    cell: Callable[..., tuple[Tensor, Tensor]], given: list[Tensor], weights: list[Tensor]
) -> dict[str, Tensor]:
    """Output, last state and the gradients of all inputs through both, by name."""
    leaves = [x.detach().requires_grad_() for x in given]
    output, last = cell(*leaves)
    loss = (output * weights[0]).sum() + (last * weights[1]).sum()
    names = ("query", "key", "value", "log_input", "log_forget", "state")
    gradients = zip(names, torch.autograd.grad(loss, leaves), strict=True)
    return {"the output": output.detach(), "the last state": last.detach()} | {
        f"the gradient of {name}": g for name, g in gradients
    }
