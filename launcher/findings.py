"""What the reports of a check of nodes (launcher/nodes.py) say together: figures, and who stands out (pure)."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median, mode
from typing import Any

SLOW = 0.5
"""Below so much of the median a figure counts as slow."""
MOST_SKEW = 1.0
"""Seconds between clocks from which a node is named: ages and time limits are compared across nodes."""
FIGURES = (("flops", "product", 1e12, "TFLOP/s per rank"), ("links", "links", 1e9, "GB/s between neighbours"))
"""Key of a report, its title, unit and what is measured: figures whose slow nodes can be named."""
Blame = Callable[[str, str], Any]
Reports = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Findings:
    """What the reports say together."""

    lines: Sequence[str]
    """For people: figures of the whole."""
    faults: Mapping[str, str]
    """Node → what is wrong with it."""
    fine: bool
    """Whether every rank reported, right and complete."""


def compare(reports: Reports, ranks: int, names: Sequence[str] = ()) -> Findings:
    """What the reports of a check say together (pure).

    Args:
        reports: of the ranks that wrote one.
        ranks: how many were started.
        names: the node of each rank; empty: unknown.
    """
    faults: dict[str, list[str]] = {}
    _who_is_missing(reports, ranks, names, lambda node, why: faults.setdefault(node, []).append(why))
    lines = [f"{sum(bool(report['finished']) for report in reports)} of {ranks} ranks reported"]
    for tell in (_versions, _products, _figures, _all_reduce, _clocks):
        lines += tell(reports, lambda node, why: faults.setdefault(node, []).append(why))
    whole = len(reports) == ranks and all(report["finished"] and "error" not in report for report in reports)
    return Findings(lines, {node: "; ".join(dict.fromkeys(why)) for node, why in faults.items()}, whole)


def _who_is_missing(reports: Reports, ranks: int, names: Sequence[str], blame: Blame) -> None:
    """Blame for silence and for errors before the ranks met; what breaks when they meet is the fault of one of these,
    or nobody's that is known."""
    for rank in sorted(set(range(ranks)) - {report["rank"] for report in reports}):
        blame(names[rank] if rank < len(names) else f"rank {rank}", f"no report from rank {rank}")
    for report in reports:
        if "error" in report and "flops" not in report:
            blame(report["node"], f"rank {report['rank']}: {report['error']}")


def _versions(reports: Reports, blame: Blame) -> list[str]:
    told = [report for report in reports if "versions" in report]
    if not told:
        return []
    names = list(dict.fromkeys(name for report in told for name in report["versions"]))
    usual = {name: mode(report["versions"].get(name, "missing") for report in told) for name in names}
    same = True
    for report in told:
        other = {name: report["versions"].get(name, "missing") for name in names}
        for name in names:
            if other[name] != usual[name]:
                same = False
                blame(report["node"], f"{name} {other[name]}, elsewhere {usual[name]}")
    listed = ", ".join(f"{name} {number}" for name, number in usual.items())
    return [f"{'versions':<12}{listed}{' on all' if same else ' on most'}; {mode(r['device'] for r in told)}"]


def _products(reports: Reports, blame: Blame) -> list[str]:
    for report in reports:
        if report.get("product", "right") != "right":
            blame(report["node"], f"rank {report['rank']}: a product of matrices is {report['product']}")
    return []


def _figures(reports: Reports, blame: Blame) -> list[str]:
    lines = []
    for key, title, unit, what in FIGURES:
        every = [(report["node"], _figure(report[key])) for report in reports if report.get(key)]
        if not every:
            continue
        middle = median(figure for _, figure in every)
        lines.append(f"{title:<12}{middle / unit:.3g} {what} (median; slowest {min(f for _, f in every) / unit:.3g})")
        for node, figure in every:
            if figure < SLOW * middle:
                blame(node, f"{title} {figure / unit:.3g} {what}, the median is {middle / unit:.3g}")
    return lines


def _figure(value: Any) -> float:
    """A figure of a node; of its two links the better: the other's slowness is its neighbour's."""
    return float(max(value.values()) if isinstance(value, Mapping) else value)


def _all_reduce(reports: Reports, blame: Blame) -> list[str]:
    told = [report["all_reduce"] for report in reports if report.get("all_reduce")]
    return [f"{'all-reduce':<12}{median(told) / 1e9:.3g} GB/s over {len(reports)} ranks"] if told else []


def _clocks(reports: Reports, blame: Blame) -> list[str]:
    told = [(report["node"], report["skew"]) for report in reports if report.get("skew") is not None]
    if len(told) < 2:
        return []
    middle = median(skew for _, skew in told)
    for node, skew in told:
        if abs(skew - middle) > MOST_SKEW:
            blame(node, f"its clock is {skew - middle:+.1f} s off")
    apart = max(skew for _, skew in told) - min(skew for _, skew in told)
    return [f"{'clocks':<12}at most {1000 * apart:.3g} ms apart"]
