"""Files → records: JSONL, Parquet and plain text, `.gz` and `.zst` of the first and the last; in bounded memory.

`datasets` is not used for local files: it loads a text file whole, fills up the fields that a JSON row does not have,
names neither file nor line where one is broken, and ends silently at the end of the first of several zstd frames.
"""

import codecs
import io
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from xlstm_distill.contract.exitcode import Mistake

if TYPE_CHECKING:
    from pyarrow import RecordBatch
    from pyarrow.parquet import ParquetFile

BLOCK = 1 << 18
"""Bytes that are read at one time."""
SMALLEST_STEP = 64
"""Bytes of zstd that are unpacked at least: 2 MiB at most."""
LONGEST_LINE = 1 << 28
"""Bytes of the longest line of JSON or row of Parquet that is taken into memory."""
PASSAGE = 1 << 20
"""Characters of a long text that are handed on at one time."""
PARQUET_ROWS = 64
"""Rows of Parquet that are decoded at one time; fewer where they are long."""

Row = Mapping[str, Any]
Progress = Callable[[float], None]
"""Hears the bytes of a file, as it lies on disk, that were read since it was last called."""


def blocks(file: str, progress: Progress = lambda read: None) -> Iterator[bytes]:
    """The bytes of `file`, unpacked where its name ends in `.gz` or `.zst`.

    Raises:
        Mistake: it is cut short or damaged.
    """
    with open(file, "rb") as opened:
        before = 0
        for block in _unpacked(file, opened):
            yield block
            at = opened.tell()
            progress(at - before)
            before = at


def _unpacked(file: str, opened: io.BufferedReader) -> Iterator[bytes]:
    import gzip
    import zlib

    if file.endswith(".zst"):
        yield from _unzst(file, opened)
        return
    stream: Any = gzip.GzipFile(fileobj=opened) if file.endswith(".gz") else opened
    try:
        yield from iter(lambda: stream.read(BLOCK), b"")
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise Mistake(f"{file}: damaged or cut short ({error}); copy it anew") from error


