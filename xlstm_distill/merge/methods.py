"""The relatives of Eq. 14 (linear.py), in torch, by peft's functions where it has them.

θ₀ is the student that all experts started from, δᵢ = θᵢ − θ₀ the task vector of expert i, wᵢ its weight, Σ wᵢ = 1,
s the scale, d the density, n the number of experts:

    task_arithmetic  θ₀ + s Σ wᵢ δᵢ                             arXiv 2212.04089
    ties             θ₀ + s mean of n wᵢ δᵢ over the experts whose trimmed δᵢ has the elected sign       2306.01708
    dare_linear      θ₀ + s Σ wᵢ mᵢ δᵢ / d, mᵢ ~ Bernoulli(d)   2311.03099
    dare_ties        as ties, over mᵢ δᵢ / d
    slerp            θ₀ + s (sin(w₁Ω) δ₁ + sin(w₂Ω) δ₂) / sin Ω, Ω the angle between δ₁ and δ₂

ties keeps the d · numel largest |δᵢ| of each tensor (at least one) and elects the sign of their sum; n wᵢ
makes equal weights the plain mean of its paper. slerp turns task vectors, not weights: those of experts of one student
lie within a fraction of a degree, where turning is taking the mean. Sums are formed in float32 (float64 of float64) and
rounded once.
"""

import importlib.util
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import xxhash
from torch import Tensor

from xlstm_distill.contract.exitcode import Mistake
from xlstm_distill.contract.schema import Merge
from xlstm_distill.merge.linear import Raw

BLOCK = 1 << 19
"""Elements summed at one time: what they need does not grow with the tensor. What DARE draws depends on it."""
TRIMMED, DROPPED, ELECTED = ("ties",), ("dare_linear", "dare_ties"), ("ties", "dare_ties")
PARALLEL = 0.9995
"""|cos Ω| above which slerp takes the weighted mean, as in mergekit."""


def merge_task_vectors(
    name: str, tensors: Mapping[str, Tensor], weights: Mapping[str, float], base: Tensor, settings: Merge, seed: int
) -> Tensor:
    """Merge one tensor.

    Args:
        name: of the tensor; with `seed` and the expert's name it decides what DARE drops, so no order does.
        tensors: expert → its floating tensor [N], all of one type.
        weights: expert → w, summing to 1.
        base: θ₀ [N].
        settings: method (not `linear`), density and scale.
        seed: of DARE.

    Returns:
        [N], of the experts' type.
    """
    method, given = settings.method, [weights[expert] for expert in tensors]
    first = next(iter(tensors.values()))
    exact = torch.promote_types(first.dtype, torch.float32)
    deltas = [
        _thinned(f"{seed}/{name}/{expert}", partial(_delta, tensor, base, exact), len(tensor), settings)
        for expert, tensor in tensors.items()
    ]
    if method == "slerp":
        given = slerp_coefficients(deltas, given, len(first))
    if method in ELECTED:
        given = [weight * len(given) for weight in given]
    factors, result = torch.tensor(given, dtype=exact), torch.empty_like(first)
    for part in _blocks(len(first)):
        mixed = _mixed([delta(part) for delta in deltas], factors, method in ELECTED)
        result[part] = base[part].to(exact) + settings.scale * mixed
    return result


def as_tensor(raw: Raw, dtype: str) -> Tensor:
    """Bytes as a tensor [N] of one of `linear.FLOATS`."""
    types = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    return torch.from_numpy(raw).view(types[dtype])


def as_bytes(tensor: Tensor) -> Raw:
    """The bytes of a tensor [N]."""
    found: Raw = tensor.view(torch.uint8).numpy()
    return found


Part = Callable[[slice], Tensor]
"""A function from a block to a task vector there."""


def _blocks(count: int) -> Iterator[slice]:
    return (slice(begin, begin + BLOCK) for begin in range(0, count, BLOCK))


def _delta(tensor: Tensor, base: Tensor, exact: torch.dtype, part: slice) -> Tensor:
    return tensor[part].to(exact) - base[part].to(exact)


def _thinned(key: str, delta: Part, count: int, settings: Merge) -> Part:
    """What the method leaves of a task vector [count]."""
    if settings.density >= 1:
        return delta
    if settings.method in TRIMMED:
        return _Trimmed(delta, count, max(1, int(settings.density * count)))
    return partial(_dropped, key, delta, settings.density) if settings.method in DROPPED else delta


def _dropped(key: str, delta: Part, density: float, part: slice) -> Tensor:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(xxhash.xxh64_intdigest(f"{key}/{part.start}".encode()) >> 1)
        return merge_utils().prune(delta(part), density, method="random", rescale=True)


class _Trimmed:
    """The `kept` largest of a task vector [count], zeros elsewhere; of those as large as the smallest kept, the first.

    Of the vector itself nothing is held (peft's form takes 40 bytes an element): its magnitudes stay until the limit
    is known. Blocks are to be asked for once each, in order.
    """

    def __init__(self, delta: Part, count: int, kept: int) -> None:
        self.delta = delta
        magnitudes = torch.empty(count, dtype=delta(slice(0)).dtype).numpy()
        for part in _blocks(count):
            magnitudes[part] = delta(part).abs_()
        magnitudes.partition(count - kept)  # in place; a NaN is larger than all
        self.limit = float(magnitudes[count - kept])
        self.equal = kept - int((magnitudes[count - kept :] > self.limit).sum())

    def __call__(self, part: slice) -> Tensor:
        values = self.delta(part)
        magnitudes = values.abs()
        equal = magnitudes == self.limit
        first = equal & (equal.cumsum(0) <= self.equal)
        self.equal -= int(first.sum())
        return values * ((magnitudes > self.limit) | first)  # not `where`: a NaN has to be seen


def _mixed(deltas: list[Tensor], factors: Tensor, elected: bool) -> Tensor:
    peft = merge_utils()
    if not elected:
        return peft.task_arithmetic(deltas, factors)
    stacked = torch.stack(deltas)
    return peft.disjoint_merge(stacked * factors[:, None], peft.calculate_majority_sign_mask(stacked))


def slerp_coefficients(deltas: Sequence[Part], weights: Sequence[float], count: int) -> list[float]:
    """What slerp multiplies two task vectors with; of one, 1.

    Args:
        deltas: the task vectors.
        weights: w, summing to 1.
        count: elements of a task vector.
    """
    if len(deltas) == 1:
        return [1.0]
    dot = first = second = 0.0
    for part in _blocks(count):
        a, b = (delta(part).double() for delta in deltas)
        dot, first, second = dot + float(a @ b), first + float(a @ a), second + float(b @ b)
    cosine = dot / math.sqrt(first * second) if first * second > 0 else 1.0
    if not abs(cosine) <= PARALLEL:
        return list(weights)
    angle = math.acos(cosine)
    return [math.sin(weight * angle) / math.sin(angle) for weight in weights]


@cache
def merge_utils() -> Any:
    """peft/utils/merge_utils.py (Apache-2.0) without the package around it, whose import takes seconds.

    Raises:
        Mistake: peft is not installed.
    """
    package = importlib.util.find_spec("peft")
    if package is None or not package.submodule_search_locations:
        raise Mistake("merge.method: peft is not installed: pip install peft")
    path = Path(package.submodule_search_locations[0]) / "utils" / "merge_utils.py"
    spec = importlib.util.spec_from_file_location("peft_merge_utils", path)
    assert spec is not None
    assert spec.loader is not None
    module: ModuleType = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
