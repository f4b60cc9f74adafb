"""A rank of test_load_dist.py: `memory STRATEGY FOLDER OUT`, `whole STRATEGY FOLDER OUT` or `same STRATEGY FOLDER`."""

import json
import sys
import threading
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from xlstm_distill.contract.job import World
from xlstm_distill.contract.schema import Strategy as Settings
from xlstm_distill.model import HybridForCausalLM
from xlstm_distill.parallel.strategy import Strategy, make_strategy
from xlstm_distill.teacher.frozen import empty_teacher
from xlstm_distill.train.students import empty_student


def anonymous() -> int:
    """Bytes of memory that are this process's own. Mapped safetensors files are not among them: their pages belong to
    the page cache, once for all ranks, and the kernel drops them when memory runs short."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon:"))
    return 1024 * int(line.split()[1])


class Peak:
    """`with Peak() as peak:`, then how much this process's own memory grew: at most `peak.bytes`, and `peak.kept`."""

    def __enter__(self) -> "Peak":
        self.start = self.most = anonymous()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.is_set():
            self.most = max(self.most, anonymous())
            time.sleep(0.0005)

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join()
        end = anonymous()
        self.bytes, self.kept = max(self.most, end) - self.start, end - self.start


def prepared(strategy: Strategy, empty, folder: Path):
    model = empty(folder)
    strategy.prepare(model, folder)
    return model


def memory(strategy: Strategy, folder: Path, out: Path, whole: bool) -> None:
    prepared(strategy, empty_teacher, folder / "small")  # what imports and first uses take is not the model's
    with Peak() as peak:
        if whole:
            model = AutoModelForCausalLM.from_pretrained(folder / "large", dtype=torch.float32)
        else:
            model = prepared(strategy, empty_teacher, folder / "large")
    assert model.lm_head.weight is not None  # it lives until here
    found = {"peak": peak.bytes, "kept": peak.kept}
    (out / f"{strategy.world.rank}.json").write_text(json.dumps(found))


def same(strategy: Strategy, folder: Path) -> None:
    """Every tensor, put together from all ranks, and the logits are those of `from_pretrained`."""
    ids = torch.arange(3, 43).view(2, 20)
    for family in sorted(folder.iterdir()):
        for empty, auto, name in (
            (empty_teacher, AutoModelForCausalLM, "teacher"),
            (empty_student, HybridForCausalLM, "student"),
        ):
            mine = prepared(strategy, empty, family / name)
            theirs = auto.from_pretrained(family / name, dtype=torch.float32).eval()
            expected = dict(theirs.named_parameters())
            found = dict(strategy.whole(mine))
            assert found.keys() == expected.keys()
            assert [key for key in found if not found[key].equal(expected[key])] == []
            buffers = dict(theirs.named_buffers())
            assert [key for key, buffer in mine.named_buffers() if not buffer.equal(buffers[key])] == []
            with torch.no_grad():
                assert mine(ids).logits.equal(theirs(ids).logits), (family, name)


if __name__ == "__main__":
    task, name, folder = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    strategy = make_strategy(Settings(name=name, precision="float32", threads=1), World.from_environment())  # type: ignore[arg-type]
    if task == "same":
        same(strategy, folder)
    else:
        memory(strategy, folder, Path(sys.argv[4]), task == "whole")
    strategy.barrier()
    strategy.close()
