"""The student as a Hugging Face model: identity with the teacher, state, padding, saving, conversion."""

import hashlib
import json

import pytest
import torch
from data_support import make_tokenizer
from model_support import FAMILIES, VOCABULARY, randomise, tiny_student, tiny_teacher
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import xlstm_distill.model
from xlstm_distill.contract.exitcode import Mistake
from xlstm_distill.model import HybridConfig, HybridForCausalLM, convert
from xlstm_distill.train.align import make_initial

BRANCHES = [{}, {"use_mlstm": False}, {"use_window": False}]


def tokens(length, batch=2, seed=0):
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_window_that_sees_everything_gives_the_teachers_logits(tmp_path, family):
    # The sinks stand on top of a layer's own window: none, to be the teacher.
    sinks = 0 if family == "olmo3" else 2
    teacher, student = tiny_student(tmp_path, family, window=40, sinks=sinks, use_mlstm=False)
    ids = tokens(40)
    torch.testing.assert_close(student(ids).logits, teacher(ids).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_with_both_branches_the_gate_at_zero_gives_the_teachers_logits(tmp_path, family):
    choices = {"window": 30, "sinks": 0 if family == "olmo3" else 2, "output_gate_bias": -60.0}
    teacher, student = tiny_student(tmp_path, family, random=False, **choices)
    ids = tokens(30)
    torch.testing.assert_close(student(ids).logits, teacher(ids).logits, atol=1e-4, rtol=1e-4)


def test_a_layer_with_a_window_of_its_own_keeps_the_smaller_one(tmp_path):
    _, student = tiny_student(tmp_path, "olmo3", window=8)
    assert [mixer.window for mixer in student.mixers] == [5, 5, 5, 8]


@pytest.mark.parametrize("choices", BRANCHES)
@pytest.mark.parametrize("split", [1, 3, 8, 20, 29])
def test_prefill_and_decode_equal_the_forward_of_the_whole(tmp_path, split, choices):
    _, student = tiny_student(tmp_path, **choices)
    ids = tokens(30)
    with torch.no_grad():
        whole = student(ids).logits
        first = student(ids[:, :split], use_cache=True)
        parts, cache = [first.logits], first.past_key_values
        for t in range(split, 30):
            parts.append(student(ids[:, t : t + 1], past_key_values=cache, use_cache=True).logits)
    assert cache.get_seq_length() == 30
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_pieces_of_any_length_equal_the_whole_in_every_family(tmp_path, family):
    _, student = tiny_student(tmp_path, family)
    ids = tokens(30)
    with torch.no_grad():
        cache, parts = student.new_cache(), []
        for piece in ids.split((2, 11, 1, 16), 1):
            parts.append(student(piece, past_key_values=cache, use_cache=True).logits)
        torch.testing.assert_close(torch.cat(parts, 1), student(ids).logits, atol=1e-4, rtol=1e-4)


def padded(ids, pad):
    """Row 0 whole, row 1 without its first `pad` tokens, on the left of which stands padding."""
    mask = torch.ones_like(ids)
    mask[1, :pad] = 0
    return torch.where(mask.bool(), ids, 0), mask


@pytest.mark.parametrize("choices", BRANCHES)
@pytest.mark.parametrize("pad", [1, 5, 15])
def test_left_padded_rows_give_and_generate_what_they_would_alone(tmp_path, pad, choices):
    _, student = tiny_student(tmp_path, **choices)
    ids, mask = padded(tokens(16), pad)
    settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    with torch.no_grad():
        together = student(ids, attention_mask=mask).logits
        torch.testing.assert_close(together[1:, pad:], student(ids[1:, pad:]).logits, atol=1e-4, rtol=1e-4)
    written = student.generate(ids, attention_mask=mask, **settings)
    alone = student.generate(ids[1:, pad:], attention_mask=mask[1:, pad:], **settings)
    assert written[1, 16:].tolist() == alone[0, 16 - pad :].tolist()
    assert written[0].tolist() == student.generate(ids[:1], attention_mask=mask[:1], **settings)[0].tolist()


def test_generation_equals_an_argmax_over_the_whole_sequence_each_time(tmp_path):
    _, student = tiny_student(tmp_path)
    ids = tokens(10, 1)
    written = student.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=None)
    with torch.no_grad():
        for _ in range(12):
            ids = torch.cat([ids, student(ids).logits[:, -1:].argmax(-1)], 1)
    assert written.tolist() == ids.tolist()


@pytest.mark.parametrize("choices", BRANCHES)
def test_the_state_does_not_grow(tmp_path, choices):
    _, student = tiny_student(tmp_path, **choices)
    sizes = []
    with torch.no_grad():
        cache = student(tokens(9), use_cache=True).past_key_values
        for length in (1, 40, 1):
            sizes.append(cache.nbytes())
            student(tokens(length), past_key_values=cache, use_cache=True)
    assert sizes[0] > 0
    assert len({*sizes, cache.nbytes()}) == 1


