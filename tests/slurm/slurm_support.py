"""What a user of a cluster does: launches, looks, waits; and what Slurm has on record afterwards."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml
from cluster import SlurmCluster

ROOT = Path(__file__).parents[2]
STAND_IN = Path(__file__).with_name("stand_in")
EXPERTS = ("math", "code", "stem", "chat")
STAGES = ("tokenize", "cache", "align", "distill", "merge", "eval", "report")


def write_configs(root: Path, experts: tuple[str, ...] = EXPERTS) -> Path:
    """A configuration folder with a teacher and a recipe for stages that read nothing."""
    sources = {name: {"weight": 1.0, "kind": "jsonl", "path": str(root / f"{name}.jsonl")} for name in experts}
    share = 1 / len(experts)
    recipe = {
        "experts": list(experts),
        "data": {"sources": {name: {**source, "weight": share} for name, source in sources.items()}},
        "expert": {name: {"sources": {name: source}, "merge_weight": share} for name, source in sources.items()},
        "cluster": {"stages": {stage: {"cpus_per_task": 1} for stage in STAGES}},
    }
    (root / "teacher").mkdir(parents=True, exist_ok=True)
    for name in experts:
        (root / f"{name}.jsonl").touch()  # a launch looks whether they are there
    teacher = {"name": "tiny", "family": "llama", "source": "folder", "path": str(root / "teacher"), "recipe": "tiny"}
    for group, value, header in (("teacher", teacher, ""), ("recipe", recipe, "# @package _global_\n")):
        (root / "configs" / group).mkdir(parents=True)
        (root / "configs" / group / "tiny.yaml").write_text(header + yaml.safe_dump(value))
    return root / "configs"


@dataclass
class Record:
    """What `scontrol show job` says about a job or an element of an array."""

    fields: dict[str, str]

    @property
    def state(self) -> str:
        return self.fields["JobState"]

    @property
    def restarts(self) -> int:
        return int(self.fields["Restarts"])

    @property
    def start(self) -> float:
        return datetime.fromisoformat(self.fields["StartTime"]).timestamp()

    @property
    def end(self) -> float:
        return datetime.fromisoformat(self.fields["EndTime"]).timestamp()


@dataclass
class User:
    """Types `xdl` in `folder`; `path`: where the packages come from."""

    cluster: SlurmCluster
    folder: Path
    configs: Path
    run: str = "r"
    path: Path = ROOT
    stand_in: bool = True
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def jobs(self) -> Path:
        return self.folder / "runs" / self.run / "jobs"

    def play(self, **roles: dict[str, Any]) -> None:
        """Say what stand-ins do from their next start on, by job with _ for -; `others` for the rest."""
        named = {"" if name == "others" else name.replace("_", "-"): role for name, role in roles.items()}
        beside = self.folder / "play.tmp"
        beside.write_text(json.dumps(named))
        beside.replace(self.folder / "play.json")

    def env(self) -> dict[str, str]:
        """The environment that `xdl` is started in, which sbatch hands on to jobs."""
        if self.stand_in and not (self.folder / "play.json").exists():
            self.play()
        places = [*([STAND_IN] if self.stand_in else []), self.path]
        own = {
            "PYTHONPATH": os.pathsep.join(map(str, places)),
            "XDL_CONFIG_DIR": str(self.configs),
            "STAND_IN": str(self.folder / "play.json"),
            "OMP_NUM_THREADS": "1",
        }
        return {**self.cluster.env, **own, **self.environment}

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        """`xdl ARGUMENTS`, not waited for."""
        command = [sys.executable, "-m", "launcher", *arguments]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, cwd=self.folder, env=self.env(), stdout=pipe, stderr=pipe, text=True)

    def xdl(self, *arguments: str, code: int = 0) -> str:
        """What `xdl ARGUMENTS` says on both streams."""
        process = self.start(*arguments)
        try:
            said = "".join(process.communicate(timeout=600))
        finally:
            process.kill()
        assert process.returncode == code, f"xdl {' '.join(arguments)}: {process.returncode}\n{said}"
        return said

    def launch(self, *arguments: str, code: int = 0) -> str:
        """`xdl launch` of this run with the tiny teacher."""
        return self.xdl("launch", "--name", self.run, *arguments, "cluster=slurm", "teacher=tiny", code=code)

    def status(self) -> dict[str, dict[str, Any]]:
        """`xdl status --json`, by job."""
        process = self.start("status", self.run, "--json")
        said, wrong = process.communicate(timeout=300)
        assert process.returncode == 0, wrong
        return {job["name"]: job for job in json.loads(said)["jobs"]}

    def ids(self) -> dict[str, str]:
        """Scheduler ids by job."""
        graph = json.loads((self.folder / "runs" / self.run / "graph.json").read_text())
        return {name: job["id"] for name, job in graph["jobs"].items() if job.get("id")}

    def records(self, job: str, id: str = "") -> list[Record]:
        """Slurm's records of a job's last submission, one per element of an array, in the order of its elements."""
        text = self.cluster.run("scontrol", "show", "job", "-o", id or self.ids()[job])
        found = [
            Record(dict(re.findall(r"(?:^| )([A-Za-z/:]+)=(.*?)(?= [A-Za-z/:]+=|$)", line)))
            for line in text.splitlines() if line.strip()
        ]  # fmt: skip
        return sorted(found, key=lambda record: int(record.fields.get("ArrayTaskId", "0").partition("-")[0]))

    def submissions(self) -> list[str]:
        """Names of this run's jobs that Slurm has heard of, once per submission."""
        lines = self.cluster.run("squeue", "-ha", "--states=all", "-o", "%F %Z %j").splitlines()
        ours = {line for line in lines if f" {self.folder} " in line}
        return sorted(line.rpartition(".")[2] for line in ours)

    def starts(self, job: str) -> list[dict[str, Any]]:
        """The starts of a stand-in."""
        file = self.jobs / job / "starts"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def checkpoint(self, job: str) -> int:
        """Step of the newest checkpoint; 0: none."""
        file = self.jobs / job / "checkpoints" / "latest"
        return int(file.read_text().removeprefix("step-")) if file.exists() else 0

    def done(self, *jobs: str) -> bool:
        """Whether the manifests of these jobs stand."""
        return all((self.jobs / job / "manifest.json").exists() for job in jobs)

    def go(self, *jobs: str) -> None:
        """Let stand-ins that hold go on."""
        for job in jobs:
            (self.jobs / job / "go").touch()

    def until(self, condition: Callable[[], object], seconds: float = 300, what: str = "") -> None:
        """Wait for it, or tell what the jobs said."""
        try:
            self.cluster.until(condition, seconds, what)
        except AssertionError as error:
            logs = [path for path in self.jobs.glob("*/logs/*.log") if path.stat().st_size]
            said = "\n".join(f"{path.relative_to(self.jobs)}: {path.read_text()[-800:]}" for path in sorted(logs))
            raise AssertionError(f"{error}\n{said}") from None

    def until_ended(self, job: str, state: str = "COMPLETED", seconds: float = 300) -> list[Record]:
        """Wait until every element of a job has ended in `state`."""
        ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")
        self.until(lambda: all(r.state in ended for r in self.records(job)), seconds, f"{job} ends")
        records = self.records(job)
        assert [r.state for r in records] == [state] * len(records), self.said(job)
        return records

    def said(self, job: str) -> str:
        """All logs of a job, the batch script's included."""
        return "\n".join(path.read_text() for path in sorted((self.jobs / job / "logs").glob("*.log")))
