"""Stage `tokenize`: documents → token shards, packed to samples of T + 1 tokens, with a held-out split."""

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

from xlstm_distill.contract.exitcode import Mistake
from xlstm_distill.contract.files import folder_atomic
from xlstm_distill.contract.job import JobFolder, World
from xlstm_distill.contract.schema import Config, Data
from xlstm_distill.data.encode import Encoder, encode_documents
from xlstm_distill.data.fetch_teacher import tokenizer_hash
from xlstm_distill.data.packing import Budget, Packer
from xlstm_distill.data.shards import (
    count_samples,
    import_streaming,
    join_parts,
    shard_writer,
    write_tokens_note,
)
from xlstm_distill.data.sieve import Sieve, make_sieve
from xlstm_distill.data.sources import Documents, open_source
from xlstm_distill.runtime.metrics import Metrics
from xlstm_distill.runtime.stop import StopFlag

SPLITS = ("train", "validation")
LEFT_OUT = ("empty", "unanswered", "dropped")
"""Counts of documents that were read and not written."""


def run(folder: JobFolder, world: World, stop: StopFlag) -> dict[str, Any]:
    """Tokenise this element's pieces that are not done yet. Output: `SOURCE/train`, `SOURCE/validation`.

    A piece is a source, or one of its `parts`, in `SOURCE/PART/`, joined by `join_pieces`. Each has a manifest of its
    own, with the facts of `tokenize_source`.

    Raises:
        Mistake: a source cannot be read, or is too small to give both splits a sample.
        Stopped: a stop was requested; finished sources are durable.
    """
    if world.size > 1:
        raise Mistake(f"tokenize: runs as one process per array element, got {world.size} ranks; ask for no GPU")
    import_streaming()
    config, fetched = folder.config, folder.input("fetch")
    pieces = folder.my_pieces(world)
    opened = {piece: _open_piece(piece, config, fetched / "data") for piece in pieces}
    sieve = make_sieve(config, fetched / "evaluation") if pieces else None
    encoders: dict[Literal["text", "chat"], Encoder] = {}
    total, before = sum(documents.expected() for documents in opened.values()), 0
    with Metrics(folder.path, total) as metrics:
        for piece, documents in opened.items():

            def on_chunk(mebibytes: int, before: int = before) -> None:
                metrics.log(min(before + mebibytes, total))
                stop.check()

            form = documents.source.format
            encoder = encoders.setdefault(form, encoders.get(form) or Encoder(fetched / "teacher", form))
            with folder_atomic(folder.output / piece) as target:
                facts = tokenize_source(documents, encoder, target, config.data, sieve, on_chunk)
                write_tokens_note(target, tokenizer_hash(fetched / "teacher"))
            folder.finish(facts, piece)
            before += documents.expected()
            metrics.log(before, _shown(piece, facts))
    return {}


def _open_piece(piece: str, config: Config, fetched: Path) -> Documents:
    name, _, part = piece.partition("/")
    return open_source(name, config.sources[name], fetched, int(part or 0))


def join_pieces(folder: JobFolder) -> None:
    """Join the parts of every source; all of them are finished."""
    for name, source in folder.config.sources.items():
        if source.parts > 1:
            for split in SPLITS:
                join_parts(folder.output / name, [str(part) for part in range(source.parts)], split)
            write_tokens_note(folder.output / name, tokenizer_hash(folder.input("fetch") / "teacher"))


def _shown(name: str, facts: dict[str, Any]) -> dict[str, float]:
    shown = {f"tokens/{name}": sum(facts[split]["tokens"] for split in SPLITS)}
    if facts["unanswered"]:
        shown[f"unanswered/{name}"] = facts["unanswered"]
    if "overlap" in facts:
        shown[f"overlap/{name}"] = facts["overlap"]["documents"]
    return shown


