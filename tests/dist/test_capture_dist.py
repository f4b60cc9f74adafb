"""A teacher that is spread over two ranks leaves the targets that one rank leaves, and what fails on one ends both."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from model_support import VOCABULARY, tiny_teacher
from ranks import spread, start
from test_fsdp import assert_students_near
from train_support import (
    SOURCES,
    TOKENS_PER_STEP,
    TOP_K,
    job,
    load_student,
    make_config,
    make_run,
    metrics,
    run,
    small_disk,
    weights,
)

from xlstm_distill.contract.exitcode import MISTAKE
from xlstm_distill.contract.job import JobFolder
from xlstm_distill.data.stream import read_samples
from xlstm_distill.teacher.index import read_note

pytestmark = pytest.mark.dist
# On one rank only, at its fourth sample.
UNREADABLE = """
import os
from xlstm_distill.contract.exitcode import Mistake
from xlstm_distill.data.reader import Shards

plain = Shards.__getitem__

def fails(shards, number):
    Shards.seen = getattr(Shards, "seen", 0) + 1
    if os.environ["RANK"] == "1" and Shards.seen == 4:
        raise Mistake("shard.00001.mds: missing shard; copy the shards anew")
    return plain(shards, number)

Shards.__getitem__ = fails
"""
# On the first rank, which writes the manifests.
UNFINISHED = """
import os
from xlstm_distill.contract.exitcode import Mistake
from xlstm_distill.contract.job import JobFolder

def finish(folder, facts, piece=""):
    raise Mistake("cache: input fetch: gone")

if os.environ["RANK"] == "0":
    JobFolder.finish = finish
"""
# The second rank sees a network file system as it was before the first start: nothing finished.
STALE = """
import os
from xlstm_distill.teacher.units import Unit

if os.environ["RANK"] == "1":
    Unit.done = lambda unit, index: None
"""
PADDED = VOCABULARY + 7
"""Rows of a teacher's head whose last 7 are no token of its tokenizer."""


@pytest.fixture(scope="module")
def jobs(tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("tied"), tied=True)


@pytest.fixture(scope="module")
def untied(tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("untied"))


@pytest.fixture(scope="module")
def padded(tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("padded"), vocab_size=PADDED)


def capture_job(jobs: Path, name: str, strategy: str = "auto", **cache: object) -> JobFolder:
    """13 and 5 samples: on two ranks that take two at a time the last batch leaves one without any."""
    config = make_config(jobs.parent / "shards")
    cache = {"micro_batch": 2, "chunk": 7, **cache}
    config = replace(config, cache=replace(config.cache, **cache), strategy=replace(config.strategy, name=strategy))
    return job(jobs, name, config, "cache", inputs=("fetch",), pieces=tuple(SOURCES))


@pytest.mark.parametrize("where", ["jobs", "untied"])
def test_two_ranks_leave_what_one_leaves(where, request):
    jobs = request.getfixturevalue(where)
    samplers = ("topk", "hybrid")
    alone = [capture_job(jobs, f"alone {sampler}", sampler=sampler) for sampler in samplers]
    both = {
        s: [capture_job(jobs, f"{s} {sampler}", s, sampler=sampler) for sampler in samplers] for s in ("fsdp", "zero3")
    }
    spread(alone, 1)
    for folders in both.values():
        spread(folders, 2)
        for one, two in zip(alone, folders, strict=True):
            assert_same_targets(one, two)


def assert_same_targets(one: JobFolder, two: JobFolder) -> None:
    for name in SOURCES:
        for split in ("train", "validation"):
            a, b = (read_samples(f.output / name / split, 99) for f in (one, two))
            assert a.tokens.equal(b.tokens)
            assert a.targets[0].equal(b.targets[0])
            torch.testing.assert_close(a.targets[1].exp(), b.targets[1].exp(), atol=1e-5, rtol=0)
            notes = [read_note(f.output / name / split) for f in (one, two)]
            assert notes[0]["samples"] == notes[1]["samples"] == len(a.tokens)


