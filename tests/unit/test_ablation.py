"""The ablation's own mixers are what their docstrings say, and its results are not mixed up between settings."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from model_support import tiny_student

from xlstm_distill.model import HybridConfig

PLACE = Path(__file__).parents[2] / "benchmarks" / "ablation.py"
spec = importlib.util.spec_from_file_location("ablation", PLACE)
ablation = importlib.util.module_from_spec(spec)
sys.modules["ablation"] = ablation
spec.loader.exec_module(ablation)


def made(folder, kind, length=30):
    """(mixer of `kind` with random parameters, what its layer sees) of a tiny student."""
    _, student = tiny_student(folder, window=5, sinks=2)
    config = HybridConfig(student.config.base, window=5, sinks=2, chunk=4)
    mixer = kind(config, student.mixers[1])
    mixer.load_state_dict(student.mixers[1].state_dict())
    torch.manual_seed(3)
    hidden = torch.randn(1, length, 32)
    with torch.no_grad():
        rope = student.model.rotary_emb(hidden, torch.arange(length)[None])
        return mixer, mixer.project(hidden, rope)


def state_of_the_evicted(mixer, p, head, t):
    """(numerator [D], denominator) of the positions s ≤ t − W, one after the other in float64."""
    group = head // mixer.groups
    query = mixer.feature_map(p.rotated_query, mixer.query_map)[0, head, t].double()
    key = mixer.feature_map(mixer._repeat(p.rotated_key), mixer.key_map)[0, head].double()
    log_input, log_forget = (g[0, head].double() for g in mixer._log_gates(p.hidden, None))
    above, below = torch.zeros(mixer.head_dim, dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for s in range(t - mixer.window + 1):
        weight = log_input[s].exp() * (query @ key[s])
        above = log_forget[s].exp() * above + weight * p.value[0, group, s].double()
        below = log_forget[s].exp() * below + weight
    return above, below


@pytest.mark.parametrize("kind", [ablation.EvictedMixer, ablation.CommonNormaliserMixer])
@torch.no_grad()
def test_the_state_holds_only_what_left_the_window(tmp_path, kind):
    mixer, p = made(tmp_path, kind)
    found = mixer.mix(p, None)
    logits = mixer.output_gate(p.query, p.key, p.value)[0, :, :, 0].double()
    for head in range(mixer.heads):
        group = head // mixer.groups
        for t in (0, 4, 5, 6, 29):
            seen = [s for s in range(t + 1) if t - s < 5 or s < 2]
            scores = p.rotated_query[0, head, t].double() @ p.rotated_key[0, group, seen].double().T
            weights = ((scores - scores.max()) / mixer.head_dim**0.5).exp()
            local = weights @ p.value[0, group, seen].double()
            above, below = state_of_the_evicted(mixer, p, head, t)
            if kind is ablation.CommonNormaliserMixer:
                share = logits[head, t].exp()
                wanted = (local + share * above) / (weights.sum() + share * below)
            else:
                o = torch.sigmoid(logits[head, t]) if t >= 5 else 0.0
                wanted = (1 - o) * local / weights.sum() + (o * above / below if t >= 5 else 0.0)
            torch.testing.assert_close(found[0, head, t].double(), wanted, atol=1e-4, rtol=1e-4)


def test_each_variant_has_parameters_of_its_own_and_the_untrained_one_is_the_window(tmp_path):
    _, student = tiny_student(tmp_path, window=5, sinks=2)
    student.requires_grad_(False)
    settings = ablation.Align(lr=1e-2)
    trainees = [ablation.Trainee(v, student, settings) for v in ablation.VARIANTS[:5]]
    teacher = ablation.TeacherPass(student, trainees)
    before = [p.clone() for p in trainees[4].new.values()]
    tokens = torch.arange(2, 33)[None]
    teacher.run(tokens, train=True)
    for trainee in trainees[1:]:
        trainee.step(0, 1)
    assert any(not torch.equal(a, b) for a, b in zip(before, trainees[4].new.values(), strict=True))
    assert all(p.grad is None for p in student.parameters())
    errors, hidden = teacher.held_out(tokens)
    for mixer in student.mixers:
        mixer.objective = None
    assert set(errors) == {v.name for v in ablation.VARIANTS[:5]}
    assert trainees[0].shut() is None
    gates = trainees[4].gates.means()
    assert gates.shape == (2, 4)
    assert ((gates > 0) & (gates < 1)).all()
    figures = ablation.end_to_end(student, trainees[0], tokens, hidden)
    window = type(student).from_pretrained(tmp_path / "student", use_mlstm=False).eval()
    with torch.no_grad():
        wanted, there = window(tokens[:, :-1]).logits, student.lm_head(hidden[0])
    kl = (
        torch.nn.functional.kl_div(wanted.log_softmax(-1), there.log_softmax(-1), log_target=True, reduction="sum") / 30
    )
    assert figures["kl"] == pytest.approx(float(kl), rel=1e-4)


def test_results_of_other_settings_are_refused(tmp_path, capsys):
    (tmp_path / "ablation.json").write_text(json.dumps({"settings": {"sequences": 1}, "seeds": {}}))
    with pytest.raises(SystemExit) as refused:
        ablation.main([str(tmp_path), "--out", str(tmp_path)])
    assert refused.value.code == 2
    assert "other settings" in capsys.readouterr().err


def test_an_unknown_variant_is_named(tmp_path, capsys):
    with pytest.raises(SystemExit):
        ablation.main([str(tmp_path), "--out", str(tmp_path / "out"), "--variants", "mamba"])
    assert "unknown mamba" in capsys.readouterr().err
