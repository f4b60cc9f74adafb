"""The student is a PreTrainedModel in full: saving, loading, generating, wrapping, resizing, compiling."""

import copy
import pickle
import warnings

import pytest
import torch
from data_support import make_tokenizer
from model_support import FAMILIES, VOCABULARY, tiny_student, tiny_teacher, tokens
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, DynamicCache

from xlstm_distill.model import HybridCache, HybridConfig, HybridForCausalLM

FIXED = {"eos_token_id": None, "max_new_tokens": 8}


# Saving and loading


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
def test_saved_in_shards_and_loaded_by_the_auto_classes_it_is_the_same_to_the_bit(tmp_path, family, tied):
    _, student = tiny_student(tmp_path, family, tied=tied)
    student.save_pretrained(tmp_path / "again", max_shard_size="10kB")
    assert len(list((tmp_path / "again").glob("*.safetensors"))) > 3
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert type(again) is HybridForCausalLM
    assert again(tokens()).logits.equal(student(tokens()).logits)
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == tied
    first, second = ({**model.config.to_dict(), "_name_or_path": ""} for model in (student, again))
    assert first == second


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_it_loads_in_any_type(tmp_path, dtype):
    _, student = tiny_student(tmp_path)
    student.save_pretrained(tmp_path / "again")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=dtype)
    assert {p.dtype for p in loaded.parameters()} == {dtype}
    out, wanted = loaded(tokens()).logits, student(tokens()).logits
    assert out.dtype == dtype
    assert (out.float() - wanted).norm() / wanted.norm() < (1e-6 if dtype == torch.float32 else 5e-2)
    assert loaded.generate(tokens(), do_sample=False, **FIXED).shape == (2, 20)


@pytest.mark.parametrize("device_map", ["cpu", "auto"])
def test_it_loads_by_device_map(tmp_path, device_map):
    _, student = tiny_student(tmp_path)
    student.save_pretrained(tmp_path / "again")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "again", device_map=device_map)
    torch.testing.assert_close(loaded(tokens().to(loaded.device)).logits.cpu(), student(tokens()).logits)


def test_layers_that_lie_on_disk_give_the_same(tmp_path):
    _, student = tiny_student(tmp_path)
    student.save_pretrained(tmp_path / "again")
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu"}
    places |= {"model.rotary_emb": "cpu", "lm_head": "cpu"}
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "again", device_map=places, offload_folder=str(tmp_path / "off")
    )
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[0, :3] = 0
    given = {"attention_mask": mask, "do_sample": False, **FIXED}
    assert loaded.generate(tokens(), **given).equal(student.generate(tokens(), **given))
    assert loaded._no_split_modules == {"LlamaDecoderLayer"}


def test_what_a_folder_lacks_starts_as_stage_1_starts_and_says_so(tmp_path, caplog):
    _, student = tiny_student(tmp_path, random=False)
    fresh = HybridForCausalLM(student.config).mixer_parameters()
    for name, parameter in student.mixer_parameters().items():
        torch.testing.assert_close(fresh[name], parameter)
    loaded, report = HybridForCausalLM.from_pretrained(
        tmp_path / "teacher", config=student.config, output_loading_info=True
    )
    assert report["missing_keys"] == set(student.mixer_parameters())
    assert loaded(tokens()).logits.equal(student(tokens()).logits)


def test_other_choices_at_load_are_taken_and_never_draw_weights_anew(tmp_path):
    _, student = tiny_student(tmp_path)
    student.save_pretrained(tmp_path / "again")
    load = lambda **more: HybridForCausalLM.from_pretrained(tmp_path / "again", **more)  # noqa: E731
    for choices in ({"window": 3}, {"use_mlstm": False}, {"feature_map": "hedgehog"}, {"feature_rope": "after"}):
        loaded = load(**choices)
        assert {name: getattr(loaded.config, name) for name in choices} == choices
        assert all(p.equal(q) for p, q in zip(loaded.parameters(), student.parameters(), strict=True))
        assert not loaded(tokens()).logits.equal(student(tokens()).logits)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        load(gate_input="hidden")  # its gate has another width


