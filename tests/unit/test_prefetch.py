"""Batches are made ahead of their turn, and nobody can tell but by the wait."""

import threading
import time
from pathlib import Path

import numpy as np
import pytest
from data_support import make_shards

from xlstm_distill.contract.exitcode import Mistake
from xlstm_distill.data import codec, stream
from xlstm_distill.data.priors import write_prior
from xlstm_distill.data.shards import sample, shard_writer
from xlstm_distill.data.stream import AHEAD, Part, SampleStream

COUNT, BATCH = 60, 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shards(tmp_path_factory.mktemp("shards") / "a", COUNT)


def made(folder: Path) -> SampleStream:
    return SampleStream([Part(folder, 1.0)], batch=BATCH, seed=0)


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Positions whose batch was begun."""
    begun: list[int] = []
    plain = SampleStream._read

    def counting(self: SampleStream, position: int) -> stream.Batch:
        begun.append(position)
        return plain(self, position)

    monkeypatch.setattr(SampleStream, "_read", counting)
    return begun


def until(condition) -> bool:
    deadline = time.monotonic() + 5
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.005)
    return condition()


def test_so_many_batches_are_made_while_one_is_in_use_and_no_more(folder, read):
    samples = made(folder)
    next(samples)
    assert until(lambda: len(read) == 1 + AHEAD)
    time.sleep(0.05)
    assert sorted(read) == [BATCH * n for n in range(1 + AHEAD)]


def test_the_position_counts_what_was_handed_out_alone(folder):
    samples = made(folder)
    wanted = [samples._read(n * BATCH).tokens for n in range(8)]
    for done in range(1, 6):
        assert next(samples).tokens.equal(wanted[done - 1])
        assert samples.state_dict()["position"] == done * BATCH
        resumed = made(folder)
        resumed.load_state_dict(samples.state_dict())
        assert all(next(resumed).tokens.equal(tokens) for tokens in wanted[done : done + 3])


def test_going_back_drops_what_was_made_ahead(folder):
    samples = made(folder)
    first = [next(samples).tokens for _ in range(3)]
    state = samples.state_dict()
    next(samples)
    samples.load_state_dict({**state, "position": 0})
    assert all(next(samples).tokens.equal(tokens) for tokens in first)


def test_what_goes_wrong_ahead_is_raised_when_its_turn_comes_and_not_skipped(folder, monkeypatch):
    wanted = [next(samples).tokens for samples in [made(folder)] for _ in range(6)]
    broken = threading.Event()
    broken.set()
    plain = SampleStream._read

    def fails(self, position):
        if position == 3 * BATCH and broken.is_set():
            raise Mistake("shard.00001.mds: missing shard")
        return plain(self, position)

    monkeypatch.setattr(SampleStream, "_read", fails)
    samples = made(folder)
    assert all(next(samples).tokens.equal(tokens) for tokens in wanted[:3])
    for _ in range(2):
        with pytest.raises(Mistake, match="missing shard"):
            next(samples)
        assert samples.state_dict()["position"] == 3 * BATCH
    broken.clear()
    assert all(next(samples).tokens.equal(tokens) for tokens in wanted[3:])


def test_nobody_waits_for_a_batch_that_took_less_than_the_step_before(folder, monkeypatch):
    plain = SampleStream._read

    def slow(self, position):
        time.sleep(0.05)
        return plain(self, position)

    monkeypatch.setattr(SampleStream, "_read", slow)
    samples = made(folder)
    next(samples)
    waits = []
    for _ in range(4):
        time.sleep(0.15)  # a step
        began = time.monotonic()
        next(samples)
        waits.append(time.monotonic() - began)
    assert min(waits) < 0.05


def test_targets_are_decoded_for_each_sample_with_the_prior_of_its_source(tmp_path):
    rng = np.random.default_rng(0)
    wanted = {}
    for number, name in enumerate(("a", "b")):
        rows = []
        for _ in range(6):
            ids = np.argsort(rng.random((8, 50)))[:, :5]
            log_probs = np.log(np.sort(rng.dirichlet(np.ones(6), 8))[:, :0:-1])
            rows.append((ids, log_probs, np.log1p(-np.exp(log_probs).sum(1))))
        prior = codec.Prior.fit(rows[number : number + 3], 50)
        write_prior(tmp_path / name, prior)
        with shard_writer(tmp_path / name / "train", 8, 1 << 12, targets=True) as writer:
            for index, row in enumerate(rows):
                key = 10 * number + index
                data = codec.encode(*row, 50, prior)
                wanted[key] = codec.decode(data, prior)
                writer.write({**sample(*[np.full(9, key)] * 3), "targets": data})
    samples = SampleStream([Part(tmp_path / name / "train", 0.5) for name in ("a", "b")], batch=4, seed=0)
    for _ in range(6):
        batch = next(samples)
        for row, key in enumerate(batch.tokens[:, 0].tolist()):
            for found, given in zip(batch.targets, wanted[key], strict=True):
                assert np.array_equal(found[row].numpy(), given)
