# mypy: allow-untyped-defs, allow-untyped-decorators
"""The mLSTM's kernels in Triton, chunkwise-parallel, the backward pass written out (paper Eq. 8-10).

With (S, z) as one matrix M, u_t = φ(q_t) M_t and h = u_S / u_z, a chunk of L positions after the state M is

    u_t = e^{F_t} q_t M + Σ_{j ≤ t} A_tj [v_j, 1],   A_tj = e^{F_t − F_j + log i_j} q_t·k_j,   F_t = Σ_{j ≤ t} log f_j
    M'  = e^{F_L} M + Σ_j e^{F_L − F_j + log i_j} k_j ⊗ [v_j, 1]

- `carry` runs M over the chunks, and backwards the gradient of M', with q for k and ∂u for [v, 1]; `output` and
  `gradients` take the chunks in parallel.
- ∂log f_t sums only what crosses t (rows from t on, columns before t). The usual reverse sum of q·∂q − k·∂k is the same
  in exact arithmetic, but where f is near 0 its large terms leave nothing but their rounding.
- F reaches −64·10⁴ within a chunk while differences of order 1 count: it comes as two float32, whose differences are
  exact enough.
- Accumulation is float32. OPERAND is what is multiplied: bfloat16, or float32 with PRECISION `tf32x3`: three tensor-
  core products, error 1e-6 (plain tf32: 1e-3; `ieee` leaves the tensor cores idle).

Shapes: q, k [B·H, T, D]; v, h, du [B·H, T, E]; u_z and its gradient [B·H, T]; gates [B·H·N, 5, L] for N chunks of L;
states [B·H·N, D, E], norms [B·H·N, D]; first and last state [B·H, D, E + 1]. BD and BE are the tiles of D and E.
"""

try:
    import triton
    import triton.language as tl
except ImportError as error:  # inside try: remote code that is loaded without Triton must not ask for it
    raise ImportError(f"Triton cannot be imported ({error}; CUDA builds of torch bring it along)") from error

# Rows of the gates, [B·H·N, 5, L].
_LOG_INPUT = tl.constexpr(0)
_FORGET_HIGH = tl.constexpr(1)
_FORGET_LOW = tl.constexpr(2)
_INTO_STATE = tl.constexpr(3)
_FROM_STATE = tl.constexpr(4)


