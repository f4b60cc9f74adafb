"""Experts → the tensors of the merged student, one at a time, and the folder that holds them.

Each shard of the first expert is written again with its own header, byte for byte, and the merged tensors in the order
of the file: one tensor of each expert is in memory at a time, whatever the size of the model.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from xlstm_distill.contract.exitcode import Mistake
from xlstm_distill.contract.files import folder_atomic
from xlstm_distill.contract.schema import Merge
from xlstm_distill.merge.folder import copy_rest, read_header, refuse_difference, refuse_other_tensors
from xlstm_distill.merge.linear import FLOATS, Raw, is_finite, weighted_sum
from xlstm_distill.merge.read import HashedFolder
from xlstm_distill.merge.weights import TensorWeights


@dataclass(frozen=True)
class Recipe:
    """How experts become one student."""

    weights: TensorWeights
    settings: Merge
    seed: int = 0
    """Of what DARE drops."""


class Experts:
    """The experts of a merge.

    Args:
        models: expert → its folder, of equal architecture.
        base: the student that all of them started from; None where every recipe is `linear`.

    Raises:
        Mistake: two of them do not fit together; the message names the first difference.
    """

    def __init__(self, models: Mapping[str, HashedFolder], base: HashedFolder | None = None) -> None:
        self.models, self.base = models, base
        self.first, *others = models.values()
        for other in others:
            refuse_difference(self.first, other)
        if base is not None:  # its type may be another: training starts from the very values
            refuse_other_tensors(self.first, base)

    def check(self, recipe: Recipe) -> None:
        """Refuse a recipe that cannot be carried out, before a tensor is read.

        Raises:
            Mistake: slerp of other than two experts, or weights that do not fit the tensors.
        """
        if recipe.settings.method == "slerp" and len(self.models) != 2:
            raise Mistake(
                f"merge.method=slerp: turns one expert to another; expected 2 experts, got {len(self.models)}"
            )
        recipe.weights.check(self.first.entries)

    @contextmanager
    def reading(self, recipe: Recipe) -> Iterator[None]:
        """Keep what the recipe reads open in the block; at its end everything has the hash of its manifest.

        Raises:
            Mistake: it has not; the message names the file.
        """
        with ExitStack() as stack:
            for model in self._read_by(recipe):
                stack.enter_context(model.reading())
            yield

    def _read_by(self, recipe: Recipe) -> "list[HashedFolder]":
        return [*self.models.values(), *([self.base] if self.base and recipe.settings.method != "linear" else [])]

    def merged(self, recipe: Recipe, names: Iterable[str]) -> Iterator[tuple[str, Raw]]:
        """The bytes of the merged tensors, with their names, in the order of `names`; in `reading` only.

        Raises:
            Mistake: integers differ between experts, or a result is not finite.
        """
        for name in names:
            yield name, self._merge(recipe, name)

    def _merge(self, recipe: Recipe, name: str) -> Raw:
        tensors = {expert: model.raw(name) for expert, model in self.models.items()}
        entry = self.first.entries[name]
        if entry.dtype not in FLOATS:
            return _equal(name, entry.dtype, tensors)
        weights = recipe.weights[name]
        taken = {expert: tensor for expert, tensor in tensors.items() if weights[expert]}  # 0 · NaN is no 0
        if self.base and recipe.settings.method != "linear" and entry.size:
            from xlstm_distill.merge.methods import as_bytes, as_tensor, merge_task_vectors

            given = {expert: as_tensor(tensor, entry.dtype) for expert, tensor in taken.items()}
            base = as_tensor(self.base.raw(name), self.base.entries[name].dtype)
            merged = merge_task_vectors(name, given, weights, base, recipe.settings, recipe.seed)
            result: Raw = as_bytes(merged)
        else:
            result = weighted_sum(list(taken.values()), [weights[expert] for expert in taken], entry.dtype)
        if not is_finite(result, entry.dtype):
            raise Mistake(f"merge: {name}: {self._culprit(name, taken)}")
        return result

    def _culprit(self, name: str, tensors: Mapping[str, Raw]) -> str:
        dtype = self.first.entries[name].dtype
        for expert, tensor in tensors.items():
            if not is_finite(tensor, dtype):
                return f"expert {expert} holds a NaN or an infinite value; distil it again, or give it the weight 0"
        if self.base and not is_finite(self.base.raw(name), self.base.entries[name].dtype):
            return "the student that the experts started from holds a NaN or an infinite value; align it again"
        return f"the result is not finite in {dtype}"


def _equal(name: str, dtype: str, tensors: Mapping[str, Raw]) -> Raw:
    """What all experts have."""
    (first_expert, first), *others = tensors.items()
    for expert, other in others:
        if not np.array_equal(first, other):
            raise Mistake(
                f"merge: {name} ({dtype}) differs between the experts {first_expert} and {expert}; it has no mean"
            )
    return first


def write_merge(
    experts: Experts, recipe: Recipe, destination: Path, on_tensor: Callable[[], None] = lambda: None
) -> dict[str, int]:
    """Write the merge to `destination`, whole or not at all.

    Config, tokenizer and the like are copied from the first expert. A tensor that two names share is stored once and
    stays so.

    Args:
        experts: what is merged; `HashedFolder`s are read once.
        recipe: how.
        destination: folder to make or replace.
        on_tensor: called after each tensor.

    Returns:
        `{"bytes": …, "tensors": …}`.

    Raises:
        Mistake: see `Experts`.
    """
    experts.check(recipe)
    first, size = experts.first, 0
    with folder_atomic(destination) as beside, experts.reading(recipe):
        for file in first.files:
            names = [name for name, entry in first.entries.items() if entry.file == file]
            with (beside / file).open("wb") as out:
                out.write(read_header(first.path / file)[0])
                for _, tensor in experts.merged(recipe, names):
                    out.write(tensor.data)
                    on_tensor()
                size += out.tell()
        copy_rest(first.path, beside)
    return {"bytes": size, "tensors": len(first.entries)}
