"""λ of each expert, for each tensor (paper, Eq. 14): scaled to sum to 1 over the experts."""

from collections.abc import Iterable, Mapping

from xlstm_distill.contract.exitcode import Mistake
from xlstm_distill.contract.parts import LAYER, part_of, problem_of
from xlstm_distill.contract.schema import Config

Weights = Mapping[str, float]
"""Expert → λ."""


def scale_weights(weights: Weights, where: str = "") -> dict[str, float]:
    """`weights` scaled to sum to 1.

    Raises:
        Mistake: one is no number ≥ 0, or all are zero.
    """
    for name, weight in weights.items():
        if not 0 <= weight < float("inf"):
            raise Mistake(f"merge: the weight of expert {name} is {weight}; expected a number ≥ 0")
    total = sum(weights.values())
    if total <= 0:
        what = f" for {where}" if where else ""
        raise Mistake(f"merge: the weights of {', '.join(weights)}{what} are all zero; give one a positive weight")
    return {name: weight / total for name, weight in weights.items()}


class TensorWeights:
    """λ by tensor.

    Args:
        default: expert → weight of what no part names.
        parts: expert → part (`contract.parts`) → weight.
    """

    def __init__(self, default: Weights, parts: Mapping[str, Weights] | None = None) -> None:
        self.default, self.parts = default, parts or {}

    @classmethod
    def of(cls, config: Config) -> "TensorWeights":
        """As the configuration has them: `expert.NAME.merge_weight`, and `merge.weights` for parts.

        Raises:
            Mistake: `merge.weights` names an expert that is not merged, or a part that there is not.
        """
        names = config.specialists
        for expert, parts in config.merge.weights.items():
            if expert not in names:
                raise Mistake(f"merge.weights.{expert}: no such expert is merged; there are {', '.join(names)}")
            if problem := problem_of(parts, 0):
                raise Mistake(f"merge.weights.{expert}.{problem}")
        return cls({name: config.expert[name].merge_weight for name in names}, config.merge.weights)

    def __getitem__(self, tensor: str) -> dict[str, float]:
        """λ of the tensor of this name."""
        given = {}
        for expert, default in self.default.items():
            parts = self.parts.get(expert, {})
            given[expert] = parts.get(part_of(tensor, parts), default)
        return scale_weights(given, tensor if self.parts else "")

    def check(self, tensors: Iterable[str]) -> None:
        """Refuse what does not fit a model of these tensors, before any is read.

        Raises:
            Mistake: a part names none of them, or all weights of one are zero.
        """
        names = list(tensors)
        layers = 1 + max((int(layer[1]) for name in names if (layer := LAYER.search(name))), default=-1)
        for expert, parts in self.parts.items():
            if problem := problem_of(parts, layers):
                raise Mistake(f"merge.weights.{expert}.{problem}")
            for part in parts:
                if not any(part_of(name, [part]) for name in names):
                    raise Mistake(f"merge.weights.{expert}.{part}: the student has no tensor of that part")
        for name in names:
            _ = self[name]
