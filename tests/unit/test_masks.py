"""Padding and packed documents: each row, and each document, gives what it gives alone."""

import pytest
import torch
from model_support import FAMILIES, VOCABULARY, close, tiny_student, tokens
from transformers import AutoModelForCausalLM

from xlstm_distill.model.layout import DOCUMENT, documents_of, has_holes, make_layout
from xlstm_distill.objectives.align import LayerAlignment
from xlstm_distill.teacher.frozen import document_positions

BRANCHES = [{}, {"use_mlstm": False}, {"use_window": False}, {"feature_rope": "after"}]
LENGTHS = (1, 7, 13, 9)  # of documents: shorter than the sinks, than the window, longer; W = 5, two sinks


def packed(batch=1):
    """Tokens, document numbers, positions that start again [B, 30], and the slices of the documents."""
    ends = torch.tensor(LENGTHS).cumsum(0).tolist()
    slices = [slice(end - length, end) for end, length in zip(ends, LENGTHS, strict=True)]
    numbers = torch.cat([torch.full((length,), 11 + 3 * n) for n, length in enumerate(LENGTHS)])
    positions = torch.cat([torch.arange(length) for length in LENGTHS])
    return tokens(sum(LENGTHS), batch), numbers.expand(batch, -1), positions.expand(batch, -1), slices


