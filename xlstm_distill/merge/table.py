"""What a search found, as a table and as a figure: a triangle for three experts, bars otherwise."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_BARS = 40
"""Bars in a figure; of more candidates the best are shown, and the first ones (uniform and single experts)."""
CORNERS = ((0.0, 0.0), (1.0, 0.0), (0.5, math.sqrt(3) / 2))


def table(records: Sequence[Mapping[str, Any]], chosen: int) -> str:
    """One line per candidate, the chosen one marked: KL by source, their mean, the mean score where there are tasks."""
    sources, scored = list(records[0]["kl"]), "score" in records[0]
    head = ["", "candidate", *(f"KL {source}" for source in sources), "mean KL", *(["score"] if scored else [])]
    rows = [head]
    for number, record in enumerate(records):
        numbers = [*record["kl"].values(), record["mean_kl"], *([record["score"]] if scored else [])]
        rows.append(["*" if number == chosen else "", record["name"], *(f"{value:.4f}" for value in numbers)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = zip(row, widths, strict=True)
        lines.append("  ".join(c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(cells)).rstrip())
    return "\n".join(lines)


def draw(records: Sequence[Mapping[str, Any]], chosen: int, path: Path) -> None:
    """Write the figure of the mean held-out KL over the candidates."""
    from xlstm_distill.evaluate.plots import save

    three = len(records[0]["weights"]) == 3
    save(lambda: _triangles(records, chosen) if three else _bars(records, chosen), path)


def _triangles(records: Sequence[Mapping[str, Any]], chosen: int) -> "Figure":
    """One triangle per method, a corner per expert, the colour is the KL."""
    import matplotlib.pyplot as plt

    methods = list(dict.fromkeys(record["method"] for record in records))
    figure, grid = plt.subplots(1, len(methods), figsize=(1.2 + 4 * len(methods), 3.9), squeeze=False)
    limits = [f([record["mean_kl"] for record in records]) for f in (min, max)]
    for axes, method in zip(grid[0], methods, strict=True):
        rows = [record for record in records if record["method"] == method]
        places = [_place(record["weights"].values()) for record in rows]
        axes.plot(*zip(*CORNERS, CORNERS[0], strict=True), color="#bbbbbb", linewidth=1, zorder=1)
        shown = axes.scatter(
            *zip(*places, strict=True), c=[record["mean_kl"] for record in rows], s=260, cmap="viridis",
            vmin=limits[0], vmax=limits[1], zorder=2,
        )  # fmt: skip
        for record, (x, y) in zip(rows, places, strict=True):
            axes.annotate(f"{record['mean_kl']:.3f}", (x, y), (0, -17), textcoords="offset points", ha="center", size=7)
            if record is records[chosen]:
                axes.plot(x, y, "o", markersize=20, fillstyle="none", color="#D55E00", markeredgewidth=2, zorder=3)
        _name_corners(axes, list(records[0]["weights"]))
        axes.set_title(method)
    figure.colorbar(shown, ax=list(grid[0]), label="mean held-out KL, nats per token")
    return figure


def _place(weights: Any) -> tuple[float, float]:
    """Barycentric → plane."""
    return tuple(sum(w * corner[axis] for w, corner in zip(weights, CORNERS, strict=True)) for axis in (0, 1))  # type: ignore[return-value]


def _name_corners(axes: "Axes", names: Sequence[str]) -> None:
    for name, (x, y) in zip(names, CORNERS, strict=True):
        axes.annotate(name, (x, y), (0, 14 if y else -30), textcoords="offset points", ha="center", weight="bold")
    axes.set(aspect="equal", xlim=(-0.18, 1.18), ylim=(-0.2, 1.05))
    axes.axis("off")


def _bars(records: Sequence[Mapping[str, Any]], chosen: int) -> "Figure":
    """A bar per candidate, the best on top; beside the KL the mean score where there are tasks."""
    import matplotlib.pyplot as plt

    best = sorted(records, key=lambda record: record["mean_kl"])
    named = [record for record in records if record["method"] == "linear"][: len(records[0]["weights"]) + 1]
    kept = [record for i, record in enumerate(best) if i < MOST_BARS - len(named) or record in named]
    panels = {"mean_kl": "mean held-out KL, nats per token"}
    if "score" in records[0]:
        panels["score"] = "mean score"
    size = (4 + 3.6 * len(panels), 1.2 + 0.26 * len(kept))
    figure, grid = plt.subplots(1, len(panels), figsize=size, sharey=True, squeeze=False)
    colours = ["#D55E00" if record is records[chosen] else "#0072B2" for record in kept]
    for axes, (key, label) in zip(grid[0], panels.items(), strict=True):
        bars = axes.barh(range(len(kept)), [record[key] for record in kept], color=colours)
        axes.bar_label(bars, fmt="%.4f", padding=3, fontsize=8)
        axes.margins(x=0.15)
        axes.grid(axis="y", visible=False)
        axes.set(xlabel=label)
    grid[0][0].set_yticks(range(len(kept)), [r["name"] + (" (chosen)" if r is records[chosen] else "") for r in kept])
    grid[0][0].invert_yaxis()
    return figure
