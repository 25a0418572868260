"""A real SLURM of two nodes on 127.0.0.1, in its own folder: two of them never meet,
and nothing outlives a test.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

DAEMONS = ("munged", "slurmctld", "slurmd", "sbatch")

# A node named in a file `hang-<node>` never starts what srun asks of it.
TASK_PROLOG = '#!/bin/sh\n[ ! -e "{folder}/hang-$SLURMD_NODENAME" ] || exec sleep 1000\n'

CONFIGURATION = """
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdParameters=config_overrides
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
TaskProlog={folder}/prolog
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
KillWait=30
MinJobAge=600
NodeName=n1 NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[1]} CPUs=4 RealMemory=1000
NodeName=n2 NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[2]} CPUs=4 RealMemory=1000
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=60 OverSubscribe=NO
"""


def why_not() -> str | None:
    """Why no SLURM can be started here; None where one can."""
    if os.geteuid():
        return "only root can start SLURM's daemons"
    lacking = [daemon for daemon in DAEMONS if not shutil.which(daemon)]
    return f"not installed: {', '.join(lacking)} (Debian: slurmctld slurmd slurm-client munge)" if lacking else None


def wait_for(happened: Callable[[], object], what: str, timeout_s: float = 300) -> None:
    """Returns as soon as `happened` is true."""
    end = time.monotonic() + timeout_s
    while not happened():
        assert time.monotonic() < end, f"{what}: not within {timeout_s} s"
        time.sleep(0.1)


class Cluster:
    """Two nodes of four cores, n1 and n2.

    Attributes:
        folder: of the configuration, the daemons' state and their logs.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def environment(self) -> dict[str, str]:
        """What sbatch, scancel … need to find this cluster, and its jobs to find one another:
        the nodes' names don't resolve.
        """
        return os.environ | {"SLURM_CONF": str(self.folder / "slurm.conf"), "MASTER_ADDR": "127.0.0.1"}

    def run(self, *command: str | Path, cwd: Path | None = None) -> str:
        """The output of a command that has to succeed."""
        done = subprocess.run(
            [str(part) for part in command], cwd=cwd, env=self.environment, capture_output=True, text=True, timeout=100
        )
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def hang(self, node: str, hangs: bool) -> None:
        """Whether what SLURM starts on a node, apart from batch scripts, gets stuck before its first line."""
        file = self.folder / f"hang-{node}"
        if hangs:
            file.touch()
        else:
            file.unlink()

    def jobs(self, job: str) -> list[dict[str, str]]:
        """SLURM's fields of a job, or of every task of an array."""
        return [
            dict(re.findall(r"(\w+)=(\S*)", line))
            for line in self.run("scontrol", "show", "job", "--oneliner", job).splitlines()
            if line
        ]

    def job(self, job: str) -> dict[str, str]:
        """SLURM's fields of a single job, e.g. `JobState`."""
        (found,) = self.jobs(job)
        return found

    def hurry(self, job: str, restarts: int) -> None:
        """Waits for a job's next attempt, and starts it where SLURM would wait two minutes."""
        wait_for(
            lambda: (now := self.job(job))["Restarts"] == str(restarts) and now["Reason"] == "BeginTime",
            f"requeue {restarts} of job {job}",
        )
        # Not at once: nodes refuse a job for the rest of the second in which they ended it.
        self.run("scontrol", "update", f"JobId={job}", "StartTime=now+2seconds")
        wait_for(lambda: self.job(job)["JobState"] == "RUNNING", f"attempt {restarts + 1} of job {job}")


def _ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for free in sockets:
            free.bind(("127.0.0.1", 0))
        return [free.getsockname()[1] for free in sockets]


@contextmanager
def start_cluster(folder: Path) -> Iterator[Cluster]:
    """Starts the daemons; cancels every job and stops the daemons at the end."""
    munge = folder / "munge"
    for path in (munge, folder / "state", folder / "spool-n1", folder / "spool-n2"):
        path.mkdir(parents=True)
    (munge / "munge.key").write_bytes(secrets.token_bytes(1024))
    (munge / "munge.key").chmod(0o600)
    (folder / "prolog").write_text(TASK_PROLOG.format(folder=folder), encoding="utf-8")
    (folder / "prolog").chmod(0o755)
    (folder / "slurm.conf").write_text(CONFIGURATION.format(folder=folder, ports=_ports(3)), encoding="utf-8")
    cluster = Cluster(folder)
    sockets = (
        "--socket",
        munge / "munge.socket",
        "--pid-file",
        munge / "munged.pid",
        "--log-file",
        munge / "munged.log",
        "--seed-file",
        munge / "seed",
    )
    daemons = [
        ["munged", "--foreground", "--force", "--key-file", munge / "munge.key", *sockets],
        ["slurmctld", "-D"],
        ["slurmd", "-D", "-N", "n1"],
        ["slurmd", "-D", "-N", "n2"],
    ]
    with ExitStack() as stack:
        for number, command in enumerate(daemons):
            output = stack.enter_context((folder / f"daemon-{number}.log").open("w"))
            process = subprocess.Popen(
                [str(part) for part in command], env=cluster.environment, stdout=output, stderr=output
            )
            stack.callback(_stop, process)
            if number == 0:
                wait_for((munge / "munge.socket").exists, "munged's socket", 10)
        wait_for(lambda: _idle(cluster) == 2, "two idle nodes", 30)
        yield cluster
        cluster.run("scancel", "--user", "root")
        wait_for(lambda: not cluster.run("squeue", "--noheader"), "the end of all jobs", 60)


def _idle(cluster: Cluster) -> int:
    done = subprocess.run(
        ["sinfo", "--noheader", "--Node", "--format=%T"], env=cluster.environment, capture_output=True, text=True
    )
    return done.stdout.split().count("idle")


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
