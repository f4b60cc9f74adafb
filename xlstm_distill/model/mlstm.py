"""The mLSTM cell with a normaliser state (paper Eq. 8-10), chunkwise-parallel, with carried state.

    S_t = f_t S_{t-1} + i_t φ(k_t) ⊗ v_t        z_t = f_t z_{t-1} + i_t φ(k_t)        h_t = φ(q_t) S_t / (φ(q_t) z_t)

`i` is soft-capped and log f ≤ 0, so S and z stay below T·e¹⁵ and fit float32 without a running maximum. A state is one
tensor, z being the last column of S.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from .precision import full_precision

FORGET_ALL = -1e4
"""Smallest log f: e^−10000 is 0 in every dtype, and sums of it stay exact in float64 where those of −∞ would be NaN."""

SEGMENT = 1 << 18
"""Elements of a [L, L] product that the CPU holds at once: more leaves its cache, and each is fetched from the system
anew (measured: twice the time)."""


def mlstm(
    query: Tensor, key: Tensor, value: Tensor, log_input: Tensor, log_forget: Tensor, state: Tensor | None, chunk: int
) -> tuple[Tensor, Tensor]:
    """Run the cell over a sequence of any length.

    Args:
        query: [B, H, T, D], φ(q): positive.
        key: [B, H, T, D], φ(k): positive.
        value: [B, H, T, E]; T·i·|v| has to fit float32 (|v| up to 1e30 with i = e¹⁵; for gradients up to 1e10).
        log_input: [B, H, T], log i, below 80; −inf leaves a position out.
        log_forget: [B, H, T], log f, at most 0; −inf forgets all that came before.
        state: [B, H, D, E + 1], (S, z) before the first position, or None for zeros.
        chunk: positions computed in parallel. Changes the speed, not the result.

    Returns:
        h float32 [B, H, T, E] and the state after the last position, float32 [B, H, D, E + 1].
    """
    above, below, state = mlstm_sums(query, key, value, log_input, log_forget, state, chunk)
    return normalise(above, below), state


def mlstm_sums(
    query: Tensor, key: Tensor, value: Tensor, log_input: Tensor, log_forget: Tensor, state: Tensor | None, chunk: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Numerator and denominator apart; arguments as `mlstm`'s.

    Returns:
        φ(q_t) S_t [B, H, T, E], φ(q_t) z_t [B, H, T, 1] and the last state, all float32.
    """
    length = query.shape[2]
    query, key, value = query.float(), key.float(), value.float()
    log_forget = log_forget.clamp_min(FORGET_ALL)
    if state is None:
        state = value.new_zeros(*key.shape[:2], key.shape[3], value.shape[3] + 1)
    if length == 1:
        return _step(query, key, value, log_input, log_forget, state)
    chunk = min(chunk, length)
    rest = -length % chunk
    # Padding at the end: i = 0 adds nothing, f = 1 forgets nothing.
    query, key, value = (_chunks(x, chunk, rest) for x in (query, key, value))
    log_input = F.pad(log_input.double(), (0, rest), value=-torch.inf).unflatten(-1, (-1, chunk))
    # Sums of log f within a chunk in float64: differences of large sums are what decays are made of.
    forget = F.pad(log_forget.double(), (0, rest)).unflatten(-1, (-1, chunk)).cumsum(-1)
    above, below, matrix, norm = _Chunkwise.apply(  # type: ignore[no-untyped-call]
        query, key, value, log_input, forget, state[..., :-1], state[..., -1:]
    )
    above, below = (x.flatten(2, 3)[:, :, :length] for x in (above, below))
    return above, below, torch.cat([matrix, norm], -1)


def normalise(above: Tensor, below: Tensor) -> Tensor:
    """above / below [..., 1]. Below is positive where a real position was seen; on padding it is 0, and so is h."""
    return _Normalise.apply(above, below)  # type: ignore[no-untyped-call, no-any-return]


class _Normalise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, above: Tensor, below: Tensor) -> Tensor:
        below = below.masked_fill(below <= 0, 1.0)
        out = above / below
        ctx.save_for_backward(out, below)
        return out

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    @full_precision
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        out, below = ctx.saved_tensors
        d_above = grad / below
        return d_above, -torch.linalg.vecdot(d_above, out)[..., None]