def _unzst(file: str, opened: io.BufferedReader) -> Iterator[bytes]:
    """Frame by frame: zstandard's own reader takes a file that is cut short for a whole one. As little is read at a
    time as gives about a block: some bytes may stand for megabytes."""
    import zstandard

    machine, frame, step = zstandard.ZstdDecompressor(max_window_size=1 << 31), None, SMALLEST_STEP
    try:
        while packed := opened.read(step):
            while packed:
                frame = frame or machine.decompressobj()
                block = frame.decompress(packed)
                packed, frame = (frame.unused_data, None) if frame.eof else (b"", frame)
                yield block
                step = min(2 * step, BLOCK) if len(block) < BLOCK else max(step // 2, SMALLEST_STEP)
    except zstandard.ZstdError as error:
        raise Mistake(f"{file}: damaged ({error}); copy it anew") from error
    if frame is not None:
        raise Mistake(f"{file}: cut short (its last zstd frame has no end); copy it anew")


def json_records(file: str, progress: Progress = lambda read: None) -> Iterator[tuple[str, Row]]:
    """(`FILE, line N`, object) for each line of JSONL that is not blank.

    Raises:
        Mistake: a line is no JSON object, no UTF-8, or longer than `LONGEST_LINE`.
    """
    start = 0
    for number, line in enumerate(_lines(file, progress), start=1):
        place, first = f"{file}, line {number}", start
        start += len(line)
        if number == 1 and line.startswith(codecs.BOM_UTF8):
            line, first = line[3:], 3
        try:
            text = line.decode("utf-8")
            row = json.loads(text) if not text.isspace() else None
        except UnicodeDecodeError as error:
            raise _no_utf8(place, first, error) from error
        except (ValueError, RecursionError) as error:
            raise Mistake(f"{place}: not JSON ({error}); expected one object per line") from error
        if isinstance(row, dict):
            yield place, row
        elif row is not None:
            raise Mistake(f"{place}: holds {type(row).__name__}; expected one JSON object per line")


def _lines(file: str, progress: Progress) -> Iterator[bytes]:
    """Lines with their ends, so that their lengths add up to positions in the file."""
    parts: list[bytes] = []
    size = number = 0
    for block in blocks(file, progress):
        *whole, rest = block.split(b"\n")
        for line in whole:
            number += 1
            yield b"".join([*parts, line, b"\n"])
            parts, size = [], 0
        if rest:
            parts.append(rest)
            size += len(rest)
        if size > LONGEST_LINE:
            raise _too_long(f"{file}, line {number + 1}")
    if parts:
        yield b"".join(parts)


def _too_long(place: str) -> Mistake:
    return Mistake(
        f"{place}: longer than {LONGEST_LINE >> 20} MiB, so it may not fit into memory; split the document, or give it "
        f"as a text file (kind=text), which is read in passages"
    )


def _no_utf8(place: str, start: int, error: UnicodeDecodeError) -> Mistake:
    byte = error.object[error.start]
    return Mistake(
        f"{place}: not UTF-8 (byte 0x{byte:02x} at offset {start + error.start}, {error.reason}); "
        f"convert the file (iconv -t UTF-8) or leave it out"
    )


def parquet_records(
    file: str, columns: Sequence[str], progress: Progress = lambda read: None, optional: Sequence[str] = ()
) -> Iterator[tuple[str, Row]]:
    """(`FILE, row N`, row) of Parquet, of which only `columns` are read, and `optional` ones where they are there; all
    of them where it lacks one of `columns`.

    Raises:
        Mistake: it is no Parquet, holds text that is no UTF-8, or a row longer than `LONGEST_LINE`.
    """
    import pyarrow as pa
    from pyarrow.parquet import ParquetFile

    number = 0
    try:
        with ParquetFile(file, pre_buffer=False, buffer_size=BLOCK) as opened:  # else a row group is read whole
            there = set(opened.schema_arrow.names)
            wanted = [*columns, *(there & set(optional) - set(columns))] if set(columns) <= there else None
            share = os.path.getsize(file) / max(opened.metadata.num_rows, 1)
            for batch in _batches(opened, wanted):
                for place in range(batch.num_rows):
                    number += 1
                    row = batch.slice(place, 1)
                    if row.nbytes > LONGEST_LINE:
                        raise _too_long(f"{file}, row {number}")
                    yield f"{file}, row {number}", row.to_pylist()[0]
                progress(share * batch.num_rows)
    except UnicodeDecodeError as error:
        raise Mistake(f"{file}, row {number}: not UTF-8 ({error.reason}); write the file anew") from error
    except (pa.ArrowException, OSError) as error:
        raise Mistake(f"{file}: cannot be read as Parquet ({' '.join(str(error).split())[:200]})") from error


def _batches(opened: "ParquetFile", columns: list[str] | None) -> "Iterator[RecordBatch]":
    """The rows of a file, so many together as hold about `LONGEST_LINE` bytes by the mean of their row group."""
    for number in range(opened.num_row_groups):
        group = opened.metadata.row_group(number)
        rows = LONGEST_LINE * group.num_rows // max(group.total_byte_size, 1)
        yield from opened.iter_batches(min(max(rows, 1), PARQUET_ROWS), [number], columns=columns)


def text_passages(file: str, progress: Progress = lambda read: None) -> Iterator[str]:
    """A text file in passages of about `PASSAGE` characters, cut as `cut` does; line ends become `\\n`.

    Raises:
        Mistake: it is no UTF-8; the line names the place.
    """
    utf8 = codecs.getincrementaldecoder("utf-8")()
    newlines = io.IncrementalNewlineDecoder(None, translate=True)
    text, start = "", 0
    for block in blocks(file, progress):
        skipped = 3 if not start and block.startswith(codecs.BOM_UTF8) else 0
        text += newlines.decode(_decoded(utf8, file, start + skipped, block[skipped:]))
        start += len(block)
        while len(text) > PASSAGE:
            end = cut(text, PASSAGE)
            yield text[:end]
            text = text[end:]
    yield text + newlines.decode(_decoded(utf8, file, start, b"", final=True), final=True)


def _decoded(utf8: codecs.IncrementalDecoder, file: str, start: int, block: bytes, *, final: bool = False) -> str:
    pending = len(utf8.getstate()[0])
    try:
        return utf8.decode(block, final)
    except UnicodeDecodeError as error:
        raise _no_utf8(file, start - pending, error) from error


def cut(text: str, longest: int) -> int:
    """Where to part `text` so that the first part has at most `longest` characters: between a letter and a space or a
    line's end, where byte-level tokenizers part it anyway, whatever stands further away; at `longest` where the second
    half has no such place."""
    end = longest
    while (end := max(text.rfind(sign, longest // 2, end) for sign in " \n")) > 0:
        if text[end - 1].isalpha():
            return end
    return longest
