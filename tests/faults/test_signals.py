"""A stop signal is handled at any point of a run: it ends in under 20 seconds with exit code 0, and resumes exactly."""

from __future__ import annotations

import json
import os
import pty
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.faults.conftest import BRIEF, LONG, Tally, Uninterrupted
from tests.faults.hooks import Gate, before_call, before_step
from tests.processes import TINY, Job, end_with_command, enter_command, lines, weights, write_recipe
from trainer import trainer as trainer_module
from trainer.data import prepare
from trainer.runs import state
from trainer.runs.checkpoint import verify
from trainer.runs.store import CheckpointStore
from trainer.tasks.segmentation import Segmentation

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 20.0  # launchers kill 30 s after the signal


def resume(world_size: int, recipe: Path, *options: str) -> tuple[str, Any]:
    """The same command again; returns what it printed, and its weights and metrics."""
    with Job(world_size, recipe, *BRIEF, *options) as job:
        assert job.wait() == [0] * world_size, job.output
    run = recipe.parent / "runs" / "run"
    return job.output, (weights(run), lines(run))


def in_first_step(gate: Gate) -> Callable[[int], None]:
    return lambda rank: before_step(0, gate.stop_here)


def in_evaluation(gate: Gate) -> Callable[[int], None]:
    """Between the first and the second batch."""
    return lambda rank: before_call(Segmentation, "evaluation_sums", gate.stop_here, on_call=2)


def in_save(gate: Gate) -> Callable[[int], None]:
    """In the thread of rank 0 that writes."""
    return lambda rank: before_call(state, "save_file", gate.stop_here, on_call=2) if rank == 0 else None


def in_preparation(gate: Gate) -> Callable[[int], None]:
    return lambda rank: before_call(prepare, "check_row", gate.stop_here, on_call=20) if rank == 0 else None


def in_building(gate: Gate) -> Callable[[int], None]:
    return lambda rank: before_call(trainer_module, "build_task", gate.stop_here) if rank == 0 else None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("place", "world_size", "arrivals", "number", "to_rank", "message"),
    [
        (in_first_step, 1, 1, signal.SIGUSR1, None, "stopped on SIGUSR1 at step 1, checkpoint saved"),
        (in_first_step, 1, 1, signal.SIGHUP, None, "stopped on SIGHUP at step 1, checkpoint saved"),
        (in_first_step, 2, 2, signal.SIGTERM, None, "stopped on SIGTERM at step 1, checkpoint saved"),
        (in_evaluation, 2, 2, signal.SIGTERM, None, "stopped on SIGTERM at step 7, checkpoint saved"),
        (in_evaluation, 2, 2, signal.SIGTERM, 1, "stopped on a signal at step 7, checkpoint saved"),
        (in_save, 2, 1, signal.SIGTERM, None, "checkpoint saved"),
        (in_preparation, 2, 1, signal.SIGTERM, None, "stopped on SIGTERM before training began"),
        (in_building, 2, 1, signal.SIGTERM, None, "stopped on SIGTERM before training began"),
    ],
    ids=[
        "first-step-SIGUSR1",
        "first-step-SIGHUP",
        "first-step",
        "evaluation",
        "evaluation-to-one-rank",
        "save",
        "preparation",
        "building",
    ],
)
def test_a_stop_is_handled_at_once_and_the_same_command_resumes_exactly(
    tmp_path: Path,
    tally: Tally,
    uninterrupted: Uninterrupted,
    place: Callable[[Gate], Any],
    world_size: int,
    arrivals: int,
    number: int,
    to_rank: int | None,
    message: str,
) -> None:
    recipe, gate = write_recipe(tmp_path), Gate()
    with Job(world_size, recipe, *BRIEF, fault=place(gate)) as job:
        gate.await_arrival(arrivals)
        if place is in_save:
            assert list((tmp_path / "runs" / "run" / "checkpoints").glob(".writing-*"))
        job.signal(number, to_rank)
        began = time.monotonic()
        gate.open(arrivals)
        assert job.wait(2 * LIMIT_S) == [0] * world_size, job.output
        took = time.monotonic() - began
        assert took < LIMIT_S
    assert message in job.output and "Traceback" not in job.output, job.output
    if place is in_preparation:
        assert {path.name for path in (tmp_path / "data").iterdir()} == {".tiny.lock"}  # nothing half-done
    output, ended = resume(world_size, recipe)
    assert ended == uninterrupted(world_size, recipe)
    assert ("resumed run from step" in output) == ("checkpoint saved" in message)
    tally(
        f"stop signals {place.__name__.replace('_', ' ')}: exit 0, resumed, weights and metrics equal to the bit",
        seconds=took,
    )


