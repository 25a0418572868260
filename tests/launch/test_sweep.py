"""A sweep trains what isn't finished, continues after a failure, and reports how all runs ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.processes import write_recipe

pytestmark = pytest.mark.launch
TRAINER = str(Path(sys.executable).with_name("trainer"))
OPTIONS = ("train.duration=2 steps", "evaluate.every=2 steps", "train.threads=1")


def sweep(recipe: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [TRAINER, "sweep", str(recipe), *OPTIONS, *arguments], capture_output=True, text=True, timeout=200
    )


def test_a_failed_run_does_not_stop_the_others_and_finished_ones_are_skipped(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    first = sweep(recipe, "optimizer.lr=1e-3,1e300", "--parallel", "2")
    assert first.returncode == 3 and "Traceback" not in first.stderr, first.stderr
    table = first.stdout.splitlines()[-3:]
    assert table[0].startswith("run-lr=1e-3 ") and "finished" in table[0] and "miou" in table[0]
    assert table[1].startswith("run-lr=1e300 ") and "failed" in table[1]
    assert (tmp_path / "runs" / "run-sweep.png").stat().st_size > 1000
    assert "training failed" in (tmp_path / "runs" / "run-lr=1e300.log").read_text()
    second = sweep(recipe, "optimizer.lr=1e-3,2e-3")
    assert second.returncode == 0, second.stderr
    assert "run-lr=1e-3: finished already" in second.stdout and "run-lr=2e-3: training" in second.stdout


def test_a_mistake_in_any_run_is_reported_before_one_is_trained(tmp_path: Path) -> None:
    done = sweep(write_recipe(tmp_path), "optimizer.lr=1e-3,-1")
    assert done.returncode == 2 and "optimizer.lr: must be greater than 0" in done.stderr
    assert not (tmp_path / "runs").exists()
    done = sweep(write_recipe(tmp_path), "optimizer.lr=1e-3")
    assert done.returncode == 2 and "nothing to sweep over" in done.stderr


def test_a_stop_signal_stops_the_run_with_a_checkpoint(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    command = [
        TRAINER,
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
