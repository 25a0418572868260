"""No rank waits for ever: a lost rank ends the job in time, is named, and the same command resumes."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.conftest import BRIEF, LONG, Tally, Uninterrupted
from tests.faults.hooks import Gate, before_call, in_reading
from tests.processes import LAUNCH, TINY, Job, lines, weights, write_recipe
from trainer import trainer as trainer_module

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT = "train.timeout=0.1 minutes"
LIMIT_S = 60.0  # ten times that: without the watchdog it would be half an hour, and a busy machine is slow
STEP = 3


def is_killed(job: Job, victim: int) -> None:
    job.signal(signal.SIGKILL, victim)


def is_stopped(job: Job, victim: int) -> None:
    job.signal(signal.SIGSTOP, victim)


def is_stuck(job: Job, victim: int) -> None:
    """It is already waiting at the gate, in the loader, and nobody opens it."""


def raises() -> None:
    raise RuntimeError("something broke")


CASES = [
    (is_killed, 2, 0),
    (is_killed, 2, 1),
    (is_stopped, 2, 0),
    (is_stopped, 2, 1),
    (is_stuck, 2, 0),
    (is_stuck, 2, 1),
    (raises, 2, 0),
    (raises, 2, 1),
]
SHORT = [(is_killed, 2, 1), (is_stopped, 2, 0), (raises, 2, 1)]


@pytest.mark.parametrize(
    ("fault", "world_size", "victim"), [*CASES, (is_stopped, 4, 2), (is_killed, 4, 3)] if LONG else SHORT
)
@pytest.mark.slow
def test_a_lost_rank_ends_the_job_in_time_and_is_named(
    tmp_path: Path, tally: Tally, uninterrupted: Uninterrupted, fault: Callable[..., None], world_size: int, victim: int
) -> None:
    recipe, gate = write_recipe(tmp_path), Gate()

    def hold(rank: int) -> None:
        def act() -> None:
            gate.stop_here()
            raises()  # if the gate is opened

        if rank == victim:
            in_reading(STEP, act)

    with Job(world_size, recipe, *BRIEF, TIMEOUT, "checkpoint.every=2 steps", fault=hold) as job:
        gate.await_arrival()
        began = time.monotonic()
        if fault is raises:
            gate.open()
        else:
            fault(job, victim)
        codes = job.wait(LIMIT_S) if fault is not is_stopped else wait_but_for(job, victim)
        took = time.monotonic() - began
    others = [code for rank, code in enumerate(codes) if rank != victim]
    assert others == [3] * (world_size - 1) and took < LIMIT_S, (codes, took, job.output)
    failures = [line for line in job.output.splitlines() if line.startswith("training failed: ")]
    assert failures and all(f"rank {victim}" in line for line in failures), job.output
    # Rank 0 holds the store that informs the others; with a launcher, that would.
    assert victim == 0 or f"reading data, after step {STEP}" in failures[0], failures
    assert fault is not raises or "something broke" in job.output
    with Job(world_size, recipe, *BRIEF, TIMEOUT, "checkpoint.every=2 steps") as job:
        assert job.wait() == [0] * world_size, job.output
    assert "resumed run from step 2" in job.output
    assert (weights(tmp_path / "runs" / "run"), lines(tmp_path / "runs" / "run")) == uninterrupted(world_size, recipe)
    tally(
        f"lost ranks: one of {world_size} {fault.__name__.replace('_', ' ')}: named, ended, resumed exactly",
        seconds=took,
    )


def wait_but_for(job: Job, victim: int) -> list[int | None]:
    """A stopped process ends only when it is killed."""
    for rank, process in enumerate(job.processes):
        if rank != victim:
            process.join(LIMIT_S)
    return job.wait(0)


def ends_before_it_meets_the_others() -> None:
    os._exit(1)


def ends_while_it_meets_the_others() -> None:
    before_call(trainer_module, "build_accelerator", lambda recipe: os.kill(os.getpid(), signal.SIGKILL))


def fails_while_it_meets_the_others() -> None:
    before_call(trainer_module, "build_accelerator", lambda recipe: raises())


AT_START = (ends_before_it_meets_the_others, ends_while_it_meets_the_others, fails_while_it_meets_the_others)
STARTS = [(fault, 2, victim) for fault in AT_START for victim in (0, 1)]
SHORT_STARTS = [STARTS[0], STARTS[3], STARTS[5], (ends_before_it_meets_the_others, 4, 2)]


@pytest.mark.parametrize(("fault", "world_size", "victim"), [*STARTS, SHORT_STARTS[-1]] if LONG else SHORT_STARTS)
@pytest.mark.slow
def test_a_rank_lost_before_all_have_met_ends_the_job_in_time_and_is_named(
    tmp_path: Path, tally: Tally, fault: Callable[[], None], world_size: int, victim: int
) -> None:
    """The others wait for it in `init_process_group`, whose own limit is minutes and whose message names nobody."""
    began = time.monotonic()
    with Job(
        world_size, write_recipe(tmp_path), *BRIEF, TIMEOUT, fault=lambda rank: fault() if rank == victim else None
    ) as job:
        codes = job.wait(30)
        took = time.monotonic() - began
    assert [code for rank, code in enumerate(codes) if rank != victim] == [3] * (
        world_size - 1
    ) and took < 2 * LIMIT_S, (codes, took, job.output)
    failures = [line for line in job.output.splitlines() if line.startswith("training failed: ")]
    assert failures and all(f"rank {victim}" in line for line in failures), job.output
    assert fault is fails_while_it_meets_the_others or "Traceback" not in job.output, job.output
    tally(f"lost ranks: one of {world_size} {fault.__name__.replace('_', ' ')}: named, ended", seconds=took)


@pytest.mark.launch
@pytest.mark.skipif(not LONG, reason="make faults: a launch takes long")
def test_a_rank_killed_under_a_launcher_ends_the_job_in_time_and_is_named(
    tmp_path: Path, tally: Tally, uninterrupted: Uninterrupted
) -> None:
    recipe = write_recipe(tmp_path)
    gated = f"plugins=[{TINY},{Path(__file__).with_name('gated.py')}]"
    command = [*LAUNCH, str(recipe), *BRIEF, TIMEOUT, gated]
    began = time.time()
    killed = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"GATE_PLACE": "killed"}, capture_output=True, text=True, timeout=120
    )
    took = time.time() - max(began, (tmp_path / "runs" / "run" / "metrics.jsonl").stat().st_mtime)
    assert killed.returncode != 0 and took < 2 * LIMIT_S, killed.stderr  # the launcher's own end included
    assert re.search(rf"training failed: rank 1 is not responding.* reading data, after step {STEP}", killed.stderr), (
        killed.stderr
    )
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "finished run" in done.stderr, done.stderr
    assert (weights(tmp_path / "runs" / "run"), lines(tmp_path / "runs" / "run")) == uninterrupted(2, recipe)
    tally("lost ranks: killed under accelerate launch: named, ended, resumed exactly", seconds=took)
