"""Retrieval past the window: what a student finds of what was said once, and what helps.

    python benchmarks/needle.py layers [--items N] [--folder FOLDER]     # which layers of the teacher carry retrieval
    python benchmarks/needle.py students [--students base wide …] [--tokens N] [--items N] [--folder FOLDER] [--json]

SmolLM2-135M-Instruct. A prompt says "The code of KEY is VALUE." once, at any depth of a haystack, among three other
codes where it is `multi`, and asks for it at the end (`evaluate/tasks/needle.py`). Printed by length: the share of
items whose value is the likeliest of four, of which one is right, and the mean log-probability of the right value.

`layers` needs no training: every layer sees a window of 64 + 4 sinks, but for one which sees all; what that layer adds
to the log-probability is its part. `students` are aligned (and, named with a `+`, distilled) at equal tokens, each in
the run folder's own jobs; those that are finished, and what was measured, are kept with --folder.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

import torch
from targets import made

from xlstm_distill.data.stream import read_samples
from xlstm_distill.evaluate.heldout import Reference, Sample, final_hidden, measure
from xlstm_distill.evaluate.tasks.needle import needle
from xlstm_distill.model import HybridForCausalLM

WINDOW, WHOLE, LAYERS = 64, 1 << 20, 30
LENGTHS = (56, 128, 256, 512, 1024, 2048)
SOURCES = ("demo_math", "demo_code")
COMMON = [
    f"student.window={WINDOW}", "student.sinks=4", "experts=[code]", "eval.tasks=[]", "cluster=local",
    "align.checkpoint_every=1000", "distill.checkpoint_every=1000", "align.validation_samples=2",
    "distill.validation_samples=2", "strategy.precision=float32", "distill.targets=online", "distill.loss=full",
    *(f"data.sources.{name}.limit=400" for name in SOURCES), "expert.code.sources.demo_code.limit=400",
]  # fmt: skip
TEXTS = 400
"""Documents of the needles' source; their seed is not that of the items."""
STUDENTS = {
    "base": ["data.sequence=512"],
    "short": [
        "data.sequence=128",
        *(f"{stage}.{key}=4" for stage in ("align", "distill") for key in ("batch", "micro_batch")),
    ],
    "long": ["data.sequence=2048"],
    "reset": ["data.sequence=512", "student.reset_at_documents=true"],
    "forget": ["data.sequence=512", "student.forget_gate_bias=[5.0,10.0]"],
    "hedgehog": ["data.sequence=512", "student.feature_map=hedgehog"],
    "needles": ["data.sequence=512"],
    "wide": ["data.sequence=512"],
    "moved": ["data.sequence=512", "student.window=16"],
    "shifted": ["data.sequence=512", "student.window=32"],
}
"""Settings of each; as many steps, but for `long`, whose samples are fewer. `needles` has them in its mixture. Some
layers of `wide` see all of what a sample holds; those of `moved` and `shifted` as far as the state of `base` reaches,
which the other layers give up for them."""
NARROW = {"moved": 16, "shifted": 32}
"""Windows of the other layers."""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=("layers", "students"))
    parser.add_argument("--folder", type=Path, help="of the runs; default: a temporary one")
    parser.add_argument("--items", type=int, default=12, help="per length and kind")
    parser.add_argument("--length", type=int, default=512, help="`layers`: of the prompts")
    parser.add_argument("--tokens", type=int, default=16_384, help="`students`: of Stage I, and of Stage II")
    parser.add_argument(
        "--students", nargs="+", default=["base"], help=f"of {', '.join(STUDENTS)}; NAME+: distilled too"
    )
    parser.add_argument("--wide", nargs="+", type=int, default=[], help="layers of `wide` that see all of a sample")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    with tempfile.TemporaryDirectory() as temporary, redirect_stdout(sys.stderr):
        study = layers if options.study == "layers" else students
        found = study(Path(options.folder or temporary), options)
    print(json.dumps(found, indent=None if options.json else 2))


def layers(root: Path, options: argparse.Namespace) -> dict[str, Any]:
    """What each layer adds when it alone sees the whole context, and what the best ones do together."""
    teacher, tokenizer = _teacher(root)
    items = list(_items(tokenizer, options.length, options.items))
    student = _window_only(teacher, root)
    count = len(student.mixers)

    def seeing(wide: Sequence[int]) -> dict[str, float]:
        for number, mixer in enumerate(student.mixers):
            mixer.window = WHOLE if number in wide else WINDOW
        return _score(student, tokenizer, items)

    none, full = seeing([]), seeing(range(count))
    each = {number: seeing([number])["log_prob"] - none["log_prob"] for number in range(count)}
    order = sorted(each, key=lambda number: -each[number])
    best = {n: seeing(order[:n]) | {"layers": sorted(order[:n])} for n in (1, 2, 3, 4, 6, 8)}
    return {"teacher": full, "window": none, "each": each, "best": best}


