"""The figures of a report."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xlstm_distill.evaluate import verdict_plots
from xlstm_distill.evaluate.checks import LAYER_LIMIT
from xlstm_distill.evaluate.collect import Results
from xlstm_distill.evaluate.style import COLOURS, MARKERS, line_look, new_axes, save
from xlstm_distill.evaluate.verdict import Verdicts
from xlstm_distill.runtime.gate_map import LABEL, TICKS, Gates, draw_gate_map

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FIGURES = {
    "heldout": "KL to the teacher on held-out text, by model and source",
    "positions": "Held-out KL by position in the sequence",
    "long": "Held-out cross-entropy by position, past the length of the training",
    "win_tie": "Win-and-Tie curves: share of tasks won or tied over the tolerance α; marked: α* and its interval",
    "recovery": "Recovery of each task, with intervals over samples",
    "changes": "What merging changed in each domain, with intervals over samples",
    "alignment": "Alignment error of each layer, before and after Stage I",
    "output_gate": "Mean output gate of each layer and head on held-out text, the share of the mLSTM; ×: shut",
    "losses": "Loss curves of training",
}
"""Name of a PNG → what it shows, as caption and alternative text."""


def draw_all(results: Results, verdicts: Verdicts | None, folder: Path) -> list[str]:
    """Draw what there is data for into `folder` and return the names (`NAME.png`), in the order of `FIGURES`."""
    drawers: dict[str, Any] = {
        "heldout": lambda: _heldout(results) if results.students and results.sources else None,
        "positions": lambda: _positions(results) if any(m.positions for m in results.students) else None,
        "long": lambda: _long(results) if any(m.long for m in results.models) else None,
        "alignment": lambda: _alignment(results.align) if results.align.get("error_after") else None,
        "output_gate": lambda: _output_gate(results.gates) if results.gates else None,
        "losses": lambda: _losses(results.curves),
    }
    drawn = {name for name, draw in drawers.items() if save(draw, folder / f"{name}.png")}
    if verdicts:
        drawn |= draw_verdicts(verdicts, folder)
    return [name for name in FIGURES if name in drawn]


def draw_verdicts(verdicts: Verdicts, folder: Path) -> set[str]:
    """Draw the figures of a verdict and return their names."""
    drawers: dict[str, Any] = {
        "win_tie": lambda: verdict_plots.win_tie(verdicts) if verdicts.students else None,
        "recovery": lambda: verdict_plots.recovery(verdicts) if verdicts.students else None,
        "changes": lambda: verdict_plots.changes(verdicts.changes) if verdicts.changes else None,
    }
    return {name for name, draw in drawers.items() if save(draw, folder / f"{name}.png")}


def _heldout(results: Results) -> "Figure":
    figure, axes = new_axes(7, 1.2 + 0.34 * len(results.students) * max(1, len(results.sources)))
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
                axes.plot(middles, _gaps(kl), marker=MARKERS[i % 8], markersize=4, label=model.label, **line_look(i))
        if results.window:
            axes.axvline(results.window, color="#555555", linewidth=0.9)
            axes.annotate(" window", (results.window, 1), xycoords=("data", "axes fraction"), va="top", fontsize=9)
        axes.set(xlabel="position in the sequence", title=source, ylim=(0, None))
    grid[0][0].set_ylabel("KL(teacher ‖ student), nats")
    grid[0][-1].legend(fontsize=8.5)
    return figure


def _long(results: Results) -> "Figure":
    """One panel per source: teacher and students over positions on a logarithmic scale."""
    import matplotlib.pyplot as plt

    sources = sorted({source for model in results.models for source in model.long})
    figure, grid = plt.subplots(1, len(sources), figsize=(1 + 4.2 * len(sources), 3.8), squeeze=False)
    for axes, source in zip(grid[0], sources, strict=True):
        for i, model in enumerate(m for m in results.models if source in m.long):
            edges, ce = model.long[source]["edges"], model.long[source]["ce"]
            middles = [(low + high) / 2 for low, high in pairwise(edges)]
            axes.plot(middles, _gaps(ce), marker=MARKERS[i % 8], markersize=4, label=model.label, **line_look(i))
        if results.window:
            axes.axvline(results.window, color="#555555", linewidth=0.9)
        axes.set(xlabel="position in the sequence", title=source, xscale="log")
    grid[0][0].set_ylabel("cross-entropy, nats per token")
    grid[0][-1].legend(fontsize=8.5)
    return figure


def _alignment(facts: Mapping[str, Any]) -> "Figure":
    before, after = facts["error_before"], facts["error_after"]
    figure, axes = new_axes(max(6, 1.5 + 0.28 * len(before)), 3.6)
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
        axes[-1].plot(range(len(found)), means, marker=MARKERS[i % 8], markersize=4, label=label, **line_look(i))
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
            axes.plot(steps, values, label=name, **line_look(i), **few)
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


def _gaps(values: Sequence[float | None]) -> list[float]:
    return [float("nan") if value is None else value for value in values]