@full_precision
def _step(
    query: Tensor, key: Tensor, value: Tensor, log_input: Tensor, log_forget: Tensor, state: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    forget, weight = (g.float().exp()[..., None] for g in (log_forget, log_input))  # [B, H, 1, 1]
    state = forget * state + (weight * key).mT * F.pad(value, (0, 1), value=1.0)
    sums = query @ state
    return sums[..., :-1], sums[..., -1:], state


def _chunks(x_BHTD: Tensor, chunk: int, rest: int) -> Tensor:
    return (F.pad(x_BHTD, (0, 0, 0, rest)) if rest else x_BHTD).unflatten(2, (-1, chunk))


class _Chunkwise(torch.autograd.Function):
    """The chunkwise form with its gradient written out: what autograd makes of it takes twice the time and memory.

    query, key [B, H, N, L, D], value [B, H, N, L, E], log_input and forget float64 [B, H, N, L] (sums of log f from the
    chunk's start), S [B, H, D, E], z [B, H, D, 1] → numerator, denominator, last S and z. F = forget, a = log_input:

        within    D_ij = exp(F_i − F_j + a_j), j ≤ i      P = (Q Kᵀ) ∘ D
        from      g_i  = exp(F_i)                         numerator = P V + (g ∘ Q) S     denominator = P 1 + (g ∘ Q) z
        into      w_j  = exp(F_L − F_j + a_j)             S' = exp(F_L) S + (w ∘ K)ᵀ V    z' = exp(F_L) z + (w ∘ K)ᵀ 1

    Chunks are computed in parallel within a segment, on the CPU one segment after the other (see `SEGMENT`).
    """

    @staticmethod
    @full_precision
    def forward(ctx: Any, *inputs: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        query, key, value, log_input, forget, matrix, norm = inputs
        chunks = query.shape[:3]
        above, below = torch.empty_like(value), value.new_empty(*value.shape[:4], 1)
        states = value.new_empty(*chunks, key.shape[4], value.shape[4])  # before each chunk
        norms = value.new_empty(*chunks, key.shape[4], 1)
        for n in _segments(query):
            within, of_state, into, decay = _decays(log_input[:, :, n], forget[:, :, n])
            adding = key[:, :, n] * into
            matrix = _carry(matrix, adding.mT @ value[:, :, n], decay, states[:, :, n])
            norm = _carry(norm, adding.sum(-2)[..., None], decay, norms[:, :, n])
            reading = query[:, :, n] * of_state
            pairs = (query[:, :, n] @ key[:, :, n].mT).mul_(within)
            torch.add(reading @ states[:, :, n], pairs @ value[:, :, n], out=above[:, :, n])
            torch.add(reading @ norms[:, :, n], pairs.sum(-1, keepdim=True), out=below[:, :, n])
        ctx.save_for_backward(query, key, value, log_input, forget, states, norms)
        return above, below, matrix, norm

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    @full_precision
    def backward(ctx: Any, d_above: Tensor, d_below: Tensor, d_matrix: Tensor, d_norm: Tensor) -> tuple[Tensor, ...]:
        saved = ctx.saved_tensors
        d_query, d_key, d_value, d_input, d_forget = (torch.empty_like(x) for x in saved[:5])
        for n in reversed(_segments(saved[0])):
            query, key, value, log_input, forget, states, norms = (x[:, :, n] for x in saved)
            within, of_state, into, decay = _decays(log_input, forget)
            from_above, from_below = d_above[:, :, n], d_below[:, :, n]
            # What the sums read from the state before their chunk.
            reading = query * of_state
            d_reading = (from_above @ states.mT).addcmul_(from_below, norms.mT)
            d_states, d_matrix = _carry_back(d_matrix, reading.mT @ from_above, decay)
            d_norms, d_norm = _carry_back(d_norm, reading.mT @ from_below, decay)
            d_decay = (_inner(d_states, states) + _inner(d_norms, norms)) * decay[..., 0, 0]
            # What each chunk adds to the state after it.
            adding = key * into
            d_adding = (value @ d_states.mT).add_(d_norms.mT)
            # Within the chunk.
            pairs = query @ key.mT
            d_pairs = (from_above @ value.mT).add_(from_below).mul_(within)  # as far as it goes to Q Kᵀ
            d_within = d_pairs * pairs  # dD ∘ D
            torch.add(adding @ d_states, pairs.mul_(within).mT @ from_above, out=d_value[:, :, n])
            torch.addcmul(d_pairs @ key, d_reading, of_state, out=d_query[:, :, n])
            torch.addcmul(d_pairs.mT @ query, d_adding, into, out=d_key[:, :, n])
            d_into = torch.linalg.vecdot(d_adding, adding)
            of_input = d_within.sum(-2) + d_into
            of_forget = d_within.sum(-1) + torch.linalg.vecdot(d_reading, reading) - of_input
            of_forget[..., -1] += d_into.sum(-1) + d_decay
            d_input[:, :, n], d_forget[:, :, n] = of_input, of_forget
        return d_query, d_key, d_value, d_input, d_forget, d_matrix, d_norm


def _segments(query: Tensor) -> list[slice]:
    """Slices of the chunks."""
    batch, heads, chunks, length, _ = query.shape
    size = max(1, SEGMENT // (batch * heads * length * length)) if query.device.type == "cpu" else chunks
    return [slice(n, n + size) for n in range(0, chunks, size)]


def _decays(log_input: Tensor, forget: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """D [B, H, N, L, L], g and w [B, H, N, L, 1], exp(F_L) [B, H, N, 1, 1]: differences in float64, then float32."""
    within = (forget[..., :, None] - (forget - log_input)[..., None, :]).float().exp_().tril_()
    into = (forget[..., -1:] - forget + log_input).float().exp_()[..., None]
    return within, forget.float().exp_()[..., None], into, forget[..., -1:].float().exp_()[..., None]


def _carry(state: Tensor, update: Tensor, decay: Tensor, states: Tensor) -> Tensor:
    """Write the state before each chunk to `states` [B, H, N, D, E]; return the one after the last."""
    for n in range(update.shape[2]):
        states[:, :, n] = state
        state = torch.addcmul(update[:, :, n], decay[:, :, n], state)
    return state


def _carry_back(last: Tensor, reading: Tensor, decay: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the state after each chunk [B, H, N, D, E], and of the one before the first."""
    grads = torch.empty_like(reading)
    for n in reversed(range(reading.shape[2])):
        grads[:, :, n] = last
        last = torch.addcmul(reading[:, :, n], decay[:, :, n], last)
    return grads, last


def _inner(a: Tensor, b: Tensor) -> Tensor:
    """Σ a ∘ b over the last two axes."""
    return torch.linalg.vecdot(a.flatten(-2), b.flatten(-2))
