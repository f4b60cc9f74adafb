"""The output gate o of Eq. 11: its mean tells which layers and heads use the mLSTM (1), and which the window (0)."""

from collections.abc import Callable
from types import TracebackType

import torch
from torch import Tensor, nn

from .mixer import HybridMixer


class GateRecorder:
    """Adds up the output gates of every forward in its `with` block, over real positions; `means()` reads them.

    It can be entered again: the sums go on. They stay on the device and nothing is read back before `means`. An
    earlier `gate_hook` is put aside meanwhile and back afterwards, after an exception too. Activations recomputed in a
    backward pass count twice, in the sums and in the number of positions alike.

    Args:
        model: a student, or a module that holds one.

    Raises:
        ValueError: `model` has no mixers, or they have no gate because one of the branches is off.
    """

    def __init__(self, model: nn.Module) -> None:
        self._mixers = [module for module in model.modules() if isinstance(module, HybridMixer)]
        if not self._mixers:
            raise ValueError(f"{type(model).__name__}: no output gates there, it holds no hybrid xLSTM")
        config = self._mixers[0].config
        for branch in ("use_mlstm", "use_window"):
            if not getattr(config, branch):
                raise ValueError(f"this student has no output gate: {branch} is False, so one branch is all there is")
        self._layers = [_LayerSums(mixer) for mixer in self._mixers]
        self._earlier: list[Callable[..., None] | None] | None = None

    def __enter__(self) -> "GateRecorder":
        if self._earlier is not None:
            raise RuntimeError("this GateRecorder is attached already")
        self._earlier = [mixer.gate_hook for mixer in self._mixers]
        for mixer, layer in zip(self._mixers, self._layers, strict=True):
            mixer.gate_hook = layer
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._earlier is not None
        for mixer, hook in zip(self._mixers, self._earlier, strict=True):
            mixer.gate_hook = hook
        self._earlier = None

    def means(self, reduce: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Mean output gate, float64 [layers, heads]; NaN before the first real position.

        Args:
            reduce: sums a tensor over the ranks that saw different rows; collective then.
        """
        device = self._layers[0].sums.device
        totals = torch.stack([torch.cat([layer.sums, layer.count]).to(device) for layer in self._layers])
        totals = reduce(totals) if reduce else totals
        return totals[:, :-1] / totals[:, -1:]


class _LayerSums:
    """One mixer's hook. It counts in tensors, not in Python, so that a compiled layer is not compiled again."""

    def __init__(self, mixer: HybridMixer) -> None:
        device = mixer.output_gate.bias.device
        device = torch.device("cpu") if device.type == "meta" else device  # offloaded: the gates come from elsewhere
        self.sums = torch.zeros(mixer.heads, dtype=torch.float64, device=device)
        self.count = torch.zeros(1, dtype=torch.float64, device=device)

    def __call__(self, layer_idx: int, gate: Tensor, real: Tensor | None = None) -> None:
        """Add `gate` [B, H, T, 1] at the positions that are `real`: bool [B or 1, T], None: all."""
        gate = gate.detach()[..., 0]
        batch, _, length = gate.shape
        if real is None:
            self.count.add_(batch * length)
        else:
            gate = gate.masked_fill(~real[:, None], 0.0)
            self.count.add_(real.expand(batch, -1).sum().to(self.count.device))
        self.sums.add_(gate.sum((0, 2), dtype=torch.float64).to(self.sums.device))
