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
Run = Annotated[str, typer.Argument(metavar="[RUN]", help="Name below runs/, or a path.")]
Runs = Annotated[str, typer.Option("--runs", metavar="FOLDER", help="Folder of the runs.")]


@app.command()
def launch(
    overrides: Overrides = None,
    nodes: Annotated[int | None, typer.Option(help="Nodes of align and distill (or of the stage named).")] = None,
    gpus_per_node: Annotated[int | None, typer.Option(help="GPUs per node of the same; one rank each.")] = None,
    time: Annotated[str | None, typer.Option(help="Time limit of the same, 04:00:00.")] = None,
    name: Name = "",
    only: Annotated[bool, typer.Option("--only", help="The stage alone, without its ancestors.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show jobs and scripts; write and start nothing.")] = False,
    follow: Annotated[bool, typer.Option("--follow", help="On Slurm: watch until the jobs have ended.")] = False,
) -> None:
    """Run what is missing of the pipeline, up to stage=STAGE (fetch, tokenize, cache, align, distill, merge, eval,
    report; all without it). The same command again goes on where the last one stopped."""
    from launcher.launch import Placing, launch

    placing = Placing(nodes, gpus_per_node, time)
    raise typer.Exit(launch(overrides or [], placing, name=name, only=only, dry_run=dry_run, follow=follow))


@app.command()
def status(run: Run = "", runs: Runs = "runs") -> None:
    """Show how the jobs of a run stand, or all runs."""
    from launcher.monitor import show_status

    show_status(run, runs)


@app.command()
def logs(
    run: Run,
    job: Annotated[str, typer.Argument(metavar="[JOB]", help="A job; without it the one that wrote last.")] = "",
    rank: Annotated[int, typer.Option(help="Which rank's log.")] = 0,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on as the log grows.")] = False,
    runs: Runs = "runs",
) -> None:
    """Print a job's log."""
    from launcher.monitor import show_log

    show_log(run, job, rank, follow, runs)


@app.command()
def config(overrides: Overrides = None) -> None:
    """Print every setting and where its value came from."""
    from launcher.compose import compose
    from launcher.show import config_text

    sys.stdout.write(config_text(compose(overrides or [])))


@app.command()
def report(
    run: Run = "",
    scores: Annotated[str, typer.Option(metavar="FILE", help="JSON of scores instead of a run.")] = "",
    json: Annotated[bool, typer.Option("--json", help="Print Win-and-Tie and recovery as JSON.")] = False,
    runs: Runs = "runs",
) -> None:
    """Print and write scores, recovery, the Win-and-Tie curve and the critical tolerance of a run, or of any scores."""
    from launcher.launch import run_module
    from launcher.runs import find_run

    arguments = [str(find_run(run, runs))] if run else []
    arguments += [f"--scores={scores}"] if scores else []
    raise typer.Exit(run_module("report", arguments + ["--json"] * json))


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
    install_streaming: Annotated[
        bool, typer.Option("--install-streaming", help="Install mosaicml-streaming beside newer packages.")
    ] = False,
) -> None:
    """Say what is missing on this machine."""
    import launcher.doctor as physician

    raise typer.Exit(physician.install_streaming() if install_streaming else physician.diagnose())


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
