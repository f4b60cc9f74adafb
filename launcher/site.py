"""`xdl doctor --write-site NAME`: a first configuration for this cluster, from what Slurm and the environment say; each
line has a comment that tells where its value came from."""

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from launcher.checks import bad_name, seconds
from launcher.compose import options
from launcher.scheduler import ANSWER_SECONDS
from xlstm_distill.contract.data import data_folder
from xlstm_distill.contract.devices import find_device
from xlstm_distill.contract.exitcode import Mistake
from xlstm_distill.contract.files import write_atomic

ON_GPUS = ("cache", "align", "distill", "eval")
"""Stages that compute on GPUs."""
ASKED = {
    "tokenize": ("12:00:00", 32), "cache": ("24:00:00", 8), "align": ("24:00:00", 8), "distill": ("24:00:00", 8),
    "merge": ("04:00:00", 8), "eval": ("12:00:00", 8), "report": ("04:00:00", 8),
}  # fmt: skip
"""The longest time and the most cores per rank that a recipe asks for, by stage."""
ACCOUNTS = ("SBATCH_ACCOUNT", "SLURM_ACCOUNT", "SALLOC_ACCOUNT")
"""Variables that may name the account."""


@dataclass(frozen=True)
class Partition:
    """A partition and its most frequent kind of node, by sinfo."""

    name: str
    default: bool
    limit: str
    """Time limit in Slurm's notation; `infinite`: none."""
    nodes: int
    cpus: int
    gpus: int
    """Of a node."""
    kind: str = ""
    """Of its GPUs, as the site calls them."""


def write_site(name: str) -> int:
    """Print a proposed `cluster/NAME.yaml`, and write it where XDL_CONFIG_DIR says.

    Raises:
        Mistake: there is no Slurm here, the name is taken or none, or the file exists.
    """
    for problem in bad_name("--write-site", name):
        raise Mistake(problem)
    if name in options("cluster", [data_folder("configs")]):
        raise Mistake(f"--write-site {name}: xdl has a cluster of that name; take another")
    own = os.environ.get("XDL_CONFIG_DIR")
    path = Path(own).expanduser().absolute() / "cluster" / f"{name}.yaml" if own else None
    if path and path.exists():
        raise Mistake(f"{path}: exists; remove it or take another name")
    partitions = parse_partitions(ask("sinfo", "-h", "-o", "%P|%a|%l|%D|%c|%G"))
    text = propose(name, _config(), partitions, os.environ, _accounts())
    print(text, end="")
    if path:
        write_atomic(path, text)
        print(f"\nwritten to {path}; look it over, then: xdl doctor --nodes 2 cluster={name}")
    else:
        print(f"\nnot written: set XDL_CONFIG_DIR to a folder of yours, and it becomes cluster/{name}.yaml there")
    return 0


def ask(*command: str) -> str:
    """What a command prints; empty where it is missing or fails."""
    if not shutil.which(command[0]):
        return ""
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=ANSWER_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return answer.stdout if answer.returncode == 0 else ""


def _config() -> dict[str, str]:
    found = parse_config(ask("scontrol", "show", "config"))
    if not found:
        raise Mistake("scontrol show config does not answer here; do this on a login node of the cluster")
    return found


def parse_config(text: str) -> dict[str, str]:
    """`scontrol show config` as names and values."""
    pairs = (line.partition("=") for line in text.splitlines())
    return {name.strip(): value.strip() for name, sign, value in pairs if sign}


def _accounts() -> list[str]:
    """Accounts of this user by sacctmgr; none where there is no accounting."""
    text = ask("sacctmgr", "-nP", "show", "assoc", f"user={os.environ.get('USER', '')}", "format=Account")
    return list(dict.fromkeys(text.split()))


def parse_partitions(text: str) -> list[Partition]:
    """Lines of sinfo, `name*|up|limit|nodes|cpus|gres`, as partitions; of several kinds of nodes the most frequent."""
    found: dict[str, Partition] = {}
    for line in text.splitlines():
        name, up, limit, nodes, cpus, gres = [*line.split("|"), "", "", "", "", "", ""][:6]
        listed = re.findall(r"(?:^|,)gpu:(?:([^:,()]+):)?(\d+)", gres)
        gpus, kind = sum(int(count) for _, count in listed), next((kind for kind, _ in listed if kind), "")
        one = Partition(name.rstrip("*"), name.endswith("*"), limit, _number(nodes), _number(cpus), gpus, kind)
        if up == "up" and (one.name not in found or found[one.name].nodes < one.nodes):
            found[one.name] = one
    return list(found.values())


def _number(text: str) -> int:
    digits = re.match(r"\d+", text)
    return int(digits[0]) if digits else 0


