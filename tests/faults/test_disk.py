"""A full or read-only disk is reported in one clear message; what was saved stays, and the same command resumes."""

from __future__ import annotations

import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.faults.conftest import LONG, Tally
from tests.faults.hooks import Gate, before_call, before_step
from tests.processes import Job, lines, weights, write_recipe
from trainer.runs import state
from trainer.runs.checkpoint import verify

OPTIONS = ("train.precision=fp32", "train.timeout=0.1 minutes")


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A file system of 4 MiB, which holds the runs."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = (
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder], capture_output=True, text=True)
        if shutil.which("mount")
        else None
    )
    if mounted is None or mounted.returncode:
        pytest.skip(f"no small disk can be mounted here: {mounted.stderr.strip() if mounted else 'no mount command'}")
    monkeypatch.setenv("TRAINER_RUNS", str(folder))
    yield folder
    subprocess.run(["umount", folder], check=True)


def fill(disk: Path) -> None:
    with (disk / "ballast").open("wb", buffering=0) as file, suppress(OSError):
        while file.write(bytes(512)):
            pass
    assert shutil.disk_usage(disk).free == 0


def messages(output: str) -> list[str]:
    """The failures reported, without what torch's C++ code adds when a process is gone."""
    assert "Traceback" not in output, output
    return [line for line in output.splitlines() if line.startswith(("error: ", "training failed: "))]


def filled_during_save(disk: Path) -> None:
    """While the third checkpoint is written, and training has continued."""
    continued = threading.Event()
    before_step(10, lambda trainer: continued.set())
    # Each checkpoint has two files of tensors.
    before_call(state, "save_file", lambda *_: (continued.wait(), fill(disk)), on_call=5)


def filled_between_saves(disk: Path) -> None:
    """Metrics, or the summary, are the first that can't be written."""

    def filling(trainer: Any) -> None:
        trainer.writer.wait()
        fill(disk)

    before_step(8, filling)


@pytest.mark.parametrize(
    ("filled", "world_size", "log_every", "message"),
    [
        (filled_during_save, 2, "1000 steps", "the checkpoint of step 10 can't be written"),
        (filled_between_saves, 1, "1 steps", "can't be written"),
        *([(filled_between_saves, 2, "1000 steps", "can't be written")] if LONG else []),
    ],
)
@pytest.mark.slow
def test_a_full_disk_ends_the_run_in_one_message_and_nothing_saved_is_lost(
    tmp_path: Path,
    disk: Path,
    tally: Tally,
    filled: Callable[[Path], None],
    world_size: int,
    log_every: str,
    message: str,
) -> None:
    recipe = write_recipe(tmp_path)
    options = (*OPTIONS, f"train.log_every={log_every}")
    with Job(world_size, recipe, "name=uninterrupted", *options) as job:
        assert set(job.wait()) == {0}, job.output
    with Job(world_size, recipe, *options, fault=lambda rank: filled(disk) if rank == 0 else None) as job:
        assert job.wait() == [3] * world_size, job.output
    printed = sorted(messages(job.output), key=lambda line: line.startswith("training failed: rank 0"))
    # If no launcher ends the other rank, it reports why it ends.
    assert printed and all(line.startswith("training failed: rank 0") for line in printed[1:]), job.output
    assert (
        message in printed[0]
        and "No space left on device" in printed[0]
        and "(0 MiB free)" in printed[0]
        and "rerun to resume" in printed[0]
    ), printed
    found = sorted((disk / "run" / "checkpoints").glob("step_*"))
    assert [folder.name for folder in found] == ["step_00000005", "step_00000007"]
    for folder in found:
        verify(folder)
        state.Checkpoint.load(folder)
    (disk / "ballast").unlink()
    with Job(world_size, recipe, *options) as job:
        assert set(job.wait()) == {0}, job.output
    assert "resumed run from step 7" in job.output
    assert weights(disk / "run") == weights(disk / "uninterrupted") and lines(disk / "run") == lines(
        disk / "uninterrupted"
    )
    tally("disks filled to the last byte: one message, older checkpoints load, resumed and ended equal to the bit")


def test_a_read_only_run_folder_is_one_message(tmp_path: Path, disk: Path, tally: Tally) -> None:
    recipe = write_recipe(tmp_path)
    with Job(1, recipe, "train.duration=8 steps") as job:
        assert job.wait() == [0], job.output
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    for name in ("run", "new"):
        with Job(2, recipe, f"name={name}", "train.duration=10 steps") as job:
            assert job.wait() == [2, 2], job.output
        (printed,) = messages(job.output)
        assert "Read-only file system" in printed and str(disk) in printed, printed
    subprocess.run(["mount", "-o", "remount,rw", disk], check=True)
    with Job(1, recipe, "train.duration=10 steps") as job:
        assert job.wait() == [0] and "resumed run from step 8" in job.output, job.output
    tally("read-only run folders: one message")


def test_a_run_folder_in_use_by_another_process_is_one_message(tmp_path: Path, tally: Tally) -> None:
    recipe, gate = write_recipe(tmp_path), Gate()
    with Job(1, recipe, fault=lambda rank: before_step(3, gate.stop_here)) as first:
        gate.await_arrival()
        with Job(2, recipe) as second:
            assert second.wait() == [2, 2], second.output
        (printed,) = messages(second.output)
        assert "is in use by another process" in printed
        gate.open()
        assert first.wait() == [0], first.output
    tally("run folders in use by another process: one message")
