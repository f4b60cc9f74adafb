"""Weights from a Hugging Face folder into a model that is sharded already: every rank reads only what it keeps.

model = empty_model(lambda: HybridForCausalLM(config))     parameters on the meta device: no memory
…shard it…
materialise(model, device)                                 memory for this rank's parts
read_weights(model, folder)                                slices of the safetensors files into them
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from xlstm_distill.contract.exitcode import Mistake

Model = TypeVar("Model", bound=nn.Module)
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
DTYPES = ("F64", "F32", "F16", "BF16")


def empty_model(build: Callable[[], Model]) -> Model:
    """What `build` makes, with float32 parameters on the meta device, whatever dtype its configuration names, and real
    buffers (RoPE's frequencies)."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        model = build()
    model.tie_weights()  # type: ignore[operator]  # each parameter became another object
    return model.float()


def materialise(model: nn.Module, device: torch.device) -> None:
    """Give memory on `device` to the parameters that have none, unset; move the rest there. Tied parameters stay tied,
    and every parameter stays the same object."""
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model._apply(lambda t: torch.empty_like(t, device=device) if t.is_meta else t.to(device))
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)


@torch.no_grad()
def read_weights(model: nn.Module, folder: Path) -> None:
    """Fill the parameters of `model`, DTensors with this rank's slice, from the safetensors files in `folder`.

    Raises:
        Mistake: a file or a parameter is missing, damaged, quantised, or of another shape.
    """
    weights = Weights(folder)
    for name, parameter in model.named_parameters():
        weights.check(name, tuple(parameter.shape))
        if isinstance(parameter, DTensor):
            shape, offset = compute_local_shape_and_global_offset(
                parameter.shape, parameter.device_mesh, parameter.placements
            )
            where = tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))
            parameter.to_local().copy_(weights.read(name, where))
        else:
            parameter.copy_(weights.read(name))


class Weights:
    """The tensors of a Hugging Face folder by name, read in slices. A lone file goes before an index, as it does for
    `from_pretrained`.

    Raises:
        Mistake: neither is there, or the index is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[str, Any] = {}
        if (folder / SINGLE).exists():
            self._places = dict.fromkeys(self._open(SINGLE).keys(), SINGLE)
        elif (folder / INDEX).exists():
            self._places = _weight_map(folder / INDEX)
        else:
            raise Mistake(f"{folder}: no safetensors weights there; fetch or convert the model again")

    def _open(self, file: str) -> Any:
        if file not in self._files:
            try:
                self._files[file] = safe_open(self.folder / file, framework="pt")
            except (OSError, SafetensorError) as error:
                line = str(error).splitlines()[0]
                raise Mistake(
                    f"{self.folder / file}: not readable as safetensors ({line}); fetch or convert the model again"
                ) from error
        return self._files[file]

    def check(self, name: str, shape: tuple[int, ...]) -> None:
        """Raise `Mistake` unless tensor `name` is there, with this shape and a floating dtype."""
        if name not in self._places:
            raise Mistake(f"{self.folder}: holds no tensor {name}; is it the right model?")
        file = self._places[name]
        try:
            part = self._open(file).get_slice(name)
        except SafetensorError as error:
            raise Mistake(f"{self.folder / file}: holds no tensor {name}, though {INDEX} says so") from error
        if (found := tuple(part.get_shape())) != shape:
            raise Mistake(f"{self.folder}: {name} has shape {found}, its config.json says {shape}")
        if part.get_dtype() not in DTYPES:  # a quantised value means nothing without its scale
            raise Mistake(f"{self.folder}: {name} is {part.get_dtype()}; expected one of {', '.join(DTYPES)}")

    def read(self, name: str, where: tuple[slice, ...] = ()) -> Tensor:
        """Tensor `name`, or a slice of it, on the CPU."""
        file = self._open(self._places[name])
        return file.get_slice(name)[where] if where else file.get_tensor(name)


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor name → file."""
    try:
        return dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise Mistake(f"{index}: damaged; fetch or convert the model again") from error