def test_a_second_ctrl_c_ends_at_once_and_saved_checkpoints_are_intact(
    tmp_path: Path, tally: Tally, uninterrupted: Uninterrupted
) -> None:
    recipe, gate = write_recipe(tmp_path), Gate()
    # In the middle of the third checkpoint, which has three files of tensors.
    with Job(1, recipe, *BRIEF, fault=lambda rank: before_call(state, "save_file", gate.stop_here, on_call=8)) as job:
        gate.await_arrival()
        for _ in range(100):  # two that come at once are one
            job.signal(signal.SIGINT)
            if job.wait(0.1) != [None]:
                break
        assert job.wait(0) == [130], job.output
    assert "second Ctrl-C: exiting immediately" in job.output
    store = CheckpointStore(tmp_path / "runs" / "run" / "checkpoints")
    assert store.steps() == [5, 7] and list(store.path.glob(".writing-*"))
    for step in (5, 7):
        verify(store.folder(step))
    assert resume(1, recipe)[1] == uninterrupted(1, recipe)
    tally("second Ctrl-C in the middle of a save: exit 130 at once, checkpoints intact, resumed exactly")


def test_a_hang_up_of_an_entire_process_group_leaves_loader_workers_to_the_process_that_started_them(
    tmp_path: Path,
) -> None:
    gate = Gate()
    with Job(
        1, write_recipe(tmp_path), *BRIEF, "data.workers=1", fault=lambda rank: before_step(1, gate.stop_here)
    ) as job:
        gate.await_arrival()
        os.killpg(job.group, signal.SIGHUP)
        gate.open()
        assert job.wait() == [0], job.output
    assert "stopped on SIGHUP at step 2, checkpoint saved" in job.output and "worker" not in job.output, job.output


@pytest.mark.parametrize(
    ("ignored", "status"), [(False, "stopped"), (True, "finished")], ids=["handled", "as-nohup-does"]
)
def test_a_run_whose_terminal_is_closed_saves_a_checkpoint_and_one_that_ignores_hang_ups_trains_on(
    tmp_path: Path, ignored: bool, status: str
) -> None:
    recipe, gate = write_recipe(tmp_path), Gate()
    child, terminal = pty.fork()
    if child == 0:
        signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
        enter_command()
        before_step(3, gate.stop_here)
        end_with_command(recipe, *BRIEF)
    gate.await_arrival()
    os.close(terminal)
    gate.open()
    _, code = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(code) == 0
    run = tmp_path / "runs" / "run"
    assert json.loads((run / "summary.json").read_text())["status"] == status
    assert (run / "checkpoints" / "last").resolve().name == ("step_00000010" if ignored else "step_00000004")


def start(recipe: Path, gate: Gate, place: str, *options: str, **variables: str) -> subprocess.Popen[str]:
    """A real `trainer/run.py` that stops at the gate."""
    return subprocess.Popen(
        [sys.executable, "trainer/run.py", str(recipe), *BRIEF, *options],
        cwd=ROOT,
        env=os.environ
        | {"GATE_PLACE": place, "GATE_ARRIVALS": str(gate.arrivals[1]), "GATE_PASSES": str(gate.passes[0])}
        | variables,
        pass_fds=(gate.arrivals[1], gate.passes[0]),
        stderr=subprocess.PIPE,
        text=True,
    )


def ends_in_time(process: subprocess.Popen[str]) -> str:
    """What it printed."""
    _, errors = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 0 and "Traceback" not in errors, errors
    return errors


long_only = pytest.mark.skipif(not LONG, reason="make faults: real starts take long")
GATED = f"plugins=[{TINY},{Path(__file__).with_name('gated.py')}]"


@long_only
@pytest.mark.launch
def test_a_stop_during_data_preparation_leaves_nothing_half_done(
    tmp_path: Path, tally: Tally, uninterrupted: Uninterrupted
) -> None:
    recipe, gate = write_recipe(tmp_path), Gate()
    with start(recipe, gate, "rows", GATED) as process:
        gate.await_arrival()
        process.send_signal(signal.SIGTERM)
        assert "stopped on SIGTERM before training began" in ends_in_time(process)
    assert not [path for path in (tmp_path / "data").iterdir() if not path.name.endswith(".lock")]
    assert resume(1, recipe, GATED)[1] == uninterrupted(1, recipe)
    tally("stop signals in data preparation, real run: exit 0 in time, nothing half-done, started again")


@long_only
@pytest.mark.launch
def test_a_stop_while_wandb_waits_for_a_server_that_never_answers(
    tmp_path: Path, tally: Tally, uninterrupted: Uninterrupted
) -> None:
    recipe, gate = write_recipe(tmp_path), Gate()
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        key = "0123456789abcdef0123456789abcdef01234567"  # synthetic
        with start(
            recipe, gate, "step", GATED, "track=[wandb]", WANDB_MODE="online", WANDB_API_KEY=key, WANDB_BASE_URL=address
        ) as process:
            gate.await_arrival()
            server.settimeout(60)
            connection, _ = server.accept()  # W&B is starting, and waits for an answer
            process.send_signal(signal.SIGTERM)
            gate.open()
            errors = ends_in_time(process)
            connection.close()
    assert "stopped on SIGTERM at step 6, checkpoint saved" in errors and key not in errors, errors
    assert resume(1, recipe, GATED)[1] == uninterrupted(1, recipe)
    tally("stop signals while W&B starts, real run: exit 0 in time, resumed, weights and metrics equal to the bit")
