"""The `xdl` command: one short function per command. Whatever is slow to import is imported inside."""

import os
import signal
import sys
from typing import Annotated

import typer

app = typer.Typer(
    name="xdl",
    help="Turn a transformer LLM into a hybrid xLSTM, on one machine or a Slurm cluster.",
    rich_markup_mode=None,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings; `xdl config` lists them.")
]
Name = Annotated[str, typer.Option("--name", metavar="RUN", help="Name of the run [the teacher's].")]
Nodes = Annotated[int | None, typer.Option(help="Nodes of align and distill (or of the stage named).")]
GpusPerNode = Annotated[int | None, typer.Option(help="GPUs per node of the same; one rank each.")]
Time = Annotated[str | None, typer.Option(help="Time limit of the same, 04:00:00.")]
Only = Annotated[bool, typer.Option("--only", help="The stage alone, without its ancestors.")]
Force = Annotated[
    bool,
    typer.Option(
        "--force", help="Even where memory, disk or tokens will not be enough, or files, GPUs, tasks are missing."
    ),
]
Run = Annotated[str, typer.Argument(metavar="[RUN]", help="Name below runs/, or a path.")]
Jobs = Annotated[list[str] | None, typer.Argument(metavar="[JOB]...", help="Some of its jobs; without: all.")]
Scores = Annotated[str, typer.Option("--scores", metavar="FILE", help="JSON or CSV of scores instead of a run.")]
Runs = Annotated[str, typer.Option("--runs", metavar="FOLDER", help="Folder of the runs.")]


@app.command()
def launch(
    overrides: Overrides = None,
    nodes: Nodes = None,
    gpus_per_node: GpusPerNode = None,
    time: Time = None,
    name: Name = "",
    only: Only = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show jobs and scripts; write and start nothing.")] = False,
    follow: Annotated[bool, typer.Option("--follow", help="On Slurm: watch until the jobs have ended.")] = False,
    restart: Annotated[
        list[str] | None, typer.Option(metavar="JOB", help="Make a job anew, perhaps with other settings; repeatable.")
    ] = None,
    cancel_obsolete: Annotated[
        bool,
        typer.Option("--cancel-obsolete", help="Cancel what is queued and is not wanted so any more."),
    ] = False,
    force: Force = False,
) -> None:
    """Run what is missing of the pipeline, up to stage=STAGE (fetch, tokenize, cache, align, distill, merge, eval,
    report; all without it). The same command again goes on where the last one stopped."""
    from launcher.launch import Placing, launch

    placing = Placing(nodes, gpus_per_node, time)
    code = launch(
        overrides or [],
        placing,
        name=name,
        only=only,
        dry_run=dry_run,
        follow=follow,
        restart=restart or [],
        cancel_obsolete=cancel_obsolete,
        force=force,
    )
    raise typer.Exit(code)


@app.command()
def plan(
    overrides: Overrides = None,
    nodes: Nodes = None,
    gpus_per_node: GpusPerNode = None,
    time: Time = None,
    name: Name = "",
    only: Only = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON; sizes in bytes.")] = False,
    force: Force = False,
) -> None:
    """Show what a launch would take: hours, tokens, memory by part, disk. Writes and starts nothing; exit code 2 where
    something cannot fit."""
    from launcher.launch import Placing, show_plan

    placing = Placing(nodes, gpus_per_node, time)
    raise typer.Exit(show_plan(overrides or [], placing, name=name, only=only, as_json=json, force=force))


@app.command()
def status(
    run: Run = "",
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Draw again until nothing is queued or runs.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON; what is unknown is null.")] = False,
    runs: Runs = "runs",
) -> None:
    """Show how the jobs of a run stand, or all runs."""
    from launcher.monitor import show_status

    show_status(run, runs, as_json=json, watched=watch)


@app.command()
def logs(
    run: Run,
    job: Annotated[str, typer.Argument(metavar="[JOB]", help="A job; without it the one that wrote last.")] = "",
    rank: Annotated[int | None, typer.Option(help="This rank's log [rank 0 and ranks in trouble].")] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on as the logs grow.")] = False,
    runs: Runs = "runs",
) -> None:
    """Print the logs of a job: of rank 0, and of any rank with a traceback."""
    from launcher.logs import show_logs

    show_logs(run, job, rank, follow, runs)


@app.command()
def cancel(run: Run, jobs: Jobs = None, runs: Runs = "runs") -> None:
    """End jobs of a run at once, queued or running. `xdl stop` writes a checkpoint first."""
    from launcher.control import cancel

    cancel(run, jobs or [], runs)


@app.command()
def stop(run: Run, jobs: Jobs = None, runs: Runs = "runs") -> None:
    """Stop jobs of a run: those that run write a checkpoint first, those that wait are cancelled."""
    from launcher.control import stop

    stop(run, jobs or [], runs)


@app.command(context_settings={"ignore_unknown_options": True})
def tensorboard(
    run: Run,
    arguments: Annotated[list[str] | None, typer.Argument(metavar="[--port P] [--host H]...")] = None,
    runs: Runs = "runs",
) -> None:
    """Start TensorBoard on a run."""
    from launcher.control import tensorboard

    raise typer.Exit(tensorboard(run, arguments or [], runs))


