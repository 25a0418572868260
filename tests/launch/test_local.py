"""`launch/local.sh` resumes automatically, and knows when not to; with a stand-in for the launcher an attempt costs
nothing.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent

# An attempt that saves a checkpoint if steps.txt has a line left, then runs `what`.
LAUNCHER = """#!/usr/bin/env bash
echo "attempt $*" >>attempts.txt
mkdir -p "$TRAINER_RUNS/r/checkpoints"
step=$(head -n 1 steps.txt)
[[ -z $step ]] || mkdir -p "$TRAINER_RUNS/r/checkpoints/step_$step"
sed -i 1d steps.txt
{what}
"""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with nothing but launch/ and a virtual environment."""
    shutil.copytree(ROOT / "launch", tmp_path / "launch")
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    for name in ("trainer", "python"):
        (tmp_path / ".venv" / "bin" / name).write_text(f'#!/bin/sh\nexec {BIN / name} "$@"\n', encoding="utf-8")
        (tmp_path / ".venv" / "bin" / name).chmod(0o755)
    (tmp_path / "r.yaml").write_text("task: segmentation\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@contextmanager
def start(home: Path, what: str, steps: str = "") -> Iterator[subprocess.Popen[str]]:
    """`launch/local.sh` in its own session, no process of which outlives the test."""
    accelerate = home / ".venv" / "bin" / "accelerate"
    accelerate.write_text(LAUNCHER.replace("{what}", what), encoding="utf-8")
    accelerate.chmod(0o755)
    (home / "steps.txt").write_text(steps, encoding="utf-8")
    command = ["launch/local.sh", "r.yaml", "train.seed=1"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    ) as process:
        try:
            yield process
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def finish(process: subprocess.Popen[str]) -> tuple[int, str, int]:
    """Exit code, output, number of attempts."""
    output, _ = process.communicate(timeout=200)
    return process.returncode, output, len(Path("attempts.txt").read_text().splitlines())


def run(home: Path, what: str, steps: str = "") -> tuple[int, str, int]:
    with start(home, what, steps) as process:
        return finish(process)


def test_it_resumes_as_long_as_there_are_newer_checkpoints(home: Path) -> None:
    crash_until_finished = """[[ -s steps.txt ]] && kill -KILL $$
echo '{"status": "finished", "step": 7}' >"$TRAINER_RUNS/r/summary.json" """
    code, output, attempts = run(home, crash_until_finished, "1\n2\n3\n4\n5\n6\n7\n")
    assert (code, attempts) == (0, 7) and "r  interrupted  step 6" in output and "r  finished  step 7" in output
    again = subprocess.run(["launch/local.sh", "r.yaml"], capture_output=True, text=True)
    assert again.returncode == 0 and len(Path("attempts.txt").read_text().splitlines()) == 7


def test_it_stops_after_three_more_attempts_without_a_newer_checkpoint(home: Path) -> None:
    code, output, attempts = run(home, "exit 1", "1\n2\n")
    assert (code, attempts) == (1, 5) and "no newer checkpoint after three more attempts; not trying again" in output


def test_a_mistake_is_not_tried_again(home: Path) -> None:
    (home / "trainer").mkdir()
    (home / "trainer" / "run.py").write_text(
        "import sys; print('error: of the user', sys.argv[1:]); sys.exit(2)\n", encoding="utf-8"
    )
    code, output, attempts = run(home, '"${@: -3}" || exit 1')  # as the launcher does: its own code
    assert (code, attempts) == (2, 1) and "error: of the user ['r.yaml', 'train.seed=1']" in output


def test_a_failed_training_is_not_tried_again(home: Path) -> None:
    code, _, attempts = run(home, """echo '{"status": "failed"}' >"$TRAINER_RUNS/r/summary.json"; exit 1""")
    assert (code, attempts) == (3, 1)


def test_a_closed_terminal_does_not_end_it_under_nohup(home: Path) -> None:
    wait = """echo ready
until [[ -e go ]]; do sleep 0.1; done
echo '{"status": "finished"}' >"$TRAINER_RUNS/r/summary.json" """
    handler = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # what its children inherit
    try:
        with start(home, wait) as process:
            assert process.stdout is not None
            while "ready" not in process.stdout.readline():
                assert process.poll() is None
            os.killpg(process.pid, signal.SIGHUP)
            (home / "go").touch()
            code, output, attempts = finish(process)
    finally:
        signal.signal(signal.SIGHUP, handler)
    assert (code, attempts) == (0, 1) and "r  finished" in output


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_ctrl_c_waits_for_the_checkpoint_and_stops(home: Path, number: signal.Signals) -> None:
    save = """trap 'mkdir "$TRAINER_RUNS/r/checkpoints/step_9"; exit 1' TERM
echo ready
while :; do sleep 0.1; done"""
    with start(home, save) as process:
        assert process.stdout is not None
        while "ready" not in process.stdout.readline():
            assert process.poll() is None
        os.killpg(process.pid, number)  # a terminal's Ctrl-C reaches the entire group
        code, output, attempts = finish(process)
    assert (code, attempts) == (0, 1) and "rerun to resume from step 9" in output


def test_it_never_starts_from_scratch(home: Path) -> None:
    done = subprocess.run(["launch/local.sh", "r.yaml", "--resume", "never"], capture_output=True, text=True)
    assert done.returncode == 2 and "always resumes from the newest checkpoint" in done.stderr
