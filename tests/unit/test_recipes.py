"""The experts' mixtures and the merge weights are the paper's, percent by percent (§3, §4)."""

import pytest

from launcher.compose import compose

V1, V2 = "nvidia/Nemotron-Post-Training-Dataset-v1", "nvidia/Nemotron-Post-Training-Dataset-v2"
SFT, LLAMA = "nvidia/Nemotron-Pretraining-SFT-v1", "nvidia/Llama-Nemotron-Post-Training-Dataset"
PYTHON, INSTRUCT = "allenai/Dolci-Think-SFT-Python", "nvidia/OpenCodeInstruct"
PAPER = {
    ("llama-3.1-8b-instruct", "math"): {(SFT, "math"): 50, (LLAMA, "math"): 25, (V2, "math"): 25},
    ("llama-3.1-8b-instruct", "code"): {
        (LLAMA, "code"): 21, (V2, "code"): 1, (SFT, "code"): 64, (INSTRUCT, ""): 11, (PYTHON, ""): 3,
    },
    ("llama-3.1-8b-instruct", "stem"): {(V1, "stem"): 100},
    ("llama-3.1-8b-instruct", "chat"): {(SFT, "general"): 90, (V1, "chat"): 10},
    ("qwen2.5-7b-instruct", "math"): {(SFT, "math"): 76, (LLAMA, "math"): 20, (V2, "math"): 4},
    ("qwen2.5-7b-instruct", "code"): {
        (LLAMA, "code"): 20, (V2, "code"): 1.2, (SFT, "code"): 60, (INSTRUCT, ""): 12, (PYTHON, ""): 6.8,
    },
    ("qwen2.5-7b-instruct", "stem"): {
        ("nvidia/Nemotron-Pretraining-Specialized-v1", "stem"): 90.6, ("nvidia/Nemotron-Science-v1", "mcq"): 3.4,
        (V2, "stem"): 6,
    },
    ("qwen2.5-7b-instruct", "chat"): {
        (SFT, "general"): 88, (V2, "chat"): 8, ("nvidia/Nemotron-Instruction-Following-Chat-v1", "chat_if"): 4,
    },
    ("llama-3.1-8b", "generalist"): {("allenai/dolmino-mix-1124", ""): 100},
    ("olmo-3-7b", "generalist"): {("allenai/dolma3_dolmino_mix-100B-1025", ""): 100},
}  # fmt: skip
MERGE = {
    "llama-3.1-8b-instruct": {"math": 0.35, "code": 0.35, "stem": 0.20, "chat": 0.10},
    "qwen2.5-7b-instruct": {"math": 0.20, "code": 0.40, "stem": 0.15, "chat": 0.25},
    "llama-3.1-8b": {"generalist": 1.0},
    "olmo-3-7b": {"generalist": 1.0},
}


@pytest.mark.parametrize("teacher", MERGE)
def test_a_teacher_s_recipe_has_the_experts_mixtures_and_merge_weights_of_the_paper(teacher):
    config = compose([f"teacher={teacher}"]).config
    assert set(config.experts) == set(MERGE[teacher])
    for name in config.experts:
        expert, wanted = config.expert[name], PAPER[teacher, name]
        assert expert.merge_weight == MERGE[teacher][name]
        assert len(expert.sources) == len(wanted)
        for (path, part), percent in wanted.items():
            (source,) = [s for s in expert.sources.values() if s.path == path]
            assert 100 * source.weight == pytest.approx(percent)
            assert part in f"{source.subset} {source.split}".lower()
    assert (config.distill.gamma, config.distill.beta, config.cache.top_k) == (0.9, 0.1, 256)


def test_base_models_are_aligned_on_the_papers_mid_training_mixtures():
    paths = {"llama-3.1-8b": "allenai/dolmino-mix-1124", "olmo-3-7b": "allenai/dolma3_dolmino_mix-100B-1025"}
    for teacher, path in paths.items():
        (source,) = compose([f"teacher={teacher}"]).config.data.sources.values()
        assert source.path == path
