"""The output gates of a student at each validation: recorded on all ranks, logged, among the job's facts."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from xlstm_distill.contract.gates import heads_shut
from xlstm_distill.model import HybridForCausalLM, StudentForCausalLM
from xlstm_distill.model.gates import GateRecorder
from xlstm_distill.parallel.strategy import Strategy
from xlstm_distill.runtime.gate_map import gate_image
from xlstm_distill.runtime.metrics import Metrics


class HeldOutGates:
    """Mean output gate per layer and head over the held-out samples; nothing for a student that has no gate.

    In Stage I the layers see the teacher's stream, in Stage II the student's own.
    """

    def __init__(self, model: StudentForCausalLM) -> None:
        gated = isinstance(model, HybridForCausalLM) and model.config.use_mlstm and model.config.use_window
        self._recorder = GateRecorder(model) if gated else None

    def recording(self, counts: bool = True) -> AbstractContextManager[object]:
        """Forwards in here are recorded, if they count."""
        return self._recorder if self._recorder and counts else nullcontext()

    def means(self, strategy: Strategy) -> list[list[float]]:
        """Of all ranks together, layer by layer. Collective."""
        return self._recorder.means(strategy.sum).tolist() if self._recorder else []


def log_gates(metrics: Metrics, step: int, gates: Sequence[Sequence[float]]) -> dict[str, float]:
    """Draw the map `gates/output_gate` in TensorBoard; returns each layer's mean, for the metrics of this step."""
    if not gates:
        return {}
    metrics.image("gates/output_gate", step, lambda: gate_image(gates))
    return {f"gates_layer/{n}": sum(heads) / len(heads) for n, heads in enumerate(gates)}


def gate_facts(gates: Sequence[Sequence[float]]) -> dict[str, Any]:
    """For the manifest: the gates of the last validation, and the heads that lost a branch."""
    return {"output_gate": gates, "heads_shut": [list(head) for head in heads_shut(gates)]} if gates else {}