# Configuration


def test_a_configuration_survives_json_and_shares_nothing_with_the_teachers(tmp_path):
    teacher = tiny_teacher("olmo3")
    config = HybridConfig(
        teacher.config, window=7, sinks=1, feature_map="hedgehog", feature_rope="after", gate_input="hidden",
        input_gate_soft_cap=9.0, output_gate_bias=-2.0, reset_at_documents=True, use_gates=False, chunk=16,
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert type(again) is HybridConfig
    assert type(again.base_config) is type(teacher.config)
    assert {**again.to_dict(), "_name_or_path": ""} == {**config.to_dict(), "_name_or_path": ""}
    assert again.base_config.layer_types == teacher.config.layer_types
    changed = again.to_diff_dict()
    assert changed["window"] == 7
    assert changed["base_config"]["model_type"] == "olmo3"
    before = teacher.config.to_dict()
    HybridForCausalLM(config).resize_token_embeddings(VOCABULARY + 5)
    assert teacher.config.to_dict() == before
    assert teacher(tokens()).logits.shape[-1] == VOCABULARY


def test_libraries_read_a_decoders_shape_off_it(tmp_path):
    base = tiny_teacher().config
    config = HybridConfig(base)
    for name in (
        "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size",
        "max_position_embeddings", "intermediate_size", "initializer_range", "bos_token_id", "eos_token_id",
    ):  # fmt: skip
        assert getattr(config, name) == getattr(base, name), name
    assert config.head_dim == 8
    assert config.get_text_config() is config


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"feature_map": "relu"}, "feature_map='relu': expected one of softmax, hedgehog"),
        ({"feature_rope": "inside"}, "feature_rope='inside': expected one of before, after, none"),
        ({"gate_input": "x"}, "gate_input='x': expected one of qkv, qkv_rotated, hidden"),
        ({"kernel": "cuda"}, "kernel='cuda': expected one of auto, torch, triton"),
        ({"window": 0}, "expected window ≥ 1"),
        ({"sinks": -1}, "sinks ≥ 0"),
        ({"chunk": 0}, "chunk ≥ 1"),
        ({"input_gate_soft_cap": 0.0}, "input_gate_soft_cap > 0"),
        ({"input_gate_soft_cap": 81.0}, "input_gate_soft_cap"),
        ({"input_gate_soft_cap": float("nan")}, "input_gate_soft_cap"),
        ({"use_mlstm": False, "use_window": False}, "nothing would be mixed"),
        ({"base_config": {"model_type": "mistral"}}, "'mistral' is not supported; supported: llama, qwen2, qwen3, olm"),
    ],
)
def test_choices_that_cannot_work_are_one_line(choices, message):
    with pytest.raises(ValueError, match=r".") as caught:
        HybridConfig(**choices)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


# Forward