def tokenize_source(
    documents: Documents,
    encoder: Encoder,
    target: Path,
    settings: Data,
    sieve: Sieve | None = None,
    on_chunk: Callable[[int], None] = lambda mebibytes: None,
) -> dict[str, Any]:
    """Write one source's shards below `target`.

    Args:
        documents: of the source.
        encoder: the tokenizer, for the source's format.
        target: gets `train/` and `validation/`.
        settings: sequence, share of the validation, size of shards.
        sieve: looks for texts of the evaluation.
        on_chunk: hears how many MiB of the files were read so far; may raise to stop.

    Returns:
        Facts: `documents` that were read; of them `empty`: without text, `unanswered`: chats without a question or an
        answer, `dropped`: on request alone, see `Sieve`; per split documents, tokens, samples, remainder; `overlap`, if
        looked for; `stopped_at`: the piece's share of `tokens` if it ended there, else 0.

    Raises:
        Mistake: a split has no sample.
    """
    with ExitStack() as stack:
        packers = {}
        for split in SPLITS:
            writer = stack.enter_context(shard_writer(target / split, settings.sequence, settings.shard_bytes))
            packers[split] = Packer(writer, settings.sequence)
        budget = Budget(documents, packers)
        packer = packers["train"]
        for chunk in encode_documents(sieve(documents) if sieve else documents, encoder):
            for document in chunk:
                if budget.ends_before(document):
                    continue
                if document.first:
                    packer = packers["validation" if document.draw < settings.validation else "train"]
                packer.add(document)
            on_chunk(documents.done)
        facts: dict[str, Any] = {name: getattr(documents, name) for name in ("documents", "empty", "unanswered")}
        facts["documents"] -= budget.beyond
        facts["dropped"] = sieve.dropped if sieve else 0
        facts |= {split: packer.facts() for split, packer in packers.items()}
        facts["stopped_at"] = budget.tokens if documents.enough else 0
        _tell_unanswered(documents)
        _check_not_empty(documents.name, facts, settings)
    _check_counts(facts, target, settings.sequence)
    budget.tell()
    return {**facts, **(sieve.facts() if sieve else {})}


def _tell_unanswered(documents: Documents) -> None:
    if not documents.unanswered:
        return
    roles = ", ".join(map(repr, sorted(documents.roles)[:8]))
    print(
        f"source {documents.name}: left out {documents.unanswered} of {documents.documents} documents: chats without a "
        f"question or an answer of the role assistant{f'; unknown roles: {roles}' if roles else ''}",
        flush=True,
    )


def _check_counts(facts: dict[str, Any], target: Path, sequence: int) -> None:
    """Compare what was read with what stands on disk.

    Raises:
        RuntimeError: they differ: a defect of this program.
    """
    counts = {"written": sum(facts[split]["documents"] for split in SPLITS)} | {key: facts[key] for key in LEFT_OUT}
    if facts["documents"] != sum(counts.values()):
        found = ", ".join(f"{count} {name}" for name, count in counts.items())
        raise RuntimeError(f"{target}: {facts['documents']} documents read, {found}")
    for split in SPLITS:
        counts, written = facts[split], count_samples(target / split)
        if counts["tokens"] != written * sequence + 1 + counts["remainder"]:
            raise RuntimeError(f"{target / split}: {written} samples of {sequence} were written, of {counts}")


def _check_not_empty(name: str, facts: dict[str, Any], settings: Data) -> None:
    if facts["documents"] == facts["empty"] + facts["unanswered"]:
        raise Mistake(
            f"source {name}: holds no documents ({facts['empty']} without text, {facts['unanswered']} chats without an "
            f"answer); mend its path, field or answer"
        )
    for split in SPLITS:
        counts = facts[split]
        if counts["samples"]:
            continue
        advice = f"raise data.validation={settings.validation}, " if split == "validation" else ""
        total = sum(facts[s]["documents"] for s in SPLITS)
        raise Mistake(
            f"source {name}: its {split} split has {counts['documents']} of {total} documents and {counts['tokens']} "
            f"tokens, less than one sample of {settings.sequence + 1}; {advice}give more text or lower data.sequence"
        )
