"""The figures of the verdict: Win-and-Tie curves, recovery per task, what merging changed per domain."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from xlstm_distill.evaluate.bootstrap import Interval
from xlstm_distill.evaluate.style import COLOURS, MARKERS, bar_look, line_look, new_axes
from xlstm_distill.evaluate.verdict import Change, Estimate, Verdicts
from xlstm_distill.evaluate.win_tie import ALPHAS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NARROWEST = 0.2
"""Least tolerance up to which the curves are drawn."""
MOST_RECOVERY = 2.0
"""Bars end here: a student that finds what its teacher hardly finds would flatten all others."""


def win_tie(verdicts: Verdicts) -> "Figure":
    """C_α over α for every student (paper Fig. 1), α* marked where the curve reaches one half; below, α* with its
    interval over samples."""
    import matplotlib.pyplot as plt

    students, strip = verdicts.students, 0.5 + 0.17 * len(verdicts.students)
    size, heights = (8, 4.2 + strip), [3.6, strip]
    figure, (axes, below) = plt.subplots(2, 1, figsize=size, height_ratios=heights, sharex=True)
    drops = [drop for c in verdicts.comparisons.values() for drop in c.drops.values() if math.isfinite(drop)]
    end = min(1.0, max(NARROWEST, 1.05 * max(drops, default=0.0)))
    for i, (name, verdict) in enumerate(students.items()):
        comparison, star = verdict.comparison, verdict.critical_tolerance
        alphas = sorted({*(a for a in ALPHAS if a < end), *(d for d in comparison.drops.values() if d < end), end})
        found = star.value if star.value is not None else math.inf
        label = f"{name} (α* = {found:.3f})" if math.isfinite(found) else f"{name} (no α*)"
        axes.step(alphas, [comparison.win_and_tie(a) for a in alphas], where="post", label=label, **line_look(i))
        if found <= end:
            axes.plot(found, comparison.win_and_tie(found), MARKERS[i % 8], color=COLOURS[i % 8], markersize=8)
            _interval(below, i, found, star.samples, end)
    axes.axhline(0.5, color="#555555", linewidth=0.8)
    axes.annotate("half of the tasks", (end, 0.5), xytext=(0, 3), textcoords="offset points", ha="right", fontsize=9)
    axes.set(ylabel="$C_α$, share won or tied", xlim=(-0.01 * end, end), ylim=(0, 1.03))
    below.set(xlabel="tolerance α (relative drop)", ylabel="α*", yticks=[], ylim=(len(students) - 0.4, -0.6))
    figure.legend(loc="outside right upper", fontsize=9)
    return figure


def _interval(axes: "Axes", i: int, star: float, over_samples: Interval | None, end: float) -> None:
    low, high = over_samples or (math.nan, math.nan)
    axes.errorbar(
        [star],
        [i],
        xerr=[[max(0.0, star - low)], [max(0.0, min(high, end) - star)]] if over_samples else None,
        fmt=MARKERS[i % 8],
        color=COLOURS[i % 8],
        markersize=6,
        elinewidth=1.4,
        capsize=3,
    )


def recovery(verdicts: Verdicts) -> "Figure":
    """Bars per task and student, with intervals over samples; the line is the teacher."""
    tasks, students = verdicts.board.tasks, verdicts.students
    figure, axes = new_axes(9, 1.4 + max(0.3 * len(tasks), 0.16 * len(tasks) * len(students)))
    thickness = 0.82 / len(students)
    for i, (name, verdict) in enumerate(students.items()):
        places = [y + (i - (len(students) - 1) / 2) * thickness for y in range(len(tasks))]
        _bars(axes, i, places, [verdict.recovery[task] for task in tasks], thickness * 0.9, name)
        for place, task in zip(places, tasks, strict=True):
            lost = task in verdict.comparison.missing
            if lost or verdict.recovery[task].value is None:
                words = " no score" if lost else " teacher: 0"
                axes.annotate(words, (0, place), va="center", fontsize=8, color=COLOURS[i % 8])
    axes.axvline(1, color="#555555", linewidth=0.9)
    axes.annotate("teacher ", (1, 1), xycoords=("data", "axes fraction"), ha="right", va="bottom", fontsize=9)
    axes.set_yticks(range(len(tasks)), tasks)
    axes.set(xlabel="recovery: student / teacher", xlim=(0, min(MOST_RECOVERY, axes.get_xlim()[1])))
    axes.set_ylim(len(tasks) - 0.5, -0.5)
    axes.grid(axis="y", visible=False)
    figure.legend(loc="outside right upper", fontsize=9)
    return figure


def changes(found: Sequence[Change]) -> "Figure":
    """Gains and losses of the merged student per domain: bars by whom it is held against, intervals over samples."""
    domains = list(dict.fromkeys(change.domain for change in found))
    series: dict[str, dict[str, Change]] = {}
    for change in found:
        series.setdefault(_series(change), {})[change.domain] = change
    figure, axes = new_axes(8, 1.4 + 0.26 * len(domains) * len(series))
    thickness = 0.82 / len(series)
    for i, (label, by_domain) in enumerate(series.items()):
        rows = [(y, by_domain[domain]) for y, domain in enumerate(domains) if domain in by_domain]
        places = [y + (i - (len(series) - 1) / 2) * thickness for y, _ in rows]
        _bars(axes, i, places, [change.difference for _, change in rows], thickness * 0.9, label)
    axes.axvline(0, color="#555555", linewidth=0.9)
    axes.set_yticks(range(len(domains)), domains)
    axes.set(xlabel="mean recovery, merged less the other")
    axes.set_ylim(len(domains) - 0.5, -0.5)
    axes.grid(axis="y", visible=False)
    figure.legend(loc="outside right upper", title="against", fontsize=9)
    return figure


def _series(change: Change) -> str:
    return {"best expert": "best expert there", "own expert": "the domain's expert"}.get(change.kind, change.against)


def _bars(
    axes: "Axes", i: int, places: Sequence[float], estimates: Sequence[Estimate], thickness: float, label: str
) -> None:
    values = [0.0 if e.value is None else e.value for e in estimates]
    ends = [e.samples or Interval(math.nan, math.nan) for e in estimates]
    reach = [
        [max(0.0, value - low) if low == low else low for value, (low, _) in zip(values, ends, strict=True)],
        [max(0.0, high - value) if high == high else high for value, (_, high) in zip(values, ends, strict=True)],
    ]
    lines = {"elinewidth": 1.0, "capsize": 1.5, "ecolor": "#666666"}
    axes.barh(places, values, thickness, xerr=reach, error_kw=lines, label=label, **bar_look(i))