def test_hidden_states_tuples_losses_and_kept_logits(tmp_path):
    teacher, student = tiny_student(tmp_path, window=40, sinks=0, use_mlstm=False)
    ids = tokens()
    out = student(ids, labels=ids, output_hidden_states=True, output_attentions=True)
    wanted = teacher(ids, labels=ids, output_hidden_states=True)
    torch.testing.assert_close(out.loss, wanted.loss, atol=1e-4, rtol=1e-4)
    assert len(out.hidden_states) == len(wanted.hidden_states) == 3
    for a, b in zip(out.hidden_states, wanted.hidden_states, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    assert out.attentions is None
    loss, logits, _ = student(ids, labels=ids, output_hidden_states=True, return_dict=False)
    assert loss.equal(out.loss)
    assert logits.equal(out.logits)
    torch.testing.assert_close(student(ids, logits_to_keep=3).logits, out.logits[:, -3:])
    torch.testing.assert_close(student(inputs_embeds=student.get_input_embeddings()(ids)).logits, out.logits)


def test_the_loss_of_labels_is_the_shifted_cross_entropy_over_as_many_as_the_trainer_says(tmp_path):
    _, student = tiny_student(tmp_path)
    ids = tokens()
    labels = ids.clone()
    labels[:, :4] = -100
    out = student(ids, labels=labels)
    args = out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    torch.testing.assert_close(out.loss, torch.nn.functional.cross_entropy(*args))
    given = student(ids, labels=labels, num_items_in_batch=torch.tensor(100)).loss
    torch.testing.assert_close(given, torch.nn.functional.cross_entropy(*args, reduction="sum") / 100)


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputed_activations_give_the_same_loss_and_gradients(tmp_path, reentrant):
    _, student = tiny_student(tmp_path)
    ids, grads, losses = tokens(), [], []
    student.train()
    enable = getattr(student, "activation_checkpointing_enable", None) or student.gradient_checkpointing_enable
    for checkpointing in (False, True):
        if checkpointing:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                enable({"use_reentrant": reentrant})
            assert student.model.layers[0].gradient_checkpointing
        loss = student(ids, labels=ids).loss
        loss.backward()
        losses.append(loss)
        grads.append([p.grad for p in student.parameters()])
        student.zero_grad()
    assert losses[0].equal(losses[1])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


# Generation


def generate(student, ids, seed=0, **settings):
    torch.manual_seed(seed)
    return student.generate(ids, **{**FIXED, **settings})


@pytest.mark.parametrize(
    "settings",
    [
        {"do_sample": False},
        {"do_sample": True, "temperature": 0.7, "top_p": 0.9},
        {"do_sample": False, "num_beams": 3},
        {"do_sample": True, "num_beams": 3},
        {"do_sample": True, "num_return_sequences": 3},
        {"do_sample": False, "num_beams": 4, "num_return_sequences": 2, "length_penalty": 0.5},
        {"do_sample": False, "repetition_penalty": 1.3},
    ],
)
def test_every_way_of_writing_gives_with_its_state_what_it_gives_without(tmp_path, settings):
    _, student = tiny_student(tmp_path)
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, :5] = 0
    written = generate(student, tokens(), attention_mask=mask, **settings)
    assert written.tolist() == generate(student, tokens(), attention_mask=mask, use_cache=False, **settings).tolist()
    assert written.shape == (2 * settings.get("num_return_sequences", 1), 20)


def test_greedy_writing_is_an_argmax_over_the_whole_each_time(tmp_path):
    _, student = tiny_student(tmp_path)
    ids = tokens(10, 1)
    written = generate(student, ids, do_sample=False)
    with torch.no_grad():
        for _ in range(8):
            ids = torch.cat([ids, student(ids).logits[:, -1:].argmax(-1)], 1)
    assert written.tolist() == ids.tolist()


def test_streams_time_limits_and_continuing_from_the_returned_state(tmp_path):
    _, student = tiny_student(tmp_path)
    ids, heard = tokens(12, 1), []

    class Streamer:
        def put(self, value):
            heard.extend(value.flatten().tolist())

        def end(self):
            heard.append("end")

    written = generate(student, ids, do_sample=False, streamer=Streamer())
    assert heard == [*written[0].tolist(), "end"]
    assert generate(student, ids, max_new_tokens=10**6, max_time=0.05).shape[1] < 10**5
    first = generate(student, ids, do_sample=False, max_new_tokens=3, return_dict_in_generate=True)
    assert isinstance(first.past_key_values, HybridCache)
    rest = generate(student, first.sequences, do_sample=False, max_new_tokens=5, past_key_values=first.past_key_values)
    assert rest.tolist() == written.tolist()
    embedded = student.get_input_embeddings()(ids)
    assert student.generate(inputs_embeds=embedded, do_sample=False, **FIXED).tolist() == written[:, 12:].tolist()


