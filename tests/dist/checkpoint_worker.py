"""A rank of test_checkpoints_dist.py: `save FOLDER`, `load FOLDER`, `fail FOLDER` or `damaged FOLDER`."""

import errno
import json
import resource
import sys
import threading
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

from xlstm_distill.contract.exitcode import Mistake
from xlstm_distill.contract.files import hash_file
from xlstm_distill.parallel.state import training_state
from xlstm_distill.train import checkpoint

STEPS = (1, 2, 3)
REPLICATED = 100_000


class Training:
    """Sharded layers whose rows no number of ranks divides (one has fewer rows than ranks), and a replicated tensor."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(7, 33), nn.Tanh(), nn.Linear(33, 1))
        for layer in (self.model[0], self.model[2], self.model):
            fully_shard(layer)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.1)
        self.replicated = torch.zeros(REPLICATED)

    def step(self) -> None:
        self.model(torch.randn(4, 7)).square().sum().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.replicated += 1

    def state(self) -> dict:
        return training_state(dict(self.model.named_parameters()), self.optimizer) | {"replicated": self.replicated}

    def whole(self) -> dict:
        """Collective."""
        state = self.state()
        return {name: t.full_tensor() if hasattr(t, "full_tensor") else t.clone() for name, t in state.items()}


def save(folder: Path) -> None:
    """A save at each step; while it is slowly written the parameters change, and the collectives of steps go on."""
    training, saver = Training(), checkpoint.Checkpoints(folder / "checkpoints", keep=9)
    checkpoint.hash_file = lambda path: time.sleep(0.3) or hash_file(path)  # type: ignore[assignment]
    meanwhile = 0
    for step in STEPS:
        training.step()
        if dist.get_rank() == 0:
            torch.save(training.whole(), folder / f"expected-{step}.pt")
        else:
            training.whole()
        saver.save(step, training.state(), {"rank": "any"})
        for _ in range(20):
            training.step()
            meanwhile += threading.active_count() > 1
        training.replicated.fill_(step)
    saver.wait()
    assert meanwhile >= 3, "the steps were to go on while checkpoints were written"


def load(folder: Path) -> None:
    """What was saved at each step, whatever the number of ranks."""
    training = Training()
    for step in reversed(STEPS):
        path = folder / "checkpoints" / f"step-{step}"
        assert checkpoint.read_state(path) == {"step": step, "rank": "any"}
        checkpoint.load(path, training.state())
        expected, found = torch.load(folder / f"expected-{step}.pt"), training.whole()
        assert expected.keys() == found.keys()
        assert [name for name in expected if not expected[name].equal(found[name])] == []


def fail(folder: Path) -> None:
    """Rank 1 cannot write, then cannot hash, then rank 0 cannot write: every rank says the same; then all is well."""
    training, saver = Training(), checkpoint.Checkpoints(folder / "checkpoints", keep=9)
    training.step()
    rank, said = dist.get_rank(), []

    def attempt() -> None:
        saver.save(9, training.state(), {})
        flag = torch.zeros(1)
        while not flag:  # as the loop asks: the ranks learn of it at different moments
            training.step()
            flag.fill_(saver.failed)
            dist.all_reduce(flag)
        try:
            saver.wait()
        except Mistake as mistake:
            said.append(str(mistake))

    def no_device(*_: object) -> str:
        raise OSError(errno.EIO, "Input/output error")

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    attempt()
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        checkpoint.hash_file = no_device  # type: ignore[assignment]
    attempt()
    checkpoint.hash_file = hash_file
    if rank == 0:
        right, checkpoint.write_atomic = checkpoint.write_atomic, no_device  # type: ignore[assignment]
    attempt()
    if rank == 0:
        checkpoint.write_atomic = right
    (folder / f"said-{rank}.json").write_text(json.dumps(said))
    saver.save(10, training.state(), {})
    saver.wait()
    checkpoint.read_state(folder / "checkpoints" / "step-10")


def damaged(folder: Path) -> None:
    """Each rank writes down why nothing is read, for every file in turn."""
    said = {}
    for file in sorted((folder / "checkpoints" / "step-3").iterdir()):
        whole = file.read_bytes()
        dist.barrier()
        if dist.get_rank() == 0:
            file.write_bytes(whole[:-1])
        dist.barrier()
        try:
            checkpoint.read_state(file.parent)
        except Mistake as mistake:
            said[file.name] = str(mistake)
        dist.barrier()
        if dist.get_rank() == 0:
            file.write_bytes(whole)
    (folder / f"said-{dist.get_rank()}.json").write_text(json.dumps(said))


if __name__ == "__main__":
    dist.init_process_group("gloo")
    for task in sys.argv[2:]:
        globals()[task](Path(sys.argv[1]))
    dist.barrier()
    dist.destroy_process_group()
