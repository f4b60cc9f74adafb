"""Time and memory of the sparse distillation loss, forward and backward, beside its bare matrix products, the fused
distillation loss of Liger-Kernel and the plain loss over all logits, in one run.

    python benchmarks/loss.py [--tokens 512] [--chunk 64] [--rounds 5] [--memory-tokens 512 2048] [--json loss.json]
    python benchmarks/loss.py --sides products topk_tail topk random full topk_tail/reverse topk_tail/jsd

A side is a kind of targets, with a divergence behind a slash. *products*: per chunk logits = h Wᵀ, then grad_h = z W
and grad_W += zᵀ h with whatever the logits hold: what no chunked loss can do without. *liger*: LigerFusedLinearJSDLoss
at β = 0, which is KL(teacher ‖ student) over the whole vocabulary, from a teacher of the student's shape (one more
product; `full` has it too); `--compiled`: with torch.compile. *plain*: log-softmax of all logits and autograd.

Times: the sides run in turn, each round one after the other; the ratio to *products* is the median over the rounds, of
wall clock and of the CPU time of all threads, which other work on the machine disturbs less. Memory: of the second of
two steps, in a process of its own, above what was held before it, without grad_W and grad_h: by the resident set (of
MKL and malloc what they had not held after the first step), and by the storages that torch allocates.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from xlstm_distill.objectives.distill import DenseTargets, SparseTargets, Targets, distillation_loss

SIDES = ("products", "topk_tail", "liger", "plain")
GAMMA, BETA = 0.1, 0.9


def main() -> None:
    """Measure, print a table and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--chunk", type=int, default=64)
    parser.add_argument("--top-k", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sides", nargs="+", default=SIDES)
    parser.add_argument("--memory-tokens", type=int, nargs="*", help="numbers of tokens for memory; default: --tokens")
    parser.add_argument("--compiled", action="store_true", help="Liger's loss with torch.compile")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path)
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.peak:
        print(json.dumps(peak_bytes(options, options.peak)))
        return
    found = {side: {"memory": memory(options, side)} for side in options.sides}
    if options.rounds:
        for side, times in timed(options).items():
            found[side] |= times
    print(json.dumps(found, indent=2))
    if options.json:
        result = {"torch": torch.__version__, "settings": vars(options) | {"json": str(options.json)}, "sides": found}
        options.json.write_text(json.dumps(result, indent=2), encoding="utf-8")


