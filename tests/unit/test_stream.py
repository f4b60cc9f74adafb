"""The sequence of global batches depends on mixture, batch and seed alone; damage is noticed."""

import json
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from threading import Barrier

import numpy as np
import pytest
import torch
from data_support import make_shards

from xlstm_distill.contract.exitcode import Mistake
from xlstm_distill.contract.manifest import Manifest, outputs_of, verify_outputs
from xlstm_distill.data import reader
from xlstm_distill.data.reader import Shards
from xlstm_distill.data.stream import Part, SampleStream, read_samples


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> list[Part]:
    root = tmp_path_factory.mktemp("shards")
    return [Part(make_shards(root / "a", 23), 0.75), Part(make_shards(root / "b", 11, first=100), 0.25)]


def numbers(stream: SampleStream, steps: int) -> list[list[int]]:
    return [next(stream).tokens[:, 0].tolist() for _ in range(steps)]


def flat(lists: Iterable[list[int]]) -> list[int]:
    return list(chain.from_iterable(lists))


def global_batches(parts: list[Part], world: int, steps: int, state: dict | None = None) -> list[list[int]]:
    ranks = [SampleStream(parts, batch=8, seed=3, rank=rank, world=world) for rank in range(world)]
    for rank in ranks:
        if state:
            rank.load_state_dict(state)
    shares = [numbers(rank, steps) for rank in ranks]
    return [flat(share[step] for share in shares) for step in range(steps)]


@pytest.mark.parametrize("world", [2, 4, 8])
def test_global_batches_are_the_same_at_every_world_size_across_epochs(parts, world):
    assert global_batches(parts, world, 20) == global_batches(parts, 1, 20)


@pytest.mark.parametrize("done", [0, 1, 4, 5, 13])
@pytest.mark.parametrize(("saved_at", "resumed_at"), [(1, 2), (2, 4), (4, 1)])
def test_a_state_saved_at_any_step_resumes_exactly_at_another_world_size(parts, done, saved_at, resumed_at):
    ranks = [SampleStream(parts, batch=8, seed=3, rank=rank, world=saved_at) for rank in range(saved_at)]
    for rank in ranks:
        numbers(rank, done)
    states = [json.loads(json.dumps(rank.state_dict())) for rank in ranks]
    assert all(state == states[0] for state in states)
    assert global_batches(parts, resumed_at, 6, states[0]) == global_batches(parts, 1, done + 6)[done:]


def test_an_epoch_of_one_part_holds_each_sample_once_in_another_order_each_time(parts):
    order = flat(numbers(SampleStream(parts[:1], batch=1, seed=0), 46))
    assert sorted(order[:23]) == sorted(order[23:]) == list(range(23))
    assert order[:23] != order[23:]
    assert order[:23] != sorted(order[:23])


def test_another_seed_gives_another_order(parts):
    assert numbers(SampleStream(parts, batch=8, seed=1), 4) != numbers(SampleStream(parts, batch=8, seed=2), 4)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_parts_come_in_proportion_to_their_weights_whatever_their_size(parts, share):
    mixed = [Part(parts[0].folder, share), Part(parts[1].folder, 1 - share)]
    drawn = flat(numbers(SampleStream(mixed, batch=10, seed=0), 68))
    assert sum(n < 100 for n in drawn) / len(drawn) == pytest.approx(share, abs=0.03)
    counts = Counter(n for n in drawn if n < 100)
    assert max(counts.values()) - min(counts.values()) <= 0.7 * 680 / 34  # each epoch chooses anew, no favourites


