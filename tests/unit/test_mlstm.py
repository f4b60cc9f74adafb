"""Eq. 8-10: the chunkwise cell, its gradients and its carried state are those of the recurrence in float64."""

import functools

import pytest
import torch

from xlstm_distill.model.mlstm import mlstm

B, H, D, E = 2, 2, 8, 6
NAMES = ("query", "key", "value", "log_input", "log_forget", "state")


def recurrence(query, key, value, log_input, log_forget, state):
    """Eq. 8-10 one position after the other; `state` is S and z side by side."""
    memory, normaliser = state[..., :-1], state[..., -1]
    outputs = []
    for t in range(query.shape[2]):
        i, f = log_input[..., t].exp(), log_forget[..., t].exp()
        written = torch.einsum("bhd,bhe->bhde", key[:, :, t], value[:, :, t])
        memory = f[..., None, None] * memory + i[..., None, None] * written
        normaliser = f[..., None] * normaliser + i[..., None] * key[:, :, t]
        above = torch.einsum("bhd,bhde->bhe", query[:, :, t], memory)
        outputs.append(above / torch.einsum("bhd,bhd->bh", query[:, :, t], normaliser)[..., None])
    return torch.stack(outputs, 2), torch.cat([memory, normaliser[..., None]], -1)


def inputs(length, *, forget=(3.0, 6.0), gate=2.0, seed=0, with_state=True):
    torch.manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, dtype=torch.float64)  # noqa: E731
    state = torch.cat([draw(B, H, D, E), draw(B, H, D, 1).exp()], -1)
    bias = torch.tensor(forget, dtype=torch.float64)[None, :, None]
    return {
        "query": draw(B, H, length, D).softmax(-1),
        "key": draw(B, H, length, D).softmax(-1),
        "value": draw(B, H, length, E),
        "log_input": gate * draw(B, H, length),
        "log_forget": torch.nn.functional.logsigmoid(draw(B, H, length) + bias),
        "state": state if with_state else torch.zeros_like(state),
    }


def run(cell, given, dtype, **more):
    """Output, last state and the gradients of every input, through both outputs."""
    leaves = {name: x.to(dtype).requires_grad_() for name, x in given.items()}
    output, state = cell(*leaves.values(), **more)
    torch.manual_seed(7)
    weights = (torch.randn(x.shape, dtype=torch.float64).to(x.dtype) for x in (output, state))
    sum((x * w).sum() for x, w in zip((output, state), weights, strict=True)).backward()
    return {"output": output, "last state": state, **{name: x.grad for name, x in leaves.items()}}


def assert_near(found, wanted, bound):
    for name, expected in wanted.items():
        error = (found[name].double() - expected).norm() / expected.norm().clamp_min(1e-30)
        assert torch.isfinite(found[name]).all(), name
        assert error <= bound, f"{name}: relative error {error:.1e}"


@pytest.mark.parametrize("chunk", [1, 16, 64, 128, 4096])
@pytest.mark.parametrize("length", [1, 7, 64, 65, 130, 300])
def test_output_state_and_gradients_are_those_of_the_recurrence(length, chunk):
    given = inputs(length)
    assert_near(run(mlstm, given, torch.float32, chunk=chunk), run(recurrence, given, torch.float64), 1e-4)


@pytest.mark.parametrize("chunk", [16, 64, 128])
def test_a_thousand_positions(chunk):
    given = inputs(1000)
    assert_near(run(mlstm, given, torch.float32, chunk=chunk), reference_of_a_thousand(), 1e-4)


@functools.cache
def reference_of_a_thousand():
    return run(recurrence, inputs(1000), torch.float64)


@pytest.mark.parametrize(("keys", "values"), [(4, 16), (16, 4), (8, 1)])
def test_keys_and_values_of_other_widths(keys, values):
    torch.manual_seed(1)
    given = inputs(70)
    given["query"], given["key"] = (torch.randn(B, H, 70, keys).double().softmax(-1) for _ in range(2))
    given["value"] = torch.randn(B, H, 70, values).double()
    given["state"] = torch.randn(B, H, keys, values + 1).double().abs()
    assert_near(run(mlstm, given, torch.float32, chunk=16), run(recurrence, given, torch.float64), 1e-4)


@pytest.mark.parametrize("gate", [-15.0, 15.0])
def test_gates_at_the_soft_cap_either_way_change_nothing(gate):
    given = inputs(200)
    given["log_input"] = torch.full_like(given["log_input"], gate)
    given["log_input"][..., ::7] = -gate
    found = run(mlstm, given, torch.float32, chunk=64)
    assert_near(found, run(recurrence, given, torch.float64), 1e-4)


@pytest.mark.parametrize("forget", [(-20.0, -8.0), (15.0, 30.0), (-20.0, 30.0)])
def test_forget_gates_near_zero_and_near_one(forget):
    given = inputs(200, forget=forget)
    assert_near(run(mlstm, given, torch.float32, chunk=64), run(recurrence, given, torch.float64), 1e-4)


def test_no_state_is_a_state_of_zeros():
    given = inputs(70, with_state=False)
    wanted, wanted_state = recurrence(*given.values())
    output, state = mlstm(*(x.float() for x in list(given.values())[:-1]), None, 16)
    assert_near({"output": output, "state": state}, {"output": wanted, "state": wanted_state}, 1e-5)


