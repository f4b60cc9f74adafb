"""The mLSTM cell with a normaliser state (paper Eq. 8-10), chunkwise-parallel, with carried state.

    S_t = f_t S_{t-1} + i_t φ(k_t) ⊗ v_t        z_t = f_t z_{t-1} + i_t φ(k_t)        h_t = φ(q_t) S_t / (φ(q_t) z_t)

`i` is soft-capped and log f ≤ 0, so S and z stay below T·e¹⁵ and fit float32 without a running maximum. The value gets
a column of ones, so that z is the last column of S and both are one product.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def mlstm(
    query: Tensor, key: Tensor, value: Tensor, log_input: Tensor, log_forget: Tensor, state: Tensor | None, chunk: int
) -> tuple[Tensor, Tensor]:
    """Run the cell over a sequence of any length.

    Args:
        query: [B, H, T, D], φ(q): positive.
        key: [B, H, T, D], φ(k): positive.
        value: [B, H, T, E].
        log_input: [B, H, T], log i; −inf leaves a position out.
        log_forget: [B, H, T], log f, at most 0.
        state: [B, H, D, E + 1], (S, z) before the first position, or None for zeros.
        chunk: positions computed in parallel. Changes the speed, not the result.

    Returns:
        h float32 [B, H, T, E] and the state after the last position, float32 [B, H, D, E + 1].
    """
    length = query.shape[2]
    query, key = query.float(), key.float()
    value = F.pad(value.float(), (0, 1), value=1.0)
    if state is None:
        state = value.new_zeros(*key.shape[:2], key.shape[3], value.shape[3])
    if length == 1:
        return _step(query, key, value, log_input, log_forget, state)
    chunk = min(chunk, length)
    rest = -length % chunk
    # Padding at the end: i = 0 adds nothing, f = 1 forgets nothing.
    query, key, value = (_chunks(F.pad(x, (0, 0, 0, rest)), chunk) for x in (query, key, value))
    log_input = F.pad(log_input.double(), (0, rest), value=-torch.inf).unflatten(-1, (-1, chunk))
    # Sums of log f within a chunk in float64: differences of large sums are what decays are made of.
    forget = F.pad(log_forget.double(), (0, rest)).unflatten(-1, (-1, chunk)).cumsum(-1)

    into_state = (
        (forget[..., -1:] - forget + log_input).exp().float()
    )  # [B, H, N, L]: weight of s in the chunk's last state
    update = (key * into_state[..., None]).transpose(-1, -2) @ value  # [B, H, N, D, E + 1]
    decay = forget[..., -1].exp().float()[..., None, None]  # [B, H, N, 1, 1]
    states, state = _carry(state, update, decay)

    within = forget[..., :, None] - forget[..., None, :] + log_input[..., None, :]
    causal = torch.ones(chunk, chunk, dtype=torch.bool, device=query.device).tril()
    within = within.masked_fill(~causal, -torch.inf).exp().float()  # [B, H, N, L, L]
    mixed = (query @ key.transpose(-1, -2) * within) @ value
    mixed = mixed + (query * forget.exp().float()[..., None]) @ states
    mixed = mixed.flatten(2, 3)[:, :, :length]
    return _normalise(mixed), state


def _step(
    query: Tensor, key: Tensor, value: Tensor, log_input: Tensor, log_forget: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    forget, weight = (g.float().exp()[..., None] for g in (log_forget, log_input))  # [B, H, 1, 1]
    state = forget * state + (weight * key).transpose(-1, -2) @ value
    return _normalise(query @ state), state


def _chunks(x_BHTD: Tensor, chunk: int) -> Tensor:
    return x_BHTD.unflatten(2, (-1, chunk))


def _carry(state: Tensor, update: Tensor, decay: Tensor) -> tuple[Tensor, Tensor]:
    """States before each chunk [B, H, N, D, E + 1], and the one after the last."""
    before = []
    for n in range(update.shape[2]):
        before.append(state)
        state = decay[:, :, n] * state + update[:, :, n]
    return torch.stack(before, 2), state


def _normalise(mixed: Tensor) -> Tensor:
    """Divide by the last column. It is positive where a real position was seen; on padding it is 0, and so is h."""
    total = mixed[..., -1:]
    return mixed[..., :-1] / torch.where(total > 0, total, torch.ones_like(total))