@pytest.fixture(scope="module")
def sized(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("sized")
    sizes = (400, 900, 150, 50, 700)
    return [make_shards(root / str(n), size, sequence=1, shard_bytes=1 << 14) for n, size in enumerate(sizes)]


@pytest.mark.parametrize(
    "weights",
    [
        (0.64, 0.21, 0.01, 0.11, 0.03),
        (0.6, 0.2, 0.012, 0.12, 0.068),
        (0.906, 0.034, 0.06),
        (0.05, 0.05, 0.9),
        (0.5, 0.5),
    ],
)
def test_over_any_epoch_the_shares_are_within_half_a_percent_whether_parts_are_repeated_or_cut(sized, weights):
    parts = [Part(folder, weight) for folder, weight in zip(sized, weights, strict=False)]
    stream = SampleStream(parts, batch=1, seed=5)
    available = [len(shards) for shards in stream.shards]
    drawn = [np.bincount(of_part(stream, epoch), minlength=len(parts)) for epoch in range(3)]
    for counts in drawn:
        assert counts.sum() == stream.mixture.epoch_size == sum(available)
        assert np.abs(counts / counts.sum() - weights).max() < 0.005
    repeated = [count > there for count, there in zip(drawn[0], available, strict=True)]
    assert any(repeated)
    assert not all(repeated)


def of_part(stream: SampleStream, epoch: int) -> list[int]:
    first = epoch * stream.mixture.epoch_size
    return [stream._place(number)[0] for number in range(first, first + stream.mixture.epoch_size)]


def test_a_repeated_part_repeats_each_sample_equally_often_and_a_cut_one_repeats_none(sized):
    stream = SampleStream([Part(sized[0], 0.9), Part(sized[1], 0.1)], batch=1, seed=5)
    places = Counter(stream._place(number) for number in range(stream.mixture.epoch_size))
    often = [count for (part, _), count in places.items() if part == 0]
    assert len(often) == 400
    assert max(often) - min(often) <= 1
    assert {count for (part, _), count in places.items() if part == 1} == {1}


def test_weights_count_relative_to_their_sum_and_a_part_of_weight_nothing_is_left_out(parts):
    doubled = [Part(part.folder, 2 * part.weight) for part in parts]
    assert numbers(SampleStream(doubled, batch=8, seed=3), 5) == global_batches(parts, 1, 5)
    only = SampleStream([parts[0], Part(Path("/nowhere"), 0.0)], batch=8, seed=3)
    assert max(flat(numbers(only, 5))) < 23


def test_even_the_rarest_part_comes_once_an_epoch(tmp_path):
    rare = [Part(make_shards(tmp_path / "a", 3), 0.98), Part(make_shards(tmp_path / "b", 1, first=100), 0.02)]
    stream = SampleStream(rare, batch=1, seed=0)
    assert 100 in flat(numbers(stream, stream.mixture.epoch_size))


def test_a_single_sample_is_enough(tmp_path):
    stream = SampleStream([Part(make_shards(tmp_path / "a", 1), 1.0)], batch=2, seed=0)
    assert numbers(stream, 3) == [[0, 0]] * 3


def test_a_batch_has_the_documented_types(parts):
    batch = next(SampleStream(parts, batch=4, seed=0))
    assert batch.tokens.shape == batch.mask.shape == batch.document.shape == (4, 9)
    assert (batch.tokens.dtype, batch.mask.dtype, batch.document.dtype) == (torch.int64, torch.bool, torch.int64)
    assert batch.targets is None
    assert batch.rows(slice(1, 3)).to("cpu").tokens.equal(batch.tokens[1:3])


def test_several_streams_over_the_same_folder_do_not_disturb_each_other(parts):
    first, second = (SampleStream(parts, batch=8, seed=3) for _ in range(2))
    interleaved = [numbers(s, 1) for _ in range(5) for s in (first, second)]
    assert interleaved[::2] == interleaved[1::2]


def test_samples_are_read_in_order(parts):
    assert read_samples(parts[0].folder, 5, first=7).tokens[:, 0].tolist() == [7, 8, 9, 10, 11]
    assert len(read_samples(parts[0].folder, 99).tokens) == 23
    with pytest.raises(Mistake, match="holds 23 samples; asked for 1 from number 23 on"):
        read_samples(parts[0].folder, 1, first=23)


def test_reading_changes_no_file_that_a_manifest_lists(tmp_path):
    folder = make_shards(tmp_path / "out" / "train", 9)
    listed = outputs_of(tmp_path / "out")
    manifest = Manifest("tokenize", "tokenize", {}, 0, {}, listed)
    read_samples(folder, 9)
    assert outputs_of(tmp_path / "out") == listed
    assert verify_outputs(manifest, tmp_path / "out", deep=True) is None


def test_a_folder_that_cannot_be_written_is_read_all_the_same(tmp_path, monkeypatch):
    folder = make_shards(tmp_path / "a", 9)
    monkeypatch.setattr(reader.os, "access", lambda *_: False)
    monkeypatch.setattr(reader.tempfile, "gettempdir", lambda: str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    assert read_samples(folder, 9).tokens[:, 0].tolist() == list(range(9))
    assert not list(folder.glob(".raw/*"))
    assert list((tmp_path / "tmp").rglob("*.mds"))


def test_an_unpacked_copy_that_was_cut_short_is_made_again(tmp_path):
    folder = make_shards(tmp_path / "a", 9)
    read_samples(folder, 9)
    for copy in folder.glob(".raw/*.mds"):
        copy.write_bytes(copy.read_bytes()[:-3])
    assert read_samples(folder, 9).tokens[:, 0].tolist() == list(range(9))


def test_threads_of_a_process_unpack_the_same_shard_at_once(tmp_path, monkeypatch):
    """Each has a stream of its own over the folder, as training and validation may; none takes the other's file."""
    folder, both, replace = make_shards(tmp_path / "a", 4), Barrier(2), Path.replace

    def meet(path: Path, target: Path) -> Path:
        both.wait(timeout=30)
        return replace(path, target)

    readers = [Shards(folder), Shards(folder)]
    monkeypatch.setattr(Path, "replace", meet)
    with ThreadPoolExecutor(2) as threads:
        read = list(threads.map(lambda shards: shards[0]["tokens"][0], readers))
    assert read == [0, 0]
    assert [file.suffix for file in (folder / ".raw").iterdir()] == [".mds"]


@pytest.mark.parametrize("damage", ["missing", "short", "flipped"])
def test_a_missing_or_damaged_shard_is_named(tmp_path, damage):
    folder = make_shards(tmp_path / "a", 20)
    shard = sorted(folder.glob("shard.*"))[1]
    data = bytearray(shard.read_bytes())
    if damage == "missing":
        shard.unlink()
    elif damage == "short":
        shard.write_bytes(data[:-1])
    else:
        data[len(data) // 2] ^= 1
        shard.write_bytes(data)
    word = "missing" if damage == "missing" else "damaged"
    with pytest.raises(Mistake, match=f"{shard}: {word} shard.*launch again"):
        read_samples(folder, 20)


@pytest.mark.parametrize("all_gone", [False, True])
def test_a_shard_deleted_during_reading_is_unpacked_again_or_named(tmp_path, all_gone):
    shards = Shards(make_shards(tmp_path / "a", 20))
    assert shards[0]["tokens"][0] == 0
    for file in [*shards.folder.glob(".raw/*"), *(shards.folder.glob("shard.*") if all_gone else [])]:
        file.unlink()
    if not all_gone:
        assert [shards[n]["tokens"][0] for n in range(20)] == list(range(20))
        return
    with pytest.raises(Mistake, match=f"{shards.folder}/shard.00000.mds.zstd: missing shard"):
        shards[0]


def test_a_folder_without_shards_is_named(tmp_path):
    with pytest.raises(Mistake, match=f"{tmp_path}: no token shards there"):
        SampleStream([Part(tmp_path, 1.0)], batch=1, seed=0)
    (tmp_path / "index.json").write_text("{", encoding="utf-8")
    with pytest.raises(Mistake, match="damaged, not an MDS index"):
        Shards(tmp_path)
    (tmp_path / "index.json").write_text('{"version": 2, "shards": []}', encoding="utf-8")
    with pytest.raises(Mistake, match="holds no samples"):
        Shards(tmp_path)


def test_shards_without_the_hash_that_is_checked_are_refused(tmp_path):
    folder = make_shards(tmp_path / "a", 3)
    index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
    for shard in index["shards"]:
        shard["zip_data"]["hashes"] = {}
    (folder / "index.json").write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(Mistake, match="no xxh64 of shard"):
        read_samples(folder, 3)


def test_parts_of_different_length_are_refused(parts, tmp_path):
    longer = make_shards(tmp_path / "longer", 3, sequence=9)
    with pytest.raises(Mistake, match="differ in length or columns"):
        SampleStream([parts[0], Part(longer, 1.0)], batch=1, seed=0)


def test_a_batch_that_the_ranks_cannot_share_is_refused(parts):
    with pytest.raises(Mistake, match="batch=8: 9 ranks need a sample each"):
        SampleStream(parts, batch=8, seed=0, rank=0, world=9)


@pytest.mark.parametrize("world", [1, 2, 3, 5, 8])
def test_any_number_of_ranks_shares_the_same_global_batches(parts, world):
    alone = SampleStream(parts, batch=8, seed=0)
    ranks = [SampleStream(parts, batch=8, seed=0, rank=rank, world=world) for rank in range(world)]
    for _ in range(7):
        shares = [next(rank).tokens for rank in ranks]
        assert torch.cat(shares).equal(next(alone).tokens)
        assert max(map(len, shares)) == -(-8 // world)
        assert min(map(len, shares)) == 8 // world


def test_a_batch_can_be_described_by_folder_and_number(parts):
    stream = SampleStream(parts, batch=8, seed=0)
    next(stream)
    told = stream.describe(1)
    found = {}
    for piece in told.split("; "):
        folder, numbers = piece.split(": ")
        found |= {(folder, int(n)): read_samples(Path(folder), 1, int(n)).tokens[0].tolist() for n in numbers.split()}
    assert len(found) <= 8
    assert {tuple(row) for row in found.values()} == {tuple(row) for row in next(stream).tokens.tolist()}


def test_an_empty_mixture_is_refused(parts):
    with pytest.raises(Mistake, match="mixture is empty"):
        SampleStream([Part(parts[0].folder, 0.0)], batch=8, seed=0)


@pytest.mark.parametrize("change", [{"seed": 4}, {"batch": 4}])
def test_a_position_in_another_sequence_is_refused(parts, change):
    state = SampleStream(parts, **{"batch": 8, "seed": 3} | change).state_dict()
    with pytest.raises(Mistake, match=f"data position: {next(iter(change))} was"):
        SampleStream(parts, batch=8, seed=3).load_state_dict(state)
