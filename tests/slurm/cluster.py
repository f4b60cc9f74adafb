"""A Slurm cluster of real daemons on this machine, in one folder: nothing outside of it is touched.

Debian's slurmd runs several times on one host (`slurmd -N node3`, each with a port of its own). Its GPUs are links to
/dev/null. As root each node has a hostname of its own. Several clusters may stand side by side.
"""

import os
import random
import shutil
import signal
import socket
import subprocess
import time
from contextlib import suppress
from pathlib import Path

from ports import free_ports

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "squeue", "scontrol", "munged")
ACCOUNTING = ("slurmdbd", "sacctmgr", "sacct", "mariadbd", "mariadb-install-db", "mariadb")
PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
FOREIGN = ("SLURM", "SBATCH_", "SRUN_", "SALLOC_", "SQUEUE_", "SACCT_", "SCONTROL_")
CPUS, MEMORY = 8, 16000
DAEMON = "XDL_TEST_CLUSTER"
"""Marks the environment of a cluster's daemons; its jobs have SLURMD_NODENAME in theirs."""

CONFIGURATION = """
ClusterName=xdltest
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={controller}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
# A requeued job starts again when its old credential has expired: after 6 s, where the default is 121.
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/log/slurmctld
SlurmdLogFile={folder}/log/%n
MailProg=/bin/true
# Ports of jobs follow from their ids, and clusters stand side by side on this host.
FirstJobId={first_job}
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
# Without it one job takes the memory of a whole node.
DefMemPerCPU=100
SlurmdParameters=config_overrides
GresTypes=gpu
ReturnToService=2
SlurmctldTimeout=10
SlurmdTimeout=3
MessageTimeout=30
TCPTimeout=10
KillWait=3
# Ended jobs stay in `scontrol show job`.
MinJobAge=3600
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=1,sched_min_interval=100000,batch_sched_delay=0,requeue_delay=0
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=REQUEUE GraceTime=20
PartitionName=high Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=100 PreemptMode=OFF
{accounting}
{nodes}
"""
WITH_ACCOUNTING = """
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={port}
# slurmdbd does not read AuthInfo.
AccountingStoragePass={folder}/munge.socket
AccountingStorageTRES=gres/gpu
JobAcctGatherType=jobacct_gather/linux
"""
WITHOUT_ACCOUNTING = "AccountingStorageType=accounting_storage/none\nJobAcctGatherType=jobacct_gather/none"
DATABASE_DAEMON = """
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort={port}
SlurmUser={user}
LogFile={folder}/log/slurmdbd
PidFile={folder}/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort={database}
StorageUser=slurm
StoragePass=slurm
StorageLoc=slurm
"""
DATABASE = "create database slurm; create user slurm@'127.0.0.1' identified by 'slurm'; grant all on slurm.* to slurm@'127.0.0.1'"  # noqa: E501


def missing(programs: tuple[str, ...] = PROGRAMS) -> list[str]:
    """Which of these programs are not installed."""
    return [name for name in programs if not shutil.which(name, path=PATH)]


