"""What the cache stage writes is the teacher's own distribution, beside the very tokens that it was given."""

import json
import shutil
import threading
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from data_support import ALONE, NeverStop, make_config, make_job
from safetensors.torch import load_file, save_file
from train_support import small_disk

from xlstm_distill.contract.exitcode import Mistake, Stopped
from xlstm_distill.contract.files import exclusive
from xlstm_distill.contract.job import JobFolder, World
from xlstm_distill.contract.manifest import read_manifest
from xlstm_distill.contract.schema import Cache, Source, Strategy, Student, pieces_of
from xlstm_distill.contract.state import begun
from xlstm_distill.data.grid import default_steps
from xlstm_distill.data.priors import read_prior
from xlstm_distill.data.reader import Shards
from xlstm_distill.data.shards import sample, shard_writer
from xlstm_distill.data.stream import Batch, Part, SampleStream, read_samples
from xlstm_distill.runtime.metrics import Metrics
from xlstm_distill.teacher.capture import Capture, join_pieces, run
from xlstm_distill.teacher.index import check_targets, read_note

VOCABULARY, SEQUENCE, TOP_K = 90, 12, 5
FLOAT32 = Strategy(precision="float32", threads=1)
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


def make_shards(folder: Path, count: int, seed: int = 0, shard_bytes: int = 1 << 16) -> None:
    rng = np.random.default_rng(seed)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with shard_writer(folder, SEQUENCE, shard_bytes) as writer:
        for number in range(count):
            row = rng.integers(0, VOCABULARY, SEQUENCE + 1)
            writer.write(sample(row, rng.integers(0, 2, SEQUENCE + 1), np.full(SEQUENCE + 1, number)))


SMALL = 700
"""Bytes of a shard of 3 samples: then `train` has 4 of them."""


def cache_job(
    root: Path, teacher: Path, sources: tuple[str, ...] = ("mine",), parts: int = 1, shard: int = 1 << 16, **cache
) -> JobFolder:
    config = make_config({name: Source(parts=parts) for name in sources}, sequence=SEQUENCE)
    settings = {"top_k": TOP_K, "micro_batch": 4, "chunk": 7, "sampler": "topk"} | cache
    config = replace(config, cache=Cache(**settings), strategy=FLOAT32)
    fetched = make_job(root, "fetch", config)
    (fetched.output / "teacher").symlink_to(teacher, target_is_directory=True)
    (fetched.output / "teacher.json").write_text(json.dumps({"weights": "aa", "tokenizer": "bb"}), encoding="utf-8")
    fetched.finish({})
    tokenized = make_job(root, "tokenize", config)
    for seed, name in enumerate(sources):
        for split, count in COUNTS.items():
            make_shards(tokenized.output / name / split, count, seed, shard)
    tokenized.finish({})
    pieces = tuple(piece for name in sources for piece in pieces_of(name, config.sources[name]))
    return make_job(root, "cache", config, inputs=("fetch", "tokenize"), pieces=pieces)


class StopAfter:
    """A stop flag that is raised after so many looks."""

    def __init__(self, looks: int) -> None:
        self.left = looks

    def requested(self, also: bool = False) -> bool:
        self.left -= 1
        return also or self.left < 0


def samples(job: JobFolder, name: str = "mine", split: str = "train") -> Batch:
    return read_samples(job.output / name / split, 99)


def same(a: Batch, b: Batch) -> bool:
    return a.tokens.equal(b.tokens) and all(map(torch.equal, a.targets, b.targets))


