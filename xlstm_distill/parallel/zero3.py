"""DeepSpeed ZeRO-3: parameters, gradients and optimiser state in equal flat parts, one per rank, optionally in host
memory. In DeepSpeed's names `ds_tensor` is this rank's part of a parameter, whose `data` is empty until it is gathered.
"""

import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor import zeros as sharded_zeros
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from xlstm_distill.contract.exitcode import Mistake
from xlstm_distill.contract.files import write_json
from xlstm_distill.contract.job import JobFolder, World
from xlstm_distill.contract.schema import Strategy as Settings
from xlstm_distill.parallel.group import join
from xlstm_distill.parallel.load import Weights
from xlstm_distill.parallel.state import set_optimizer_step, training_state
from xlstm_distill.parallel.strategy import Read, Strategy

KINDS = ("parameter", "exp_avg", "exp_avg_sq")
"""Of the tensors of a training state."""


def deepspeed_config(settings: Settings, hidden_size: int, max_norm: float) -> dict[str, Any]:
    """What DeepSpeed is told.

    Batches, accumulation and the schedule are the training loop's. Sizes are in elements, by the rule of transformers'
    Trainer; parameters below the threshold (norms, biases) stay whole between steps.

    Args:
        settings: precision and offload.
        hidden_size: of the model.
        max_norm: to which gradients are clipped; 0: never.
    """
    zero: dict[str, Any] = {
        "stage": 3,
        "overlap_comm": True,
        "contiguous_gradients": True,
        "reduce_bucket_size": hidden_size**2,
        "stage3_prefetch_bucket_size": hidden_size**2 * 9 // 10,
        "stage3_param_persistence_threshold": 10 * hidden_size,
    }
    if settings.offload:
        place = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
        zero |= {"offload_optimizer": place, "offload_param": place}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": max_norm,
        "bf16": {"enabled": settings.precision == "bfloat16"},
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "timers": {"throughput": {"enabled": False}},  # it would wait for the device at every forward
    }


