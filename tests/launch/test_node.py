"""`launch/node.sh` survives SLURM's warning at any moment and records it;
stand-ins for what it starts make that cheap.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NODE = {"SLURM_JOB_NODELIST": "n1", "SLURM_JOB_ID": "7", "SLURM_NODEID": "0"}
HELD = """#!/usr/bin/env bash
echo {name} starts
until [[ -e {name} ]]; do sleep 0.1; done
exit {code}
"""


@contextmanager
def start(folder: Path, nodes: int) -> Iterator[subprocess.Popen[str]]:
    """node.sh with preflight and launcher that end when a file of their name is there, the launcher with 7."""
    stand_ins = {
        "scontrol": "#!/bin/sh\necho n1\n",
        "python": HELD.format(name="preflight", code=0),
        "accelerate": HELD.format(name="launcher", code=7),
    }
    for name, text in stand_ins.items():
        (folder / name).write_text(text, encoding="utf-8")
        (folder / name).chmod(0o755)
    variables = {
        "PATH": f"{folder}:{os.environ['PATH']}",
        "TRAINER_HOME": str(ROOT),
        "TRAINER_ATTEMPT": str(folder / "attempt"),
        "SLURM_NNODES": str(nodes),
    }
    command = [ROOT / "launch" / "node.sh", "r.yaml"]
    with subprocess.Popen(
        command,
        cwd=folder,
        env=os.environ | NODE | variables,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            yield process
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def wait_for(process: subprocess.Popen[str], line: str) -> None:
    assert process.stdout is not None
    while line not in process.stdout.readline():
        assert process.poll() is None


@pytest.mark.parametrize("during", ["preflight", "launcher"])
def test_a_warning_before_training_starts_is_recorded_and_ends_nothing(tmp_path: Path, during: str) -> None:
    with start(tmp_path, nodes=2) as process:
        if during == "launcher":
            (tmp_path / "preflight").touch()
        wait_for(process, f"{during} starts")
        os.killpg(process.pid, signal.SIGUSR1)  # as SLURM does: to every process of the step
        while not (tmp_path / "attempt.stop").exists():
            assert process.poll() is None
            time.sleep(0.01)
        (tmp_path / "preflight").touch()
        if during == "preflight":
            wait_for(process, "launcher starts")
        (tmp_path / "launcher").touch()
        assert process.wait(60) == 7  # the launcher's own code


def test_nothing_is_recorded_without_a_warning_and_the_launcher_gets_other_signals(tmp_path: Path) -> None:
    with start(tmp_path, nodes=1) as process:
        wait_for(process, "launcher starts")
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == -signal.SIGTERM  # it has taken the place of node.sh
    assert not (tmp_path / "attempt.stop").exists()
