"""The figures of a report. Colours from Okabe and Ito, told apart by marker or line as well as by hue."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xlstm_distill.evaluate.collect import LAYER_LIMIT, Results
from xlstm_distill.evaluate.win_tie import ALPHAS, Comparison
from xlstm_distill.runtime.gate_map import LABEL, TICKS, Gates, draw_gate_map

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#999999")
LINES = ("-", "--", "-.", ":")
MARKERS = "osD^vPX*"
STYLE: dict[Any, Any] = {
    "figure.dpi": 110,
    "savefig.dpi": 110,
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
}
FIGURES = {
    "heldout": "KL to the teacher on held-out text, by model and source",
    "positions": "Held-out KL by position in the sequence",
    "win_tie": "Win-and-Tie curve: share of tasks won or tied over the tolerance α",
    "alignment": "Alignment error of each layer, before and after Stage I",
    "output_gate": "Mean output gate of each layer and head on held-out text, the share of the mLSTM; ×: shut",
    "losses": "Loss curves of training",
}
"""Name of a PNG → what it shows, as caption and alternative text."""


def draw_all(results: Results, folder: Path) -> list[str]:
    """Draw what there is data for into `folder` and return the names (`NAME.png`), in the order of `FIGURES`."""
    drawers: dict[str, Any] = {
        "heldout": lambda: _heldout(results) if results.students and results.sources else None,
        "positions": lambda: _positions(results) if any(m.positions for m in results.students) else None,
        "win_tie": lambda: win_tie(results.comparisons()) if results.comparisons() else None,
        "alignment": lambda: _alignment(results.align) if results.align.get("error_after") else None,
        "output_gate": lambda: _output_gate(results.gates) if results.gates else None,
        "losses": lambda: _losses(results.curves),
    }
    return [name for name in FIGURES if save(drawers[name], folder / f"{name}.png")]


def save(draw: Any, path: Path) -> bool:
    """Call `draw` under our style and write its figure, if it makes one."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with plt.rc_context(STYLE):
        figure = draw()
        if figure is None:
            return False
        figure.savefig(path, metadata={"Software": None})
        plt.close(figure)
    return True


def win_tie(comparisons: Mapping[str, Comparison]) -> "Figure":
    """C_α over α for every student, α* marked where the curve reaches one half."""
    figure, axes = _axes(7, 4)
    for i, (name, comparison) in enumerate(comparisons.items()):
        star = comparison.critical_tolerance
        alphas = sorted({*ALPHAS, *(drop for drop in comparison.drops.values() if drop <= 1)})
        curve = [comparison.win_and_tie(alpha) for alpha in alphas]
        label = f"{name} (α* = {star:.3f})" if star < float("inf") else f"{name} (no α*)"
        axes.step(alphas, curve, where="post", label=label, **_line(i))
        if star <= 1:
            axes.plot(star, comparison.win_and_tie(star), MARKERS[i % 8], color=COLOURS[i % 8], markersize=8)
    axes.axhline(0.5, color="#555555", linewidth=0.8)
    axes.annotate("half of the tasks", (1, 0.5), xytext=(0, 3), textcoords="offset points", ha="right", fontsize=9)
    axes.set(xlabel="tolerance α (relative drop)", ylabel="$C_α$, share won or tied", xlim=(0, 1), ylim=(0, 1.03))
    axes.legend(loc="lower right")
    return figure


def _heldout(results: Results) -> "Figure":
    figure, axes = _axes(7, 1.2 + 0.34 * len(results.students) * max(1, len(results.sources)))
    height = 0.8 / len(results.sources)
    for i, source in enumerate(results.sources):
        rows = [(y, m.heldout[source]["kl"]) for y, m in enumerate(results.students) if source in m.heldout]
        places = [y + (i - (len(results.sources) - 1) / 2) * height for y, _ in rows]
        bars = axes.barh(places, [kl for _, kl in rows], height * 0.92, label=source, color=COLOURS[i % 8])
        axes.bar_label(bars, fmt="%.3f", padding=3, fontsize=9)
    axes.set_yticks(range(len(results.students)), [m.label for m in results.students])
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.margins(x=0.12)
    axes.set(xlabel="KL(teacher ‖ student), nats per token")
    axes.legend(loc="lower right")
    return figure


def _positions(results: Results) -> "Figure":
    import matplotlib.pyplot as plt

    sources = [s for s in results.sources if any(s in m.positions for m in results.students)]
    figure, grid = plt.subplots(1, len(sources), figsize=(1 + 4.2 * len(sources), 3.8), sharey=True, squeeze=False)
    for axes, source in zip(grid[0], sources, strict=True):
        for i, model in enumerate(results.students):
            if source in model.positions:
                bucket, kl = model.positions[source]["bucket"], model.positions[source]["kl"]
                middles = [(j + 0.5) * bucket for j in range(len(kl))]
                axes.plot(middles, _gaps(kl), marker=MARKERS[i % 8], markersize=4, label=model.label, **_line(i))
        if results.window:
            axes.axvline(results.window, color="#555555", linewidth=0.9)
            axes.annotate(" window", (results.window, 1), xycoords=("data", "axes fraction"), va="top", fontsize=9)
        axes.set(xlabel="position in the sequence", title=source, ylim=(0, None))
    grid[0][0].set_ylabel("KL(teacher ‖ student), nats")
    grid[0][-1].legend(fontsize=8.5)
    return figure


