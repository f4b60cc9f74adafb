"""The `merge` stage. Output: `student/`; after a search `search.json` and `search.png` besides."""

from typing import Any

from xlstm_distill.contract.exitcode import Mistake
from xlstm_distill.contract.job import JobFolder, World
from xlstm_distill.merge.read import HashedFolder
from xlstm_distill.merge.verify import verify_base, verify_experts
from xlstm_distill.merge.weights import TensorWeights, scale_weights
from xlstm_distill.merge.write import Experts, Recipe, write_merge
from xlstm_distill.runtime.metrics import Metrics
from xlstm_distill.runtime.stop import StopFlag


def run(folder: JobFolder, world: World, stop: StopFlag) -> dict[str, Any]:
    """Merge the run's experts into `output/student`, by the weights that are given or by those that a search finds.

    Returns:
        Facts: `method`, `weights` (λ by expert) and, where they are given, those of `parts`; `bytes` and `tensors`
        written; after a search `search`: what was chosen and why (`merge.search.verdict`).

    Raises:
        Mistake: an expert is missing or damaged, stems from another student, or does not fit the others.
        Stopped: a stop was requested; what the search has measured is kept.
    """
    if world.rank > 0:
        return {}
    config = folder.config
    if not config.specialists:
        raise Mistake("merge: experts=[]: nothing to merge; name at least one expert")
    recipe, facts = Recipe(TensorWeights.of(config), config.merge, config.seed), dict[str, Any]()
    experts = open_experts(folder)
    tensors = len(experts.first.entries)
    if not config.merge.search:
        with Metrics(folder.path, total=tensors) as metrics:
            facts |= write(folder, experts, recipe, stop, metrics)
    else:
        from xlstm_distill.merge.search import Search

        search = Search(folder, experts, stop)
        with Metrics(folder.path, total=search.units + tensors) as metrics:
            recipe, facts["search"] = search.run(metrics)
            facts |= write(folder, experts, recipe, stop, metrics, search.units)
    if recipe.weights.parts:
        facts["parts"] = recipe.weights.parts
    return {"method": recipe.settings.method, "weights": scale_weights(recipe.weights.default), **facts}


def open_experts(folder: JobFolder) -> Experts:
    """The experts and, where a method needs it, the student that they started from, each with its hashes."""
    verified = verify_experts(folder)
    models = {name: HashedFolder(expert.folder, expert.hashes, f"expert {name}") for name, expert in verified.items()}
    if set(folder.config.merge.tried) == {"linear"}:
        return Experts(models)
    base = verify_base(folder, verified)
    return Experts(models, HashedFolder(base.folder, base.hashes, "the student that the experts started from"))


def write(
    folder: JobFolder, experts: Experts, recipe: Recipe, stop: StopFlag, metrics: Metrics, done: int = 0
) -> dict[str, int]:
    """Write the merge in the pass that verifies what it reads; `done`: units of progress so far."""

    def on_tensor() -> None:
        nonlocal done
        stop.check()
        done += 1
        metrics.log(done)

    return write_merge(experts, recipe, folder.output / "student", on_tensor)