class Problem:
    """Random hidden states, head, labels, and a teacher of the same shape that is near the student."""

    def __init__(self, options: argparse.Namespace, tokens: int, side: str) -> None:
        torch.manual_seed(0)
        self.options, vocabulary = options, options.vocabulary
        self.hidden = torch.randn(tokens, options.hidden, requires_grad=True)
        self.head = (torch.randn(vocabulary, options.hidden) / options.hidden**0.5).requires_grad_()
        self.labels = torch.randint(0, vocabulary, (tokens,))
        self.weights = torch.full((tokens,), 1.0 / tokens)
        self.kind, _, self.divergence = side.partition("/")
        if self.kind in ("liger", "full"):
            self.teacher: Targets = DenseTargets(torch.randn(tokens, options.hidden), self.head.detach().clone())
        else:
            ids = torch.rand(tokens, vocabulary // 64).topk(options.top_k).indices * 64  # differ within a row
            log_probs = (2 * torch.randn(tokens, options.top_k)).log_softmax(1)
            self.teacher = SparseTargets(ids, log_probs - 0.1, torch.full((tokens,), -2.352))  # log(1 − e^−0.1)

    def step(self) -> None:
        """Loss and both gradients; the gradients of the step before are gone."""
        self.hidden.grad = self.head.grad = None
        {"products": self._products, "plain": self._plain, "liger": self._liger}.get(self.kind, self._fused)()

    def _products(self) -> None:
        hidden, head, chunk = self.hidden.detach(), self.head.detach(), self.options.chunk
        grad_hidden, grad_head = torch.empty_like(hidden), torch.zeros_like(head)
        buffer = torch.empty(min(chunk, len(hidden)), len(head))
        for start in range(0, len(hidden), chunk):
            rows = slice(start, start + chunk)
            logits = buffer[: len(hidden[rows])]
            torch.mm(hidden[rows], head.T, out=logits)
            torch.mm(logits, head, out=grad_hidden[rows])
            torch.addmm(grad_head, logits.T, hidden[rows], out=grad_head)
        self.hidden.grad, self.head.grad = grad_hidden, grad_head

    def _fused(self) -> None:
        distillation_loss(
            self.hidden, self.head, self.labels, self.weights, self.teacher, gamma=GAMMA, beta=BETA,
            kind=self.kind, divergence=self.divergence or "forward", chunk=self.options.chunk,  # type: ignore[arg-type]
        ).loss.backward()  # fmt: skip

    def _liger(self) -> None:
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

        assert isinstance(self.teacher, DenseTargets)
        loss = LigerFusedLinearJSDLoss(
            GAMMA, BETA, beta=0.0, compiled=self.options.compiled, chunk_size=self.options.chunk
        )
        loss(self.hidden, self.head, self.teacher.hidden, self.teacher.head_weight, self.labels).backward()

    def _plain(self) -> None:
        assert isinstance(self.teacher, SparseTargets)
        log_probs = (self.hidden @ self.head.T).log_softmax(1)
        ids, teacher = self.teacher.ids, self.teacher.log_probs
        outside = log_probs.scatter(1, ids, -torch.inf).logsumexp(1)
        top, tail = log_probs.gather(1, ids), self.teacher.tail_log_mass
        values = (teacher.exp() * (teacher - top)).sum(1) + tail.exp() * (tail - outside)
        ce = -log_probs.gather(1, self.labels[:, None])[:, 0]
        ((GAMMA * ce + BETA * values) @ self.weights).backward()


def timed(options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Medians of each side, and of its ratio to `products` in the same round."""
    problems = {side: Problem(options, options.tokens, side) for side in options.sides}
    times: dict[str, list[tuple[float, float]]] = {side: [] for side in problems}
    for number in range(options.rounds + 1):
        for side, problem in problems.items():
            wall, cpu = time.perf_counter(), time.process_time()
            problem.step()
            if number:  # the first is for warm-up
                times[side].append((time.perf_counter() - wall, time.process_time() - cpu))
            problem.hidden.grad = problem.head.grad = None
    found = {}
    for side, own in times.items():
        found[side] = {}
        for index, clock in enumerate(("wall", "cpu")):
            ratios = [a[index] / b[index] for a, b in zip(own, times.get("products", own), strict=True)]
            found[side][f"{clock}_s"] = round(statistics.median(x[index] for x in own), 3)
            found[side][f"{clock}_ratio"] = round(statistics.median(ratios), 3)
            found[side][f"{clock}_ratios"] = [round(ratio, 3) for ratio in ratios]
    return found


def memory(options: argparse.Namespace, side: str) -> dict[str, dict[str, float]]:
    """MB above grad_W and grad_h by number of tokens, in a process whose allocator gives back what is freed."""
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    arguments = ["--peak", side, *(["--compiled"] if options.compiled else [])]
    for name in ("hidden", "vocabulary", "chunk", "top_k", "threads"):
        arguments += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    found = {}
    for tokens in options.memory_tokens if options.memory_tokens is not None else [options.tokens]:
        command = [sys.executable, __file__, *arguments, "--tokens", str(tokens)]
        out = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
        found[str(tokens)] = json.loads(out.splitlines()[-1])
    return found


def peak_bytes(options: argparse.Namespace, side: str) -> dict[str, float]:
    """In this process: of the second step by the resident set, of the third by storages."""
    problem = Problem(options, options.tokens, side)
    gradients = problem.hidden.nbytes + problem.head.nbytes
    problem.step()
    problem.hidden.grad = problem.head.grad = None
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # peak := now
    problem.step()
    found = {"rss_mb": round((resident("VmHWM") - before - gradients) / 1e6, 1)}
    problem.hidden.grad = problem.head.grad = None
    from plan import Live

    live = Live()
    for tensor in (problem.hidden, problem.head, problem.labels, problem.weights, *vars(problem.teacher).values()):
        live.see(tensor)
    held = live.now
    with live.watching():
        problem.step()
    return found | {"tensors_mb": round((live.most - held - gradients) / 1e6, 1)}


def resident(name: str) -> int:
    """Bytes of this process by /proc/self/status."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {name}")


if __name__ == "__main__":
    main()