@triton.jit
def _tile(matrix, row, rows, column, columns, width):
    """Elements [row, column] of a row-major matrix as float32, zeros outside of it."""
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    return tl.load(matrix + row[:, None] * width + column[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _put(matrix, value, row, rows, column, columns, width):
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    tl.store(matrix + row[:, None] * width + column[None, :], value.to(matrix.dtype.element_ty), mask=inside)


@triton.jit
def _decays(gate, L: tl.constexpr):
    """e^{F_t − F_j + log i_j} for j ≤ t, else 0: [L, L]."""
    t = tl.arange(0, L)
    high, low = tl.load(gate + _FORGET_HIGH * L + t), tl.load(gate + _FORGET_LOW * L + t)
    exponent = (high[:, None] - high[None, :]) + (low[:, None] - low[None, :])
    exponent += tl.load(gate + _LOG_INPUT * L + t)[None, :]
    return tl.exp(tl.where(t[:, None] >= t[None, :], exponent, float("-inf")))


@triton.jit
def carry(
    x, y, gates, ones, first, states, norms, last, T, N,
    D: tl.constexpr, E: tl.constexpr, L: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr,
    REVERSE: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of M over all chunks; stores M before each. Forward: x = k, y = v. Reverse: the gradient of M after each
    chunk, x = q, y = ∂u_S, and ∂u_z in place of the column of ones."""
    head = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    e = tl.program_id(2) * BE + tl.arange(0, BE)
    own_norm = (d < D) & (tl.program_id(2) == 0)
    t = tl.arange(0, L)
    memory = _tile(first + head * D * (E + 1), d, D, e, E, E + 1)
    norm = tl.load(first + head * D * (E + 1) + d * (E + 1) + E, mask=d < D, other=0.0)
    for step in range(N):
        chunk = step
        if REVERSE:
            chunk = N - 1 - step
        at = head * N + chunk
        _put(states + at * D * E, memory, d, D, e, E, E)
        tl.store(norms + at * D + d, norm, mask=own_norm)
        row = chunk * L + t
        gate = gates + at * 5 * L
        decay = tl.load(gate + _FROM_STATE * L + L - 1)
        columns = _tile(y + head * T * E, row, T, e, E, E)
        if REVERSE:
            weight = tl.load(gate + _FROM_STATE * L + t)
            one = tl.load(ones + head * T + row, mask=row < T, other=0.0)
        else:
            weight = tl.load(gate + _INTO_STATE * L + t)
            one = tl.full([L], 1.0, tl.float32)
        rows = _tile(x + head * T * D, row, T, d, D, D) * weight[:, None]
        norm = norm * decay + tl.sum(rows * one[:, None], 0)
        memory = memory * decay + tl.dot(tl.trans(rows).to(OPERAND), columns.to(OPERAND), input_precision=PRECISION)
    _put(last + head * D * (E + 1), memory, d, D, e, E, E + 1)
    tl.store(last + head * D * (E + 1) + d * (E + 1) + E, norm, mask=own_norm)


@triton.jit
def output(
    q, k, v, gates, states, norms, h, totals, T, N,
    D: tl.constexpr, E: tl.constexpr, L: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Some columns of one chunk's h, and its u_z."""
    at = tl.program_id(0).to(tl.int64)
    head, row = at // N, (at % N) * L + tl.arange(0, L)
    e = tl.program_id(1) * BE + tl.arange(0, BE)
    gate = gates + at * 5 * L
    from_state = tl.load(gate + _FROM_STATE * L + tl.arange(0, L))
    scores, mixed = tl.zeros([L, L], tl.float32), tl.zeros([L, BE], tl.float32)
    total = tl.zeros([L], tl.float32)
    for start in range(0, D, BD):
        d = start + tl.arange(0, BD)
        query, key = _tile(q + head * T * D, row, T, d, D, D), _tile(k + head * T * D, row, T, d, D, D)
        scores = tl.dot(query.to(OPERAND), tl.trans(key).to(OPERAND), scores, input_precision=PRECISION)
        query = (query * from_state[:, None]).to(OPERAND)
        memory = _tile(states + at * D * E, d, D, e, E, E)
        mixed = tl.dot(query, memory.to(OPERAND), mixed, input_precision=PRECISION)
        total += tl.sum(query.to(tl.float32) * tl.load(norms + at * D + d, mask=d < D, other=0.0)[None, :], 1)
    scores = (scores * _decays(gate, L)).to(OPERAND)
    total += tl.sum(scores.to(tl.float32), 1)  # of what is multiplied: where one position is all, h is its v
    value = _tile(v + head * T * E, row, T, e, E, E)
    mixed = tl.dot(scores, value.to(OPERAND), mixed, input_precision=PRECISION)
    _put(h + head * T * E, mixed / tl.where(total > 0, total, 1.0)[:, None], row, T, e, E, E)
    tl.store(totals + head * T + row, total, mask=(row < T) & (tl.program_id(1) == 0))


@triton.jit
def gradients(
    q, k, v, du, gates, d_totals, states, norms, d_states, d_norms, dq, dk, dv, d_input, d_forget, T, N,
    D: tl.constexpr, E: tl.constexpr, L: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of one chunk's q, k, v and gates, from its state before and the gradient of its state after."""
    at = tl.program_id(0).to(tl.int64)
    head, t = at // N, tl.arange(0, L)
    row = (at % N) * L + t
    q, k, dq, dk = q + head * T * D, k + head * T * D, dq + head * T * D, dk + head * T * D
    v, du, dv = v + head * T * E, du + head * T * E, dv + head * T * E
    states, d_states, norms, d_norms = states + at * D * E, d_states + at * D * E, norms + at * D, d_norms + at * D
    gate = gates + at * 5 * L
    d_total = tl.load(d_totals + head * T + row, mask=row < T, other=0.0)

    # The order keeps few [L, L] tiles alive at a time: registers are what this kernel is short of.
    scores = tl.zeros([L, L], tl.float32)
    for start in range(0, D, BD):
        d = start + tl.arange(0, BD)
        query, key = _tile(q, row, T, d, D, D), _tile(k, row, T, d, D, D)
        scores = tl.dot(query.to(OPERAND), tl.trans(key).to(OPERAND), scores, input_precision=PRECISION)
    scores *= _decays(gate, L)  # A
    _value(k, du, gate, d_states, dv, scores, row, T, D, E, L, BD, BE, OPERAND, PRECISION)

    flow = tl.zeros([L, L], tl.float32) + d_total[:, None]  # gradient of A
    for start in range(0, E, BE):
        e = start + tl.arange(0, BE)
        d_above, value = _tile(du, row, T, e, E, E), _tile(v, row, T, e, E, E)
        flow = tl.dot(d_above.to(OPERAND), tl.trans(value).to(OPERAND), flow, input_precision=PRECISION)
    scores *= flow  # gradient of log A
    later, below = t[:, None] >= t[None, :], t[:, None] < t[None, :]
    of_input = tl.sum(scores, 0)
    crossing = tl.cumsum(scores, 0, reverse=True)  # [t, j]: the rows from t on of column j
    of_forget = tl.sum(tl.where(t[:, None] > t[None, :], crossing, 0.0), 1)
    flow *= _decays(gate, L)  # gradient of q·k

    d_from, d_into, d_carry = _query_and_key(
        q, k, v, du, gate, d_total, states, norms, d_states, d_norms, dq, dk, flow, row, T,
        D, E, L, BD, BE, OPERAND, PRECISION,
    )  # fmt: skip
    of_forget += tl.sum(tl.where(later, d_from[:, None], 0.0) + tl.where(below, d_into[:, None], 0.0), 0) + d_carry
    tl.store(d_forget + at * L + t, of_forget)
    tl.store(d_input + at * L + t, of_input + d_into)


@triton.jit
def _query_and_key(
    q, k, v, du, gate, d_total, states, norms, d_states, d_norms, dq, dk, flow, row, T,
    D: tl.constexpr, E: tl.constexpr, L: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """∂q and ∂k; returns what F_t [L], F_L − F_j + log i_j [L] and F_L get through the state."""
    from_state = tl.load(gate + _FROM_STATE * L + tl.arange(0, L))
    into_state = tl.load(gate + _INTO_STATE * L + tl.arange(0, L))
    d_from, d_into = tl.zeros([L], tl.float32), tl.zeros([L], tl.float32)
    d_carry = tl.zeros([BD], tl.float32)
    for start in range(0, D, BD):
        d = start + tl.arange(0, BD)
        norm = tl.load(norms + d, mask=d < D, other=0.0)
        d_norm = tl.load(d_norms + d, mask=d < D, other=0.0)
        of_query = d_total[:, None] * norm[None, :]
        of_key = tl.zeros([L, BD], tl.float32) + d_norm[None, :]
        d_carry += norm * d_norm
        for column in range(0, E, BE):
            e = column + tl.arange(0, BE)
            d_above, value = _tile(du, row, T, e, E, E), _tile(v, row, T, e, E, E)
            memory, d_memory = _tile(states, d, D, e, E, E), _tile(d_states, d, D, e, E, E)
            of_query = tl.dot(d_above.to(OPERAND), tl.trans(memory).to(OPERAND), of_query, input_precision=PRECISION)
            of_key = tl.dot(value.to(OPERAND), tl.trans(d_memory).to(OPERAND), of_key, input_precision=PRECISION)
            d_carry += tl.sum(memory * d_memory, 1)
        query, key = _tile(q, row, T, d, D, D), _tile(k, row, T, d, D, D)
        of_query *= from_state[:, None]
        of_key *= into_state[:, None]
        d_from += tl.sum(query * of_query, 1)
        d_into += tl.sum(key * of_key, 1)
        of_query = tl.dot(flow.to(OPERAND), key.to(OPERAND), of_query, input_precision=PRECISION)
        of_key = tl.dot(tl.trans(flow).to(OPERAND), query.to(OPERAND), of_key, input_precision=PRECISION)
        _put(dq, of_query, row, T, d, D, D)
        _put(dk, of_key, row, T, d, D, D)
    return d_from, d_into, tl.sum(d_carry, 0) * tl.load(gate + _FROM_STATE * L + L - 1)


@triton.jit
def _value(
    k, du, gate, d_states, dv, scores, row, T,
    D: tl.constexpr, E: tl.constexpr, L: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    into_state = tl.load(gate + _INTO_STATE * L + tl.arange(0, L))
    for column in range(0, E, BE):
        e = column + tl.arange(0, BE)
        of_value = tl.zeros([L, BE], tl.float32)
        for start in range(0, D, BD):
            d = start + tl.arange(0, BD)
            key = _tile(k, row, T, d, D, D) * into_state[:, None]
            d_memory = _tile(d_states, d, D, e, E, E)
            of_value = tl.dot(key.to(OPERAND), d_memory.to(OPERAND), of_value, input_precision=PRECISION)
        d_above = _tile(du, row, T, e, E, E)
        of_value = tl.dot(tl.trans(scores).to(OPERAND), d_above.to(OPERAND), of_value, input_precision=PRECISION)
        _put(dv, of_value, row, T, e, E, E)