@pytest.mark.parametrize("choices", BRANCHES)
def test_beams_take_their_state_along(tmp_path, choices):
    _, student = tiny_student(tmp_path, **choices)
    ids = tokens(20)
    with torch.no_grad():
        cache = student(ids[:, :12], use_cache=True).past_key_values
        cache.reorder_cache(torch.tensor([1, 0]))
        swapped = student(ids.flip(0)[:, 12:], past_key_values=cache, use_cache=True).logits
        torch.testing.assert_close(swapped, student(ids.flip(0)).logits[:, 12:], atol=1e-4, rtol=1e-4)
    best = student.generate(ids[:1], num_beams=3, max_new_tokens=6, do_sample=False, eos_token_id=None)
    plain = student.generate(
        ids[:1], num_beams=3, max_new_tokens=6, do_sample=False, eos_token_id=None, use_cache=False
    )
    assert best.tolist() == plain.tolist()


def test_rows_of_the_state_repeat_and_are_chosen(tmp_path):
    _, student = tiny_student(tmp_path)
    ids = tokens(20)
    with torch.no_grad():
        cache = student(ids[:, :12], use_cache=True).past_key_values
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([3, 0]))
        out = student(ids.flip(0)[:, 12:], past_key_values=cache, use_cache=True).logits
        torch.testing.assert_close(out, student(ids.flip(0)).logits[:, 12:], atol=1e-4, rtol=1e-4)


def test_the_loss_of_labels_is_the_shifted_cross_entropy(tmp_path):
    _, student = tiny_student(tmp_path)
    ids = tokens(12)
    out = student(ids, labels=ids)
    wanted = torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(out.loss, wanted)
    torch.testing.assert_close(student(ids, logits_to_keep=3).logits, out.logits[:, -3:])


@pytest.mark.parametrize("tied", [False, True])
def test_auto_classes_load_it_and_saving_and_loading_changes_nothing(tmp_path, tied):
    _, student = tiny_student(tmp_path, tied=tied)
    student.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float32)
    assert type(again) is xlstm_distill.model.HybridForCausalLM
    assert type(AutoConfig.from_pretrained(tmp_path / "again")) is HybridConfig
    ids = tokens(20)
    assert again(ids).logits.equal(student(ids).logits)
    first, second = ({**model.config.to_dict(), "_name_or_path": ""} for model in (student, again))
    assert first == second
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == tied
    window = AutoModelForCausalLM.from_pretrained(tmp_path / "again", use_mlstm=False)
    assert not window.config.use_mlstm


def hashes(folder):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shard_size", ["5GB", "12kB"])
def test_conversion_keeps_every_tensor_and_leaves_the_teachers_files_untouched(tmp_path, tied, shard_size):
    teacher = tiny_teacher(tie_word_embeddings=tied)
    folder, target = tmp_path / "teacher", tmp_path / "student"
    teacher.save_pretrained(folder, max_shard_size=shard_size)
    make_tokenizer(folder)
    assert (len(list(folder.glob("*.safetensors"))) > 1) == (shard_size == "12kB")
    before = hashes(folder)
    target.mkdir()
    convert(folder, target, window=8)
    assert hashes(folder) == before
    student = HybridForCausalLM.from_pretrained(target)
    inherited = {n: p for n, p in student.state_dict().items() if n not in student.mixer_parameters()}
    assert inherited.keys() == teacher.state_dict().keys()
    assert all(p.equal(teacher.state_dict()[name]) for name, p in inherited.items())
    mapped = json.loads((target / "model.safetensors.index.json").read_text())["weight_map"]
    assert all((target / file).is_file() for file in mapped.values())
    assert len(list(target.glob("*.safetensors"))) == len(list(folder.glob("*.safetensors"))) + 1
    there, here = (AutoTokenizer.from_pretrained(place) for place in (folder, target))
    assert here("the quick fox").input_ids == there("the quick fox").input_ids
    assert here.chat_template == there.chat_template


def test_a_bfloat16_teacher_gives_a_bfloat16_student(tmp_path):
    tiny_student(tmp_path, teacher=tiny_teacher().bfloat16(), random=False)
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "student", dtype="auto")
    assert {p.dtype for p in student.parameters()} == {torch.bfloat16}
    randomise(student)
    assert student(tokens(9)).logits.isfinite().all()


def test_teachers_that_cannot_be_converted_are_one_line(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=9)).save_pretrained(tmp_path / "gpt2")
    with pytest.raises(Mistake, match=r"gpt2: teacher of type 'gpt2' is not supported; supported: llama, .*olmo3$"):
        make_initial(tmp_path / "gpt2", tmp_path / "student", {})
    tiny_teacher().config.save_pretrained(tmp_path / "empty")
    with pytest.raises(Mistake, match=r"empty: no model.safetensors .*; fetch the teacher again"):
        make_initial(tmp_path / "empty", tmp_path / "student", {})
    assert not (tmp_path / "student").exists()
    with pytest.raises(ValueError, match="nothing would be mixed"):
        HybridConfig(use_mlstm=False, use_window=False)
