"""The mLSTM cell on a GPU: `triton_kernels` under autograd, with the arguments and results of `mlstm.mlstm`.

Kept for the backward pass are q, k, v, gates, h and the denominators u_z; the states are computed again. The gradient
of the normaliser is exact: h = u_S / u_z gives ∂u = [∂h / u_z, −∂h·h / u_z].
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from .mlstm import FORGET_ALL, mlstm
from .triton_kernels import carry, gradients, tl, triton
from .triton_kernels import output as output_kernel

LARGEST_CHUNK = 64
LARGEST_TILE = {tl.bfloat16: 64, tl.float32: 32}
"""Of the widths, by operand: as large as `gradients` stands with hardly a register spilled (compiled for sm_90)."""
SMALLEST_TILE = 16
"""What tensor cores multiply."""


@torch.compiler.disable
def triton_mlstm(
    query: Tensor, key: Tensor, value: Tensor, log_input: Tensor, log_forget: Tensor, state: Tensor | None, chunk: int
) -> tuple[Tensor, Tensor]:
    """`mlstm.mlstm` on a GPU: same arguments, same results, once differentiable.

    The chunk is rounded up to 16, 32 or 64. One position alone is left to the torch form.
    """
    if query.shape[2] == 1:
        return mlstm(query, key, value, log_input, log_forget, state, chunk)
    if {query.dtype, key.dtype, value.dtype} - {torch.float32, torch.bfloat16}:
        query, key, value = query.float(), key.float(), value.float()
    if state is None:
        state = query.new_zeros(*key.shape[:2], key.shape[3], value.shape[3] + 1, dtype=torch.float32)
    sizes = _Sizes(query, key, value, chunk)
    with torch.cuda.device_of(query):
        return _Cell.apply(query, key, value, log_input, log_forget, state.float(), sizes)  # type: ignore


class _Cell(torch.autograd.Function):
    """The kernels under autograd. `sizes` comes last."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, log_input: Tensor, log_forget: Tensor, state: Tensor,
        sizes: "_Sizes",
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        query, key, value, state = (x.contiguous() for x in (query, key, value, state))
        gates = _gates(log_input, log_forget, sizes.chunk)
        states, norms, last = sizes.carry(key, value, gates, None, state)
        output = value.new_empty(value.shape, dtype=torch.float32)
        total = output.new_empty(output.shape[:3])
        output_kernel[(sizes.heads * sizes.chunks, triton.cdiv(sizes.value_width, sizes.value_tile))](
            query, key, value, gates, states, norms, output, total, *sizes.kernel, num_warps=8, num_stages=2
        )
        ctx.save_for_backward(query, key, value, gates, state, output, total)
        ctx.sizes, ctx.gate_dtypes = sizes, (log_input.dtype, log_forget.dtype)
        return output, last

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, d_output: Tensor, d_last: Tensor) -> tuple[Tensor | None, ...]:
        with torch.cuda.device_of(d_output):
            return _backward(ctx.saved_tensors, ctx.sizes, d_output.contiguous(), d_last.contiguous(), ctx.gate_dtypes)


def _backward(
    saved: tuple[Tensor, ...], sizes: "_Sizes", d_output: Tensor, d_last: Tensor, gate_dtypes: tuple[torch.dtype, ...]
) -> tuple[Tensor | None, ...]:
    query, key, value, gates, state, output, total = saved
    # h = u_S / u_z, and u_S itself where no position was seen. Rounded before ∂u_z is made of it: the gradient of A is
    # their difference, ∂h·(v − h) / u_z, and small where h is nearly v.
    du = d_output / torch.where(total > 0, total, 1.0)[..., None]
    du = du.to(torch.bfloat16 if sizes.operand == tl.bfloat16 else torch.float32)
    d_total = torch.where(total > 0, -torch.linalg.vecdot(du.float(), output), 0.0)
    states, norms, _ = sizes.carry(key, value, gates, None, state)
    d_states, d_norms, d_first = sizes.carry(query, du, gates, d_total, d_last)
    d_query, d_key, d_value = (torch.empty_like(x) for x in (query, key, value))
    d_gates = gates.new_empty(2, *query.shape[:2], sizes.chunks * sizes.chunk)
    gradients[(sizes.heads * sizes.chunks,)](
        query, key, value, du, gates, d_total, states, norms, d_states, d_norms,
        d_query, d_key, d_value, *d_gates, *sizes.kernel, num_warps=8, num_stages=1,
    )  # fmt: skip
    of_gates = (x[..., : sizes.length].to(dtype) for x, dtype in zip(d_gates, gate_dtypes, strict=True))
    return d_query, d_key, d_value, *of_gates, d_first, None


