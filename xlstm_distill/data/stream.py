"""Token shards → batches: a weighted, shuffled mixture whose sequence of global batches no world size changes.

mosaicml-streaming gives the file format, the weights (`Stream`), the resampling and the shuffle. Its `StreamingDataset`
iterator is not used: it pads and repeats samples at the end of an epoch according to the number of ranks, keeps its
position in /dev/shm under names that two jobs starting together both take, and leaves them there when it is killed.
Here each rank works out the same order of samples by itself and takes its rows of every global batch, so the whole
position is one number.
"""

import threading
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xlstm_distill.contract.exitcode import Mistake
from xlstm_distill.contract.files import hash_value
from xlstm_distill.data.codec import CodecError, decode
from xlstm_distill.data.priors import prior_for
from xlstm_distill.data.reader import Shards

SHUFFLE_BLOCK = 1 << 18
"""Samples among which py1e shuffles; bounds how many shards are in use at one time."""

AHEAD, THREADS = 2, 2
"""Batches that are made while one is in use, and threads that make them. Decoding lets other threads run."""


@dataclass
class Batch:
    """B samples of T + 1 tokens."""

    tokens: Tensor
    """int64 [B, T + 1]."""
    mask: Tensor
    """bool [B, T + 1]; whether a token counts as a label."""
    document: Tensor
    """int64 [B, T + 1]; running index of the document that a token stems from, within its source and split."""
    targets: tuple[Tensor, Tensor, Tensor] | None = None
    """Teacher's distribution over token t + 1, if cached: ids int64 [B, T, k], log-probabilities float32 [B, T, k],
    log of the tail's mass float32 [B, T]."""

    def rows(self, which: slice) -> "Batch":
        """Some of the samples."""
        targets = self.targets and (self.targets[0][which], self.targets[1][which], self.targets[2][which])
        return Batch(self.tokens[which], self.mask[which], self.document[which], targets)

    def to(self, device: torch.device | str) -> "Batch":
        """The same samples on `device`."""
        targets = self.targets and tuple(t.to(device) for t in self.targets)
        return Batch(self.tokens.to(device), self.mask.to(device), self.document.to(device), targets)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Part:
    """One source of a mixture."""

    folder: Path
    """MDS folder."""
    weight: float
    """Share of the samples."""


def collate(samples: Sequence[Mapping[str, Any]]) -> Batch:
    """Samples in arrays (see `Split`) → a batch."""
    columns = {
        name: torch.from_numpy(np.stack([s[name] for s in samples]).astype(np.int64))
        for name in ("tokens", "mask", "document")
    }
    targets = None
    if all("targets" in s for s in samples):
        ids, log_probs, tail = zip(*(s["targets"] for s in samples), strict=True)
        targets = (
            torch.from_numpy(np.stack(ids).astype(np.int64)),
            torch.from_numpy(np.stack(log_probs)),
            torch.from_numpy(np.stack(tail)),
        )
    return Batch(columns["tokens"], columns["mask"].bool(), columns["document"], targets)


