"""The model card of an exported student, made from what the run recorded. Nothing of the machine stands in it."""

import inspect
import re
from typing import Any

import yaml

from xlstm_distill.contract.exitcode import Mistake
from xlstm_distill.contract.files import hash_value
from xlstm_distill.contract.manifest import Manifest
from xlstm_distill.contract.schema import Source
from xlstm_distill.evaluate.collect import Measured, Results
from xlstm_distill.evaluate.exported import Exported
from xlstm_distill.evaluate.kinds import kind_of
from xlstm_distill.evaluate.tables import Table, as_markdown, number, score_cell

HUB_LICENCES = {"Apache-2.0": "apache-2.0", "MIT": "mit", "Llama 3.1 Community License": "llama3.1"}
"""Our names of licences → the hub's."""
ALPHAS = (0.0, 0.05, 0.1)
"""Tolerances at which the card gives the Win-and-Tie rate."""
SETTINGS = ("align.", "distill.", "merge.", "cache.", "seed", "data.sequence")
"""Starts of the settings that the card lists: no paths among them; the student's own stand in its configuration."""


def model_card(exported: Exported) -> str:
    """README.md: front matter for the Hugging Face Hub, then what it is, how to use it, and what is known of it."""
    parts = [
        _front_matter(exported),
        *_introduction(exported),
        *_use(exported),
        *_evaluation(exported),
        *_limits(exported),
        *_training(exported),
        *_data(exported),
        *_settings(exported),
        *_licence(exported),
    ]
    return "\n\n".join(parts) + "\n"


def _front_matter(exported: Exported) -> str:
    teacher = exported.config.teacher
    name = exported.teacher["license"]
    fields: dict[str, Any] = {"license": HUB_LICENCES.get(name, "other")}
    if name not in HUB_LICENCES:
        fields["license_name"] = re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-") or "see-the-teacher"
    if teacher.source == "hub":
        fields["base_model"] = teacher.path
        if name not in HUB_LICENCES:
            fields["license_link"] = f"https://huggingface.co/{teacher.path}"
    if hubs := sorted({source.path for source in exported.sources.values() if source.kind == "hub"}):
        fields["datasets"] = hubs
    fields |= {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": list(kind_of(exported.hybrid).tags),
    }
    return f"---\n{yaml.safe_dump(fields, sort_keys=False, allow_unicode=True)}---"


def _introduction(exported: Exported) -> list[str]:
    own, teacher = kind_of(exported.hybrid), exported.config.teacher
    linked = f"[{teacher.path}](https://huggingface.co/{teacher.path})" if teacher.source == "hub" else teacher.name
    name = exported.place.name
    kind = {
        "merged": f"the merge of the experts {', '.join(exported.experts)}",
        "aligned": "aligned to its teacher layer by layer, not yet distilled end to end",
    }.get(name, f"the expert {name}")
    if name in exported.experts and (union := exported.config.expert[name].union_of):
        kind = f"one student on the mixtures of {', '.join(union)} together"
    return [
        f"# {teacher.name} as {own.name}",
        f"{linked}, distilled: {own.made}. "
        f"Its time is linear in the length of the input and its memory constant while it writes. This is {kind}; "
        f"{exported.parameters / 1e6:,.1f} M parameters, stored as {exported.dtype}.",
    ]


def _use(exported: Exported) -> list[str]:
    prompt = (
        'chat = [{"role": "user", "content": "What is the capital of France?"}]\n'
        "inputs = tokenizer.apply_chat_template(\n"
        '    chat, add_generation_prompt=True, return_dict=True, return_tensors="pt"\n'
        ")"
        if exported.config.teacher.chat
        else 'inputs = tokenizer("The capital of France is", return_tensors="pt")'
    )
    code = f"""from transformers import AutoModelForCausalLM, AutoTokenizer

path = "…"  # this folder, or its name on the hub
tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)
{prompt}
output = model.generate(**inputs, max_new_tokens=64)
print(tokenizer.decode(output[0], skip_special_tokens=True))"""
    return [
        "## Use",
        f"```python\n{code}\n```",
        kind_of(exported.hybrid).needs,
    ]