def _alignment(facts: Mapping[str, Any]) -> "Figure":
    before, after = facts["error_before"], facts["error_after"]
    figure, axes = _axes(max(6, 1.5 + 0.28 * len(before)), 3.6)
    layers = range(len(before))
    axes.bar([x - 0.2 for x in layers], before, 0.4, label="window + sinks, untrained", color="#bbbbbb")
    axes.bar([x + 0.2 for x in layers], after, 0.4, label="aligned", color=COLOURS[0], hatch="//", edgecolor="white")
    limits = [LAYER_LIMIT * value for value in before]
    axes.plot(layers, limits, "_", color=COLOURS[1], markersize=10, label=f"{LAYER_LIMIT} of untrained")
    axes.set(xlabel="layer", ylabel="‖h − ĥ‖² / ‖h‖²", ylim=(0, None))
    axes.set_xticks([x for x in layers if x % max(1, len(before) // 16) == 0])
    axes.grid(axis="x", visible=False)
    axes.margins(x=0.01)
    figure.legend(loc="outside upper center", ncols=3)
    return figure


def _output_gate(gates: Mapping[str, Gates]) -> "Figure":
    """A heat map per student (paper Fig. 8), heads over layers, and below them the mean of each layer."""
    import matplotlib.pyplot as plt

    layers, heads = (max(sizes) for sizes in zip(*((len(g), len(g[0])) for g in gates.values()), strict=True))
    width, height = min(12.0, max(6.0, 1.5 + 0.26 * layers)), min(5.0, max(1.6, 0.7 + 0.2 * heads))
    size, rows = (width, height * len(gates) + 2.2), len(gates) + 1
    figure, axes = plt.subplots(rows, figsize=size, height_ratios=[*[height] * len(gates), 2.2], sharex=True)
    for i, (label, found) in enumerate(gates.items()):
        image = draw_gate_map(axes[i], found)
        axes[i].set(title=label, xlabel="")
        means = [sum(row) / len(row) for row in found]
        axes[-1].plot(range(len(found)), means, marker=MARKERS[i % 8], markersize=4, label=label, **_line(i))
    axes[-1].set(xlabel="layer", ylabel="mean over heads", ylim=(0, None))
    axes[-1].legend(fontsize=8.5)
    figure.colorbar(image, ax=list(axes), label=LABEL, ticks=TICKS)
    return figure


def _losses(curves: Mapping[str, Sequence[Mapping[str, float]]]) -> "Figure | None":
    """One panel per job: what its metrics call a loss, and its validation."""
    import matplotlib.pyplot as plt

    panels = {job: series for job, records in curves.items() if (series := loss_series(records))}
    if not panels:
        return None
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure, grid = plt.subplots(rows, columns, figsize=(1 + 4 * columns, 3.4 * rows), squeeze=False)
    for axes, (job, series) in zip(grid.flat, panels.items(), strict=False):
        for i, (name, (steps, values)) in enumerate(sorted(series.items())):
            few = {"marker": MARKERS[i % 8], "markersize": 5} if len(steps) < 30 else {}
            axes.plot(steps, values, label=name, **_line(i), **few)
        positive = all(value > 0 for _, values in series.values() for value in values)
        axes.set(xlabel="step", title=job, yscale="log" if positive else "linear")
        for axis_formatter in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            axis_formatter("{x:.3g}")
        axes.legend(fontsize=8)
    for axes in list(grid.flat)[len(panels) :]:
        axes.set_visible(False)
    grid[0][0].set_ylabel("loss")
    return figure


def loss_series(records: Sequence[Mapping[str, float]]) -> dict[str, tuple[list[float], list[float]]]:
    """Name → steps and values of every metric that is a loss or a validation number; at most eight."""
    series: dict[str, tuple[list[float], list[float]]] = {}
    for record in records:
        for name, value in record.items():
            if name.split("/")[0] in ("loss", "validation") and isinstance(value, int | float) and value == value:
                steps, values = series.setdefault(name, ([], []))
                steps.append(record["step"])
                values.append(value)
    return dict(list(series.items())[:8])


def _axes(width: float, height: float) -> "tuple[Figure, Axes]":
    import matplotlib.pyplot as plt

    return plt.subplots(figsize=(width, height))


def _line(index: int) -> dict[str, Any]:
    return {"color": COLOURS[index % 8], "linestyle": LINES[index % 4], "linewidth": 1.8}


def _gaps(values: Sequence[float | None]) -> list[float]:
    return [float("nan") if value is None else value for value in values]
