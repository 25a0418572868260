"""A kill at any moment loses at most the work since the last checkpoint,
and the run ends as if nothing had happened.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from types import FrameType
from typing import Any

import psutil
import pytest

from tests.faults.conftest import LONG, Tally
from tests.processes import LAUNCH, Job, lines, weights, write_recipe
from tests.unit.runs.test_checkpoint import make
from trainer.distributed.watchdog import Watchdog
from trainer.runs import checkpoint, durable, state, store, writer
from trainer.runs.store import CheckpointStore

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 60.0  # on a busy machine; without the watchdog it would be half an hour
OPTIONS = (
    "train.precision=fp32",
    "train.ema=0.9",
    "train.timeout=0.1 minutes",
    "train.log_every=3 steps",
    "checkpoint.every=2 steps",
    "checkpoint.keep=2",
)
KINDS = (
    "all ranks, at a random moment",
    "all ranks, at a random line of the code that writes a checkpoint",
    "all ranks, at a random moment",
    "all ranks, some milliseconds after a checkpoint was begun",
    "one rank, at a random moment",
    "all ranks, at a random line of the code that writes a checkpoint",
)


def kill_all() -> None:
    os.killpg(0, signal.SIGKILL)


def tracer(number: int, act: Callable[[], Any]) -> Any:
    """A trace function that calls `act` at the n-th line run of the modules that write a checkpoint, or of shutil,
    with which they remove folders.
    """
    left, files = number, {module.__file__ for module in (checkpoint, durable, state, store, writer, shutil)}

    def line(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal left
        left -= event == "line"
        if left == 0:
            act()
        return line

    return lambda frame, event, argument: line if frame.f_code.co_filename in files else None


def at_line(number: int) -> Callable[[int], None]:
    """Kills the job when rank 0 has come to the n-th line in the thread that writes checkpoints."""
    return lambda rank: threading.settrace(tracer(number, kill_all)) if rank == 0 else None


def after_begin(of_save: int, seconds: float) -> Callable[[int], None]:
    """Kills the job so long after rank 0 began to write its n-th checkpoint."""

    def fault(rank: int) -> None:
        save, left = CheckpointStore.save, of_save

        def timed(*arguments: Any) -> Path:
            nonlocal left
            left -= 1
            if left == 0:
                threading.Timer(seconds, kill_all).start()
            return save(*arguments)

        CheckpointStore.save = timed

    return fault


def inspect_checkpoints(root: Path, tally: Tally) -> None:
    """What a kill left: every folder with the name of a checkpoint is intact."""
    for folder in [*root.glob("step_*"), *root.glob("best"), *root.glob("last")]:
        checkpoint.verify(folder)
        tally("checkpoints found after kills, all of them intact")
    tally("kills that left a half-written checkpoint, which nothing reads", len(list(root.glob(".writing-*"))))


def met(marks: Path) -> Callable[[int], None]:
    """Each rank leaves a mark when it has a watchdog; before, no process knows of the others."""

    def fault(rank: int) -> None:
        run = Watchdog._run
        marks.mkdir(exist_ok=True)

        def running(watchdog: Watchdog) -> None:
            (marks / str(rank)).touch()
            run(watchdog)

        Watchdog._run = running

    return fault


def kill_one(job: Job, victim: int, marks: Path, seconds: float, tally: Tally) -> None:
    """Kills one rank, so long after the processes have met; the other ends on its own, and reports why."""
    while not all((marks / str(rank)).exists() for rank in (0, 1)):
        job.wait(0.01)
    job.wait(seconds)
    job.signal(signal.SIGKILL, victim)
    began = time.monotonic()
    codes = job.wait(LIMIT_S)
    took = time.monotonic() - began
    if codes[victim] == -signal.SIGKILL:
        assert took < LIMIT_S, job.output
        tally("SIGKILL of one rank: the other ended on its own", seconds=took)
        # 0: nothing was left to do.
        assert codes[1 - victim] == 0 or (codes[1 - victim] == 3 and f"training failed: rank {victim}" in job.output), (
            job.output
        )


def saved(root: Path, step: int) -> None:
    CheckpointStore(root).save(make(step), keep=2, best=step != 2)


def test_a_kill_at_any_line_of_a_save_leaves_only_intact_checkpoints(tmp_path: Path, tally: Tally) -> None:
    """A save that also replaces one of the same step, removes an old one and the best one before."""
    before = tmp_path / "before"
    for step in (1, 2, 3):
        saved(before, step)
    for number in range(1, 10_000) if LONG else range(1, 10_000, 13):
        root = shutil.copytree(before, tmp_path / str(number), symlinks=True)
        step = 3 if number % 3 == 0 else 4
        child = os.fork()
        if child == 0:
            sys.settrace(tracer(number, lambda: os.kill(os.getpid(), signal.SIGKILL)))
            saved(root, step)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        inspect_checkpoints(root, tally)
        newest, problems = CheckpointStore(root).newest_intact()
        assert newest in (3, 4) and problems == []
        saved(root, 5)  # and the next save works
        inspect_checkpoints(root, tally)
        assert (root / "last").resolve().name == (root / "best").resolve().name == "step_00000005"
        shutil.rmtree(root)
        if status == 0:
            return
        tally(
            "SIGKILLs of a single save, one at each line"
            if LONG
            else "SIGKILLs of a single save, one at every 13th line"
        )


@pytest.mark.slow
@pytest.mark.timeout(900 if LONG else 300)
@pytest.mark.parametrize("seed", range(10 if LONG else 1))
def test_a_run_killed_again_and_again_ends_bit_for_bit_like_an_uninterrupted_one(
    tmp_path: Path, tally: Tally, seed: int
) -> None:
    recipe, runs, draw = write_recipe(tmp_path), tmp_path / "runs", random.Random(seed)
    began = time.monotonic()
    with Job(2, recipe, "name=uninterrupted", *OPTIONS) as job:
        assert job.wait() == [0, 0], job.output
    duration = time.monotonic() - began
    kills = name = 0
    for attempt, kind in enumerate(cycle(KINDS)):
        if "line" in kind:
            fault = at_line(draw.randint(1, 500))
        elif "milliseconds" in kind:
            fault = after_begin(draw.randint(1, 3), draw.uniform(0, 0.01))
        else:
            marks = tmp_path / f"marks{attempt}"
            fault = met(marks)
        with Job(2, recipe, f"name=run{name}", *OPTIONS, fault=fault) as job:
            if "one rank" in kind:
                kill_one(job, draw.randint(0, 1), marks, draw.uniform(0, duration / 2), tally)
            elif "moment" in kind:
                job.wait(draw.uniform(0, duration))
                job.signal(signal.SIGKILL)
            codes = job.wait()
        if -signal.SIGKILL in codes:
            kills += 1
            tally("SIGKILLs in all, forked runs of two processes")
            tally(f"SIGKILL of {kind}")
            inspect_checkpoints(runs / f"run{name}" / "checkpoints", tally)
        else:
            assert codes == [0, 0], job.output
            assert weights(runs / f"run{name}") == weights(runs / "uninterrupted")
            assert lines(runs / f"run{name}") == lines(runs / "uninterrupted")
            tally("killed runs that ended: weights, averages and metrics equal to the bit")
            if kills >= (21 if LONG else len(KINDS)):
                return
            name += 1


@pytest.mark.launch
@pytest.mark.skipif(not LONG, reason="make faults: launches take long")
@pytest.mark.timeout(900)
def test_a_launch_killed_five_times_ends_bit_for_bit_like_an_uninterrupted_run(tmp_path: Path, tally: Tally) -> None:
    recipe, runs, draw = write_recipe(tmp_path), tmp_path / "runs", random.Random(5)
    options = (*OPTIONS, "train.duration=100 epochs")
    with Job(2, recipe, "name=uninterrupted", *options) as job:
        assert job.wait(200) == [0, 0], job.output
    root = runs / "run" / "checkpoints"
    for kill in range(6):
        before = CheckpointStore(root).steps()
        with (
            (tmp_path / "log").open("w") as log,
            subprocess.Popen([*LAUNCH, str(recipe), *options], cwd=ROOT, stderr=log) as launcher,
        ):
            if kill < 5:
                while CheckpointStore(root).steps()[-1:] <= before[-1:]:
                    assert launcher.poll() is None, (tmp_path / "log").read_text()
                    time.sleep(0.05)
                time.sleep(draw.uniform(0, 1.0))
                for process in [psutil.Process(launcher.pid), *psutil.Process(launcher.pid).children(recursive=True)]:
                    process.kill()
            launcher.wait(200)
        assert launcher.returncode == (-signal.SIGKILL if kill < 5 else 0), (tmp_path / "log").read_text()
        if kill < 5:
            tally("SIGKILLs of entire launches of two processes")
            inspect_checkpoints(root, tally)
    assert weights(runs / "run") == weights(runs / "uninterrupted") and lines(runs / "run") == lines(
        runs / "uninterrupted"
    )
    tally("killed launches that ended: weights, averages and metrics equal to the bit")
