"""What a checkpoint costs the step that runs meanwhile.

    python benchmarks/checkpoint.py [--tokens 512] [--rounds 4] [--folder DIR]

A student of SmolLM2-135M's shape with random weights makes Stage II steps (forward, loss against random sparse targets,
backward, AdamW; float32). Normal steps and saves take turns in one run; every step counts that runs while a save is in
flight, the first with the copying that `save` does before it returns. Medians; the very first save, whose copies meet
fresh memory, stands apart.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoConfig

from xlstm_distill.contract.schema import AdamW
from xlstm_distill.model import HybridForCausalLM
from xlstm_distill.model.configuration import HybridConfig
from xlstm_distill.objectives.distill import SparseTargets, distillation_loss
from xlstm_distill.parallel.state import training_state
from xlstm_distill.train.checkpoint import Checkpoints, latest
from xlstm_distill.train.optim import make_optimizer

SMOLLM2 = {
    "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64, "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}  # fmt: skip
TOP_K = 32
NORMAL = 3
"""Steps before each save."""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--folder", type=Path, help="where to write; default: a temporary folder")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        result = measure(Path(folder), options.tokens, options.rounds)
    print_table(result)
    if options.json:
        options.json.write_text(json.dumps(result, indent=2), encoding="utf-8")


def measure(folder: Path, tokens: int, rounds: int) -> dict[str, float]:
    """Seconds of normal steps, of those with a save, of the save's parts; bytes."""
    step, state = make_step(tokens, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    checkpoints = Checkpoints(folder, keep=1)
    normal, first, later, copying, writing = ([] for _ in range(5))
    step(), step()
    for number in range(rounds + 1):
        normal += [timed(step) for _ in range(NORMAL)]
        copying.append(timed(lambda: checkpoints.save(number, state(), {})))  # noqa: B023
        first.append(copying[-1] + timed(step))
        while number and latest(folder) != folder / f"step-{number}":
            later.append(timed(step))
        checkpoints.wait()
        writing.append(checkpoints.last_seconds)
    waited = timed(lambda: (checkpoints.save(rounds + 1, state(), {}), checkpoints.wait()))
    usual, during = statistics.median(normal), first[1:] + later
    return {
        "threads": torch.get_num_threads(),
        "tokens": tokens,
        "bytes": sum(file.stat().st_size for file in (folder / f"step-{rounds + 1}").iterdir()),
        "normal": usual,
        "worst_normal": max(normal) / usual,
        "during": statistics.median(during),
        "ratio": statistics.median(during) / usual,
        "worst": max(during) / usual,
        "first": statistics.median(first[1:]) / usual,
        "steps": len(during) / rounds,
        "copying": statistics.median(copying[1:]),
        "writing": statistics.median(writing[1:]),
        "waited": waited,
        "fresh": first[0] / usual,
        "fresh_copying": copying[0],
    }


def make_step(tokens: int, device: torch.device) -> tuple[Callable[[], None], Callable[[], dict[str, Tensor]]]:
    """A training step that ends when the device has finished it, and what a checkpoint holds."""
    torch.manual_seed(0)
    config = HybridConfig(AutoConfig.for_model("llama", **SMOLLM2), window=64, sinks=4)
    model = HybridForCausalLM(config).to(device)
    parameters = {name: p for name, p in model.named_parameters() if name not in model.idle_parameters()}
    optimizer = make_optimizer({1e-4: parameters}, AdamW())
    ids = torch.randint(config.vocab_size, (1, tokens + 1), device=device)
    objective = random_objective(ids[0, 1:], config.vocab_size)

    def step() -> None:
        model(input_ids=ids[:, :-1], objective=objective).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()

    return step, lambda: training_state(parameters, optimizer)


def random_objective(labels: Tensor, vocabulary: int) -> Callable[[Tensor, Tensor], Tensor]:
    """Stage II's loss at the paper's weights, against targets that no teacher gave."""
    count = len(labels)
    scores, ids = torch.randn(count, vocabulary, device=labels.device).log_softmax(-1).topk(TOP_K)
    targets = SparseTargets(ids, scores, (-scores.exp().sum(-1)).log1p())
    weights = torch.full((count,), 1 / count, device=labels.device)

    def objective(hidden: Tensor, head_weight: Tensor) -> Tensor:
        flat = hidden.flatten(0, 1)
        return distillation_loss(
            flat, head_weight, labels, weights, targets, kind="topk_tail", gamma=0.9, beta=0.1
        ).loss

    return objective


def timed(work: Callable[[], None]) -> float:
    """Seconds."""
    before = time.perf_counter()
    work()
    return time.perf_counter() - before


def print_table(result: dict[str, float]) -> None:
    """One line per figure."""
    r = result
    print(f"{r['threads']} threads, {r['tokens']} tokens, {r['bytes'] / 1e9:.2f} GB per checkpoint")
    print(f"normal step        {r['normal']:7.3f} s, worst {r['worst_normal']:.3f}x")
    print(f"during a save      {r['during']:7.3f} s, {r['ratio']:.3f}x (target: 1.15), worst {r['worst']:.3f}x")
    print(f"  the one it starts in, copying included: {r['first']:.3f}x")
    print(f"copying            {r['copying']:7.3f} s")
    print(f"durable after      {r['writing']:7.3f} s more, {r['steps']:.1f} steps")
    print(f"when all wait      {r['waited']:7.3f} s, copying and writing with no step beside")
    print(f"the very first     {r['fresh']:.3f}x, copying {r['fresh_copying']:.3f} s")


if __name__ == "__main__":
    main()
