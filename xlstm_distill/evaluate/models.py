"""The models of a run by name: where each lies, and how it is loaded to be measured or to write."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xlstm_distill.contract.exitcode import Mistake
from xlstm_distill.contract.manifest import read_manifest
from xlstm_distill.contract.schema import Config
from xlstm_distill.merge import ModelFolder

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

HEADS = ("lm_head.weight", "model.embed_tokens.weight")
"""Names of the LM head in a teacher's files; the second where it is tied."""


@dataclass(frozen=True)
class ModelPlace:
    """One model of a run."""

    name: str
    """`teacher`, `window`, `aligned`, `merged` or an expert's name."""
    job: str
    """Job that makes it; empty for a folder of the user's."""
    folder: Path
    """Hugging Face folder with a tokenizer."""
    overrides: dict[str, Any] = field(default_factory=dict)
    """Keys of its configuration to set otherwise."""

    @property
    def finished(self) -> bool:
        """Whether the job that makes it has its manifest."""
        return not self.job or read_manifest(self.folder.parents[1] / "manifest.json") is not None


def model_places(jobs: Path, config: Config) -> dict[str, ModelPlace]:
    """Every model that the run can have, in the order of the table: baseline, students, teacher last.

    `window` is the untrained student without its mLSTM branch. Where Stage II starts from a given folder, that folder
    stands for the aligned student, and for `window` too (Stage I leaves everything but the mLSTM branch as it was).
    A Distil-xLSTM has neither: its start is random.

    Args:
        jobs: `runs/NAME/jobs`.
        config: of the run.
    """

    def place(name: str, job: str, folder: str, **overrides: Any) -> ModelPlace:
        return ModelPlace(name, job, jobs / job / "output" / folder, overrides)

    baseline = {"use_mlstm": False, "use_window": True}
    if config.student.kind == "distil_xlstm":
        students = []
    elif given := config.student.init_from:
        students = [
            ModelPlace("window", "", Path(given), baseline),
            ModelPlace("aligned", "", Path(given)),
        ]
    else:
        students = [place("window", "align", "initial", **baseline), place("aligned", "align", "student")]
    students += [place(expert, f"distill-{expert}", "student") for expert in config.experts]
    students.append(place("merged", "merge", "student"))
    chosen = config.model.kernel != "auto" and config.student.kind == "hybrid"
    kernel = {"kernel": config.model.kernel} if chosen else {}
    students = [replace(p, overrides={**p.overrides, **kernel}) for p in students]
    return {p.name: p for p in (*students, place("teacher", "fetch", "teacher"))}


def find_model(jobs: Path, config: Config, name: str) -> ModelPlace:
    """The finished model `name`.

    Raises:
        Mistake: the run has no such model, or it is not finished; the message lists those that are.
    """
    places = model_places(jobs, config)
    finished = [p.name for p in places.values() if p.finished]
    if name not in finished:
        what = "is not finished" if name in places else "is no model of this run"
        raise Mistake(f"{name}: {what}; finished: {', '.join(finished) or 'none'}")
    return places[name]


def load_model(place: ModelPlace, precision: str = "bfloat16") -> "PreTrainedModel":
    """Load a model to evaluate it: on this process's GPU in `precision`, else on the CPU in float32.

    Raises:
        Mistake: its folder is not a model, or the run's kernel cannot compute it here.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from xlstm_distill.model.kernel import choose  # its package registers the student with the Auto classes

    _check(place)
    on_gpu = torch.cuda.is_available()
    kernel = place.overrides.get("kernel", "auto")
    try:
        choose(kernel, torch.device("cuda" if on_gpu else "cpu"))
    except ValueError as error:
        raise Mistake(f"model.{error}") from error
    dtype = getattr(torch, precision) if on_gpu else torch.float32
    model = AutoModelForCausalLM.from_pretrained(place.folder, dtype=dtype, **place.overrides)
    if on_gpu:
        model.to(torch.device("cuda"))  # type: ignore[arg-type]
    return model.eval()


def precision_of(config: Config) -> str:
    """What `load_model` computes in, given `strategy.precision`."""
    import torch

    return config.strategy.precision if torch.cuda.is_available() else "float32"


def load_tokenizer(place: ModelPlace) -> "PreTrainedTokenizerBase":
    """Load the tokenizer beside a model.

    Raises:
        Mistake: its folder is not a model.
    """
    from transformers import AutoTokenizer

    _check(place)
    return AutoTokenizer.from_pretrained(place.folder)


def read_head(place: ModelPlace) -> "Tensor":
    """The LM head [V, H] from a teacher's files.

    Raises:
        Mistake: there is none in them.
    """
    files = ModelFolder(place.folder)
    name = next((name for name in HEADS if name in files.entries), None)
    if name is None:
        raise Mistake(f"{files.path}: no LM head in it (looked for {' and '.join(HEADS)})")
    return files.tensor(name)


def _check(place: ModelPlace) -> None:
    if not (place.folder / "config.json").is_file():
        raise Mistake(f"{place.name}: {place.folder} is not a model folder (no config.json in it)")
