"""Tiny random teachers of every family, students converted from them, and a mixer written out per token in float64."""

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from xlstm_distill.model import HybridForCausalLM, convert

VOCABULARY = 97
FAMILIES = ("llama", "qwen2", "qwen3", "olmo2", "olmo3")
SHAPE = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.2,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip


def tiny_teacher(family="llama", seed=0, **changes):
    torch.manual_seed(seed)
    more = {"sliding_window": 5, "num_hidden_layers": 4} if family == "olmo3" else {}
    more |= {"head_dim": 8} if family == "qwen3" else {}
    config = AutoConfig.for_model(family, **{**SHAPE, **more, **changes})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():  # biases and norms away from their neutral start, so that a lost one shows
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
            assert parameter.isfinite().all(), name
    return model


def tiny_student(folder: Path, family="llama", *, teacher=None, random=True, tied=False, seed=0, **choices):
    """(teacher, student), converted through `folder`; `random`: the mixers' parameters are off their start."""
    teacher = teacher or tiny_teacher(family, seed, tie_word_embeddings=tied)
    teacher.save_pretrained(folder / "teacher")
    (folder / "student").mkdir(parents=True)
    convert(folder / "teacher", folder / "student", **{"window": 8, "sinks": 2, "chunk": 4, **choices})
    student = HybridForCausalLM.from_pretrained(folder / "student", dtype=torch.float32).eval()
    if random:
        randomise(student, seed)
    return teacher, student


@torch.no_grad()
def randomise(student, seed=0):
    generator = torch.Generator().manual_seed(seed + 100)
    for name, parameter in student.mixer_parameters().items():
        spread = 1.0 if "gate" in name else 0.3
        parameter.add_(spread * torch.randn(parameter.shape, generator=generator))
        if name.endswith("output_gate.bias"):
            parameter.add_(4.0)


def tokens(length=12, batch=2, seed=0):
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def close(a, b, bound=1e-4):
    torch.testing.assert_close(a, b, atol=bound, rtol=bound)


def rotate(x, position, base):
    """RoPE of one vector [..., D] at one position, pair (j, j + D/2) turned by position·base^(−2j/D)."""
    half = x.shape[-1] // 2
    angle = position * base ** (-torch.arange(half, dtype=torch.float64) / half)
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()], -1)


def rms_norm(x, weight, eps):
    return weight * x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def naive_mixer(p, x, *, heads, kv_heads, window, sinks, base, eps, hedgehog=False):
    """Eq. 11 for one sequence x [T, hidden] → [T, hidden], head by head and token by token.

    `p`: the mixer's parameters by name, float64.
    """
    dim = p["q_proj.weight"].shape[0] // heads

    def project(name, count):
        y = x @ p[f"{name}_proj.weight"].T + p.get(f"{name}_proj.bias", 0.0)
        norm = p.get(f"{name}_norm.weight")
        if norm is not None and norm.numel() != dim:
            y = rms_norm(y, norm, eps)
        y = y.view(len(x), count, dim)
        return rms_norm(y, norm, eps) if norm is not None and norm.numel() == dim else y

    def phi(z, matrix):
        scores = z @ matrix
        if hedgehog:
            return (torch.cat([scores.softmax(-1), (-scores).softmax(-1)], -1) / 2).clamp_min(1e-12)
        return scores.softmax(-1).clamp_min(1e-12)

    q, k, v = project("q", heads), project("k", kv_heads), project("v", kv_heads)
    rows = []
    for t in range(len(x)):
        row = []
        for h in range(heads):
            g = h // (heads // kv_heads)
            turned = rotate(q[t, h], t, base)
            keys = [rotate(k[s, g], s, base) for s in range(t + 1)]
            # Eq. 8-10, unrolled: position s is worth i_s times the forget gates after it.
            above, below = torch.zeros(dim, dtype=torch.float64), torch.zeros((), dtype=torch.float64)
            for s in range(t + 1):
                i = x[s] @ p["input_gate.weight"][h] + p["input_gate.bias"][h]
                f = x[s] @ p["forget_gate.weight"][h] + p["forget_gate.bias"][h]
                feature = (15 * (i / 15).tanh()).exp() * phi(keys[s], p["key_map"][h])
                match = phi(turned, p["query_map"][h])
                forget = torch.sigmoid(f)
                if s == 0:
                    state, norm = feature[:, None] * v[s, g], feature
                else:
                    state, norm = forget * state + feature[:, None] * v[s, g], forget * norm + feature
                above, below = match @ state, match @ norm
            seen = [s for s in range(t + 1) if t - s < window or s < sinks]
            weights = torch.stack([turned @ keys[s] / dim**0.5 for s in seen]).softmax(-1)
            local = sum(w * v[s, g] for w, s in zip(weights, seen, strict=True))
            joined = torch.cat([q[t, h], k[t, g], v[t, g]]) / dim**0.5
            o = torch.sigmoid(joined @ p["output_gate.weight"][h] + p["output_gate.bias"][h])
            row.append(o * above / below + (1 - o) * local)
        rows.append(torch.cat(row))
    return torch.stack(rows) @ p["o_proj.weight"].T + p.get("o_proj.bias", 0.0)