class SlurmCluster:
    """Partitions `main` (default, can be preempted after 20 s) and `high` (preempts it); nodes `node0`, `node1`, ….

    `start` takes half a second, with accounting 5. `stop` ends every process of the cluster, its jobs included.
    """

    def __init__(self, folder: Path, nodes: int = 8, gpus: int = 4, accounting: bool = False) -> None:
        self.folder, self.gpus, self.accounting = folder, gpus, accounting
        self.nodes = [f"node{number}" for number in range(nodes)]
        own = {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN)}
        self.env = {**own, "PATH": PATH, "SLURM_CONF": str(folder / "slurm.conf")}
        """The environment of who uses this cluster."""
        self.hostnames = os.geteuid() == 0 and self._may_unshare()
        """Whether each node has a hostname of its own, which the others can resolve."""

    def start(self) -> None:
        """Start the daemons and wait until every node is idle."""
        for name in ("state", "spool", "log", "dev", "tmp"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        self._write_files()
        self._munge()
        if self.accounting:
            self._accounting()
        self._daemon("slurmctld")
        for node in self.nodes:
            self.start_node(node)
        self.until(lambda: self.run("sinfo", "-hN", "-p", "main", "-t", "idle").count("\n") == len(self.nodes), 30)

    def start_node(self, node: str) -> None:
        """Start the daemon of a node, for the first time or after `crash`."""
        slurmd = ["slurmd", "-N", node]
        if self.hostnames:
            inside = 'hostname "$1"; mount --bind "$2" /etc/hosts; shift 2; exec "$@"'
            arguments = ["sh", "-c", inside, "sh", node, str(self.folder / "hosts"), *slurmd]
            slurmd = ["unshare", "--uts", "--mount", "--propagation", "private", *arguments]
        self._daemon(*slurmd, SLURMD_NODENAME=node)

    def crash(self, node: str) -> None:
        """Kill a node's daemon, step daemons and jobs without a word, as if its power had gone."""
        self._kill(self._processes(node))

    def stop(self) -> None:
        """Kill every process of the cluster, its jobs included; configuration and logs stay."""
        while pids := self._processes():
            self._kill(pids)
            time.sleep(0.05)
        shutil.rmtree(self.folder / "db", ignore_errors=True)

    def run(self, *command: str, check: bool = True) -> str:
        """What a command of Slurm prints."""
        answer = subprocess.run(command, env=self.env, capture_output=True, text=True, timeout=60, check=False)
        assert not (check and answer.returncode), f"{' '.join(command)}: {answer.stderr}"
        return answer.stdout

    def until(self, condition, seconds: float = 60, what: str = "") -> None:
        """Wait until `condition()` holds.

        Raises:
            AssertionError: it does not within so many seconds; the queue as it stands is in the message.
        """
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                queue = self.run("squeue", "-o", "%i %j %T %r %S", check=False)
                raise AssertionError(f"not within {seconds} s: {what or condition}\n{queue}")
            time.sleep(0.2)

    def _write_files(self) -> None:
        ports = free_ports(3 + len(self.nodes), 15_000)
        self._ports = {"controller": ports[0], "port": ports[1], "database": ports[2]}
        first_job = random.randrange(1, 50_000)
        addresses = [f"127.0.1.{10 + number}" for number in range(len(self.nodes))]
        for number in range(self.gpus):
            (self.folder / f"dev/gpu{number}").symlink_to("/dev/null")
        host = socket.gethostname().partition(".")[0]
        lines = [f"{address} {node}\n" for address, node in zip(addresses, self.nodes, strict=True)]
        (self.folder / "hosts").write_text(f"127.0.0.1 localhost {host}\n{''.join(lines)}")
        (self.folder / "gres.conf").write_text(f"Name=gpu File={self.folder}/dev/gpu[0-{self.gpus - 1}]\n")
        shape = f"CPUs={CPUS} RealMemory={MEMORY} Gres=gpu:{self.gpus} State=UNKNOWN"
        nodes = [
            f"NodeName={node} NodeHostname={host} NodeAddr={address} Port={port} {shape}"
            for node, address, port in zip(self.nodes, addresses, ports[3:], strict=True)
        ]
        accounting = self._filled(WITH_ACCOUNTING) if self.accounting else WITHOUT_ACCOUNTING
        text = self._filled(CONFIGURATION, accounting=accounting, nodes="\n".join(nodes), first_job=str(first_job))
        (self.folder / "slurm.conf").write_text(text)

    def _filled(self, template: str, **values: str) -> str:
        import getpass

        return template.format(folder=self.folder, user=getpass.getuser(), **self._ports, **values)

    def _munge(self) -> None:
        key = self.folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(1024))
        files = {"key-file": key.name, "socket": "munge.socket", "pid-file": "munged.pid", "seed-file": "munge.seed"}
        options = [f"--{option}={self.folder}/{name}" for option, name in {**files, "log-file": "log/munged"}.items()]
        self._daemon("munged", "--force", *options)

    def _accounting(self) -> None:
        user = ["--user=root"] if os.geteuid() == 0 else []
        data, mysql = f"--datadir={self.folder}/db", f"--socket={self.folder}/mysql.sock"
        aside = {"TMPDIR": f"{self.folder}/tmp"}  # one that starts deletes the temporary tables of others
        plain = ["--auth-root-authentication-method=normal", "--skip-test-db"]
        self._daemon("mariadb-install-db", "--no-defaults", *user, data, *plain, **aside)
        place = [
            f"--port={self._ports['database']}",
            "--bind-address=127.0.0.1",
            f"--pid-file={self.folder}/mariadbd.pid",
        ]
        buffers = ["--innodb-buffer-pool-size=64M", "--innodb-log-file-size=16M", "--innodb-lock-wait-timeout=900"]
        with (self.folder / "log/mariadbd").open("ab") as log:
            subprocess.Popen(
                ["mariadbd", "--no-defaults", *user, data, mysql, *place, *buffers, "--skip-name-resolve"],
                env=self.env | aside | {DAEMON: str(self.folder)}, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip
        client = ["mariadb", "--no-defaults", "-uroot", mysql, "-e"]
        self.until(lambda: self._succeeds(*client, "select 1"), 30, "the database answers")
        self.run(*client, DATABASE)
        configuration = self.folder / "slurmdbd.conf"
        configuration.touch(mode=0o600)
        configuration.write_text(self._filled(DATABASE_DAEMON))
        self._daemon("slurmdbd")
        self.until(lambda: self._succeeds("sacctmgr", "-ni", "add", "cluster", "xdltest"), 30, "slurmdbd answers")

    def _daemon(self, *command: str, **environment: str) -> None:
        """Run what puts itself into the background; never with a pipe, which it would keep open."""
        with (self.folder / "log/started").open("ab") as log:
            env = {**self.env, **environment, DAEMON: str(self.folder)}
            subprocess.run(command, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log, check=True, timeout=60)

    def _succeeds(self, *command: str) -> bool:
        return not subprocess.run(command, env=self.env, capture_output=True, timeout=10, check=False).returncode

    @staticmethod
    def _may_unshare() -> bool:
        command = ["unshare", "--uts", "--mount", "--propagation", "private", "true"]
        return (
            bool(shutil.which("unshare")) and not subprocess.run(command, capture_output=True, check=False).returncode
        )

    def _processes(self, node: str = "") -> list[int]:
        """The daemons, step daemons and jobs of a node, or of the whole cluster: their environment tells."""
        ours, known = f"SLURM_CONF={self.folder}/slurm.conf".encode(), f"SLURMD_NODENAME={node}".encode()
        daemon = f"{DAEMON}={self.folder}".encode()
        found = []
        for pid in (int(name) for name in os.listdir("/proc") if name.isdigit()):
            variables = environment_of(pid).split(b"\0")
            on_node = any(name == known if node else name.startswith(known) for name in variables)
            if (ours in variables and on_node) or (daemon in variables and not node):
                found.append(pid)
        return found

    @staticmethod
    def _kill(pids: list[int]) -> None:
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def environment_of(pid: int) -> bytes:
    """The environment that a process was started with; empty where it has ended."""
    try:
        return Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return b""
