"""Shards of an object store are read through a folder here that mirrors it; what is wrong there is fetched again."""

import json
import shutil
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from data_support import make_config, make_job, make_shards

from launcher.compose import compose
from xlstm_distill.contract.exitcode import Mistake
from xlstm_distill.contract.files import write_json
from xlstm_distill.contract.schema import Source
from xlstm_distill.data import remote
from xlstm_distill.data.reader import Shards
from xlstm_distill.data.shards import read_index, token_folder, write_tokens_note
from xlstm_distill.data.stream import read_samples


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    monkeypatch.setattr(remote, "PAUSE", 0.0)


@pytest.fixture
def store(tmp_path):
    for split, count in (("train", 23), ("validation", 5)):
        make_shards(tmp_path / "store" / "mine" / split, count)
    write_tokens_note(tmp_path / "store" / "mine", "aa")
    return tmp_path / "store"


def make_training(tmp_path, shards: str, tokenizer: str = "aa"):
    config = make_config({"mine": Source(kind="jsonl", path="x")}, shards=shards, sequence=8)
    jobs = tmp_path / "run" / "jobs"
    fetched = make_job(jobs, "fetch", config)
    write_json(fetched.output / "teacher.json", {"tokenizer": tokenizer})
    return make_job(jobs, "align", config, inputs=("fetch",))


def test_only_what_is_read_is_fetched_and_only_once(tmp_path, store, capsys):
    folder = token_folder(make_training(tmp_path, f"file://{store}")) / "mine" / "train"
    assert folder.is_relative_to(tmp_path / "run" / "shards")
    assert not list(folder.glob("shard.*"))
    assert read_samples(folder, 23).tokens[:, 0].tolist() == list(range(23))
    assert len(list(folder.glob("shard.*"))) == len(list((store / "mine" / "train").glob("shard.*"))) > 2
    shutil.rmtree(store)
    assert token_folder(make_training(tmp_path, f"file://{store}")) / "mine" / "train" == folder
    assert read_samples(folder, 23).tokens[:, 0].tolist() == list(range(23))
    assert "fetching" not in capsys.readouterr().out


@pytest.mark.parametrize("damage", ["missing", "short", "flipped"])
def test_a_copy_that_is_missing_or_damaged_is_named_and_fetched_again(tmp_path, store, capsys, damage):
    folder = token_folder(make_training(tmp_path, f"file://{store}")) / "mine" / "train"
    read_samples(folder, 23)
    shutil.rmtree(folder / ".raw")
    shard = sorted(folder.glob("shard.*"))[1]
    spoil(shard, damage)
    assert read_samples(folder, 23).tokens[:, 0].tolist() == list(range(23))
    told = capsys.readouterr().out
    assert (f"{shard}: damaged shard" in told) == (damage != "missing")


def test_a_shard_that_goes_while_others_are_read_is_fetched_again(tmp_path, store):
    shards = Shards(token_folder(make_training(tmp_path, f"file://{store}")) / "mine" / "train")
    shards[0]
    for file in shards.folder.glob("shard.*"):
        file.unlink()
    assert [int(shards[n]["tokens"][0]) for n in range(23)] == list(range(23))


@pytest.mark.parametrize("damage", ["missing", "flipped"])
def test_damage_in_the_store_itself_ends_with_the_shard_and_the_reason(tmp_path, store, capsys, damage):
    folder = token_folder(make_training(tmp_path, f"file://{store}")) / "mine" / "train"
    spoil(sorted((store / "mine" / "train").glob("shard.*"))[1], damage)
    first, second = (folder / info["zip_data"]["basename"] for info in read_index(folder)[:2])
    with pytest.raises(Mistake, match=r"after 4 attempts to fetch it from file://.*mine/train") as error:
        read_samples(folder, 23)
    assert "\n" not in str(error.value)
    assert str(error.value).startswith(f"{second}: {'missing' if damage == 'missing' else 'damaged'} shard")
    told = capsys.readouterr().out
    assert told.count(f"{second}: ") == told.count("fetching it from") == 3
    assert first.exists()


def test_a_damaged_unpacked_shard_is_unpacked_anew_without_asking_the_store(tmp_path, store, monkeypatch):
    folder = token_folder(make_training(tmp_path, f"file://{store}")) / "mine" / "train"
    read_samples(folder, 23)
    spoil(sorted((folder / ".raw").glob("*.mds"))[1], "flipped")
    monkeypatch.setattr(remote, "_fetch", lambda url, file: pytest.fail(f"asked for {url}"))
    assert read_samples(folder, 23).tokens[:, 0].tolist() == list(range(23))


