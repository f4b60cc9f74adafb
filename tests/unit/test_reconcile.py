"""What a launch does about each job: only what is missing or failed is submitted, what waits follows it."""

from launcher.plan import Graph
from launcher.reconcile import PENDING, RUNNING, obsolete, reconcile
from xlstm_distill.contract.job import Job
from xlstm_distill.contract.state import State

GRAPH = Graph(
    (
        Job("align", "align", {}),
        Job("distill-math", "distill", {}, ("align",)),
        Job("distill-code", "distill", {}, ("align",)),
        Job("merge", "merge", {}, ("distill-math", "distill-code")),
    )
)


def kinds(done: str = "", queue: dict[str, str] | None = None, other: str = "", **options: bool) -> str:
    """Initials of the actions, in the graph's order: k(eep), w(ait), s(ubmit), f(ollow), r(eplace)."""
    standing = {job.name: State("done" if job.name in done.split() else "new") for job in GRAPH}
    actions = reconcile(GRAPH, standing, queue or {}, set(other.split()), **options)
    return "".join(action.kind[0] for action in actions.values())


def test_a_new_run_submits_all_and_a_finished_one_nothing() -> None:
    assert kinds() == "ssss"
    assert kinds(" ".join(GRAPH.names)) == "kkkk"


def test_a_second_launch_submits_nothing_twice() -> None:
    assert kinds(queue=dict.fromkeys(GRAPH.names, PENDING)) == "wwww"
    assert kinds("align", {"distill-math": RUNNING, "distill-code": RUNNING, "merge": PENDING}) == "kwww"


def test_a_failed_expert_is_submitted_and_the_merge_that_waits_follows_it() -> None:
    assert kinds("align", {"distill-math": RUNNING, "merge": PENDING}) == "kwsf"
    assert kinds("align distill-math") == "kkss"


def test_a_job_that_runs_is_left_alone_whatever_its_inputs_do() -> None:
    standing = {job.name: State("new") for job in GRAPH}
    actions = reconcile(GRAPH, standing, {"distill-math": RUNNING}, set())
    assert actions["distill-math"].kind == "wait"
    assert "made anew" in actions["distill-math"].why


def test_another_placement_is_told_and_replaced_on_request_where_the_job_waits() -> None:
    queue = dict.fromkeys(GRAPH.names, PENDING)
    standing = {job.name: State("new") for job in GRAPH}
    assert "--cancel-obsolete" in reconcile(GRAPH, standing, queue, {"merge"})["merge"].why
    assert kinds(queue=queue, other="distill-code", replace=True) == "wwrr"  # merge waits for an end
    assert kinds(queue={**queue, "distill-code": RUNNING}, other="distill-code", replace=True) == "wwww"


def test_what_the_configuration_no_longer_has_is_obsolete_and_a_later_stage_is_not() -> None:
    queue = {"distill-stem": "7", "eval": "9", "merge": "8"}
    assert obsolete(queue, GRAPH, {*GRAPH.names, "eval"}) == ["distill-stem"]