@pytest.fixture
def worded(tmp_path):
    """(student, tokenizer) of one vocabulary."""
    folder = tmp_path / "words"
    folder.mkdir()
    make_tokenizer(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    _, student = tiny_student(tmp_path, teacher=tiny_teacher(vocab_size=len(tokenizer)))
    student.save_pretrained(folder)
    return student, tokenizer, folder


def test_stop_strings_end_the_text(worded):
    student, tokenizer, _ = worded
    ids = tokens(6, 1)
    free = student.generate(ids, do_sample=False, **FIXED)
    stop = tokenizer.decode(free[0, 9])
    ended = student.generate(ids, do_sample=False, stop_strings=[stop], tokenizer=tokenizer, **FIXED)
    assert ended.shape[1] <= 10
    assert ended.tolist() == free[:, : ended.shape[1]].tolist()
    assert tokenizer.decode(ended[0]).endswith(stop)


def test_a_pipeline_writes(worded):
    from transformers import pipeline

    _, tokenizer, folder = worded
    writer = pipeline("text-generation", model=str(folder), tokenizer=tokenizer)
    (found,) = writer("the quick fox", max_new_tokens=4, do_sample=False)
    assert found["generated_text"].startswith("the quick fox")


@pytest.mark.parametrize("way", ["assistant", "prompt look-up"])
def test_assisted_decoding_is_refused_before_anything_runs(tmp_path, way):
    teacher, student = tiny_student(tmp_path)
    student.forward = teacher.forward = lambda *args, **kwargs: pytest.fail("it ran")
    settings = {"assistant_model": teacher} if way == "assistant" else {"prompt_lookup_num_tokens": 2}
    with pytest.raises(ValueError, match=r"^assisted generation is not supported with stateful models.*Hybrid"):
        student.generate(tokens(12, 1), **settings, **FIXED)


def test_a_state_of_another_kind_is_refused_and_other_kinds_asked_for_are_ignored(tmp_path, caplog):
    _, student = tiny_student(tmp_path)
    for use in ({"use_cache": True}, {}):
        with pytest.raises(ValueError, match=r"past_key_values=DynamicCache: a hybrid xLSTM keeps a HybridCache"):
            student(tokens(), past_key_values=DynamicCache(), **use)
    with pytest.raises(ValueError, match="past_key_values=DynamicCache"):
        generate(student, tokens(), past_key_values=DynamicCache())
    plain = generate(student, tokens(), do_sample=False)
    for kind in ("static", "dynamic", "quantized"):
        assert generate(student, tokens(), do_sample=False, cache_implementation=kind).equal(plain)


# Embeddings


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("size", [VOCABULARY + 8, VOCABULARY - 7])
def test_the_vocabulary_grows_and_shrinks(tmp_path, tied, size):
    _, student = tiny_student(tmp_path, tied=tied)
    ids, kept = tokens() % (VOCABULARY - 7), min(size, VOCABULARY)
    before = student(ids).logits
    student.resize_token_embeddings(size, mean_resizing=False)
    after = student(ids).logits
    assert after.shape[-1] == size == student.config.vocab_size == student.config.base_config.vocab_size
    assert after[..., :kept].equal(before[..., :kept])
    assert (student.lm_head.weight is student.model.embed_tokens.weight) == tied
    student.save_pretrained(tmp_path / "resized")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "resized")
    assert again(ids).logits.equal(after)
    assert student(ids, labels=ids).loss.isfinite()


def test_embeddings_are_got_and_set_and_parameters_counted(tmp_path):
    teacher, student = tiny_student(tmp_path)
    new = torch.nn.Embedding(VOCABULARY, 32)
    student.set_input_embeddings(new)
    assert student.get_input_embeddings() is student.model.embed_tokens is new
    assert student.get_output_embeddings() is student.lm_head
    own = sum(p.numel() for p in student.mixer_parameters().values())
    assert student.num_parameters() == teacher.num_parameters() + own
    assert student.num_parameters(exclude_embeddings=True) == teacher.num_parameters(exclude_embeddings=True) + own
    student.model.requires_grad_(False)
    assert student.num_parameters(only_trainable=True) == VOCABULARY * 32


