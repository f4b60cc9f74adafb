"""What a search tries: a small simplex of λ, under one method or several (no torch)."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product


@dataclass(frozen=True)
class Candidate:
    """A method with its λ."""

    method: str
    weights: Mapping[str, float]

    @property
    def name(self) -> str:
        """In a table: `uniform`, `math alone`, `ties 0.25 math + 0.75 code`."""
        shares = [f"{weight:.3g} {name}" for name, weight in self.weights.items() if weight]
        words = " + ".join(shares)
        if len(shares) == 1:
            words = f"{shares[0].split(' ', 1)[1]} alone"
        elif len(set(self.weights.values())) == 1:
            words = "uniform"
        return words if self.method == "linear" else f"{self.method} {words}"


def simplex(names: Sequence[str], divisions: int) -> Iterator[dict[str, float]]:
    """Every λ ≥ 0 of sum 1 whose parts are multiples of 1/`divisions`, and before them the uniform one."""
    yield dict.fromkeys(names, 1 / len(names))
    for parts in product(range(divisions + 1), repeat=len(names)):
        if sum(parts) == divisions and len(set(parts)) > 1:
            yield {name: part / divisions for name, part in zip(names, parts, strict=True)}


def candidates(names: Sequence[str], divisions: int, methods: Sequence[str]) -> list[Candidate]:
    """What is tried. `linear` has the uniform mean and each expert alone in any case; under another method one expert
    alone is no merge."""
    grid = list(simplex(names, divisions))
    alone = [{name: float(name == one) for name in names} for one in names]
    needed = [grid[0], *(weights for weights in alone if weights != grid[0])]
    linear = [*needed, *((w for w in grid if w not in needed) if "linear" in methods else ())]
    others = [(m, w) for m in methods if m != "linear" for w in grid if sum(map(bool, w.values())) > 1]
    return [Candidate("linear", w) for w in linear] + [Candidate(m, w) for m, w in others]