def test_ranks_that_see_different_files_do_what_the_first_one_sees(jobs, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(STALE)
    alone, both = capture_job(jobs, "not stale"), capture_job(jobs, "stale")
    spread([alone], 1)
    spread([both], 2)
    for name in SOURCES:
        shutil.rmtree(both.output / name / "validation/00000")
        both.piece_path(name).unlink()
    both.manifest_path.unlink()
    spread([both], 2, path=tmp_path)
    assert_same_targets(alone, both)


def distill_job(jobs: Path, name: str, strategy: str, start: Path) -> JobFolder:
    """Of the student in `start`, which has more rows than the teacher."""
    config = make_config(jobs.parent / "shards")
    config = replace(
        config,
        teacher=replace(config.teacher, vocab_size=PADDED),
        student=replace(config.student, init_from=str(start)),
        distill=replace(config.distill, tokens=4 * TOKENS_PER_STEP, micro_batch=1),
        strategy=replace(config.strategy, name=strategy),
    )
    return job(jobs, name, config, "distill", inputs=("fetch", "cache"), expert="math")


def test_vocabularies_padded_beyond_the_tokenizer_are_captured_and_learned_as_by_one_process(padded):
    """The teacher's padding is its own and has mass, which targets keep; the student's further rows have none."""
    start = padded / "wide"
    student = load_student(padded / "align/output/student")
    student.resize_token_embeddings(PADDED + 5)
    with torch.no_grad():
        student.lm_head.weight[PADDED:] = 3.0
    student.save_pretrained(start)
    captured = {s: capture_job(padded, f"capture {s}", s, sampler="topk") for s in ("single", "fsdp", "zero3")}
    learned = {name: distill_job(padded, f"distill {name}", name, start) for name in captured}
    spread([captured["single"]], 1)
    run(learned["single"])
    spread([folders[name] for name in ("fsdp", "zero3") for folders in (captured, learned)], 2)
    batch = read_samples(captured["single"].output / "mine/train", 99)
    teacher = tiny_teacher(vocab_size=PADDED)
    with torch.no_grad():
        reference = teacher(batch.tokens[:, :-1]).logits.softmax(-1)
    assert reference[..., VOCABULARY:].sum(-1).min() > 0
    assert (batch.targets[0] >= VOCABULARY).any()
    torch.testing.assert_close(batch.targets[1].exp(), reference.gather(-1, batch.targets[0]), atol=0.02, rtol=0)
    rest = 1 - reference.topk(TOP_K).values.sum(-1)
    torch.testing.assert_close(batch.targets[2].exp(), rest, atol=0.02, rtol=0)
    for name in ("fsdp", "zero3"):
        assert_same_targets(captured["single"], captured[name])
        for a, b in zip(metrics(learned["single"]), metrics(learned[name]), strict=True):
            assert b == pytest.approx(a, rel=1e-4, abs=1e-7)
        assert_students_near(learned["single"], learned[name])
        beyond = weights(learned[name])["lm_head.weight"][PADDED:]
        assert beyond.eq(beyond[0, 0]).all()  # no gradient: nothing but the decay


@pytest.mark.parametrize(
    ("patch", "line"), [(UNREADABLE, "shard.00001.mds: missing shard"), (UNFINISHED, "cache: input fetch: gone")]
)
def test_what_one_rank_cannot_do_ends_all_with_its_line(jobs, tmp_path, patch, line):
    (tmp_path / "sitecustomize.py").write_text(patch)
    said = start([capture_job(jobs, line)], 2, path=tmp_path).wait(MISTAKE)
    assert said.count(f"error: {line}") == 2


def test_a_full_disk_under_the_rank_that_writes_ends_all(jobs):
    folder = capture_job(jobs, "full")
    folder.output.rmdir()
    with small_disk(folder.output, "8k"):
        said = start([folder], 2).wait(MISTAKE)
    assert said.count("No space left") == 2
    start([folder], 2).wait()
