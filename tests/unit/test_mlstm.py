"""Eq. 8-10: the chunkwise cell, its gradients and its carried state are those of the recurrence in float64."""

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


@pytest.mark.parametrize("chunk", [1, 16, 64])
@pytest.mark.parametrize("length", [1, 7, 64, 65, 200])
def test_output_state_and_gradients_are_those_of_the_recurrence(length, chunk):
    given = inputs(length)
    assert_near(run(mlstm, given, torch.float32, chunk=chunk), run(recurrence, given, torch.float64), 1e-4)


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
