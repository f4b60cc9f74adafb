"""The second student: its blocks compute what the xlstm package's do, with a state, padding and right gradients."""

import math

import pytest
import torch
from distil_support import tiny_distil
from model_support import VOCABULARY, close, tiny_teacher, tokens
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from xlstm_distill.contract.distil_xlstm import Blocks
from xlstm_distill.model import DistilXLSTMConfig, DistilXLSTMForCausalLM, convert_distil, distil_blocks
from xlstm_distill.model.distil_blocks import MLSTMLayer, SLSTMLayer

LENGTH = 12


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    """Four blocks, off their start: of recurrent weights and gates some would be zero there."""
    return tiny_distil(tmp_path_factory.mktemp("distil"))


def kinds(model):
    return [{SLSTMLayer: "s", MLSTMLayer: "m"}[type(block.xlstm)] for block in model.model.layers]


@pytest.mark.parametrize(("layers", "expected"), [(8, "smsm"), (7, "sms"), (2, "s"), (1, "s")])
def test_half_as_many_blocks_as_layers_by_turns_an_slstm_first(layers, expected):
    config = DistilXLSTMConfig(tiny_teacher(num_hidden_layers=layers).config)
    assert "".join(kinds(DistilXLSTMForCausalLM(config))) == expected


def test_without_state_and_padding_it_is_the_packages_own_stack(student):
    """Loaded with the same parameters under the same names."""
    from xlstm import (
        FeedForwardConfig,
        mLSTMBlockConfig,
        mLSTMLayerConfig,
        sLSTMBlockConfig,
        sLSTMLayerConfig,
        xLSTMBlockStack,
        xLSTMBlockStackConfig,
    )

    slstm = sLSTMBlockConfig(sLSTMLayerConfig(backend="vanilla", num_heads=4), FeedForwardConfig(proj_factor=1.3))
    mlstm = mLSTMBlockConfig(mLSTMLayerConfig(num_heads=4))
    stack = xLSTMBlockStack(
        xLSTMBlockStackConfig(
            mlstm_block=mlstm, slstm_block=slstm, slstm_at=[0, 2], num_blocks=4, embedding_dim=32, context_length=32
        )
    ).eval()
    ours = {name.replace("layers.", "blocks."): x for name, x in student.model.state_dict().items()}
    ours["post_blocks_norm.weight"] = ours.pop("norm.weight")
    del ours["embed_tokens.weight"]
    stack.load_state_dict(ours)  # strict: no name is missing, none is over
    x = student.model.embed_tokens(tokens(LENGTH))
    found = student(inputs_embeds=x, output_hidden_states=True)
    close(found.hidden_states[-1], stack(x), 1e-5)


def slstm_recurrence(gates, weight, bias, heads):
    """y of an sLSTM without stabiliser, one number after another, float64."""
    length, width = gates.shape[0], gates.shape[1] // 4
    dim = width // heads
    y = torch.zeros(width, dtype=torch.float64)
    c, n, out = torch.zeros_like(y), torch.zeros_like(y), []
    for t in range(length):
        # Of head h, gate g and feature o: Σ over the head's features R[h, g D + o, :] · y.
        pulled = torch.einsum("hgoi,hi->gho", weight.view(heads, 4, dim, dim), y.view(heads, dim)).reshape(-1)
        i, f, z, o = (gates[t] + pulled + bias).view(4, width)
        c = f.sigmoid() * c + i.exp() * z.tanh()
        n = f.sigmoid() * n + i.exp()
        y = o.sigmoid() * c / n
        out.append(y)
    return torch.stack(out)


def test_the_slstm_and_its_gradients_are_those_of_the_recurrence_in_float64(student):
    cell = student.model.layers[0].xlstm.slstm_cell
    generator = torch.Generator().manual_seed(0)
    gates = 2 * torch.randn(1, LENGTH, 128, generator=generator)
    mix = torch.randn(LENGTH, 32, generator=generator, dtype=torch.float64)
    exact = [x.detach().double().requires_grad_() for x in (gates[0], cell._recurrent_kernel_, cell._bias_)]
    reference = slstm_recurrence(*exact, heads=4)
    wanted = torch.autograd.grad((reference * mix).sum(), exact)
    gates.requires_grad_()
    y, _ = cell(gates, {}, None)
    y = y[0].transpose(0, 1).reshape(LENGTH, 32)
    found = torch.autograd.grad((y * mix.float()).sum(), (gates, cell._recurrent_kernel_, cell._bias_))
    close(y.double(), reference, 1e-5)
    for ours, theirs in zip(found, wanted, strict=True):
        assert (ours.double().view_as(theirs) - theirs).norm() < 1e-5 * theirs.norm()


