"""A sweep trains what isn't finished, continues after a failure, and reports how all runs ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.processes import Job, write_recipe
from trainer.commands import main

pytestmark = pytest.mark.launch
TRAINER = (sys.executable, "-m", "trainer")
OPTIONS = ("train.duration=2 steps", "evaluate.every=2 steps", "train.threads=1")


def sweep(recipe: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*TRAINER, "sweep", str(recipe), *OPTIONS, *arguments], capture_output=True, text=True, timeout=200
    )


@pytest.mark.slow
def test_a_failed_run_does_not_stop_the_others_and_finished_ones_are_skipped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(tmp_path)
    with Job(1, recipe, *OPTIONS, "name=run-lr=1e-3", "optimizer.lr=1e-3") as job:
        assert job.wait() == [0], job.output
    done = sweep(recipe, "optimizer.lr=1e-3,1e300,2e-3", "--parallel", "2")
    assert done.returncode == 3 and "Traceback" not in done.stderr, done.stderr
    assert "run-lr=1e-3: already finished" in done.stdout and "run-lr=2e-3: training" in done.stdout
    table = done.stdout.splitlines()[-4:]
    for row, name, status in zip(table, ("1e-3", "1e300", "2e-3"), ("finished", "failed", "finished"), strict=False):
        assert row.startswith(f"run-lr={name} ") and status in row and ("miou" in row) == (status == "finished"), row
    assert (tmp_path / "runs" / "run-sweep.png").stat().st_size > 1000
    assert "training failed" in (tmp_path / "runs" / "run-lr=1e300.log").read_text()
    assert main(["sweep", str(recipe), *OPTIONS, "optimizer.lr=1e-3,2e-3"]) == 0
    assert capsys.readouterr().out.count("already finished") == 2


def test_a_mistake_in_any_run_is_reported_before_one_is_trained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = str(write_recipe(tmp_path))
    assert main(["sweep", recipe, *OPTIONS, "optimizer.lr=1e-3,-1"]) == 2
    assert "optimizer.lr: must be greater than 0" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
    assert main(["sweep", recipe, *OPTIONS, "optimizer.lr=1e-3"]) == 2
    assert "nothing to sweep: give a key several values" in capsys.readouterr().err


@pytest.mark.slow
def test_a_stop_signal_stops_the_run_with_a_checkpoint(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    command = [
        *TRAINER,
        "sweep",
        str(recipe),
        "train.duration=100000 steps",
        "train.threads=1",
        "optimizer.lr=1e-3,2e-3",
    ]
    metrics = tmp_path / "runs" / "run-lr=1e-3" / "metrics.jsonl"
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, env=os.environ) as process:
        while not (metrics.exists() and metrics.stat().st_size):
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
    assert "stopped on SIGTERM at step" in (tmp_path / "runs" / "run-lr=1e-3.log").read_text()
    assert not (tmp_path / "runs" / "run-lr=2e-3").exists()