def test_a_store_without_the_tokenizer_s_name_is_asked_for_it_once(tmp_path, store, monkeypatch, capsys):
    (store / "mine" / "tokens.json").unlink()
    real, asked = remote._fetch, []
    monkeypatch.setattr(remote, "_fetch", lambda url, file: asked.append(file.name) or real(url, file))
    folder = token_folder(make_training(tmp_path, f"file://{store}"))
    assert sorted(asked) == ["index.json", "index.json", "tokens.json"]
    assert f"{folder}/mine: does not say by which tokenizer it was made" in capsys.readouterr().out


def test_a_store_that_does_not_answer_twice_is_asked_again(tmp_path, store, monkeypatch):
    real, calls = remote._downloader("file"), []

    class Moody:
        def download(self, url, local, timeout):
            calls.append(url)
            if len(calls) < 3:
                raise ConnectionError("the store is busy")
            real.download(url, local, timeout)

    monkeypatch.setattr(remote, "_downloader", lambda scheme: Moody())
    token_folder(make_training(tmp_path, f"file://{store}"))
    assert len(calls) == 2 + 3


def test_threads_of_a_stream_fetch_a_shard_once_and_streams_do_not_take_each_other_s_copy(tmp_path, store, monkeypatch):
    folder = token_folder(make_training(tmp_path, f"file://{store}")) / "mine" / "train"
    real, asked = remote._downloader("file"), []

    class Slow:
        def download(self, url, local, timeout):
            asked.append(url)
            real.download(url, local, timeout)
            time.sleep(0.05)

    monkeypatch.setattr(remote, "_downloader", lambda scheme: Slow())
    shards = Shards(folder)
    with ThreadPoolExecutor(4) as threads:
        assert [int(s["tokens"][0]) for s in threads.map(shards.__getitem__, range(23))] == list(range(23))
    assert len(asked) == len(set(asked)) == len(shards.index)
    shutil.rmtree(folder / ".raw")
    for file in folder.glob("shard.*"):
        file.unlink()
    streams = [Shards(folder) for _ in range(4)]
    with ThreadPoolExecutor(4) as threads:
        assert [int(s["tokens"][0]) for s in threads.map(lambda shards: shards[0], streams)] == [0] * 4
    assert not [file for file in folder.iterdir() if file.suffix == ".tmp"]


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("file:///no/such/store", r"index.json: missing, after 4 attempts to fetch it from file:///no/such/store/mine"),
        ("nonsense://bucket/x", r"data.shards=nonsense://…: not a store that mosaicml-streaming knows"),
    ],
)
def test_a_store_that_is_not_there_is_one_line(tmp_path, url, message):
    with pytest.raises(Mistake, match=message) as error:
        token_folder(make_training(tmp_path, url))
    assert "\n" not in str(error.value)


def test_a_store_s_address_reaches_the_jobs_as_it_is():
    assert compose(["data.shards=s3://bucket/x", "stage=distill"]).config.data.shards == "s3://bucket/x"


def test_tokens_of_another_tokenizer_are_refused_with_both_values(tmp_path, store):
    for place in (str(store), f"file://{store}"):
        assert token_folder(make_training(tmp_path, place)).is_dir()
        with pytest.raises(Mistake, match=r"mine was made with the tokenizer aa, this teacher has bb; tokenise for"):
            token_folder(make_training(tmp_path, place, tokenizer="bb"))


def test_shards_that_do_not_say_their_tokenizer_are_taken_with_a_word(tmp_path, store, capsys):
    (store / "mine" / "tokens.json").unlink()
    assert token_folder(make_training(tmp_path, str(store))) == store
    assert f"{store}/mine: does not say by which tokenizer it was made" in capsys.readouterr().out
    (store / "mine" / "tokens.json").write_text(json.dumps({}), encoding="utf-8")
    with pytest.raises(Mistake, match=r"tokens.json: damaged"):
        token_folder(make_training(tmp_path, str(store)))


def spoil(shard, damage: str) -> None:
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    if damage == "missing":
        shard.unlink()
    else:
        shard.write_bytes(data[:-1] if damage == "short" else data)
