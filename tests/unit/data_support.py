"""A tiny tokenizer, job folders and shards for the tests of the data side."""

from pathlib import Path
from typing import Any

import numpy as np

from xlstm_distill.contract.job import Job, JobFolder, World
from xlstm_distill.contract.schema import Config, Data, Source, Teacher
from xlstm_distill.data.shards import sample, shard_writer

ALONE = World()
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEXT = "the quick brown fox jumps over the lazy dog and the little cat sleeps under the old tree"


class NeverStop:
    def check(self) -> None: ...

    def requested(self, also: bool = False) -> bool:
        return also


def make_tokenizer(folder: Path, *, template: str = CHATML, bos: bool = False, eos: bool = True) -> Path:
    """A byte-level BPE trained on one line, in an HF folder."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    inner.train_from_iterator(
        [TEXT], trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet)
    )
    if bos:
        inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    names = {"bos_token": "<s>"} | ({"eos_token": "</s>"} if eos else {})
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, **names)
    tokenizer.chat_template = template or None
    tokenizer.save_pretrained(folder)
    return folder


def make_config(sources: dict[str, Source] | None = None, **data: Any) -> Config:
    settings = Data(sources=sources or {}, **{"sequence": 16, "validation": 0.2, "shard_bytes": 1 << 16} | data)
    return Config(teacher=Teacher(name="tiny", family="llama", source="folder", path=""), data=settings)


def make_job(
    root: Path, name: str, config: Config, *, inputs: tuple[str, ...] = (), pieces: tuple[str, ...] = ()
) -> JobFolder:
    folder = JobFolder(root / name, Job(name, name, {"test": 1}, inputs, pieces=pieces), config)
    folder.output.mkdir(parents=True, exist_ok=True)
    folder.write()
    return folder


def make_fetched(root: Path, config: Config, tokenizer: Path) -> JobFolder:
    """A finished fetch job whose teacher is a tokenizer alone."""
    fetched = make_job(root, "fetch", config)
    (fetched.output / "teacher").symlink_to(tokenizer, target_is_directory=True)
    fetched.finish({})
    return fetched


def make_shards(folder: Path, count: int, *, sequence: int = 8, first: int = 0, shard_bytes: int = 400) -> Path:
    """Samples whose tokens all equal their own number, so that a batch tells where it came from."""
    with shard_writer(folder, sequence, shard_bytes) as writer:
        for number in range(first, first + count):
            row = np.full(sequence + 1, number)
            writer.write(sample(row, np.ones(sequence + 1), row))
    return folder
