"""The tables of a report, as rows of text: for the terminal, for Markdown."""

import math
from collections.abc import Mapping, Sequence

from xlstm_distill.contract.gates import heads_shut
from xlstm_distill.evaluate.collect import Measured, Results

WIDTH = 100
"""Columns of a terminal that plain tables fit into."""
Table = tuple[list[str], list[list[str]]]
"""Header and rows."""


def heldout_table(results: Results) -> Table:
    """One row per model, KL to the teacher (nats per token) and perplexity per source."""
    header = ["model"]
    for source in results.sources:
        header += [f"{source} KL", f"{source} ppl"]
    return header, [[model.label, *_heldout_cells(model, results.sources)] for model in results.models]


def _heldout_cells(model: Measured, sources: Sequence[str]) -> list[str]:
    cells = []
    for source in sources:
        values = model.heldout.get(source, {})
        cells += [number(values.get("kl"), 3), number(values.get("perplexity"), 2)]
    return cells


def task_table(results: Results, short: bool = False) -> Table:
    """One row per task and one column per model.

    Args:
        results: of a run.
        short: model names and numbers for a narrow terminal.
    """
    header = ["task", *(model.name if short else model.label for model in results.models)]
    lower = results.lower_is_better()
    rows = []
    for task in results.tasks:
        name = task + (" ↓" if task in lower else "")
        rows.append([name, *(score_cell(model.scores.get(task), short) for model in results.models)])
    return header, rows


def gate_table(results: Results, most: int = 3) -> Table:
    """One row per student: mean output gate, the layers that use the mLSTM most and least, number of shut heads.

    Args:
        results: of a run.
        most: number of layers to name at either end.
    """
    rows = []
    for label, gates in results.gates.items():
        layers = [sum(heads) / len(heads) for heads in gates]
        order = sorted(range(len(layers)), key=lambda layer: -layers[layer])
        named = [f"{layer} ({number(layers[layer], 3)})" for layer in order]
        shut, heads = len(heads_shut(gates)), sum(map(len, gates))
        ends = (named[:most], named[::-1][:most])
        rows.append([label, number(sum(map(sum, gates)) / heads, 4), *map(", ".join, ends), f"{shut} of {heads}"])
    return ["student", "mean gate", "most mLSTM: layer (gate)", "least", "heads shut"], rows


def score_cell(score: Mapping[str, object] | None, short: bool = False) -> str:
    """`0.812 ± 0.051`, or `.81±.05`."""
    if not score or not isinstance(score.get("score"), int | float):
        return "–"
    value, stderr = float(score["score"]), score.get("stderr")  # type: ignore[arg-type]
    digits = 2 if short else 3
    text = number(value, digits)
    if isinstance(stderr, int | float) and math.isfinite(stderr):
        text += f"{'±' if short else ' ± '}{number(float(stderr), digits)}"
    return text.replace("0.", ".") if short and value < 10 else text


def number(value: float | None, digits: int) -> str:
    """`value` with `digits` decimals; three figures above 1000; – for nothing, ∞ for infinity."""
    if value is None or math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞"
    return f"{value:.{digits}f}" if abs(value) < 1000 else f"{value:.3g}"


def as_text(table: Table, width: int = WIDTH) -> str:
    """Aligned columns, the first to the left, at most `width` wide: the first column is cut, then columns go below."""
    header, rows = table
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    first = min(widths[0], max(16, width - sum(w + 2 for w in widths[1:])))
    blocks: list[list[int]] = []
    columns: list[int] = []
    used = first
    for index in range(1, len(header)):
        if columns and used + 2 + widths[index] > width:
            blocks.append(columns)
            columns, used = [], first
        columns.append(index)
        used += 2 + widths[index]
    blocks.append(columns)
    return "\n\n".join(_block(header, rows, columns, first, widths) for columns in blocks)


def _block(header: list[str], rows: list[list[str]], columns: list[int], first: int, widths: list[int]) -> str:
    def line(row: list[str]) -> str:
        return "  ".join([_elided(row[0], first).ljust(first), *(row[i].rjust(widths[i]) for i in columns)]).rstrip()

    rule = "─" * (first + sum(2 + widths[i] for i in columns))
    return "\n".join([line(header), rule, *map(line, rows)])


def _elided(name: str, width: int) -> str:
    """Names that agree in both their ends are rare; in one end, as tasks of one kind or source, they are not."""
    if len(name) <= width:
        return name
    tail = width // 2
    return f"{name[: width - tail - 1]}…{name[-tail:]}"


def as_markdown(table: Table) -> str:
    """A Markdown table, numbers to the right."""
    header, rows = table
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