@pytest.mark.parametrize("choices", BRANCHES)
@pytest.mark.parametrize("reset", [False, True])
def test_left_and_right_padding_in_one_batch(tmp_path, choices, reset):
    _, student = tiny_student(tmp_path, window=5, reset_at_documents=reset, **choices)
    ids, mask = tokens(20, 4), torch.ones(4, 20, dtype=torch.long)
    mask[1, :6] = mask[2, 13:] = 0
    mask[3, :3] = mask[3, 18:] = 0
    out = student(ids, attention_mask=mask).logits
    assert out.isfinite().all()
    for row in range(4):
        real = mask[row].bool()
        close(out[row : row + 1, real], student(ids[row : row + 1, real]).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_left_padding_in_every_family(tmp_path, family):
    _, student = tiny_student(tmp_path, family, window=5)
    ids, mask = tokens(20), torch.ones(2, 20, dtype=torch.long)
    mask[1, :6] = 0
    close(student(ids, attention_mask=mask).logits[1:, 6:], student(ids[1:, 6:]).logits)


@pytest.mark.parametrize("choices", BRANCHES)
@pytest.mark.parametrize("tell", ["document_ids", "position_ids", "one row of position_ids"])
def test_with_reset_a_packed_document_gives_what_it_gives_alone(tmp_path, choices, tell):
    _, student = tiny_student(tmp_path, window=5, reset_at_documents=True, **choices)
    ids, numbers, positions, slices = packed(2)
    given = {
        "document_ids": {"document_ids": numbers},
        "position_ids": {"position_ids": positions},
        "one row of position_ids": {"position_ids": positions[:1]},
    }[tell]
    out = student(ids, **given).logits
    for part in slices:
        close(out[:, part], student(ids[:, part]).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_documents_in_every_family(tmp_path, family):
    _, student = tiny_student(tmp_path, family, window=8, reset_at_documents=True)
    ids, numbers, _, slices = packed()
    out = student(ids, document_ids=numbers).logits
    for part in slices:
        close(out[:, part], student(ids[:, part]).logits)


def test_packed_documents_with_padding_before_between_and_after_them(tmp_path):
    _, student = tiny_student(tmp_path, window=5, reset_at_documents=True)
    ids, numbers, positions, slices = packed(2)
    pad = torch.zeros(2, 4, dtype=torch.long)
    ids = torch.cat([pad, ids[:, :8], pad, ids[:, 8:], pad], 1)
    numbers = torch.cat([pad, numbers[:, :8], pad, numbers[:, 8:], pad], 1)
    positions = torch.cat([pad, positions[:, :8], pad, positions[:, 8:], pad], 1)
    mask = (ids != 0).long()
    ids[0, :4] = torch.tensor([5, 6, 7, 8])  # padding holds what it likes
    alone = [student(packed(2)[0][:, part]).logits for part in slices]
    for given in ({"document_ids": numbers}, {"position_ids": positions}):
        out = student(ids, attention_mask=mask, **given).logits
        assert out.isfinite().all()
        close(out[:, mask[0].bool()], torch.cat(alone, 1))


def test_without_reset_documents_are_read_as_one_text(tmp_path):
    _, student = tiny_student(tmp_path, window=5)
    ids, numbers, _, _ = packed()
    assert student(ids, document_ids=numbers).logits.equal(student(ids).logits)


@pytest.mark.parametrize("choices", BRANCHES)
def test_positions_that_are_given_or_shifted_change_nothing(tmp_path, choices):
    _, student = tiny_student(tmp_path, window=5, **choices)
    ids, mask = tokens(20), torch.ones(2, 20, dtype=torch.long)
    mask[1, :6] = 0
    plain = student(ids, attention_mask=mask).logits
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    assert student(ids, attention_mask=mask, position_ids=positions).logits.equal(plain)
    if "feature_rope" in choices or choices.get("use_mlstm") is False:  # what RoPE turns enters by differences alone
        close(student(ids, attention_mask=mask, position_ids=positions + 100).logits[0], plain[0])
    one_document = {"attention_mask": mask, "position_ids": positions}
    reset = AutoModelForCausalLM.from_pretrained(tmp_path / "student", reset_at_documents=True)
    reset.load_state_dict(student.state_dict())
    close(reset(ids, **one_document).logits[mask.bool()], plain[mask.bool()])


def test_gradients_under_padding_and_documents_are_finite_and_those_of_the_rows_alone(tmp_path):
    _, student = tiny_student(tmp_path, window=5, reset_at_documents=True)
    ids, numbers, _, slices = packed()
    row = torch.cat([torch.zeros(1, 4, dtype=torch.long), ids], 1)
    numbers = torch.cat([torch.zeros(1, 4, dtype=torch.long), numbers], 1)
    mask = (row != 0).long()
    weights = torch.randn(1, 30, VOCABULARY, generator=torch.Generator().manual_seed(1))
    (student(row, attention_mask=mask, document_ids=numbers).logits[:, 4:] * weights).sum().backward()
    found = {name: p.grad for name, p in student.named_parameters()}
    student.zero_grad()
    sum((student(ids[:, part]).logits * weights[:, part]).sum() for part in slices).backward()
    for name, parameter in student.named_parameters():
        assert found[name].isfinite().all(), name
        assert (found[name] - parameter.grad).norm() <= 1e-4 * parameter.grad.norm().clamp_min(1e-2), name


def test_a_state_and_packed_documents_do_not_go_together(tmp_path):
    _, student = tiny_student(tmp_path, reset_at_documents=True)
    ids, numbers, positions, _ = packed()
    for given in ({"document_ids": numbers}, {"position_ids": positions}):
        with pytest.raises(ValueError, match="packed documents have no common state: pass use_cache=False"):
            student(ids, use_cache=True, **given)
    assert student(ids, use_cache=True, position_ids=torch.arange(30)[None]).past_key_values is not None


def test_a_mask_of_another_kind_is_refused_in_one_line(tmp_path):
    _, student = tiny_student(tmp_path)
    ids = tokens(6)
    cache = student(ids, use_cache=True).past_key_values
    with pytest.raises(ValueError, match=r"attention_mask of shape \(2, 1\): expected \[batch, 7\]"):
        student(ids[:, :1], attention_mask=torch.ones(2, 1), past_key_values=cache)
    with pytest.raises(ValueError, match=r"attention_mask of shape \(2, 1, 6, 6\)"):
        student(ids, attention_mask=torch.ones(2, 1, 6, 6))


def test_padding_between_tokens_is_refused_with_what_to_do(tmp_path):
    _, student = tiny_student(tmp_path)
    ids, mask = tokens(8), torch.ones(2, 8, dtype=torch.long)
    mask[1, 5:] = 0
    student(ids, attention_mask=mask)
    with pytest.raises(ValueError, match="padding between the tokens of a row; pad prompts on the left"):
        student.generate(ids, attention_mask=mask, max_new_tokens=2)


def test_positions_count_real_tokens_of_each_document():
    mask = torch.tensor([[0, 1, 1, 1, 0, 1, 1]])
    documents = torch.tensor([[9, 9, 9, 4, 4, 4, 4]])
    layout = make_layout(mask, documents, 7)
    assert layout.ordinal.tolist() == [[-1, 0, 1, 0, -1, 1, 2]]
    assert len({p // DOCUMENT for p in layout.position[0, 1:3].tolist()}) == 1
    assert make_layout(mask, None, 7).position.tolist() == [[-1, 0, 1, 2, -1, 3, 4]]
    assert make_layout(None, None, 7) is None
    assert has_holes(mask, layout)  # the second document's
    assert not has_holes(mask, make_layout(mask, torch.tensor([[9, 9, 9, 4, 4, 5, 5]]), 7))
    positions = torch.tensor([[0, 0, 1, 0, 0, 1, 2]])
    assert documents_of(positions, mask).tolist() == [[0, 0, 0, 1, 1, 1, 1]]
    assert documents_of(torch.tensor([[5, 6, 0, 1, 0, 0]])).tolist() == [[0, 0, 1, 1, 2, 3]]


def test_hooks_that_move_inputs_between_devices_move_the_layout():
    from accelerate.utils import send_to_device

    layout = make_layout(None, torch.tensor([[1, 1, 2]]), 3)
    moved = send_to_device(layout, torch.device("meta"))
    assert type(moved) is type(layout)
    assert moved.position.is_meta
    assert moved.split


@pytest.mark.parametrize("family", FAMILIES)
def test_the_teacher_sees_documents_apart_as_the_student_does(tmp_path, family):
    """Its targets of Stage II by restarted positions, its attention outputs of Stage I by the layout."""
    teacher, student = tiny_student(tmp_path, family, window=8, reset_at_documents=True)
    ids, numbers, positions, slices = packed(2)
    assert document_positions(numbers, True).equal(positions)
    assert document_positions(numbers, False) is None
    with torch.no_grad():
        apart = torch.cat([teacher.model(ids[:, part]).last_hidden_state for part in slices], 1)
        close(teacher.model(ids, position_ids=positions, use_cache=False).last_hidden_state, apart)
        for mixer in student.mixers:
            mixer.objective = LayerAlignment(train=False)
        stream = []
        student(ids, document_ids=numbers, objective=lambda hidden, head: stream.append(hidden) or hidden.sum())
    close(stream[0], apart)


def test_alignment_counts_real_positions_alone(tmp_path):
    _, student = tiny_student(tmp_path)
    ids, mask = tokens(12, 1), torch.ones(1, 12, dtype=torch.long)
    mask[0, :5] = 0
    sums = []
    for given in ({"input_ids": ids, "attention_mask": mask}, {"input_ids": ids[:, 5:]}):
        objective = LayerAlignment(train=False)
        student.mixers[0].objective = objective
        student(**given)
        sums.append(torch.stack([objective.error, objective.norm]))
    close(*sums)
