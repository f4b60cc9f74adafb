"""Stage `cache`: token shards → the same with the teacher's sparse targets, for a distillation without a teacher."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from xlstm_distill.contract.exitcode import Mistake
from xlstm_distill.contract.files import exclusive
from xlstm_distill.contract.job import JobFolder, World
from xlstm_distill.contract.schema import pieces_of
from xlstm_distill.data.shards import token_folder, write_tokens_note
from xlstm_distill.runtime.metrics import Metrics
from xlstm_distill.runtime.stop import StopFlag
from xlstm_distill.runtime.watchdog import Watchdog
from xlstm_distill.teacher.capturer import Capture
from xlstm_distill.teacher.index import index_of, read_note
from xlstm_distill.teacher.sink import failure
from xlstm_distill.teacher.units import SPLITS, Piece, Unit, join


def run(folder: JobFolder, world: World, stop: StopFlag) -> dict[str, Any]:
    """Run the teacher over this element's pieces that are not done yet. Output: see `units.py`.

    A piece is a source, or one of its `parts`, which `join_pieces` joins when all are finished. Each has a manifest
    of its own, with samples, tokens and the targets' bytes per token by split, and the speed of this start.

    Raises:
        Mistake: the shards are missing, damaged or of another length or vocabulary; another process makes the same.
        Stopped: a stop was requested; finished shards are durable.
    """
    shards, todo = token_folder(folder), folder.my_pieces(world)
    if not todo:
        return {}
    pieces = {name: Piece(name, folder.config, shards, folder.output) for name in folder.job.pieces}
    index = index_of(folder.config, folder.input("fetch"))
    with ExitStack() as stack:
        left = {name: _take(stack, folder, pieces[name], index) for name in todo} if world.rank == 0 else {}
        capture = Capture(folder.input("fetch") / "teacher", folder.config, world, folder)
        stack.callback(capture.close)
        left = capture.ranks.from_first(left)  # on other nodes a network file system may look as it did before
        total = sum(unit.count for name in left for unit in pieces[name].units)
        done = total - sum(unit.count for units in left.values() for unit in units)
        for name, units in left.items():
            with _progress(folder, world, done, total) as on_batch:
                speed = capture.piece(pieces[name], units, index, stop, on_batch)
            done += sum(unit.count for unit in units)
            # No watchdog: a large output is hashed for minutes, for which the other ranks wait.
            finish = partial(_finish, folder, pieces[name], index, speed)
            capture.ranks.go_on(stop, failure(finish) if world.rank == 0 else None)
    return {}


def _take(stack: ExitStack, folder: JobFolder, piece: Piece, index: dict[str, Any]) -> list[Unit]:
    """Make the piece this process's own until `stack` is closed, and return what is left to do of it: two that make the
    same one would remove each other's files."""
    if not stack.enter_context(exclusive(folder.path / "locks" / piece.name)):
        raise Mistake(f"{piece.folder}: another process is caching it; wait for that one (xdl status), or end it")
    piece.clear(index)
    return [unit for unit in piece.units if not unit.done(index)]


@contextmanager
def _progress(folder: JobFolder, world: World, done: int, total: int) -> Iterator[Callable[[int, float], None]]:
    """What hears of every batch: metrics and watchdog."""
    seconds = folder.config.guard.stuck_seconds
    with Metrics(folder.path, total, enabled=world.rank == 0) as metrics, Watchdog(folder.path, world, seconds) as dog:

        def on_batch(samples: int, tokens_per_s: float) -> None:
            nonlocal done
            done += samples
            metrics.log(done, {"tokens_per_s": round(tokens_per_s, 1)})
            dog.beat(done, "cache")

        yield on_batch


def _facts(piece: Piece, tokens_per_s: float) -> dict[str, Any]:
    """Counts of a finished piece."""
    facts: dict[str, Any] = {"tokens_per_s": round(tokens_per_s, 1)}
    for split in SPLITS:
        notes = [read_note(unit.folder) for unit in piece.units if unit.split == split]
        samples = sum(note["samples"] for note in notes)
        tokens = samples * piece.config.data.sequence
        size = sum(note["target_bytes"] for note in notes)
        facts[split] = {"samples": samples, "tokens": tokens, "bytes_per_token": round(size / max(tokens, 1), 3)}
    return facts


def _finish(folder: JobFolder, piece: Piece, index: dict[str, Any], tokens_per_s: float) -> None:
    if piece.name == piece.source:
        _join(piece, index)
    folder.finish(_facts(piece, tokens_per_s), piece.name)


def _join(piece: Piece, index: dict[str, Any]) -> None:
    """Join the shards of all pieces of a source."""
    for split in SPLITS:
        join(piece.all_units(split), piece.output / piece.source, split, index)
    write_tokens_note(piece.output / piece.source, index["tokenizer"])


def join_pieces(folder: JobFolder) -> None:
    """Join every source in parts; all of them are finished."""
    shards, index = token_folder(folder), index_of(folder.config, folder.input("fetch"))
    for name, source in folder.config.sources.items():
        parts = pieces_of(name, source)
        if len(parts) > 1 and set(parts) <= set(folder.job.pieces):
            _join(Piece(parts[0], folder.config, shards, folder.output), index)