@pytest.mark.parametrize("splits", [(1, 99), (64, 36), (37, 1, 1, 61), (99, 1)])
def test_pieces_with_carried_state_are_the_whole(splits):
    given = {name: x.float() for name, x in inputs(100).items()}
    whole, whole_state = mlstm(*given.values(), 16)
    state, start, parts = given["state"], 0, []
    for size in splits:
        piece = [given[name][:, :, start : start + size] for name in NAMES[:-1]]
        part, state = mlstm(*piece, state, 16)
        parts.append(part)
        start += size
    assert_near({"o": torch.cat(parts, 2), "s": state}, {"o": whole.double(), "s": whole_state.double()}, 1e-5)


def test_bfloat16_operands_are_near_and_the_state_stays_float32():
    given = inputs(200)
    found = run(mlstm, given, torch.bfloat16, chunk=64)
    assert found["output"].dtype == found["last state"].dtype == torch.float32
    rounded = {name: x.bfloat16().double() for name, x in given.items()}
    assert_near(found, run(recurrence, rounded, torch.float64), 2e-2)


def test_a_position_that_is_left_out_changes_no_other_and_gives_zero_where_nothing_was_seen():
    given = {name: x.float() for name, x in inputs(40, with_state=False).items()}
    padded = {name: x.clone() for name, x in given.items()}
    padded["log_input"][..., :9], padded["log_forget"][..., :9] = -torch.inf, 0.0
    leaves = [x.requires_grad_() for x in padded.values()]
    output, state = mlstm(*leaves, 16)
    assert output[:, :, :9].eq(0).all()
    alone, alone_state = mlstm(*(given[name][:, :, 9:] for name in NAMES[:-1]), None, 16)
    torch.testing.assert_close(output[:, :, 9:], alone, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(state, alone_state, atol=1e-5, rtol=1e-5)
    output.square().sum().backward()
    assert all(torch.isfinite(x.grad).all() for x in leaves)


@pytest.mark.parametrize("chunk", [1, 8, 64])
def test_where_all_is_forgotten_a_text_begins_anew(chunk):
    """log f = −∞: the output, the state and the gradients are those of the pieces alone."""
    given = inputs(70)
    given["log_forget"][..., 23] = given["log_forget"][..., 24] = given["log_forget"][..., 64] = -torch.inf
    found = run(mlstm, given, torch.float32, chunk=chunk)
    wanted = run(recurrence, given, torch.float64)
    dead = wanted["log_forget"].isnan() | given["log_forget"].isinf()  # 0 · ∞ in the reference's own gradient
    wanted["log_forget"], found["log_forget"] = (x["log_forget"].masked_fill(dead, 0.0) for x in (wanted, found))
    del wanted["state"]  # nothing of it is left behind the first of them
    assert_near(found, wanted, 1e-4)
    alone, _ = mlstm(*(given[name][:, :, 24:64].float() for name in NAMES[:-1]), None, chunk)
    torch.testing.assert_close(found["output"][:, :, 24:64], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("chunk", [1, 64])
@pytest.mark.parametrize("log_input", [-15.0, 0.0, 15.0])
@pytest.mark.parametrize("log_forget", [-1e30, -1e-30, 0.0])
@pytest.mark.parametrize("size", [1e-30, 1e10])
def test_extremes_give_no_nan(chunk, log_input, log_forget, size):
    given = {name: x.float() for name, x in inputs(200, with_state=False).items()}
    given["value"] *= size
    given["log_input"], given["log_forget"] = (torch.full_like(given["log_input"], x) for x in (log_input, log_forget))
    for name in ("query", "key"):  # features as sharp as they get
        given[name] = torch.nn.functional.one_hot(given[name].argmax(-1), D).float().clamp_min(1e-12)
    found = run(mlstm, given, torch.float32, chunk=chunk)
    assert all(torch.isfinite(x).all() for x in found.values())
    assert found["output"].abs().max() <= 1.01 * given["value"].abs().max()  # a weighted mean of values


def test_values_near_the_end_of_float32_stay_finite():
    given = {name: x.float() for name, x in inputs(200, with_state=False).items()}
    given["value"] *= 1e30
    output, state = mlstm(*given.values(), 64)
    assert output.isfinite().all()
    assert state.isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("step", [1, 5000])
def test_100000_positions_stay_finite_and_exact(step):
    """The step form and the chunks, with gates at the cap and a memory that hardly forgets."""
    torch.manual_seed(0)
    length = 100_000
    query, key = (torch.randn(1, 1, length, 4).softmax(-1) for _ in range(2))
    value = torch.randn(1, 1, length, 2)
    log_input = 15 * torch.tanh(torch.randn(1, 1, length))
    log_forget = torch.nn.functional.logsigmoid(12 + torch.randn(1, 1, length))
    state, outputs = None, []
    with torch.no_grad():
        for start in range(0, length, step):
            part = [x[:, :, start : start + step] for x in (query, key, value, log_input, log_forget)]
            output, state = mlstm(*part, state, 64)
            outputs.append(output)
    # In float64 by sums over all positions, weighted by what is left of each at the last one.
    weight = (log_input.double() + log_forget.double().flip(-1).cumsum(-1).flip(-1) - log_forget.double()).exp()
    weight = weight[..., None] * key.double()
    joined = torch.cat([value, torch.ones_like(value[..., :1])], -1).double()
    wanted = weight.mT @ joined
    assert torch.cat(outputs, 2).isfinite().all()
    assert (state.double() - wanted).norm() <= 1e-4 * wanted.norm()
