"""A tiny run to evaluate: a random Llama as the teacher, a word tokenizer, held-out samples in memory."""

import types

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from xlstm_distill.contract.job import Job, JobFolder
from xlstm_distill.contract.schema import Config, Data, Eval, Expert, Source, Student, Teacher

VOCABULARY = 300
CHAT_TEMPLATE = "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} {% endfor %}<assistant>"


class NoStop:
    def check(self):
        pass

    def requested(self, also=False):
        return also

    def expect(self, seconds):
        pass


def tiny_llama(seed=0, **changes):
    torch.manual_seed(seed)
    shape = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 1,
        "pad_token_id": 0,
        "initializer_range": 0.3,
    }
    return LlamaForCausalLM(LlamaConfig(**{**shape, **changes})).eval()


def tiny_tokenizer(chat=False):
    """Bytes, so that every text has tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {"<pad>": 0, "<eos>": 1, **{letter: i + 2 for i, letter in enumerate(alphabet)}}
    tokenizer = Tokenizer(models.BPE(words, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    from tokenizers import decoders

    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", bos_token="<eos>")
    fast.chat_template = CHAT_TEMPLATE if chat else None
    return fast


def save_model(folder, model, tokenizer):
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def samples(count=4, length=96, seed=0):
    """What `read_samples` gives: random tokens of two documents per sample."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(2, 258, (count, length + 1), generator=generator)
    document = torch.arange(2 * count).repeat_interleave((length + 1) // 2 + 1).view(count, -1)[:, : length + 1]
    mask = torch.ones(count, length + 1, dtype=torch.bool)
    return types.SimpleNamespace(tokens=tokens, mask=mask, document=document)


def config(tasks=(), experts=("math",), **changes):
    return Config(
        teacher=Teacher("tiny", "llama", "folder", "tiny"),
        experts=experts,
        student=Student(window=16),
        data=Data(sources={"prose": Source(kind="text", path="x")}, sequence=96),
        expert={name: Expert() for name in experts},
        eval=Eval(tasks=tuple(tasks), samples=4, batch=3),
        **changes,
    )


def job(run, settings, name, stage, inputs=(), **fields):
    folder = JobFolder(run / "jobs" / name, Job(name, stage, {"stage": name}, inputs, **fields), settings)
    folder.output.mkdir(parents=True, exist_ok=True)
    folder.write()
    return folder


def finished_run(run, settings, pieces=("teacher", "aligned"), chat=False):
    """Every job before `eval` is finished; returns the folder of `eval`."""
    tokenizer = tiny_tokenizer(chat)
    fetch = job(run, settings, "fetch", "fetch")
    save_model(fetch.output / "teacher", tiny_llama(0), tokenizer)
    fetch.finish({})
    tokenize = job(run, settings, "tokenize", "tokenize", ("fetch",))
    (tokenize.output / "shards").write_text("in memory")
    tokenize.finish({})
    align = job(run, settings, "align", "align", ("fetch", "tokenize"))
    save_model(align.output / "student", tiny_llama(1), tokenizer)
    align.finish({"error_before": [0.4, 0.2], "error_after": [0.1, 0.19], "output_gate": [[0.5, 0.0], [0.2, 0.3]]})
    return job(run, settings, "eval", "eval", ("fetch", "tokenize", "align"), pieces=tuple(pieces))