class Split(Shards):
    """`Shards` of one split of a source, their targets decoded; several threads may read."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._lock = threading.Lock()

    def __getitem__(self, number: int) -> dict[str, Any]:
        with self._lock:
            sample = super().__getitem__(number)
        if "targets" in sample:  # outside of the lock: this is what takes time
            data = sample["targets"]
            try:
                sample["targets"] = decode(data, prior_for(data, self.folder.parent))
            except CodecError as error:
                raise Mistake(
                    f"{self.folder}: damaged teacher targets in sample {number} ({error}); run stage=cache again"
                ) from error
        return sample


def read_samples(folder: Path, count: int, first: int = 0) -> Batch:
    """Samples `first` … `first + count − 1` of an MDS folder in order, or as many as there are.

    Raises:
        Mistake: there are none, or a shard is missing or damaged.
    """
    samples = Split(folder)
    numbers = range(first, min(first + count, len(samples)))
    if not numbers:
        raise Mistake(f"{folder}: holds {len(samples)} samples; asked for {count} from number {first} on")
    return collate([samples[n] for n in numbers])


class SampleStream:
    """This rank's share of an endless sequence of global batches.

    An epoch draws as many samples as the parts hold together, each part by its weight (repeated or cut, newly chosen
    each epoch), shuffled by streaming's py1e; batches run on across epochs, so none is short.

    The next batches are read, decoded and put together by threads while the last one is in use. The position counts
    what was handed out, so a checkpoint knows nothing of them; what goes wrong in one is raised when its turn comes.

    Args:
        parts: the mixture; weights are scaled to sum to 1.
        batch: samples of a global batch.
        seed: of choice and shuffle.
        rank: of this process.
        world: number of processes, at most `batch`; where they do not divide it, some get one sample more.

    Raises:
        Mistake: a folder holds no shards, lengths differ, or there are more ranks than samples in a batch.
    """

    def __init__(self, parts: Sequence[Part], *, batch: int, seed: int, rank: int = 0, world: int = 1) -> None:
        if batch < world:
            raise Mistake(f"batch={batch}: {world} ranks need a sample each; change the batch or --gpus-per-node")
        self.batch, self.seed, self.rank, self.world = batch, seed, rank, world
        self.parts = [part for part in parts if part.weight > 0]
        if not self.parts:
            raise Mistake("the mixture is empty; give at least one source a weight above 0")
        self.shards = [Split(part.folder) for part in self.parts]
        lengths = {part.folder: self._columns(shards) for part, shards in zip(self.parts, self.shards, strict=True)}
        if len(set(lengths.values())) > 1:
            folders = [str(folder) for folder in lengths]
            raise Mistake(f"{' and '.join(folders)}: samples differ in length or columns; tokenise them alike")
        self.mixture = _mixture(self.parts, self.shards, seed)
        self.position = 0
        self._orders: dict[int, NDArray[np.int64]] = {}
        self._lock = threading.Lock()
        self._ahead: deque[Future[Batch]] = deque()
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="samples")

    @staticmethod
    def _columns(shards: Shards) -> tuple[Any, ...]:
        info = shards.index[0]
        return tuple(zip(info["column_names"], info["column_encodings"], strict=True))

    @property
    def epoch(self) -> float:
        """Epochs consumed."""
        return self.position / self.mixture.epoch_size

    def __iter__(self) -> "SampleStream":
        return self

    def __next__(self) -> Batch:
        while len(self._ahead) <= AHEAD:
            position = self.position + len(self._ahead) * self.batch
            self._ahead.append(self._threads.submit(self._read, position))
        try:
            batch = self._ahead.popleft().result()
        except BaseException:
            self._ahead.clear()  # they begin after the position that was not handed out
            raise
        self.position += self.batch
        return batch

    def _read(self, position: int) -> Batch:
        """This rank's share of the global batch at `position`."""
        first, end = (position + r * self.batch // self.world for r in (self.rank, self.rank + 1))
        places = [self._place(number) for number in range(first, end)]
        return collate([self.shards[part][index] for part, index in places])

    def describe(self, step: int) -> str:
        """The samples of the global batch of `step` (from 0), for messages: `FOLDER: 3 7 …`, numbers within it."""
        numbers: dict[str, list[str]] = {}
        for number in range(step * self.batch, (step + 1) * self.batch):
            part, index = self._place(number)
            numbers.setdefault(str(self.parts[part].folder), []).append(str(index))
        return "; ".join(f"{folder}: {' '.join(found)}" for folder, found in numbers.items())

    def _place(self, number: int) -> tuple[int, int]:
        """Part, and sample of it, of the mixture's sample `number`."""
        epoch, offset = divmod(number, self.mixture.epoch_size)
        with self._lock:
            if epoch not in self._orders:
                kept = {e: order for e, order in self._orders.items() if abs(e - epoch) == 1}
                self._orders = kept | {epoch: self.mixture.order(epoch)}
            chosen = int(self._orders[epoch][offset])
        part = int(np.searchsorted(self.mixture.ends, chosen, side="right"))
        return part, chosen - int(self.mixture.ends[part]) + len(self.shards[part])

    def state_dict(self) -> dict[str, Any]:
        """The position after the last batch, and what it counts in. JSON values, the same on every rank."""
        return {"position": self.position, **self._counts_in()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken, at any world size.

        Raises:
            Mistake: the state counts in another mixture, seed or batch.
        """
        for key, here in self._counts_in().items():
            if state.get(key) != here:
                raise Mistake(
                    f"checkpoint's data position: {key} was {state.get(key)} and is {here} now; use another --name"
                )
        self.position = int(state["position"])
        self._ahead.clear()

    def _counts_in(self) -> dict[str, Any]:
        total = sum(part.weight for part in self.parts)
        return {
            "batch": self.batch,
            "seed": self.seed,
            "epoch_size": self.mixture.epoch_size,
            "samples": [len(shards) for shards in self.shards],
            "content": [hash_value(shards.index) for shards in self.shards],  # it holds the hash of every shard
            "weights": [round(part.weight / total, 9) for part in self.parts],
        }


def _mixture(parts: Sequence[Part], shards: Sequence[Shards], seed: int) -> Any:
    """What streaming's `generate_work` needs of a StreamingDataset, without its shared memory."""
    from streaming import Stream, StreamingDataset
    from streaming.base.batching import generate_work
    from streaming.base.world import World

    class Mixture(StreamingDataset):
        """One canonical node, one rank: ranks share global batches among themselves."""

        def __init__(self) -> None:
            total = sum(part.weight for part in parts)
            self.streams = [Stream(local=str(part.folder), proportion=part.weight / total) for part in parts]
            self.num_streams = len(parts)
            self.shuffle, self.shuffle_algo, self.shuffle_seed = True, "py1e", seed
            self.shuffle_block_size = SHUFFLE_BLOCK
            self.sampling_method, self.sampling_granularity, self.epoch_seed_change = "balanced", 1, True
            self.partition_algo, self.num_canonical_nodes, self.initial_physical_nodes = "orig", 1, None
            self.batch_size = 1
            self.samples_per_shard = np.concatenate([s.sizes for s in shards])
            self.sample_offset_per_shard = self.samples_per_shard.cumsum() - self.samples_per_shard
            self.shards_per_stream = np.array([len(s.sizes) for s in shards], np.int64)
            self.shard_offset_per_stream = self.shards_per_stream.cumsum() - self.shards_per_stream
            self.samples_per_stream = np.array([len(s) for s in shards], np.int64)
            self.ends = self.samples_per_stream.cumsum()
            # Long enough that the rarest part comes once.
            size = max(int(self.ends[-1]), *(int(np.ceil(total / part.weight)) for part in parts))
            self.epoch_size = Stream.apply_weights(self.streams, self.samples_per_stream, size, seed)

        def order(self, epoch: int) -> NDArray[np.int64]:
            """The samples of an epoch, [epoch_size], numbered through all parts."""
            work = generate_work("random", self, World(1, 1, 1, 0), epoch, 0).flatten()
            return work[work >= 0]

    return Mixture()