def students(root: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Teacher, window alone and every student, by length."""
    teacher, tokenizer = _teacher(root)
    sets = {length: list(_items(tokenizer, length, options.items)) for length in LENGTHS}
    found: dict[str, Any] = {}

    def take(name: str, load: Callable[[], Any], trained: bool = True) -> None:
        kept = root / f"{name}-{options.items}-{options.tokens}.json"
        if not kept.exists():
            model = load()
            result: dict[str, Any] = {length: _score(model, tokenizer, items) for length, items in sets.items()}
            if isinstance(model, HybridForCausalLM):
                result["state_mb"] = model.config.state_bytes() / 1e6
            if trained:
                result["kl"] = _held_out(model, teacher, root / "base/jobs/tokenize/output")
            kept.write_text(json.dumps(result), encoding="utf-8")
        found[name] = json.loads(kept.read_text(encoding="utf-8"))
        print(name, json.dumps(found[name]), file=sys.stderr, flush=True)

    take("teacher", lambda: teacher, trained=False)
    take("window", lambda: _window_only(teacher, root), trained=False)
    made(root / "base/jobs", [*_settings("base", options), "stage=align"])  # all are asked on its held-out samples
    for name in options.students:
        plain = name.removesuffix("+")
        jobs = root / plain / "jobs"
        settings = _settings(plain, options)
        if reach := 4096 if plain == "wide" else _moved(options.wide, NARROW.get(plain, 0)):
            settings += [f"student.layer_windows.{layer}={reach}" for layer in options.wide]
        settings += _needle_source(root, tokenizer) if plain == "needles" else []
        made(jobs, [*settings, "stage=align"])
        take(plain, partial(_load, jobs / "align/output/student"))
        if name.endswith("+"):
            made(jobs, [*settings, "stage=distill"])
            take(name, partial(_load, jobs / "distill-code/output/student"))
    return found


def _settings(name: str, options: argparse.Namespace) -> list[str]:
    return [*COMMON, *STUDENTS[name], f"align.tokens={options.tokens}", f"distill.tokens={options.tokens}"]


def _moved(wide: Sequence[int], narrow: int) -> int:
    """Window of the layers `wide` when all others have a narrow one and the state has the bytes of `WINDOW` everywhere;
    0: no such student."""
    return (LAYERS * WINDOW - (LAYERS - len(wide)) * narrow) // len(wide) if wide and narrow else 0


def _items(tokenizer: Any, length: int, count: int) -> Iterator[dict[str, Any]]:
    for many in (False, True):
        yield from needle(tokenizer, many, True, length, count, 0)


@torch.no_grad()
def _score(model: Any, tokenizer: Any, items: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Share of items answered, of those whose right value is the likeliest word of all, mean log-probability of it."""
    chosen, written, log_probs = [], [], []
    for item in items:
        ids = tokenizer(item["prompt"], return_tensors="pt").input_ids
        found = model(ids, logits_to_keep=1).logits[0, -1].log_softmax(-1)
        options = [tokenizer.encode(choice, add_special_tokens=False)[0] for choice in item["choices"]]
        right = options[item["answer"]]
        chosen.append(max(options, key=lambda token: float(found[token])) == right)
        written.append(int(found.argmax()) == right)
        log_probs.append(float(found[right]))
    mean = statistics.fmean
    return {"choice": round(mean(chosen), 3), "written": round(mean(written), 3), "log_prob": round(mean(log_probs), 3)}


def _needle_source(root: Path, tokenizer: Any) -> list[str]:
    """Settings that give a fifth of Stage I's tokens, and of Stage II's, to needles with their answers."""
    file = root / "needles.jsonl"
    if not file.exists():
        texts = []
        for number in range(TEXTS):
            length = (100, 180, 320, 480)[number % 4]
            item = needle(tokenizer, number % 2 == 1, False, length, 1, 1000 + number)[0]
            texts.append(f"{item['prompt']} {item['answer']}.")
        file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    source = f"{{kind: jsonl, path: '{file.resolve()}', format: text, field: text, weight: 0.2}}"
    return [
        f"data.sources.needles={source}", "data.sources.demo_math.weight=0.4", "data.sources.demo_code.weight=0.4",
        f"expert.code.sources.needles={source}", "expert.code.sources.demo_code.weight=0.8",
    ]  # fmt: skip


def _held_out(model: Any, teacher: Any, shards: Path) -> dict[str, float]:
    """KL(teacher ‖ student) over the vocabulary on held-out text of each source, nats per token."""
    found = {}
    for source in SOURCES:
        batch = read_samples(shards / source / "validation", 4)
        sample = Sample(batch.tokens, batch.mask)
        hidden = [final_hidden(each, sample.tokens[:, :-1], 2) for each in (teacher, model)]
        head = [each.get_output_embeddings().weight.detach() for each in (teacher, model)]
        found[source] = round(float(measure(hidden[1], head[1], sample, Reference(hidden[0], head[0]))["kl"]), 4)
    return found


def _teacher(root: Path) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    jobs = root / "base" / "jobs"
    made(jobs, [*COMMON, *STUDENTS["base"], "stage=fetch"])
    folder = jobs / "fetch/output/teacher"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(folder)


def _window_only(teacher: Any, root: Path) -> HybridForCausalLM:
    """The untrained student without its recurrence."""
    from xlstm_distill.model import convert

    folder = root / "window"
    if not folder.exists():
        folder.mkdir(parents=True)
        convert(root / "base/jobs/fetch/output/teacher", folder, window=WINDOW, sinks=4, use_mlstm=False)
    return _load(folder)


def _load(folder: Path) -> HybridForCausalLM:
    return HybridForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


if __name__ == "__main__":
    main()
