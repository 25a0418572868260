"""What all tests share: folders of their own, and nothing inherited from, or left to, the machine they run on."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

# Each worker of pytest-xdist has one core to itself, and a forked child hangs in OpenMP with more than one thread.
os.environ["OMP_NUM_THREADS"] = "1"
# Forked tests would ask for CUDA, and several ranks for one card: only tests that need a GPU see one, where they run
# alone.
# Here, since this file is read before any that imports torch.
_VISIBLE = os.environ.get("CUDA_VISIBLE_DEVICES")
os.environ["CUDA_VISIBLE_DEVICES"] = ""

SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER of prctl(2)
GRACE_S = 20.0  # for a process that a test has ended already
SHARED = ("resource_tracker", "forkserver")  # processes that multiprocessing keeps for the whole session


def pytest_configure(config: pytest.Config) -> None:
    """Signals have their default effect, whatever started the suite:
    a background shell has its children ignore SIGINT, nohup SIGHUP.
    """
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    # A grandchild whose parent has ended becomes a child of this process, where it is found.
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(SUBREAPER, 1, 0, 0, 0)


@pytest.hookimpl(trylast=True)  # after -m and -k have chosen
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if items and all(item.get_closest_marker("gpu") for item in items):
        del os.environ["CUDA_VISIBLE_DEVICES"]
        if _VISIBLE is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = _VISIBLE


@pytest.fixture(autouse=True)
def _ends_what_it_starts() -> Iterator[None]:
    """Fails a test that leaves a process behind, and ends that process."""
    before = _children()
    yield
    # Of a loader that an error keeps alive; they would end with this process.
    for worker in multiprocessing.active_children():
        if worker.daemon and worker.pid not in before:
            worker.kill()
            worker.join()
    if left := _children() - before:
        processes = []
        for pid in left:
            with suppress(psutil.NoSuchProcess):
                processes.append(psutil.Process(pid))
        _, alive = psutil.wait_procs([process for process in processes if not _is_shared(process)], GRACE_S)
        commands = []
        for process in alive:
            with suppress(psutil.NoSuchProcess):
                commands.append(" ".join(process.cmdline()))
                for each in (*process.children(recursive=True), process):
                    each.kill()
        assert not commands, f"still running after the test: {commands}"


def _children() -> set[int]:
    """This process's children, of all of its threads."""
    return {int(pid) for file in Path("/proc/self/task").glob("*/children") for pid in file.read_text().split()}


def _is_shared(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return any(name in argument for argument in process.cmdline() for name in SHARED)
    return False


@pytest.fixture(autouse=True)
def _own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test has its own data and runs, and never talks to W&B."""
    monkeypatch.setenv("TRAINER_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("TRAINER_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