def _evaluation(exported: Exported) -> list[str]:
    student, teacher = exported.measured(exported.place.name), exported.measured("teacher")
    if student is None or not (student.heldout or student.scores):
        return ["## Evaluation", "This student was not evaluated."]
    models = [model for model in (student, teacher) if model is not None]
    parts = ["## Evaluation"]
    if student.heldout:
        parts += [
            "KL(teacher ‖ student) in nats per token over the whole vocabulary, on held-out text"
            f"{kind_of(exported.hybrid).columns}.",
            as_markdown(_heldout(student, teacher)),
        ]
    if student.scores:
        parts += _tasks(Results("", models, {}, {}, {}, {}))
    return parts


def _heldout(student: Measured, teacher: Measured | None) -> Table:
    header = ["source", "KL", "within", "beyond", "same first choice", "perplexity", "teacher's", "tokens"]
    rows = []
    for source, values in student.heldout.items():
        reference = teacher.heldout.get(source, {}) if teacher else {}
        found = [number(values.get(key), 3) for key in ("kl", "kl_within_window", "kl_beyond_window", "agreement")]
        found += [number(values.get("perplexity"), 2), number(reference.get("perplexity"), 2)]
        rows.append([source, *found, f"{values['tokens']:,}" if "tokens" in values else "–"])
    return header, rows


def _tasks(results: Results) -> list[str]:
    student, teacher = results.students[0], results.teacher
    lower = results.lower_is_better()
    try:
        comparison = results.comparisons().get(student.name)
    except Mistake:  # the teacher has no usable score on some task
        comparison = None
    rows = []
    for task, score in student.scores.items():
        other = teacher.scores.get(task) if teacher else None
        recovery = number(comparison.recovery.get(task), 3) if comparison else "–"
        items = str(score.get("items", "–"))
        rows.append([task + (" ↓" if task in lower else ""), score_cell(score), score_cell(other), recovery, items])
    parts = [
        "Score ± standard error; recovery: student / teacher; ↓: lower is better, left out of the figures below.",
        as_markdown((["task", "student", "teacher", "recovery", "items"], rows)),
    ]
    if comparison:
        rates = ", ".join(f"C_{alpha:g} = {number(comparison.win_and_tie(alpha), 3)}" for alpha in ALPHAS)
        parts.append(
            f"Mean recovery {number(comparison.mean_recovery, 3)}. Win-and-Tie, the share of the tasks on which the "
            f"student loses at most α of the teacher's score: {rates}. Critical tolerance, the smallest α at which "
            f"that is half of them: α* = {number(comparison.critical_tolerance, 3)}."
        )
    return parts


def _limits(exported: Exported) -> list[str]:
    hybrid = exported.hybrid
    formula = inspect.cleandoc(type(hybrid).state_bytes.__doc__ or "").partition("\n\n")[2]
    return [
        "## State and limits",
        f"The state of one sequence takes {hybrid.state_bytes() / 1e6:,.2f} MB in float32, whatever its length.",
        formula,
        f"{kind_of(hybrid).reach} what has to be copied or looked up word for word from farther back is often lost. "
        "The state cannot be rolled back, so assisted decoding and prompt look-up are refused. What holds for the "
        "teacher's knowledge, biases and safety holds here, and none of it was examined anew.",
    ]


