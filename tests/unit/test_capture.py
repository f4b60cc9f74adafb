"""What the cache stage writes is the teacher's own distribution, beside the very tokens that it was given."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from data_support import ALONE, NeverStop, make_config, make_job

from xlstm_distill.contract.exitcode import Mistake, Stopped
from xlstm_distill.contract.job import JobFolder, World
from xlstm_distill.contract.manifest import read_manifest
from xlstm_distill.contract.schema import Cache, Source, Strategy, Student
from xlstm_distill.data.shards import check_targets, sample, shard_writer
from xlstm_distill.data.stream import Part, SampleStream, read_samples
from xlstm_distill.teacher.capture import Capture, run

VOCABULARY, SEQUENCE, TOP_K = 90, 12, 5
COUNTS = {"train": 11, "validation": 3}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        num_hidden_layers=2, hidden_size=16, num_attention_heads=4, num_key_value_heads=2, intermediate_size=32,
        vocab_size=VOCABULARY, max_position_embeddings=64, initializer_range=0.4,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder := tmp_path_factory.mktemp("teacher"))
    return folder


def make_shards(folder: Path, count: int, seed: int = 0) -> None:
    rng = np.random.default_rng(seed)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with shard_writer(folder, SEQUENCE, 1 << 16) as writer:
        for number in range(count):
            row = rng.integers(0, VOCABULARY, SEQUENCE + 1)
            writer.write(sample(row, rng.integers(0, 2, SEQUENCE + 1), np.full(SEQUENCE + 1, number)))


def cache_job(root: Path, teacher: Path, sources: tuple[str, ...] = ("mine",), **cache: int) -> JobFolder:
    config = make_config({name: Source() for name in sources}, sequence=SEQUENCE)
    settings = {"top_k": TOP_K, "micro_batch": 4, "chunk": 7} | cache
    config = replace(config, cache=Cache(**settings), strategy=Strategy(precision="float32", threads=1))
    fetched = make_job(root, "fetch", config)
    (fetched.output / "teacher").symlink_to(teacher, target_is_directory=True)
    (fetched.output / "teacher.json").write_text(json.dumps({"weights": "aa", "tokenizer": "bb"}), encoding="utf-8")
    fetched.finish({})
    tokenized = make_job(root, "tokenize", config)
    for seed, name in enumerate(sources):
        for split, count in COUNTS.items():
            make_shards(tokenized.output / name / split, count, seed)
    tokenized.finish({})
    return make_job(root, "cache", config, inputs=("fetch", "tokenize"), pieces=sources)


def test_targets_are_the_teachers_log_probabilities_of_the_next_token(tmp_path, teacher):
    from transformers import AutoModelForCausalLM

    job = cache_job(tmp_path, teacher)
    run(job, ALONE, NeverStop())
    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float64)
    for split, count in COUNTS.items():
        batch = read_samples(job.output / "mine" / split, 99)
        ids, log_probs, tail = batch.targets
        assert ids.shape == log_probs.shape == (count, SEQUENCE, TOP_K)
        assert tail.shape == (count, SEQUENCE)
        with torch.no_grad():
            reference = model(batch.tokens[:, :-1]).logits.log_softmax(-1)
        wanted, wanted_ids = reference.topk(TOP_K)
        assert (ids == wanted_ids).float().mean() > 0.99  # rounding may swap equals
        torch.testing.assert_close(log_probs.double(), reference.gather(-1, ids), atol=1e-5, rtol=2**-10)
        rest = (1 - wanted.exp().sum(-1)).log()
        torch.testing.assert_close(tail.double(), rest, atol=1e-4, rtol=2**-10)


def test_with_reset_each_document_of_a_sample_is_seen_alone(tmp_path, teacher):
    config = make_config({"mine": Source()}, sequence=SEQUENCE)
    split = replace(config, student=Student(reset_at_documents=True), strategy=Strategy(precision="float32", threads=1))
    tokens = torch.randint(0, VOCABULARY, (2, SEQUENCE + 1), generator=torch.Generator().manual_seed(0))
    documents = torch.zeros_like(tokens)
    documents[:, 5:] = 1
    first, second = tokens[:, :5], tokens[:, 5:]
    whole = Capture(teacher, split).targets(tokens, documents)
    plain = Capture(teacher, replace(split, student=Student()))
    left = plain.targets(torch.cat([first, first[:, :1]], 1), documents[:, :6])
    right = plain.targets(second, documents[:, 5:])
    for n in (1, 2):  # log-probabilities, tail
        found = whole[n].unflatten(0, (2, SEQUENCE))
        torch.testing.assert_close(found[:, :5], left[n].unflatten(0, (2, 5)), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(found[:, 5:], right[n].unflatten(0, (2, SEQUENCE - 5)), atol=1e-4, rtol=1e-4)


def test_tokens_masks_and_documents_are_those_of_the_token_shards(tmp_path, teacher):
    job = cache_job(tmp_path, teacher)
    run(job, ALONE, NeverStop())
    for split in COUNTS:
        given, kept = (read_samples(job.input(name) / "mine" / split, 99) for name in ("tokenize", "cache"))
        assert given.tokens.equal(kept.tokens)
        assert given.mask.equal(kept.mask)
        assert given.document.equal(kept.document)


def test_the_stream_mixes_them_and_the_note_says_whose_they_are(tmp_path, teacher):
    job = cache_job(tmp_path, teacher, ("mine", "yours"))
    run(job, ALONE, NeverStop())
    parts = [Part(job.output / name / "train", 0.5) for name in ("mine", "yours")]
    assert next(SampleStream(parts, batch=4, seed=0)).targets[0].shape == (4, SEQUENCE, TOP_K)
    for part in parts:
        check_targets(part.folder, {"teacher": "aa", "tokenizer": "bb", "top_k": TOP_K})
        with pytest.raises(Mistake, match="made with teacher=aa, this run has teacher=cc"):
            check_targets(part.folder, {"teacher": "cc"})


def test_facts_count_and_max_samples_cuts_both_splits(tmp_path, teacher):
    job = cache_job(tmp_path, teacher, max_samples=2)
    run(job, ALONE, NeverStop())
    facts = read_manifest(job.piece_path("mine")).facts
    assert {split: facts[split]["samples"] for split in COUNTS} == {"train": 2, "validation": 2}
    assert facts["train"]["tokens"] == 2 * SEQUENCE
    assert facts["train"]["bytes_per_token"] == pytest.approx(4 * TOP_K + 2 + 28 / SEQUENCE, abs=1e-3)
    last = json.loads((job.path / "metrics.jsonl").read_text().splitlines()[-1])
    assert (last["step"], last["total"]) == (4, 4)


def test_after_a_stop_finished_sources_stand_and_only_the_others_are_done(tmp_path, teacher):
    class StopLater:
        left = 5

        def check(self):
            self.left -= 1
            if self.left < 0:
                raise Stopped("now")

    job = cache_job(tmp_path, teacher, ("mine", "yours"))
    with pytest.raises(Stopped):
        run(job, ALONE, StopLater())
    assert job.piece_done("mine")
    assert [path.name for path in job.output.iterdir()] == ["mine"]
    before = (job.output / "mine" / "train" / "index.json").stat().st_mtime_ns
    run(job, ALONE, NeverStop())
    assert job.piece_done("yours")
    assert (job.output / "mine" / "train" / "index.json").stat().st_mtime_ns == before


def test_damaged_targets_are_noticed(tmp_path, teacher):
    job = cache_job(tmp_path, teacher)
    run(job, ALONE, NeverStop())
    (shard,) = (job.output / "mine" / "train").glob("shard.*.mds")
    data = bytearray(shard.read_bytes())
    data[-20] ^= 1
    shard.write_bytes(data)
    with pytest.raises(Mistake, match="damaged shard"):
        read_samples(job.output / "mine" / "train", 99)


def test_shards_of_another_length_or_vocabulary_are_refused(tmp_path, teacher):
    job = cache_job(tmp_path / "a", teacher)
    longer = replace(job, config=replace(job.config, data=replace(job.config.data, sequence=24)))
    with pytest.raises(Mistake, match=r"data.sequence=24: the shards in .* hold samples of 12"):
        run(longer, ALONE, NeverStop())
    with shard_writer(tmp_path / "b" / "mine" / "train", SEQUENCE, 1 << 16) as writer:
        writer.write(sample(np.full(SEQUENCE + 1, VOCABULARY), np.ones(SEQUENCE + 1), np.zeros(SEQUENCE + 1)))
    make_shards(tmp_path / "b" / "mine" / "validation", 1)
    foreign = replace(job, config=replace(job.config, data=replace(job.config.data, shards=str(tmp_path / "b"))))
    with pytest.raises(Mistake, match="token 90 is outside the teacher's vocabulary of 90"):
        run(foreign, ALONE, NeverStop())


def test_more_than_one_rank_is_refused(tmp_path, teacher):
    with pytest.raises(Mistake, match="got 2 ranks"):
        run(cache_job(tmp_path, teacher), World(size=2), NeverStop())