def mlstm_recurrence(q, k, v, i, f, detached=False):
    """h of an mLSTM with the normaliser max(|q·n|, 1), without stabiliser, [N, T, D]."""
    heads, length, dim = q.shape
    memory, norm, out = q.new_zeros(heads, dim, dim), q.new_zeros(heads, dim), []
    for t in range(length):
        forget, write, key = f[:, t, None].sigmoid(), i[:, t, None].exp(), k[:, t] / math.sqrt(dim)
        memory = forget[..., None] * memory + (write * key)[..., None] * v[:, t, None]
        norm = forget * norm + write * key
        below = (q[:, t] * norm).sum(-1).abs().clamp_min(1.0)
        out.append((q[:, t, None] @ memory)[:, 0] / (below.detach() if detached else below)[:, None])
    return torch.stack(out, 1)


@pytest.mark.parametrize("scale", [0.3, 2.0])
def test_the_gradients_through_the_mlstms_normaliser_are_right_in_both_of_its_forms(scale):
    """Stock kernels leave that one out; the norm behind the cell would hide it, so it is looked at without."""
    generator = torch.Generator().manual_seed(1)
    parts = [scale * torch.randn(4, LENGTH, 8, generator=generator, dtype=torch.float64) for _ in range(3)]
    parts += [torch.randn(4, LENGTH, generator=generator, dtype=torch.float64) + shift for shift in (0.0, 3.0)]
    parts = [x.requires_grad_() for x in parts]
    mix = torch.randn(4, LENGTH, 8, generator=generator, dtype=torch.float64)

    def gradients(h):
        return torch.autograd.grad((h * mix).sum(), parts)

    wanted = gradients(mlstm_recurrence(*parts))
    q, k, v, i, f = (x[None] for x in parts)
    whole = distil_blocks.parallel_stabilized_simple(q, k, v, i[..., None], f[..., None])[0]
    pieces, _ = distil_blocks._segments([q, k, v, i, f], {})
    for found in (gradients(whole), gradients(pieces[0])):
        for ours, theirs in zip(found, wanted, strict=True):
            assert (ours - theirs).norm() < 1e-4 * theirs.norm()
    without = gradients(mlstm_recurrence(*parts, detached=True))
    assert (without[0] - wanted[0]).norm() > 0.05 * wanted[0].norm()  # else this would say nothing


@pytest.mark.parametrize("pieces", [[1] * LENGTH, [5, 1, 6], [1, 11]])
@pytest.mark.parametrize("segment", [512, 4])
def test_in_pieces_with_a_state_it_is_what_it_is_at_once(student, pieces, segment, monkeypatch):
    ids = tokens(LENGTH)
    whole = student(ids).logits
    monkeypatch.setattr(distil_blocks, "SEGMENT", segment)  # longer sequences go through the state
    close(student(ids).logits, whole)
    cache = student.new_cache()
    found = [student(part, past_key_values=cache, use_cache=True).logits for part in ids.split(pieces, 1)]
    close(torch.cat(found, 1), whole)
    assert cache.get_seq_length() == LENGTH


@pytest.mark.parametrize("padding", [1, 3, 7])
def test_a_left_padded_row_is_what_it_is_alone_and_so_is_what_follows(student, padding):
    ids = tokens(LENGTH)
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    ids[0, :padding] = 0
    alone = student(ids[:1, padding:], use_cache=True)
    both = student(ids, attention_mask=mask, use_cache=True)
    close(both.logits[0, padding:], alone.logits[0], 1e-5)
    close(both.logits[1], student(ids[1:]).logits[0], 1e-5)
    more = tokens(1, seed=5)
    mask = torch.cat([mask, torch.ones(2, 1, dtype=mask.dtype)], 1)
    after = student(more, attention_mask=mask, past_key_values=both.past_key_values, use_cache=True).logits
    close(after[0], student(more[:1], past_key_values=alone.past_key_values, use_cache=True).logits[0], 1e-5)


def test_generation_in_a_padded_batch_is_that_of_each_row_and_beams_take_their_state_along(student):
    ids, mask = tokens(LENGTH), torch.ones(2, LENGTH, dtype=torch.long)
    mask[0, :4], ids[0, :4] = 0, 0
    more = {"max_new_tokens": 6, "pad_token_id": 0, "eos_token_id": None}
    for kind in ({"do_sample": False}, {"num_beams": 3, "do_sample": False}):
        both = student.generate(ids, attention_mask=mask, **more, **kind)[:, LENGTH:]
        for row, start in ((0, 4), (1, 0)):
            own = ids[row : row + 1, start:]
            alone = student.generate(own, attention_mask=torch.ones_like(own), **more, **kind)
            assert both[row].equal(alone[0, own.shape[1] :])