def _training(exported: Exported) -> list[str]:
    rows = []
    for job, manifest in exported.manifests.items():
        if manifest.stage not in ("align", "distill"):
            continue
        stage = "align (Stage I)" if manifest.stage == "align" else f"distil {job.removeprefix('distill-')} (Stage II)"
        tokens = manifest.facts.get("tokens", manifest.tokens)
        rows.append([stage, f"{tokens:,}", f"{manifest.facts.get('steps', 0):,}", _outcome(manifest)])
    parts = ["## Training", as_markdown((["stage", "tokens", "steps", "outcome"], rows))]
    if weights := exported.facts("merge").get("weights"):
        parts.append(
            "Merged with weights " + ", ".join(f"{value:.3g} ({name})" for name, value in weights.items()) + "."
        )
    if "align" not in exported.manifests:
        parts.append("The student from which it was distilled was made elsewhere.")
    version = exported.manifests[exported.place.job].code
    made = " ".join(filter(None, [version.get("version", ""), version.get("commit", "")[:12]]))
    teacher = [[key.replace("_", " "), f"{value or '–'}"] for key, value in exported.teacher.items()]
    return [*parts, as_markdown((["teacher", ""], teacher)), f"Made with xdl {made}."]


def _outcome(manifest: Manifest) -> str:
    facts = manifest.facts
    if before := facts.get("error_before"):
        return f"alignment error {sum(facts['error_after']) / sum(before):.3f} of untrained"
    start, end = (facts.get("validation", {}).get(when, {}) for when in ("start", "end"))
    changes = [f"{s} {start[s]['kl']:.3f} → {end[s]['kl']:.3f}" for s in end if "kl" in end[s] and s in start]
    return f"validation KL {', '.join(changes)}" if changes else "–"


def _data(exported: Exported) -> list[str]:
    if exported.config.data.shards:
        return ["## Data", "Token shards that were made elsewhere."]
    header = ["source", "what", "training tokens", "xxh64 of the text", "of the tokens", "share in"]
    rows = [[name, *_source_cells(exported, name, source)] for name, source in exported.sources.items()]
    return ["## Data", as_markdown((header, rows))]


def _source_cells(exported: Exported, name: str, source: Source) -> list[str]:
    text = exported.outputs("fetch").get(f"data/{name}.jsonl", {}).get("xxh64", "–")
    tokenised = exported.outputs("tokenize").items()
    shards = {file: values["xxh64"] for file, values in tokenised if file.startswith(f"{name}/")}
    tokens = exported.facts("tokenize").get(name, {}).get("train", {}).get("tokens")
    shares = [f"{stage} {found[name].weight:g}" for stage, found in exported.mixtures.items() if name in found]
    counted = f"{tokens:,}" if tokens is not None else "–"
    return [_origin(source), counted, text, hash_value(shards) if shards else "–", ", ".join(shares)]


def _origin(source: Source) -> str:
    """Where a source comes from; of local files only that they are local."""
    if source.kind == "hub":
        more = [part for part in (source.subset, source.split, source.revision) if part]
        return f"[{source.path}](https://huggingface.co/datasets/{source.path}) ({', '.join(more)})"
    return f"generated ({source.path})" if source.kind == "demo" else f"local {source.kind} files"


def _settings(exported: Exported) -> list[str]:
    hybrid = exported.hybrid
    chosen = [name for name in inspect.signature(type(hybrid).__init__).parameters if hasattr(hybrid, name)]
    rows = [[f"`{name}`", f"{getattr(hybrid, name)}"] for name in chosen if name != "base_config"]
    recorded = {k: v for manifest in exported.manifests.values() for k, v in manifest.identity.items()}
    trained = [[f"`{k}`", f"{v}"] for k, v in recorded.items() if k.startswith(SETTINGS)]
    return ["## Settings", as_markdown((["mixer", ""], rows)), as_markdown((["training", ""], trained))]


def _licence(exported: Exported) -> list[str]:
    licence = exported.teacher["license"]
    weights = f"under the teacher's licence: {licence}" if licence else "made from the teacher's: see its licence"
    return ["## Licence", f"The weights are {weights}. The modelling code (`*.py`) is under Apache-2.0 (LICENSE-CODE)."]
