"""Stage `cache`: token shards → the same with the teacher's sparse targets, for a distillation without a teacher."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from xlstm_distill.contract.exitcode import Mistake
from xlstm_distill.contract.files import folder_atomic
from xlstm_distill.contract.job import JobFolder, World
from xlstm_distill.contract.schema import Cache, Config
from xlstm_distill.data import codec
from xlstm_distill.data.reader import Shards
from xlstm_distill.data.shards import count_samples, sequence_of, shard_writer, write_targets_note
from xlstm_distill.runtime.metrics import Metrics
from xlstm_distill.runtime.stop import StopFlag
from xlstm_distill.teacher.targets import document_positions, expected_index, load_teacher, sparse_targets

SPLITS = ("train", "validation")


def run(folder: JobFolder, world: World, stop: StopFlag) -> dict[str, Any]:
    """Run the teacher over this element's sources that are not done yet. Output: `SOURCE/train`, `SOURCE/validation`.

    Each source is a piece with its own manifest; its facts are samples, tokens, tokens_per_s and bytes_per_token of the
    targets.

    Raises:
        Mistake: the shards are missing, damaged or of another length or vocabulary.
        Stopped: a stop was requested; finished sources are durable.
    """
    if world.size > 1:
        raise Mistake(f"cache: runs as one process per array element, got {world.size} ranks; ask for one GPU")
    config, pieces = folder.config, folder.my_pieces(world)
    shards = Path(config.data.shards) if config.data.shards else folder.input("tokenize")
    limits = {(piece, split): _limit(shards / piece / split, config) for piece in pieces for split in SPLITS}
    if not pieces:
        return {}
    capture = Capture(folder.input("fetch") / "teacher", config)
    note = {**expected_index(folder.input("fetch"), config.cache.top_k), **capture.note()}
    total, done = sum(limits.values()), 0
    with Metrics(folder.path, total) as metrics:

        def on_batch(samples: int, tokens_per_s: float) -> None:
            nonlocal done
            done += samples
            metrics.log(done, {"tokens_per_s": round(tokens_per_s, 1)})
            stop.check()

        for piece in pieces:
            facts = {}
            with folder_atomic(folder.output / piece) as target:
                for split in SPLITS:
                    facts[split] = capture(shards / piece / split, target / split, limits[piece, split], on_batch)
                    write_targets_note(target / split, {**note, "samples": facts[split]["samples"]})
            folder.finish(facts, piece)
    return {}


def _limit(folder: Path, config: Config) -> int:
    """Samples of a split to do: at most `cache.max_samples`."""
    count, length = count_samples(folder), sequence_of(folder)
    if length != config.data.sequence:
        raise Mistake(f"data.sequence={config.data.sequence}: the shards in {folder} hold samples of {length}")
    limit = config.cache.max_samples
    return min(count, limit) if limit else count


class Capture:
    """The frozen teacher, on a GPU where there is one.

    Args:
        teacher: HF folder.
        config: precision (bfloat16 counts on a GPU only, a CPU computes in float32), threads, and `cache`.
    """

    def __init__(self, teacher: Path, config: Config) -> None:
        self.settings: Cache = config.cache
        self.split = config.student.reset_at_documents
        self.shard_bytes = config.data.shard_bytes
        if config.strategy.threads:
            torch.set_num_threads(config.strategy.threads)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        half = config.strategy.precision == "bfloat16" and self.device.type == "cuda"
        self.model = load_teacher(teacher, torch.bfloat16 if half else torch.float32).to(self.device)
        self.head = self.model.get_output_embeddings().weight

    def note(self) -> dict[str, Any]:
        """What `targets.json` says of the way they were made."""
        return {"codec": codec.VERSION, "vocab_size": self.head.shape[0], "dtype": str(self.head.dtype).split(".")[1]}

    def __call__(
        self, source: Path, target: Path, count: int, on_batch: Callable[[int, float], None] = lambda n, speed: None
    ) -> dict[str, Any]:
        """Copy the first `count` samples of `source` to the new folder `target`, with targets.

        Args:
            source: MDS folder of samples of T + 1 tokens.
            target: folder to make.
            count: samples.
            on_batch: hears the samples of each batch and its speed; may raise to stop.

        Returns:
            samples, tokens, tokens_per_s, bytes_per_token (of the targets).

        Raises:
            Mistake: a shard is missing or damaged, or its tokens are not the teacher's.
        """
        shards, sequence = Shards(source), sequence_of(source)
        size, began = 0, time.monotonic()
        # No compression: see shard_writer.
        with shard_writer(target, sequence, self.shard_bytes, targets=True) as writer:
            for first in range(0, count, self.settings.micro_batch):
                started = time.monotonic()
                samples = [shards[n] for n in range(first, min(first + self.settings.micro_batch, count))]
                for sample, targets in zip(samples, self._encoded(samples, source), strict=True):
                    writer.write({**sample, "targets": targets})
                    size += len(targets)
                on_batch(len(samples), len(samples) * sequence / (time.monotonic() - started))
        tokens = count * sequence
        return {
            "samples": count,
            "tokens": tokens,
            "tokens_per_s": round(tokens / max(time.monotonic() - began, 1e-9), 1),
            "bytes_per_token": round(size / max(tokens, 1), 3),
        }

    def _encoded(self, samples: list[dict[str, Any]], source: Path) -> list[bytes]:
        tokens = torch.from_numpy(np.stack([s["tokens"] for s in samples]).astype(np.int64))
        vocabulary = self.head.shape[0]
        if int(tokens.max()) >= vocabulary or int(tokens.min()) < 0:
            raise Mistake(
                f"{source}: token {int(tokens.max())} is outside the teacher's vocabulary of {vocabulary}; "
                f"the shards were made with another tokenizer"
            )
        batch, length = tokens.shape[0], tokens.shape[1] - 1
        documents = torch.from_numpy(np.stack([s["document"] for s in samples]).astype(np.int64))
        found = self.targets(tokens, documents)
        ids, log_probs, tail = (t.cpu().numpy().reshape(batch, length, *t.shape[1:]) for t in found)
        return [codec.encode(*row, vocabulary) for row in zip(ids, log_probs, tail, strict=True)]

    @torch.inference_mode()
    def targets(self, tokens: Tensor, documents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Sparse targets at the positions 0 … T − 1 of `tokens` [B, T + 1]: ids [B·T, k], log-probabilities [B·T, k],
        log of the tail's mass [B·T]. With `student.reset_at_documents` the `documents` [B, T + 1] are seen apart."""
        inputs, numbers = tokens[:, :-1].to(self.device), documents[:, :-1].to(self.device)
        positions = document_positions(numbers, self.split)
        hidden_BTH = self.model.model(input_ids=inputs, position_ids=positions, use_cache=False).last_hidden_state
        return sparse_targets(hidden_BTH.flatten(0, 1), self.head, self.settings.top_k, self.settings.chunk)