@app.command()
def config(overrides: Overrides = None) -> None:
    """Print every setting and where its value came from."""
    from launcher.compose import compose
    from launcher.show import config_text

    sys.stdout.write(config_text(compose(overrides or [])))


@app.command()
def report(
    run: Run = "",
    scores: Scores = "",
    beside: Annotated[
        list[str] | None, typer.Option(metavar="RUN[:MODEL]", help="A student of another run [merged]; repeatable.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print Win-and-Tie and recovery as JSON.")] = False,
    runs: Runs = "runs",
) -> None:
    """Print and write scores, recovery, the Win-and-Tie curve and the critical tolerance of a run, or of any scores."""
    from launcher.launch import run_module
    from launcher.runs import find_run, find_student

    arguments = [str(find_run(run, runs))] if run else []
    arguments += [f"--scores={scores}"] if scores else []
    arguments += [f"--beside={find_student(other, runs)}" for other in beside or []]
    raise typer.Exit(run_module("report", arguments + ["--json"] * json))


@app.command()
def gate(
    run: Run = "",
    student: Annotated[str, typer.Option(metavar="S", help="merged, aligned, an expert, …")] = "merged",
    max_critical_tolerance: Annotated[str, typer.Option(metavar="A", help="Largest α* that passes, 0.05.")] = "",
    min_recovery: Annotated[
        list[str] | None, typer.Option(metavar="TASK=R", help="Least recovery of a task, gsm8k=0.9; repeatable.")
    ] = None,
    scores: Scores = "",
    json: Annotated[bool, typer.Option("--json", help="Print every condition and what decided it as JSON.")] = False,
    runs: Runs = "runs",
) -> None:
    """Exit with 0 where a student is good enough, with 1 where it is not, and say which task decided."""
    from launcher.launch import run_module
    from launcher.runs import find_run

    arguments = [str(find_run(run, runs))] if run else []
    arguments += [f"--scores={scores}"] if scores else []
    arguments += [f"--max-critical-tolerance={max_critical_tolerance}"] if max_critical_tolerance else []
    arguments += [f"--min-recovery={condition}" for condition in min_recovery or []]
    raise typer.Exit(run_module("gate", [*arguments, f"--student={student}", *["--json"] * json]))


@app.command(context_settings={"ignore_unknown_options": True})
def generate(
    run: Run,
    arguments: Annotated[list[str], typer.Argument(metavar="PROMPT [--model M] [--max-new-tokens N]...")],
    runs: Runs = "runs",
) -> None:
    """Write text with the merged student of a run, or with another of its models."""
    from launcher.launch import run_module
    from launcher.runs import find_run

    raise typer.Exit(run_module("generate", [str(find_run(run, runs)), *arguments]))


@app.command()
def export(
    run: Run,
    destination: Annotated[str, typer.Argument(metavar="DEST", help="Folder to make: new or empty.")],
    model: Annotated[
        str, typer.Option(metavar="M", help="merged, aligned or an expert [merged, else the newest that is finished].")
    ] = "",
    runs: Runs = "runs",
) -> None:
    """Write a student of a run as a Hugging Face folder that loads without this package."""
    from launcher.launch import run_module
    from launcher.runs import find_run

    chosen = [f"--model={model}"] if model else []
    raise typer.Exit(run_module("export", [*chosen, "--", str(find_run(run, runs)), destination]))


@app.command()
def doctor(
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="With --nodes: where, e.g. cluster=SITE.")
    ] = None,
    nodes: Annotated[int | None, typer.Option(help="Try so many nodes in a short job, and compare them.")] = None,
    gpus_per_node: Annotated[int | None, typer.Option(help="Ranks on each [as stage distill].")] = None,
    write_site: Annotated[
        str, typer.Option(metavar="NAME", help="Propose settings for this cluster, as cluster/NAME.yaml.")
    ] = "",
    install_streaming: Annotated[
        bool, typer.Option("--install-streaming", help="Install mosaicml-streaming beside newer packages.")
    ] = False,
    runs: Runs = "runs",
) -> None:
    """Say what is missing on this machine, or what is wrong with nodes of the cluster."""
    if nodes is not None:
        from launcher.nodes import check_nodes

        raise typer.Exit(check_nodes(nodes, gpus_per_node, overrides or [], runs))
    if write_site:
        from launcher.site import write_site as write

        raise typer.Exit(write(write_site))
    import launcher.doctor as physician

    raise typer.Exit(physician.install_streaming() if install_streaming else physician.diagnose(runs))


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit code; a mistake is one line on stderr and exit code 2."""
    from xlstm_distill.contract.exitcode import MISTAKE, Mistake

    try:
        return int(app(args=arguments, standalone_mode=False, prog_name="xdl") or 0)
    except Mistake as error:
        print(f"error: {error}", file=sys.stderr)
    except typer.Exit as end:
        return int(end.exit_code)
    except (typer.Abort, KeyboardInterrupt):
        return 128 + signal.SIGINT
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        message = getattr(error, "format_message", None)
        if message is None:
            raise
        print(f"error: {message()}", file=sys.stderr) if message() else print(end="")
    return MISTAKE


if __name__ == "__main__":
    sys.exit(main())