def test_the_state_has_the_size_that_the_configuration_names_whatever_was_read(student):
    for length in (4, LENGTH):
        state = student(tokens(length), use_cache=True).past_key_values
        assert state.nbytes() == student.config.state_bytes(2)
    with pytest.raises(ValueError, match="cannot take back tokens"):
        state.layers[0].crop(1)
    state.layers[1].reset()
    assert state.layers[1].get_seq_length() == state.layers[1].nbytes() == 0


def test_the_cells_compute_in_float32_under_autocast(student):
    ids = tokens(LENGTH)
    with torch.autocast("cpu", torch.bfloat16):
        half = student(ids, use_cache=True)
    assert {x.dtype for layer in half.past_key_values.layers for n, x in layer.held().items() if n != "conv"} == {
        torch.float32
    }
    exact = student(ids).logits
    assert (half.logits - exact).norm() < 0.05 * exact.norm()


def test_labels_and_foreign_states_are_treated_as_by_the_other_student(student):
    ids = tokens(LENGTH)
    logits = student(ids).logits
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    close(student(ids, labels=ids).loss, loss, 1e-5)
    close(student(ids, logits_to_keep=1).logits, logits[:, -1:], 1e-6)
    with pytest.raises(ValueError, match="a Distil-xLSTM keeps a DistilCache"):
        student(ids, past_key_values=tiny_teacher()(ids, use_cache=True).past_key_values)


@pytest.mark.parametrize("tied", [False, True])
def test_conversion_copies_embedding_and_head_and_starts_the_blocks_by_the_seed(tmp_path, tied):
    teacher = tiny_teacher(num_hidden_layers=8, tie_word_embeddings=tied)
    teacher.save_pretrained(tmp_path / "teacher")
    folders = {}
    for name, seed in (("one", 0), ("same", 0), ("other", 1)):
        (tmp_path / name).mkdir()
        convert_distil(tmp_path / "teacher", tmp_path / name, seed=seed)
        folders[name] = {k: v for f in (tmp_path / name).glob("*.safetensors") for k, v in load_file(f).items()}
    one, same, other = folders.values()
    assert all(one[name].equal(same[name]) for name in one)
    assert not one["model.layers.1.xlstm.proj_up.weight"].equal(other["model.layers.1.xlstm.proj_up.weight"])
    assert one["model.embed_tokens.weight"].equal(teacher.model.embed_tokens.weight)
    assert ("lm_head.weight" in one) is not tied
    assert tied or one["lm_head.weight"].equal(teacher.lm_head.weight)
    assert all(x.isfinite().all() for x in one.values())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "one", dtype=torch.float32)
    assert isinstance(loaded, DistilXLSTMForCausalLM)
    assert all(loaded.get_parameter(name).equal(x) for name, x in one.items())  # nothing was drawn anew
    assert (tmp_path / "one/generation_config.json").is_file()
    new = [x for name, x in one.items() if name.startswith(("model.layers", "model.norm"))]
    assert sum(x.numel() for x in new) == Blocks(32, 8).parameters


@pytest.mark.parametrize(("width", "layers"), [(32, 2), (96, 5), (576, 4)])
def test_the_parameters_are_counted_exactly(width, layers):
    base = tiny_teacher(hidden_size=width, num_hidden_layers=layers, vocab_size=8).config
    with torch.device("meta"):
        model = DistilXLSTMForCausalLM(DistilXLSTMConfig(base))
    assert sum(p.numel() for p in model.trained_parameters().values()) == Blocks(width, layers).parameters


def test_it_is_saved_and_loaded_as_it_is(student, tmp_path):
    student.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert again(tokens(LENGTH)).logits.equal(student(tokens(LENGTH)).logits)
    assert AutoConfig.from_pretrained(tmp_path).num_blocks == 4


def test_teachers_and_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="teacher of type 'gpt2' is not supported"):
        DistilXLSTMConfig(AutoConfig.for_model("gpt2"))
    with pytest.raises(ValueError, match="heads=5: expected a proper divisor of the teacher's width 32"):
        DistilXLSTMConfig(tiny_teacher().config, heads=5)
    assert DistilXLSTMConfig(tiny_teacher().config).vocab_size == VOCABULARY
