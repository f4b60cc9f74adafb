"""The state: read in any pieces it gives the forward of the whole, and it takes the same bytes at any length."""

import pytest
import torch
from model_support import FAMILIES, close, tiny_student, tiny_teacher, tokens
from transformers import AutoModelForCausalLM

from xlstm_distill.model import HybridConfig

CHOICES: list[dict] = [
    {},
    {"use_mlstm": False},
    {"use_window": False},
    {"use_gates": False},
    {"feature_map": "hedgehog"},
    {"feature_rope": "after"},
    {"feature_rope": "after", "feature_map": "hedgehog"},
    {"feature_rope": "none", "gate_input": "hidden"},
    {"gate_input": "qkv_rotated"},
    {"sinks": 0, "window": 1},
    {"sinks": 12, "window": 3},
    {"layer_windows": [3, 11]},
]
GREEDY = {"do_sample": False, "eos_token_id": None}


@torch.no_grad()
def in_pieces(student, ids, sizes, mask=None):
    cache, parts, end = student.new_cache(), [], 0
    for size in sizes:
        end += size
        seen = None if mask is None else mask[:, :end]
        out = student(ids[:, end - size : end], attention_mask=seen, past_key_values=cache, use_cache=True)
        parts.append(out.logits)
    assert cache.get_seq_length() == end == ids.shape[1]
    return torch.cat(parts, 1)


@torch.no_grad()
def whole(student, ids, mask=None):
    return student(ids, attention_mask=mask).logits


@pytest.mark.parametrize("choices", CHOICES)
def test_prefill_and_decode_equal_the_whole_at_every_split(tmp_path, choices):
    _, student = tiny_student(tmp_path, **choices)
    ids = tokens(30)
    wanted = whole(student, ids)
    for split in (1, 2, 3, 7, 8, 9, 10, 11, 20, 29):
        close(in_pieces(student, ids, [split] + [1] * (30 - split)), wanted)


@pytest.mark.parametrize("choices", CHOICES)
def test_pieces_of_any_length_equal_the_whole(tmp_path, choices):
    _, student = tiny_student(tmp_path, **choices)
    ids = tokens(60)
    for sizes in ([60], [1] * 60, [5] * 12, [8] * 7 + [4], [2, 11, 1, 46], [25, 25, 10], [1, 58, 1]):
        close(in_pieces(student, ids, sizes), whole(student, ids))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_past_its_windows(tmp_path, family):
    _, student = tiny_student(tmp_path, family)
    ids = tokens(40)
    for sizes in ([3, 12, 1, 24], [17] + [1] * 23):
        close(in_pieces(student, ids, sizes), whole(student, ids))


@pytest.mark.parametrize("choices", [{}, {"use_mlstm": False}, {"use_window": False}, {"sinks": 12, "window": 3}])
@pytest.mark.parametrize("sizes", [[16] + [1] * 14, [4, 4, 13, 1, 8], [1] * 30])
def test_padding_on_the_left_is_not_in_the_state(tmp_path, choices, sizes):
    _, student = tiny_student(tmp_path, **choices)
    ids, mask = tokens(30), torch.ones(2, 30, dtype=torch.long)
    mask[1, :7] = 0
    out = in_pieces(student, ids, sizes, mask)
    real = mask[1].bool()
    close(out[1:, real], whole(student, ids[1:, real]))
    close(out[:1], whole(student, ids[:1]))


@pytest.mark.parametrize("choices", [{}, {"use_mlstm": False}, {"use_window": False}])
def test_left_padded_rows_write_what_they_would_alone(tmp_path, choices):
    _, student = tiny_student(tmp_path, **choices)
    ids, mask = tokens(16), torch.ones(2, 16, dtype=torch.long)
    mask[1, :5] = 0
    written = student.generate(ids, attention_mask=mask, max_new_tokens=12, **GREEDY)
    alone = student.generate(ids[1:, 5:], max_new_tokens=12, **GREEDY)
    assert written[1, 16:].tolist() == alone[0, 11:].tolist()
    plain = student.generate(ids, attention_mask=mask, max_new_tokens=12, use_cache=False, **GREEDY)
    assert written.tolist() == plain.tolist()