@pytest.mark.parametrize(
    ("choices", "idle"),
    [
        ({}, set()),
        ({"use_gates": False}, {"input_gate", "forget_gate"}),
        ({"use_window": False}, {"output_gate"}),
        ({"use_mlstm": False}, {"query_map", "key_map", "input_gate", "forget_gate", "output_gate"}),
    ],
)
def test_idle_parameters_are_those_without_a_gradient(tmp_path, choices, idle):
    _, student = tiny_student(tmp_path, **choices)
    student(tokens(), labels=tokens()).loss.backward()
    without = {name for name, p in student.named_parameters() if p.grad is None}
    assert set(student.idle_parameters()) == without
    assert {name.split("self_attn.")[1].split(".")[0] for name in without} == idle


# Copies, wrappers, trainers, compilers


def test_model_configuration_and_state_are_pickled_and_copied(tmp_path):
    _, student = tiny_student(tmp_path)
    ids = tokens()
    with torch.no_grad():
        wanted = student(ids).logits
        state = student(ids[:, :7], use_cache=True).past_key_values
        for again in (copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))):
            model = again(student)
            assert model(ids).logits.equal(wanted)
            rest = model(ids[:, 7:], past_key_values=again(state), use_cache=True).logits
            torch.testing.assert_close(rest, wanted[:, 7:], atol=1e-4, rtol=1e-4)
            assert again(student.config).to_dict() == student.config.to_dict()


def test_a_lora_trains_alone_is_saved_loaded_and_merged(tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model

    _, student = tiny_student(tmp_path)
    student.save_pretrained(tmp_path / "base")
    ids, before = tokens(), {name: p.clone() for name, p in student.named_parameters()}
    lora = get_peft_model(student, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    trained = [p for p in lora.parameters() if p.requires_grad]
    assert len(trained) == 2 * 2 * 2  # A and B of two projections of two layers
    optimizer, losses = torch.optim.AdamW(trained, 1e-2), []
    for _ in range(8):
        losses.append(lora(ids, labels=ids).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.9 * losses[0]
    now = {name.replace("base_layer.", ""): p for name, p in student.named_parameters() if "lora" not in name}
    assert all(now[name].equal(p) for name, p in before.items())
    wanted = lora(ids).logits
    lora.save_pretrained(tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    again = PeftModel.from_pretrained(base, tmp_path / "adapter")
    torch.testing.assert_close(again(ids).logits, wanted)
    torch.testing.assert_close(lora.merge_and_unload()(ids).logits, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_transformers_trainer_trains_it_with_accumulated_gradients(tmp_path):
    from transformers import Trainer, TrainingArguments

    _, student = tiny_student(tmp_path)
    ids, before = tokens(12, 4), copy.deepcopy(student)
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "out"), max_steps=1, per_device_train_batch_size=1, gradient_accumulation_steps=4,
        report_to=[], save_strategy="no", use_cpu=True, learning_rate=1e-2,
    )  # fmt: skip
    result = Trainer(student, arguments, train_dataset=[{"input_ids": row, "labels": row} for row in ids]).train()
    assert result.training_loss == pytest.approx(before(ids, labels=ids).loss.item(), rel=1e-4)
    assert not student.lm_head.weight.equal(before.lm_head.weight)


@pytest.mark.slow
@pytest.mark.parametrize("choices", [{}, {"feature_rope": "after", "feature_map": "hedgehog"}])
def test_a_compiled_layer_gives_the_same_output_and_gradients(tmp_path, choices):
    _, student = tiny_student(tmp_path, **choices)
    layer = student.model.layers[1]
    torch.manual_seed(0)
    x = torch.randn(2, 12, 32)
    cos_sin = student.model.rotary_emb(x, torch.arange(12)[None])
    found = []
    for run in (layer, torch.compile(layer, backend="aot_eager", fullgraph=True)):
        leaf = x.clone().requires_grad_()
        out = run(leaf, position_embeddings=cos_sin)
        out.square().sum().backward()
        found.append([out, leaf.grad, *(p.grad for p in layer.parameters())])
        layer.zero_grad()
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
