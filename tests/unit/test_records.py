"""Files are read whole and exactly, whatever packs them; what is broken, too long or no text is named with its place"""

import gzip
import itertools
import json
import random
import tracemalloc
from pathlib import Path

import pytest

from xlstm_distill.contract.exitcode import Mistake
from xlstm_distill.contract.schema import Source
from xlstm_distill.data import records, sources
from xlstm_distill.data.records import cut
from xlstm_distill.data.sources import Passage, open_source

TEXTS = [f"text {n} ☃\n" + "line\n" * (n % 5) for n in range(400)]


def read(path: Path | str, **changes) -> list:
    return list(open_source("mine", Source(**{"kind": "jsonl", "path": str(path)} | changes), Path("/nowhere")))


def lines(rows: list) -> bytes:
    return "".join(json.dumps({"text": row}, ensure_ascii=False) + "\n" for row in rows).encode()


def parquet(file: Path, rows: list[str]) -> None:
    import pyarrow as pa
    from pyarrow.parquet import write_table

    write_table(pa.table({"text": rows}), file, use_dictionary=False, write_batch_size=1)  # a page for each


def zst(data: bytes, frames: int = 1) -> bytes:
    import zstandard

    step = -(-len(data) // frames)
    return b"".join(zstandard.compress(data[at : at + step]) for at in range(0, len(data), step))


@pytest.mark.parametrize("ending", ["", ".gz", ".zst"])
def test_packed_files_hold_what_plain_ones_hold_in_however_many_parts(tmp_path, monkeypatch, ending):
    monkeypatch.setattr(records, "BLOCK", 1 << 10)
    pack = {"": bytes, ".gz": lambda d: gzip.compress(d[:999]) + gzip.compress(d[999:]), ".zst": lambda d: zst(d, 3)}
    (tmp_path / f"a.jsonl{ending}").write_bytes(pack[ending](lines(TEXTS)))
    (tmp_path / f"a.txt{ending}").write_bytes(pack[ending](TEXTS[3].encode()))
    assert read(tmp_path / f"a.jsonl{ending}") == TEXTS
    assert read(tmp_path / f"a.txt{ending}", kind="text") == [TEXTS[3]]


@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_a_packed_file_that_is_cut_short_is_named_and_not_taken_for_the_whole(tmp_path, ending):
    file, data = tmp_path / f"a.jsonl{ending}", lines(TEXTS)
    file.write_bytes((gzip.compress(data) if ending == ".gz" else zst(data, 2))[:-9])
    with pytest.raises(Mistake, match=f"source mine: {file}: .*cut short"):
        read(file)
    file.write_bytes(b"neither nor")
    with pytest.raises(Mistake, match=f"source mine: {file}: damaged"):
        read(file)


def test_a_byte_order_mark_windows_line_ends_and_blank_lines_are_no_text(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + b'{"text": "a"}\r\n\r\n{"text": "b"}')
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\rthree")
    assert read(tmp_path / "a.jsonl") == ["a", "b"]
    assert read(tmp_path / "a.txt", kind="text") == ["one\ntwo\nthree"]


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("block", [5, 1 << 18])
def test_bytes_that_are_no_utf8_are_named_with_their_offset(tmp_path, monkeypatch, block, mark):
    monkeypatch.setattr(records, "BLOCK", block)
    good = mark + '{"text": "snow ☃"}\n'.encode()
    data = good + b'{"text": "caf\xe9 au lait"}\n'
    for name, kind in (("a.jsonl", "jsonl"), ("a.txt", "text")):
        (tmp_path / name).write_bytes(data)
        place = f"{tmp_path}/{name}" + (", line 2" if kind == "jsonl" else "")
        with pytest.raises(Mistake, match=f"{place}: not UTF-8 .byte 0xe9 at offset {data.index(0xE9)}, ") as error:
            read(tmp_path / name, kind=kind)
        assert "\n" not in str(error.value)
    (tmp_path / "b.txt").write_bytes("half a snowman ☃".encode()[:-1])
    with pytest.raises(Mistake, match="byte 0xe2 at offset 15, unexpected end of data"):
        read(tmp_path / "b.txt", kind="text")


def test_text_in_parquet_that_is_no_utf8_is_named(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    column = pa.array([b"good", b"caf\xe9"]).view(pa.string())
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    with pytest.raises(Mistake, match=r"a.parquet, row 2: not UTF-8"):
        read(tmp_path / "a.parquet", kind="parquet")


def test_half_a_surrogate_pair_is_no_text(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n{"text": "half \\ud83d"}\n', encoding="utf-8")
    with pytest.raises(Mistake, match=r"a.jsonl, line 2: holds half of a surrogate pair \('.ud83d'\)"):
        read(tmp_path / "a.jsonl")


@pytest.mark.parametrize("line", ['["a"]', '"a"', "7", "{", "[" * 100_000])
def test_a_line_that_is_no_object_is_named(tmp_path, line):
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n' + line, encoding="utf-8")
    with pytest.raises(Mistake, match=r"a.jsonl, line 2: .*expected one (JSON )?object per line") as error:
        read(tmp_path / "a.jsonl")
    assert len(str(error.value)) < 400


def test_a_line_longer_than_memory_is_named_with_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "LONGEST_LINE", 1 << 16)
    monkeypatch.setattr(records, "BLOCK", 1 << 12)
    (tmp_path / "a.jsonl").write_bytes(lines(["short", "x" * (1 << 18)]))
    with pytest.raises(Mistake, match=r"a.jsonl, line 2: longer than 0 MiB.*give it as a text file .kind=text"):
        read(tmp_path / "a.jsonl")


def test_a_row_of_parquet_longer_than_memory_is_named_with_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "LONGEST_LINE", 1 << 16)
    parquet(tmp_path / "a.parquet", ["short", "x" * (1 << 16), "short"])
    with pytest.raises(Mistake, match=r"a.parquet, row 2: longer than 0 MiB.*give it as a text file .kind=text"):
        read(tmp_path / "a.parquet", kind="parquet")


def test_reading_parquet_takes_memory_for_some_rows_only_however_large_its_row_groups(tmp_path, monkeypatch):
    import pyarrow as pa

    monkeypatch.setattr(records, "LONGEST_LINE", 1 << 22)
    texts = [random.Random(number).randbytes(1 << 19).hex() for number in range(32)]
    parquet(tmp_path / "a.parquet", texts)
    before, held = pa.total_allocated_bytes(), []
    for text, (_, row) in zip(texts, records.parquet_records(str(tmp_path / "a.parquet"), ["text"]), strict=True):
        assert row["text"] == text
        held.append(pa.total_allocated_bytes() - before)
    assert 1 << 20 < max(held) < (32 << 20) / 2


@pytest.mark.parametrize("kind", ["text", "jsonl"])
def test_a_long_text_comes_in_passages_that_join_to_the_whole(tmp_path, monkeypatch, kind):
    for module in (records, sources):
        monkeypatch.setattr(module, "PASSAGE", 1000)
    text = "".join(TEXTS)
    (tmp_path / "a").write_bytes(text.encode() if kind == "text" else lines([text, "short"]))
    found = read(tmp_path / "a", kind=kind)
    passages = [part for part in found if isinstance(part, Passage)]
    assert "".join(part.text for part in passages) == text
    assert max(len(part.text) for part in passages) <= 1000
    assert [part.first for part in passages] == [True] + [False] * (len(passages) - 1)
    assert [part.last for part in passages] == [False] * (len(passages) - 1) + [True]
    for before, after in itertools.pairwise(passages):
        assert before.text[-1].isalpha()
        assert after.text[0] in " \n"
    assert found[len(passages) :] == ([] if kind == "text" else ["short"])


def test_texts_are_cut_between_a_letter_and_a_space_or_a_line_s_end_or_else_anywhere():
    assert cut("one two\nthree\n  four\nfive six", 24) == len("one two\nthree\n  four")
    assert cut("a b (c) (d) ee (f) (g)", 19) == len("a b (c) (d) ee")
    assert cut("1 2 3 4 5 6 7 8", 9) == 9
    assert cut("x" * 50, 20) == 20


@pytest.mark.parametrize("ending", ["", ".gz", ".zst"])
def test_reading_a_long_document_takes_memory_for_some_passages_only(tmp_path, ending):
    size = 64 << 20
    data = b"the fox and 13 dogs\n" * (size // 20)
    pack = {"": bytes, ".gz": lambda d: gzip.compress(d, 1), ".zst": zst}
    (tmp_path / f"a{ending}").write_bytes(pack[ending](data))
    del data
    documents = open_source("mine", Source(kind="text", path=str(tmp_path / "a*")), tmp_path)
    tracemalloc.start()
    characters = sum(len(part.text) for part in documents)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (characters, documents.documents) == (size // 20 * 20, 1)
    assert peak < size / 6
