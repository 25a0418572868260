"""The commands as users type them, in real processes. A launch takes seconds, so there are few."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.processes import Job, write_recipe
from trainer.commands import main

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
LAUNCH = [str(BIN / "accelerate"), "launch", "--config_file", "accelerate_config.yaml", "--main_process_port", "0"]
pytestmark = pytest.mark.launch


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(part) for part in command], cwd=ROOT, capture_output=True, text=True, timeout=200)


@pytest.mark.slow
def test_a_launch_of_two_processes_trains_and_says_so_once(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    done = run(*LAUNCH, "--num_processes", "2", "trainer/run.py", recipe, "train.duration=4 steps")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("finished run: 4 steps") == 1
    summary = json.loads((tmp_path / "runs" / "run" / "summary.json").read_text())
    assert (summary["status"], summary["world_size"]) == ("finished", 2)
    with Job(1, recipe, "train.duration=4 steps") as again:
        assert again.wait() == [0] and "already finished, at step 4" in again.output


@pytest.mark.slow
def test_a_mistake_is_one_message_and_exit_code_2(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    for command in ([sys.executable, "trainer/run.py", recipe], [BIN / "trainer", "check", recipe]):
        done = run(*command, "optimizer.lr=-1", "loss.name=soft_iuo")
        assert done.returncode == 2 and "Traceback" not in done.stderr
        assert done.stderr.splitlines() == [
            "command line: loss.name: unknown loss; did you mean 'soft_iou'? (got 'soft_iuo')",
            "command line: optimizer.lr: must be greater than 0 (got -1)",
        ]


def test_check_prints_the_resolved_recipe_and_what_reading_costs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["prepare", "shapes"]) == 0
    assert "1651 rows, 1500 train, 151 validation" in capsys.readouterr().out
    quickstart = ROOT / "recipes" / "quickstart.yaml"
    assert main(["check", str(quickstart), "--num_processes", "2", "train.seed=7"]) == 0
    printed = capsys.readouterr()
    assert "seed: 7" in printed.out and "rows for each row used (2 processes" in printed.err
    assert main(["check", str(write_recipe(tmp_path)), "--num_processes", "3"]) == 2


@pytest.mark.slow
def test_ctrl_c_saves_a_checkpoint_and_the_same_command_resumes(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    command = [
        sys.executable,
        "trainer/run.py",
        str(recipe),
        "train.duration=100000 steps",
        "train.log_every=1 steps",
        "checkpoint.every=100000 steps",
    ]
    metrics = tmp_path / "runs" / "run" / "metrics.jsonl"
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, env=os.environ) as process:
        while not (metrics.exists() and metrics.stat().st_size):
            assert process.poll() is None, process.stderr and process.stderr.read()
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert "stopped on SIGINT at step" in errors.splitlines()[-1]
    step = json.loads(metrics.read_text().splitlines()[-1])["step"]
    assert json.loads((tmp_path / "runs" / "run" / "summary.json").read_text())["status"] == "stopped"
    with Job(1, *command[2:]) as job:
        while f"resumed run from step {step}\n" not in job.output:
            assert job.wait(0.05) == [None], job.output
        job.signal(signal.SIGTERM)
        assert job.wait(60) == [0], job.output


@pytest.mark.slow
def test_a_signal_is_heard_before_anything_is_imported_that_takes_time(tmp_path: Path) -> None:
    """As soon as the operating system knows of a handler; what is imported before it is counted,
    since a signal kills until then.
    """
    command = [sys.executable, "-X", "importtime", "trainer/run.py", str(write_recipe(tmp_path))]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        status = Path(f"/proc/{process.pid}/status")
        while not handled(status.read_text()) >> (signal.SIGUSR1 - 1) & 1:
            assert process.poll() is None
            time.sleep(0.001)
        process.send_signal(signal.SIGUSR1)
        _, errors = process.communicate(timeout=200)
    assert process.returncode == 0 and "stopped on SIGUSR1 before training began" in errors, errors
    imported = [line.rpartition("|")[2].strip() for line in errors.splitlines() if line.startswith("import time:")]
    before = imported[imported.index("site") + 1 : imported.index("trainer.signals")]
    assert len(before) < 20 and not {"argparse", "trainer.errors", "torch"} & set(before), before


def handled(status: str) -> int:
    """The mask of the signals that a process handles, from its status in /proc."""
    return next(int(line.split()[1], 16) for line in status.splitlines() if line.startswith("SigCgt:"))


@pytest.mark.slow
def test_a_signal_that_came_while_it_was_ignored_counts_if_the_job_noted_it(tmp_path: Path) -> None:
    """SLURM's warning may come while the launcher is starting."""
    (tmp_path / "attempt.stop").touch()
    command = [sys.executable, "trainer/run.py", str(write_recipe(tmp_path))]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"TRAINER_ATTEMPT": str(tmp_path / "attempt")},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0 and "stopped on SIGUSR1 before training began" in done.stderr, done.stderr


def test_another_recipe_under_the_same_name_is_refused(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    with Job(1, recipe, "train.duration=2 steps") as job:
        assert job.wait() == [0], job.output
    with Job(1, recipe, "train.duration=2 steps", "optimizer.lr=0.5", "train.seed=3") as job:
        assert job.wait() == [2] and "these keys differ: optimizer.lr, train.seed" in job.output, job.output
    with Job(1, recipe, "train.duration=2 steps", "optimizer.lr=0.5", "--resume", "never") as job:
        assert job.wait() == [0] and (tmp_path / "runs" / "run.1" / "summary.json").exists(), job.output
