"""Reports as Markdown and as one HTML file with its images inside."""

import base64
import html
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from xlstm_distill.contract.files import write_atomic
from xlstm_distill.contract.gates import SHUT
from xlstm_distill.evaluate import plots, tables, verdict_tables
from xlstm_distill.evaluate.checks import checks
from xlstm_distill.evaluate.collect import Measured, Results
from xlstm_distill.evaluate.verdict import Verdicts

HELDOUT_NOTE = "KL(teacher ‖ model) in nats per token over the whole vocabulary; ppl: perplexity. Held-out text."
TASKS_NOTE = "Score ± standard error; ↓: lower is better, left out of the verdict."
GATES_NOTE = (
    "Mean of the output gate o over held-out text: 1 where a head uses only the mLSTM, 0 where only window and sinks. "
    f"A head is shut where its mean is not between {SHUT:g} and {1 - SHUT:g}."
)
CSS = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
h1, h2 { line-height: 1.2; } h2 { margin-top: 2.2rem; } img { max-width: 100%; height: auto; }
.table { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid #ddd; white-space: nowrap; }
thead th { border-bottom: 2px solid #222; } code { background: #f3f3f3; padding: 0 .25em; }
"""


def markdown_report(results: Results, verdicts: Verdicts | None, figures: list[str]) -> str:
    """The report of a run as Markdown; figures are links to the PNGs beside it."""
    parts = [f"# {results.name}: students against their teacher"]
    parts += [f"{line}." for line in standing(results)]
    if results.sources:
        parts += ["## Held-out text", HELDOUT_NOTE, tables.as_markdown(tables.heldout_table(results))]
    if results.tasks:
        parts += ["## Tasks", TASKS_NOTE, tables.as_markdown(tables.task_table(results))]
    if verdicts:
        parts += verdict_parts(verdicts)
    if results.gates:
        parts += ["## Output gates", GATES_NOTE, tables.as_markdown(tables.gate_table(results))]
    if found := checks(results):
        parts += ["## Checks", "\n".join(f"- {'✓' if passed else '✗'} {what}" for passed, what in found)]
    if facts := _training_lines(results):
        parts += ["## Training", "\n".join(facts)]
    return "\n\n".join([*parts, *figure_parts(figures)]) + "\n"


def standing(results: Results) -> list[str]:
    """What is not measured, or not as it stands now."""
    lines = [f"Not measured yet: {', '.join(results.missing)}"] if results.missing else []
    for model in results.models:
        lines += [f"Failed: {model.name}: {task}: {line}" for task, line in model.failed.items()]
    stale = [model.name for model in results.models if model.stale]
    return lines + ([f"Measured before it was made again: {', '.join(stale)}"] if stale else [])


def verdict_parts(verdicts: Verdicts) -> list[str]:
    """The verdict as Markdown: students, domains, what merging changed, tasks."""
    parts = ["## Verdict", verdict_tables.NOTE, tables.as_markdown(verdict_tables.verdict_table(verdicts))]
    parts += verdict_tables.notes(verdicts)
    if len(verdicts.board.domains) > 1:
        parts += ["### Recovery by domain", tables.as_markdown(verdict_tables.domain_table(verdicts))]
    if verdicts.changes:
        parts += ["### What merging changed", verdict_tables.CHANGES_NOTE]
        parts.append(tables.as_markdown(verdict_tables.change_table(verdicts)))
    return [*parts, "### Recovery by task", tables.as_markdown(verdict_tables.recovery_table(verdicts))]


def figure_parts(figures: Iterable[str]) -> list[str]:
    """Figures with captions, as links; nothing where there are none."""
    found = [f"### {plots.FIGURES[name]}\n\n![{plots.FIGURES[name]}]({name}.png)" for name in figures]
    return ["## Figures", *found] if found else []


def _training_lines(results: Results) -> list[str]:
    lines = []
    if results.align:
        lines.append(f"- align: {_counts(results.align)}")
    for name, facts in results.distill.items():
        if not facts:
            continue
        members = results.unions.get(name, ())
        of = f", on the mixtures of {', '.join(members)} together, at the sum of their budgets" if members else ""
        lines.append(f"- {Measured(name, union=bool(members)).label}: {_counts(facts)}{of}")
    if weights := results.merge.get("weights"):
        method = str(results.merge.get("method", "linear")).replace("_", " ")
        why = results.merge.get("search", {}).get("why", "")
        shares = ", ".join(f"{value:.3f} {name}" for name, value in weights.items())
        lines.append(f"- merge, {method}: {shares}" + (f" (searched: {why})" if why else ""))
    return lines


def _counts(facts: Mapping[str, Any]) -> str:
    known = {"tokens": "tokens", "steps": "steps", "tokens_per_s": "tokens/s"}
    return ", ".join(
        f"{facts[key]:,.0f} {unit}" for key, unit in known.items() if isinstance(facts.get(key), int | float)
    )


def write_pages(folder: Path, title: str, text: str) -> None:
    """Write `report.md`, and the same as `report.html` with its images inside."""
    import markdown

    write_atomic(folder / "report.md", text)
    body = markdown.markdown(text, extensions=["tables"])
    body = body.replace("<table>", '<div class="table"><table>').replace("</table>", "</table></div>")
    body = re.sub(r'src="([^"]+\.png)"', lambda match: f'src="{_data_url(folder / match[1])}"', body)
    head = (
        f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{html.escape(title)}</title>'
    )
    page = f'<!doctype html>\n<html lang="en"><head>{head}<style>{CSS}</style></head>\n<body>\n{body}\n</body></html>\n'
    write_atomic(folder / "report.html", page)


def _data_url(image: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(image.read_bytes()).decode()