def files(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*.*")) if f.is_file()}


def test_progress_goes_on_as_the_teacher_sees_the_text(tmp_path, teacher, monkeypatch):
    """Also while it only sees what the codec's prior is made from."""
    events, rows, log = [], Capture._rows, Metrics.log
    monkeypatch.setattr(Capture, "_rows", lambda *args: (events.append("seen"), rows(*args))[1])
    monkeypatch.setattr(Metrics, "log", lambda self, step, *args: (events.append(step), log(self, step, *args)))
    run(cache_job(tmp_path, teacher, shard=SMALL), ALONE, NeverStop())
    assert events[::2] == ["seen"] * (len(events) // 2)
    assert events[1::2] == sorted(set(events[1::2]))
    assert events[-1] == sum(COUNTS.values())


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
        assert (ids.sort().values == wanted_ids.sort().values).float().mean() > 0.99  # rounding may swap equals
        found = torch.cat([log_probs, tail[..., None]], -1).double()
        wanted = torch.cat([reference.gather(-1, ids), (1 - wanted.exp().sum(-1, keepdim=True)).log()], -1)
        bound = (1.1 / default_steps(TOP_K) / (wanted / 2).exp()).clamp(max=0.25)  # data/grid.py
        assert ((found - wanted).abs() <= bound + 1e-4).all()


def test_with_reset_each_document_of_a_sample_is_seen_alone(tmp_path, teacher):
    config = make_config({"mine": Source()}, sequence=SEQUENCE)
    config = replace(config, cache=Cache(sampler="topk"), strategy=FLOAT32)
    split = replace(config, student=Student(reset_at_documents=True))
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
        check_targets(part.folder, {"weights": "aa", "tokenizer": "bb", "top_k": TOP_K})
        with pytest.raises(Mistake, match="made with weights=aa, this run has weights=cc"):
            check_targets(part.folder, {"weights": "cc"})


def test_facts_count_and_max_samples_cuts_both_splits(tmp_path, teacher):
    job = cache_job(tmp_path, teacher, max_samples=2)
    run(job, ALONE, NeverStop())
    facts = read_manifest(job.piece_path("mine")).facts
    assert {split: facts[split]["samples"] for split in COUNTS} == {"train": 2, "validation": 2}
    assert facts["train"]["tokens"] == 2 * SEQUENCE
    assert 1.5 * TOP_K < facts["train"]["bytes_per_token"] < 4 * TOP_K + 100 / SEQUENCE
    last = json.loads((job.path / "metrics.jsonl").read_text().splitlines()[-1])
    assert (last["step"], last["total"]) == (4, 4)


def test_after_a_stop_finished_sources_stand_and_only_the_others_are_done(tmp_path, teacher):
    job = cache_job(tmp_path, teacher, ("mine", "yours"))
    with pytest.raises(Stopped):
        run(job, ALONE, StopAfter(18))
    assert job.piece_done("mine")
    assert not job.piece_done("yours")
    before = (job.output / "mine" / "train" / "index.json").stat().st_mtime_ns
    run(job, ALONE, NeverStop())
    assert job.piece_done("yours")
    assert (job.output / "mine" / "train" / "index.json").stat().st_mtime_ns == before


@pytest.mark.parametrize("looks", [4, 6, 9])
@pytest.mark.parametrize("sampler", ["topk", "random"])
def test_a_stop_keeps_every_finished_shard_and_the_end_is_that_of_an_unbroken_run(tmp_path, teacher, sampler, looks):
    whole = cache_job(tmp_path / "a", teacher, shard=SMALL, sampler=sampler, micro_batch=2)
    run(whole, ALONE, NeverStop())
    job = cache_job(tmp_path / "b", teacher, shard=SMALL, sampler=sampler, micro_batch=2)
    with pytest.raises(Stopped):
        run(job, ALONE, StopAfter(looks))
    finished = {path: path.stat().st_mtime_ns for path in job.output.glob("mine/train/*/shard*")}
    assert not list(job.output.rglob("*.tmp"))
    killed = job.output / "mine/train/.00003.tmp/shard.00000.mds"  # as a kill leaves it
    killed.parent.mkdir(parents=True)
    killed.write_bytes(b"torn")
    run(job, ALONE, NeverStop())
    assert files(job.output) == files(whole.output)
    assert all(path.stat().st_mtime_ns == time for path, time in finished.items())
    assert looks < 9 or finished


def test_a_changed_setting_or_a_lost_file_makes_shards_anew(tmp_path, teacher):
    job = cache_job(tmp_path, teacher, shard=SMALL)
    run(job, ALONE, NeverStop())
    shards = sorted(job.output.glob("mine/train/*/shard*"))
    first, second, *_ = shards
    times = {path: path.stat().st_mtime_ns for path in shards}
    job.piece_path("mine").unlink()
    first.unlink()
    run(job, ALONE, NeverStop())
    assert first.stat().st_mtime_ns != times[first]
    assert second.stat().st_mtime_ns == times[second]
    job.piece_path("mine").unlink()
    other = replace(job, config=replace(job.config, cache=replace(job.config.cache, top_k=TOP_K + 1)))
    run(other, ALONE, NeverStop())
    assert samples(other).targets[0].shape == (COUNTS["train"], SEQUENCE, TOP_K + 1)
    assert len(list((job.output / "mine/priors").iterdir())) == 1


def test_pieces_take_the_shards_in_turn_and_their_join_is_that_of_one_piece(tmp_path, teacher):
    whole, apart = (cache_job(tmp_path / str(n), teacher, shard=SMALL, parts=n, sampler="hybrid") for n in (1, 3))
    run(whole, ALONE, NeverStop())
    for element in (2, 0, 1):
        assert not (apart.output / "mine/train/index.json").exists()
        run(apart, World(element=element, elements=3), NeverStop())
        assert apart.piece_done(f"mine/{element}")
    taken = [sorted(int(path.name) for path in apart.output.glob(f"mine/{n}/train/*")) for n in range(3)]
    assert taken == [[0, 3], [1], [2]]
    join_pieces(apart)
    for split in COUNTS:
        assert same(samples(whole, split=split), samples(apart, split=split))
        notes = [read_note(job.output / "mine" / split) for job in (whole, apart)]
        assert notes[0] == notes[1]


def test_a_piece_without_a_shard_is_done_at_once(tmp_path, teacher):
    job = cache_job(tmp_path, teacher, parts=2)  # one shard
    for element in (1, 0):
        run(job, World(element=element, elements=2), NeverStop())
        assert job.piece_done(f"mine/{element}")
    join_pieces(job)
    assert len(samples(job).tokens) == COUNTS["train"]


@pytest.mark.parametrize("sampler", ["random", "hybrid"])
def test_what_is_drawn_does_not_depend_on_the_batch(tmp_path, teacher, sampler):
    found = []
    for size in (1, 3, 8):
        job = cache_job(tmp_path / str(size), teacher, shard=SMALL, sampler=sampler, micro_batch=size)
        run(job, ALONE, NeverStop())
        found.append(samples(job))
    first, *others = found
    for other in others:
        assert first.targets[0].equal(other.targets[0])
        torch.testing.assert_close(first.targets[1].exp(), other.targets[1].exp())
    total = first.targets[1].exp().sum(-1)
    assert ((total - 1).abs() < 0.15).all()  # within the codec's bound
    assert not first.targets[0][0].equal(first.targets[0][1])


def test_logits_with_a_soft_cap_are_capped(tmp_path, teacher):
    from transformers import AutoConfig, AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(teacher)
    model.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    config.final_logit_softcapping = 0.7
    config.save_pretrained(tmp_path)
    settings = replace(make_config(sequence=SEQUENCE), cache=Cache(sampler="topk"), strategy=FLOAT32)
    capture = Capture(tmp_path, settings)
    tokens = torch.randint(0, VOCABULARY, (2, SEQUENCE + 1), generator=torch.Generator().manual_seed(0))
    _, log_probs, _ = capture.targets(tokens, torch.zeros_like(tokens))
    with torch.no_grad():
        logits = model(tokens[:, :-1]).logits.flatten(0, 1)
    wanted = (0.7 * (logits / 0.7).tanh()).log_softmax(-1).topk(32).values
    torch.testing.assert_close(log_probs, wanted, atol=1e-4, rtol=1e-4)


def test_a_k_above_the_vocabulary_is_refused(tmp_path, teacher):
    job = cache_job(tmp_path, teacher, top_k=91)
    with pytest.raises(Mistake, match=r"cache.top_k=91: above the teacher's vocabulary; expected 1 to 90"):
        run(job, ALONE, NeverStop())
    assert not begun(job.path)  # a smaller k may follow in this folder


def test_a_source_has_one_prior_that_every_sample_names(tmp_path, teacher):
    job = cache_job(tmp_path, teacher, shard=SMALL)
    run(job, ALONE, NeverStop())
    (prior,) = (job.output / "mine/priors").iterdir()
    for split in COUNTS:
        assert read_note(job.output / "mine" / split)["priors"] == [prior.stem]
    for damage in (lambda: prior.write_bytes(prior.read_bytes()[:-1] + b"x"), prior.unlink):
        read_prior.cache_clear()
        damage()
        with pytest.raises(Mistake, match=rf"priors/{prior.stem}.bin: (damaged|missing)"):
            samples(job)


def test_a_disk_that_fills_up_ends_it_and_what_was_finished_stands(tmp_path, teacher):
    job = cache_job(tmp_path, teacher, shard=SMALL, micro_batch=2)
    job.output.rmdir()
    with small_disk(job.output, "1m"):
        room = job.output / "room"
        run_until = StopAfter(9)
        with pytest.raises(Stopped):
            run(job, ALONE, run_until)
        finished = set(job.output.glob("mine/train/*/shard*"))
        assert finished
        with suppress(OSError), room.open("wb", buffering=0) as file:
            while file.write(b"x" * 4096):
                pass
        with pytest.raises(OSError, match="No space left"):
            run(job, ALONE, NeverStop())
        assert set(job.output.glob("mine/train/*/shard*")) == finished
        assert not list(job.output.rglob("*.tmp"))
        room.unlink()
        run(job, ALONE, NeverStop())
        assert len(samples(job).tokens) == COUNTS["train"]


def test_a_token_shard_that_is_deleted_meanwhile_is_named_and_what_was_finished_stands(tmp_path, teacher):
    job = cache_job(tmp_path, teacher, shard=SMALL, micro_batch=2)
    tokens = job.input("tokenize") / "mine/train"

    class Deleting(StopAfter):
        def requested(self, also=False):
            if super().requested(also) and not also:
                for path in [*tokens.glob("shard.00003*"), *tokens.glob(".raw/*")]:
                    path.unlink(missing_ok=True)
            return also

    with pytest.raises(Mistake, match=r"shard.00003.mds.zstd: missing shard"):
        run(job, ALONE, Deleting(8))
    assert len(list(job.output.glob("mine/train/*/shard*"))) >= 1
    assert not job.piece_done("mine")


def test_two_captures_into_one_folder_are_refused(tmp_path, teacher):
    job = cache_job(tmp_path, teacher)
    with exclusive(job.path / "locks/mine") as free:
        assert free
        with pytest.raises(Mistake, match="cache/output/mine: another process is caching it"):
            run(job, ALONE, NeverStop())
        assert not list(job.output.iterdir())
    run(job, ALONE, NeverStop())
    assert job.piece_done("mine")


@pytest.mark.parametrize("place", [20, 0.5], ids=["the prior's digest", "the middle"])
def test_targets_that_were_damaged_before_they_were_hashed_are_named(tmp_path, teacher, place):
    job = cache_job(tmp_path, teacher)
    run(job, ALONE, NeverStop())
    shards = Shards(job.output / "mine/train")
    data = bytearray(shards[0]["targets"])
    data[place if place > 1 else int(len(data) * place)] ^= 4
    with shard_writer(tmp_path / "mine/train", SEQUENCE, 1 << 16, targets=True) as writer:
        writer.write({**shards[0], "targets": bytes(data)})
    (tmp_path / "mine/priors").symlink_to(job.output / "mine/priors")
    with pytest.raises(Mistake, match=r"mine/train: damaged teacher targets in sample 0 \(checksum.*stage=cache again"):
        read_samples(tmp_path / "mine/train", 1)


def test_a_large_output_may_be_hashed_for_longer_than_a_rank_may_stand_still(tmp_path, teacher, monkeypatch):
    """Nobody watches while it is: a rank that hashes, or waits for one that does, makes no step."""
    job = cache_job(tmp_path, teacher, ("mine", "yours"))
    watched = {}
    for owner, name in ((Capture, "_rows"), (JobFolder, "finish")):

        def told(*arguments, plain=getattr(owner, name), name=name):
            watched.setdefault(name, set()).add(any(thread.name == "watchdog" for thread in threading.enumerate()))
            return plain(*arguments)

        monkeypatch.setattr(owner, name, told)
    run(job, ALONE, NeverStop())
    assert watched == {"_rows": {True}, "finish": {False}}


def test_a_teacher_that_gives_nan_is_named_with_the_sample(tmp_path, teacher):
    weights = load_file(shutil.copytree(teacher, tmp_path / "sick") / "model.safetensors")
    weights["model.embed_tokens.weight"][5] = torch.nan  # of one token
    save_file(weights, tmp_path / "sick/model.safetensors", metadata={"format": "pt"})
    job = cache_job(tmp_path, tmp_path / "sick")
    numbers = [n for n, row in enumerate(Shards(job.input("tokenize") / "mine/train")) if 5 in row["tokens"][:-1]]
    with pytest.raises(Mistake, match=rf"train: sample {numbers[0]}: the teacher's logits are not numbers"):
        run(job, ALONE, NeverStop())


def test_damaged_targets_are_noticed(tmp_path, teacher):
    job = cache_job(tmp_path, teacher)
    run(job, ALONE, NeverStop())
    (shard,) = (job.output / "mine" / "train").glob("*/shard.*.mds")
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