@pytest.mark.parametrize("choices", [{}, {"use_mlstm": False}, {"use_window": False}])
def test_rows_are_reordered_repeated_and_chosen(tmp_path, choices):
    _, student = tiny_student(tmp_path, **choices)
    ids = tokens(20, 3)
    changes = [
        (lambda cache: cache.reorder_cache(torch.tensor([1, 1, 0])), [1, 1, 0]),
        (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
        (lambda cache: cache.batch_select_indices(torch.tensor([2, 0])), [2, 0]),
    ]
    for change, rows in changes:
        with torch.no_grad():
            cache = student(ids[:, :12], use_cache=True).past_key_values
            change(cache)
            out = student(ids[rows, 12:], past_key_values=cache, use_cache=True).logits
        close(out, whole(student, ids[rows])[:, 12:])


def test_a_state_begun_anew_or_copied_is_independent(tmp_path):
    from copy import deepcopy

    _, student = tiny_student(tmp_path)
    ids = tokens(20)
    with torch.no_grad():
        cache = student(ids[:, :12], use_cache=True).past_key_values
        copied = deepcopy(cache)
        student(tokens(5, seed=1), past_key_values=cache, use_cache=True)
        close(student(ids[:, 12:], past_key_values=copied, use_cache=True).logits, whole(student, ids)[:, 12:])
        cache.reset()
        assert cache.get_seq_length() == 0
        close(student(ids, past_key_values=cache, use_cache=True).logits, whole(student, ids))


def test_a_bfloat16_student_keeps_its_recurrence_in_float32(tmp_path):
    _, student = tiny_student(tmp_path)
    student.bfloat16()
    ids = tokens(30)
    out, wanted = in_pieces(student, ids, [11] + [1] * 19).float(), whole(student, ids).float()
    assert (out - wanted).norm() / wanted.norm() < 2e-2
    cache = student(ids, use_cache=True).past_key_values
    assert cache.layers[0].state.dtype == torch.float32
    assert cache.layers[0].keys.dtype == torch.bfloat16
    assert cache.nbytes() == student.config.state_bytes(2, torch.bfloat16)


def test_what_was_read_cannot_be_taken_back(tmp_path):
    _, student = tiny_student(tmp_path)
    cache = student(tokens(5), use_cache=True).past_key_values
    with pytest.raises(ValueError, match="cannot take back tokens"):
        cache.crop(3)


@pytest.mark.parametrize("family", ["llama", "olmo3"])
@pytest.mark.parametrize("choices", CHOICES)
def test_its_bytes_are_those_of_the_formula_whatever_was_read(tmp_path, family, choices):
    if family == "olmo3" and "layer_windows" in choices:
        choices = {"layer_windows": [3, 11, 4, 9]}  # it has four layers here
    _, student = tiny_student(tmp_path, family, **choices)
    sizes = []
    with torch.no_grad():
        cache = student(tokens(1, 3), use_cache=True).past_key_values
        for length in (1, 40, 1, 7):
            sizes.append(cache.nbytes())
            student(tokens(length, 3), past_key_values=cache, use_cache=True)
    assert {*sizes, cache.nbytes()} == {student.config.state_bytes(3)}


def test_the_formula_by_hand(tmp_path):
    """Two layers of 4 heads, 2 for keys and values, of width 8: S and z, and 8 + 2 slots."""
    _, student = tiny_student(tmp_path, window=8, sinks=2)
    slots = (8 + 2) * (2 * 2 * 2 * 8 + 8) + 8
    assert student.config.state_bytes(3, torch.bfloat16) == 3 * 2 * (4 * 4 * 8 * 9 + slots)
    assert student.config.state_bytes() > student.config.state_bytes(1, torch.float16)


def test_each_layer_sees_as_far_as_its_own_window(tmp_path):
    teacher = tiny_teacher("olmo3")
    _, student = tiny_student(tmp_path, teacher=teacher, layer_windows=[8, 2, 3, 20])
    assert [mixer.window for mixer in student.mixers] == [5, 2, 3, 20]  # the first three are the teacher's 5 at most
    with pytest.raises(ValueError, match=r"layer_windows=\[3\]: expected 4 windows of at least 1"):
        HybridConfig(teacher.config, layer_windows=[3])


@pytest.mark.slow
def test_as_many_bytes_at_64000_tokens_as_at_1000_and_still_the_right_numbers(tmp_path):
    _, student = tiny_student(tmp_path, teacher=tiny_teacher(num_hidden_layers=1))
    cache, sizes = student.new_cache(), {}
    with torch.no_grad():
        for start in range(0, 64_000, 1000):
            student(tokens(1000, 1, seed=start), past_key_values=cache, use_cache=True, logits_to_keep=1)
            sizes[start + 1000] = cache.nbytes()
    assert sizes[1000] == sizes[64_000] == student.config.state_bytes(1)
    assert all(x.isfinite().all() for layer in cache.layers for x in (layer.state, layer.keys))


def test_a_student_loaded_anew_goes_on_from_a_saved_state(tmp_path):
    _, student = tiny_student(tmp_path)
    ids = tokens(20)
    with torch.no_grad():
        cache = student(ids[:, :12], use_cache=True).past_key_values
        torch.save(cache, tmp_path / "state.pt")
        student.save_pretrained(tmp_path / "again")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "again").eval()
        loaded = torch.load(tmp_path / "state.pt", weights_only=False)
        out = again(ids[:, 12:], past_key_values=loaded, use_cache=True).logits
    close(out, whole(student, ids)[:, 12:])