class ZeRO3(Strategy):
    """DeepSpeed's engine around the model that trains; frozen models are partitioned in the same way and gathered layer
    by layer.

    Raises:
        Mistake: DeepSpeed is not installed, or a setting is fsdp's.
    """

    def __init__(self, settings: Settings, world: World, timeout: float = 0.0, folder: JobFolder | None = None) -> None:
        for name, wanted in (("compile", False), ("shard", "all")):
            if (value := getattr(settings, name)) != wanted:
                raise Mistake(f"strategy.{name}={str(value).lower()}: zero3 cannot; use strategy.name=fsdp")
        self.deepspeed = _import_deepspeed(world)
        super().__init__(settings, world)
        join(world, timeout)
        self.deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
        self.mesh = init_device_mesh("cpu", (world.size,))
        self.folder = folder
        self.loss_factor = float(world.size)  # the reduction of gradients takes the mean
        self._gathering: dict[nn.Module, LayerGathering] = {}
        self._engine: Any = None
        self._masters: set[Tensor] = set()

    def _shard(self, model: nn.Module, replicated: set[nn.Parameter]) -> None:
        config = self._config(model, 0.0)
        partitioner = self.deepspeed.zero.Init(config_dict_or_path=config, dtype=torch.float32)
        for parameter in model.parameters():
            whole = nn.Parameter(torch.empty_like(parameter, device=self.device), parameter.requires_grad)
            torch.utils.swap_tensors(parameter, whole)
            if parameter not in replicated:
                partitioner._convert_to_deepspeed_param(parameter)
                parameter.partition()  # type: ignore[attr-defined]  # whole it was never touched: no memory yet
        self._gathering[model] = LayerGathering(model, self.dtype)

    @torch.no_grad()
    def _read(self, model: nn.Module, weights: Path) -> None:
        files = Weights(weights)
        for name, parameter in model.named_parameters():
            files.check(name, shape_of(parameter))
            if is_partitioned(parameter):
                read_part(files, name, parameter, self.world.rank)
            else:
                parameter.copy_(files.read(name))
        for module in model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(self.device))

    def _config(self, model: nn.Module, max_norm: float) -> dict[str, Any]:
        """DeepSpeed's for this model, also in the job's `deepspeed.json`."""
        width = model.get_input_embeddings().embedding_dim  # type: ignore[operator]
        config = deepspeed_config(self.settings, width, max_norm)
        if self.folder is not None and self.world.rank == 0:
            write_json(self.folder.path / "deepspeed.json", config)
        return config

    def train(self, model: nn.Module, optimizer: torch.optim.Optimizer, max_norm: float) -> None:
        """Put DeepSpeed's engine around a prepared model. The optimiser stays the same object with the same groups; its
        parameters become the flat float32 parts."""
        super().train(model, optimizer, max_norm)
        self._masters = set(self._trained)
        self._gathering.pop(model).remove()
        masters = _lower(model, self._trained, self.dtype) if self.dtype != torch.float32 else {}
        self._engine, *_ = self.deepspeed.initialize(
            model=model, optimizer=optimizer, config=self._config(model, max_norm), dist_init_required=False
        )
        for parameter, master in masters.items():  # the engine rounded them
            self.deepspeed.utils.safe_set_local_fp32_param(parameter, master)
        # The objective takes the head's weight without calling the head.
        head = model.get_output_embeddings()  # type: ignore[operator]
        self.deepspeed.zero.register_external_parameter(model, head.weight)

    def autocast(self) -> torch.autocast:
        """The parameters are in `dtype`."""
        return torch.autocast(self.device.type, enabled=False)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradients of a micro-batch's share of the global loss; `last`: of this step. Collective."""
        self._engine.optimizer.clear_backward_seen_flag()  # the engine's own forward would; it counts micro-batches
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss * self.loss_factor)

    def norm(self) -> float:
        """Global norm of the gradients of this step. Collective."""
        parts = [self.deepspeed.utils.safe_get_local_grad(p) for p in self._trained]
        return float(self.sum(nn.utils.get_total_norm(parts).square()).sqrt())

    def step(self, norm: float) -> None:
        """Clip the gradients, update the parameters and drop the gradients. Collective."""
        self._engine.step()

    def discard(self) -> None:
        """Drop the gradients: the next backward overwrites their parts."""
        self._engine.optimizer.zero_grad()

    def training_state(self, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
        """What a checkpoint holds: see `parallel/state.py`. Gathered one tensor at a time, of which this rank keeps its
        rows, in host memory. Collective."""
        self._make_moments()
        return {
            f"{kind}.{name}": self._rows(self._whole(parameter, self._part(parameter, kind)))
            for name, parameter in parameters.items()
            for kind in KINDS
        }

    def load_training_state(self, parameters: Mapping[str, nn.Parameter], read: Read, updates: int) -> None:
        """Go on from a checkpoint after so many updates, whatever strategy wrote it. Collective."""
        self._make_moments()
        state: dict[str, Tensor] = {
            f"{kind}.{name}": sharded_zeros(shape_of(p), device_mesh=self.mesh, placements=[Shard(0)])
            for name, p in parameters.items()
            for kind in KINDS
        }
        read(state)
        self._engine.empty_partition_cache()  # drops what was gathered from the values before
        for name, parameter in parameters.items():
            for kind in KINDS:
                self._set_part(parameter, kind, state.pop(f"{kind}.{name}").full_tensor())  # type: ignore[attr-defined]
        set_optimizer_step(self.optimizer, updates)

    def _make_moments(self) -> None:
        flat = enumerate(self._engine.optimizer.fp32_partitioned_groups_flat)
        training_state({str(number): part for number, part in flat}, self.optimizer)

    def _part(self, parameter: Any, kind: str) -> Tensor:
        """This rank's part, padded, float32: of the optimiser's copy of a parameter that trains, or of a moment."""
        utils = self.deepspeed.utils
        if kind == "parameter":
            return utils.safe_get_local_fp32_param(parameter)
        return utils.safe_get_local_optimizer_state(parameter, kind)

    @torch.no_grad()
    def _set_part(self, parameter: Any, kind: str, whole: Tensor) -> None:
        utils, size = self.deepspeed.utils, parameter.ds_tensor.numel()
        mine = whole.flatten()[self.world.rank * size :][:size]
        part = nn.functional.pad(mine, (0, size - mine.numel()))
        if kind == "parameter":
            utils.safe_set_local_fp32_param(parameter, part)
            parameter.ds_tensor.copy_(part)
        else:
            utils.safe_set_local_optimizer_state(parameter, part, kind)

    @torch.no_grad()
    def _whole(self, parameter: Any, part: Tensor) -> Tensor:
        part = part.to(self.device, torch.float32)
        whole = part.new_empty(self.world.size * part.numel())
        dist.all_gather_into_tensor(whole, part)
        return whole[: parameter.ds_numel].view(parameter.ds_shape)

    def _rows(self, whole: Tensor) -> Tensor:
        shape, offset = compute_local_shape_and_global_offset(whole.shape, self.mesh, [Shard(0)])
        rows = whole[offset[0] : offset[0] + shape[0]].to("cpu", copy=True)
        return DTensor.from_local(
            rows, self.mesh, [Shard(0)], run_check=False, shape=whole.shape, stride=whole.stride()
        )

    def sum(self, value: Tensor) -> Tensor:
        """Sum over ranks, in place."""
        dist.all_reduce(value)
        return value

    def barrier(self) -> None:
        """Wait for every rank."""
        dist.barrier()

    def full(self, value: Tensor) -> Tensor:
        """The whole of a parameter, float32, on the CPU. Collective."""
        if not is_partitioned(value):
            return value.detach().cpu()
        part = self._part(value, "parameter") if value in self._masters else value.ds_tensor  # type: ignore[attr-defined]
        return self._whole(value, part).cpu()

    def close(self) -> None:
        """Leave the process group."""
        if self._engine is not None:
            self._engine.destroy()
        self.deepspeed.comm.destroy_process_group()


class LayerGathering:
    """Hooks that make a model's parameters whole where its forward needs them: those of each decoder layer around that
    layer, while the next layer's are under way; the others (embedding, final norm, head) around the whole.

    For forwards without a backward pass through these parameters: DeepSpeed's own hooks, made for both, would also take
    hold of parameters that are not partitioned, and of backward passes inside a forward.

    Args:
        model: a causal LM; parameters that are not partitioned are left alone.
        dtype: of the parameters when they are whole.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        self.dtype = dtype
        layers = list(model.model.layers)  # type: ignore[union-attr, arg-type]
        parts = [[p for p in layer.parameters() if is_partitioned(p)] for layer in layers]
        inside = {p for part in parts for p in part}
        self._parts: list[list[Any]] = [
            [p for p in model.parameters() if is_partitioned(p) and p not in inside],
            *parts,
        ]
        self._coming: dict[int, Any] = {}
        self._hooks = []
        for number, module in enumerate([model, *layers]):
            self._hooks.append(module.register_forward_pre_hook(self._before(number)))
            self._hooks.append(module.register_forward_hook(self._after(number)))

    def remove(self) -> None:
        """Take the hooks away."""
        for hook in self._hooks:
            hook.remove()

    def _fetch(self, number: int) -> None:
        if number < len(self._parts) and number not in self._coming:
            part = self._parts[number]
            self._coming[number] = part[0].all_gather_coalesced(part)

    def _before(self, number: int) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            self._fetch(number)
            self._coming.pop(number).wait()
            for parameter in self._parts[number]:
                parameter.data = parameter.data.to(self.dtype)
            self._fetch(number + 1)

        return hook

    def _after(self, number: int) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            for parameter in self._parts[number]:
                parameter.partition()

        return hook


def is_partitioned(parameter: Tensor) -> bool:
    """Whether each rank has a part of it."""
    return hasattr(parameter, "ds_tensor")


def shape_of(parameter: Tensor) -> tuple[int, ...]:
    """Of the whole."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _lower(model: nn.Module, trained: list[Any], dtype: torch.dtype) -> dict[Any, Tensor]:
    """Give a model's parts `dtype`; returns those that train as they were."""
    masters = {parameter: parameter.ds_tensor for parameter in trained}
    parameter: Any
    for parameter in model.parameters():
        part = parameter.ds_tensor
        lowered = part.to(dtype)
        lowered.__dict__.update(part.__dict__)  # DeepSpeed's notes of it
        parameter.ds_tensor, parameter.data = lowered, parameter.data.to(dtype)
    return masters


def read_part(files: Weights, name: str, parameter: Any, rank: int) -> None:
    """Read the flat part of `rank` of a partitioned parameter: only the rows that it touches."""
    size, width = parameter.ds_tensor.numel(), parameter.ds_shape[1:].numel()
    start = min(rank * size, parameter.ds_numel)
    stop = min(start + size, parameter.ds_numel)
    first, last = start // width, -(-stop // width)
    parameter.ds_tensor.zero_()  # the padding
    if start < stop:
        rows = files.read(name, (slice(first, last),)).flatten()
        parameter.ds_tensor[: stop - start].copy_(rows[start - first * width : stop - first * width])


def _import_deepspeed(world: World) -> Any:
    """DeepSpeed, told where it is.

    Raises:
        Mistake: it is not installed.
    """
    if not torch.cuda.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"
    os.environ.setdefault("LOCAL_RANK", str(world.local_rank))
    try:
        import deepspeed
    except ImportError as error:
        raise Mistake(
            "strategy.name=zero3: DeepSpeed is not installed; use strategy.name=fsdp, or "
            "DS_BUILD_OPS=0 pip install --no-build-isolation deepspeed"
        ) from error
    # Else it would compile an all-reduce through shared memory on CPUs: a minute, with a compiler that may be missing,
    # for a reduction that only its inference engine uses.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    warnings.filterwarnings(
        "ignore", message="`torch.distributed.(all_gather_into|reduce_scatter)_tensor` is deprecated"
    )
    return deepspeed