class _Sizes:
    """Sizes and operands of one call: what the kernels are specialised for."""

    def __init__(self, query: Tensor, key: Tensor, value: Tensor, chunk: int) -> None:
        self.heads, self.length = query.shape[0] * query.shape[1], query.shape[2]
        self.key_width, self.value_width = key.shape[3], value.shape[3]
        self.operand = tl.bfloat16 if _narrow(query, key, value) else tl.float32
        self.chunk = _power_of_two(min(chunk, self.length), LARGEST_CHUNK)
        self.key_tile = _power_of_two(self.key_width, LARGEST_TILE[self.operand])
        self.value_tile = _power_of_two(self.value_width, LARGEST_TILE[self.operand])
        self.chunks = triton.cdiv(self.length, self.chunk)
        on_nvidia = query.is_cuda and torch.version.hip is None
        self.precision = "tf32x3" if on_nvidia and torch.cuda.get_device_capability(query.device) >= (8, 0) else "ieee"

    @property
    def kernel(self) -> tuple[object, ...]:
        """The arguments that end each kernel's list."""
        widths = (self.key_width, self.value_width, self.chunk, self.key_tile, self.value_tile)
        return (self.length, self.chunks, *widths, self.operand, self.precision)

    def carry(
        self, rows: Tensor, columns: Tensor, gates: Tensor, ones: Tensor | None, first: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """S [B·H·N, D, E] and z [B·H·N, D] before each chunk, (S, z) after the last; with `ones` from the end."""
        states = gates.new_empty(self.heads * self.chunks, self.key_width, self.value_width)
        norms = gates.new_empty(states.shape[:2])
        last = torch.empty_like(first)
        tiles = triton.cdiv(self.key_width, self.key_tile), triton.cdiv(self.value_width, self.value_tile)
        *shapes, operand, precision = self.kernel
        carry[(self.heads, *tiles)](
            rows, columns, gates, ones, first, states, norms, last, *shapes, ones is not None, operand,
            precision, num_warps=4, num_stages=2,
        )  # fmt: skip
        return states, norms, last


def _narrow(*operands: Tensor) -> bool:
    kind = operands[0].device.type
    autocast = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.bfloat16
    return autocast or all(x.dtype == torch.bfloat16 for x in operands)


def _power_of_two(width: int, largest: int) -> int:
    return min(largest, max(SMALLEST_TILE, triton.next_power_of_2(width)))


def _gates(log_input: Tensor, log_forget: Tensor, chunk: int) -> Tensor:
    """Float32 [B·H·N, 5, L]: log i, F in two parts, e^{F_L − F + log i}, e^F; padded by i = 0, f = 1."""
    rest = -log_input.shape[-1] % chunk
    log_input = F.pad(log_input.float(), (0, rest), value=-math.inf).unflatten(-1, (-1, chunk))
    forget = F.pad(log_forget.double().clamp_min(FORGET_ALL), (0, rest)).unflatten(-1, (-1, chunk)).cumsum(-1)
    high = forget.float()
    into_state = (forget[..., -1:] - forget + log_input).exp()
    rows = (log_input, high, (forget - high).float(), into_state.float(), forget.exp().float())
    return torch.stack(rows, -2).flatten(0, 2)