def propose(
    name: str,
    config: Mapping[str, str],
    partitions: Sequence[Partition],
    environment: Mapping[str, str],
    accounts: Sequence[str] = (),
) -> str:
    """The text of `cluster/NAME.yaml` (pure).

    Args:
        name: of the file.
        config: what `scontrol show config` says.
        partitions: what sinfo says.
        environment: of the user.
        accounts: of the user, by sacctmgr.
    """
    main = next((one for one in partitions if one.default), None) or next(iter(partitions), None)
    with_gpus = [one for one in partitions if one.gpus]
    gpu = main if main and main.gpus else max(with_gpus, key=lambda one: one.nodes, default=None)
    version = config.get("SLURM_VERSION", "of unknown version")
    lines = [
        f"# Cluster {config.get('ClusterName', name)}, Slurm {version}, as `xdl doctor --write-site` found it.",
        f"# Launch with: xdl launch cluster={name}",
        "kind: slurm  # scontrol show config answers",
        *_block("sbatch", _sbatch(main, environment, accounts)),
        _gpu_flag(config, gpu),
        *_gpu(gpu),
        *_setup(environment),
        *_stages(main, gpu),
    ]
    return "\n".join(lines) + "\n"


def _line(key: str, value: object, why: str) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10**9).removesuffix("...\n").strip()
    return f"{key}: {text}  # {why}"


def _block(key: str, lines: Sequence[str], indent: str = "  ") -> list[str]:
    return [f"{key}:", *(indent + line for line in lines)] if lines else []


def _sbatch(main: Partition | None, environment: Mapping[str, str], accounts: Sequence[str]) -> list[str]:
    lines = []
    if main:
        lines.append(_line("partition", main.name, "the default of sinfo" if main.default else "the first of sinfo"))
    named = next((variable for variable in ACCOUNTS if environment.get(variable)), None)
    if named:
        lines.append(_line("account", environment[named], f"${named}"))
    elif accounts:
        others = f"; others are {', '.join(accounts[1:])}" if accounts[1:] else ""
        lines.append(_line("account", accounts[0], f"sacctmgr show assoc{others}"))
    return lines


def _gpu_flag(config: Mapping[str, str], gpu: Partition | None) -> str:
    """`--gpus-per-node` exists since Slurm 19.05, and works with select/cons_tres alone."""
    major = _number(config.get("SLURM_VERSION", ""))
    select, kinds = config.get("SelectType", ""), config.get("GresTypes", "(null)")
    told = f"SLURM_VERSION={config.get('SLURM_VERSION', '?')}, SelectType={select or '?'}, GresTypes={kinds}"
    told += " (scontrol show config)" if gpu else " (scontrol show config); sinfo shows no GPUs"
    return _line("gpu_flag", "gpus-per-node" if major >= 19 and "cons_tres" in select else "gres", told)


def _gpu(gpu: Partition | None) -> list[str]:
    """What plans take memory and speed from, where the site's name for it is one that is known."""
    if not gpu or not gpu.kind:
        return []
    if find_device(gpu.kind) is None:
        return [f"# gpu: {gpu.kind} (sinfo) is none that plans know; name the nearest, with its GB (h100-96)"]
    return [_line("gpu", gpu.kind, f"the GRES of {gpu.name} (sinfo)")]


def _setup(environment: Mapping[str, str]) -> list[str]:
    modules = [module for module in environment.get("LOADEDMODULES", "").split(":") if module]
    if not modules:
        return []
    value = yaml.safe_dump(f"module load {shlex.join(modules)}", default_style='"', width=10**9).strip()
    return ["setup:", f"  - {value}  # $LOADEDMODULES of this shell"]


def _stages(main: Partition | None, gpu: Partition | None) -> list[str]:
    lines = []
    for stage in ASKED:
        place = gpu if stage in ON_GPUS and gpu else main
        if place and (settings := list(_stage(stage, place, main))):
            lines += [f"{stage}:", *(f"  {line}" for line in settings)]
    told = "# " + (f"{gpu.gpus} GPUs in a node of {gpu.name} (sinfo)" if gpu else "no GPUs (sinfo)")
    told += "; the recipe says how many a stage takes, or --gpus-per-node"
    return [told, *_block("stages", lines)]


def _stage(stage: str, place: Partition, main: Partition | None) -> Iterator[str]:
    time, cores = ASKED[stage]
    if main and place.name != main.name:
        yield _line("partition", place.name, f"has GPUs, {main.name} has none (sinfo)")
    if stage in ON_GPUS and place.gpus:
        share = max(1, place.cpus // place.gpus)
        if place.cpus:
            yield _line(
                "cpus_per_task", share, f"{place.cpus} CPUs ÷ {place.gpus} GPUs of a node of {place.name} (sinfo)"
            )
    elif 0 < place.cpus < cores:
        yield _line("cpus_per_task", place.cpus, f"CPUs of a node of {place.name} (sinfo)")
    if 0 < seconds(place.limit) < seconds(time):
        yield _line("time", place.limit, f"the limit of {place.name} (sinfo)")
