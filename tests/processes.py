"""Runs the framework in forked processes: a launch takes ten seconds,
a fork of a parent that has imported everything 0.2.
"""

from __future__ import annotations

import gc
import hashlib
import json
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

# Imported here, not in every child: what the framework imports at first use takes seconds.
import accelerate  # noqa: F401
import datasets  # noqa: F401
import matplotlib.figure  # noqa: F401
import scipy.io  # noqa: F401  # by datasets
import torch
import torch._dynamo
import torch.distributed.algorithms.ddp_comm_hooks
import torch.multiprocessing as mp
from accelerate.state import AcceleratorState
from PIL import Image

from trainer.components import CATALOGUE, catalogue
from trainer.distributed.launch import Launch
from trainer.recipe.load import load_recipe
from trainer.reporting import figures, reporter
from trainer.run import main
from trainer.signals import STOP
from trainer.tasks.checks import TASK_CHECKS
from trainer.trainer import Trainer

Image.init()
for kind in CATALOGUE:
    catalogue(kind)

# The autograd engine starts with the first backward pass. After an export that would start threads, and a child of a
# process with those can't run backward passes.
torch.ones(1, requires_grad=True).sum().backward()

LAUNCH = (
    *(str(Path(sys.executable).with_name("accelerate")), "launch", "--config_file", "accelerate_config.yaml"),
    *("--num_processes", "2", "trainer/run.py"),
)
"""A real launch of two processes, from the repository's root; a recipe and overrides follow."""
TINY = Path(__file__).with_name("tiny.py")
RECIPE = f"""
plugins: [{TINY}]
task: segmentation
data: {{name: tiny, batch_size: 8, window: 3, workers: 0,
       augment: [{{name: random_crop, size: [16, 16]}}, horizontal_flip]}}
model: {{name: unet, width: 4, depth: 2}}
loss: soft_iou
optimizer: {{name: adamw, lr: 1e-2}}
schedule: {{name: cosine, warmup: 10%}}
train: {{duration: 3 epochs, precision: fp64, threads: 1, log_every: 1 steps}}
evaluate: {{every: 1 epoch, best: miou, batch_size: 5, pictures: 0}}
checkpoint: {{every: 5 steps}}
"""


def _enter(rank: int, world_size: int, port: int) -> None:
    torch.set_num_threads(1)  # a forked child hangs in OpenMP otherwise
    gc.freeze()  # looking through what the parent left takes long, and copies it
    reporter.draw_curves = lambda *_: None  # a third of a brief run
    AcceleratorState._reset_state(reset_partial_state=True)  # a test may have built an Accelerator in this process
    if world_size > 1:
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "LOCAL_WORLD_SIZE": str(world_size),
        }
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}  # as launchers do


def _end_with(function: Callable[..., Any], *arguments: Any) -> None:
    code: Any = 1
    try:
        function(*arguments)
        code = 0
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
    finally:
        with suppress(OSError):  # a terminal that was closed
            sys.stdout.flush()
            sys.stderr.flush()
        for worker in multiprocessing.active_children():  # of a loader, which otherwise looks for its parent every 5 s
            worker.kill()
            worker.join()
        os._exit(code)  # not through the parent's exit handlers


def _child(rank: int, function: Callable[..., Any], world_size: int, port: int, arguments: tuple[Any, ...]) -> None:
    _enter(rank, world_size, port)
    _end_with(function, *arguments)


def enter_command(rank: int = 0, world_size: int = 1, port: int = 0) -> None:
    """In a forked child whose output is where it belongs: makes it what `trainer/run.py` is at its start."""
    sys.stdout = sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    _enter(rank, world_size, port)
    STOP.__init__()  # type: ignore[misc]  # it remembers whose signals it handles
    STOP.install()


def end_with_command(*arguments: str | Path) -> None:
    """In a forked child: what `trainer/run.py` does with that command line, until the child's end."""
    _end_with(lambda: sys.exit(main([str(argument) for argument in arguments])))


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def run_processes(world_size: int, function: Callable[..., Any], *arguments: Any) -> None:
    """Calls `function` in `world_size` forked processes of one group; raises if one of them failed."""
    mp.start_processes(_child, (function, world_size, _free_port(), arguments), nprocs=world_size, start_method="fork")


class Job:
    """A run of `trainer/run.py` in forked processes, to be killed, stopped or signalled; in its own process group.

    No launcher ends the others when one of them is lost: that they end is the framework's doing.

    Args:
        world_size: number of processes.
        arguments: the command line: a recipe, overrides, `--resume …`.
        fault: called in each process with its rank before the run begins, to patch what the test needs.
    """

    def __init__(self, world_size: int, *arguments: str | Path, fault: Callable[[int], Any] | None = None) -> None:
        self._output = tempfile.TemporaryFile("w+b")  # noqa: SIM115
        context, port, self.group = mp.get_context("fork"), _free_port(), 0
        self.processes: list[Any] = []
        for rank in range(world_size):
            process = context.Process(
                target=self._run, args=(rank, world_size, port, [str(argument) for argument in arguments], fault)
            )
            process.start()
            self.group = self.group or process.pid
            os.setpgid(process.pid, self.group)  # here and there, as either may come first
            self.processes.append(process)

    def _run(
        self, rank: int, world_size: int, port: int, arguments: list[str], fault: Callable[[int], Any] | None
    ) -> None:
        os.setpgid(0, self.group)
        for descriptor in (1, 2):
            os.dup2(self._output.fileno(), descriptor)
        enter_command(rank, world_size, port)
        if fault:
            fault(rank)
        end_with_command(*arguments)

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *_: object) -> None:
        self.signal(signal.SIGKILL)
        self.wait()
        self._printed = self.output
        self._output.close()

    def signal(self, number: int, rank: int | None = None) -> None:
        """Sends a signal to a rank, or to all that are still there."""
        for process in self.processes if rank is None else [self.processes[rank]]:
            if process.exitcode is None:
                os.kill(process.pid, number)

    def wait(self, seconds: float = 200.0) -> list[int | None]:
        """Waits until all have ended or the time is over; returns their exit codes,
        minus the signal's number of one that was killed.
        """
        deadline = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        return [process.exitcode for process in self.processes]

    @property
    def output(self) -> str:
        """The output of all of them so far."""
        return self._printed if self._output.closed else os.pread(self._output.fileno(), 2**20, 0).decode()


def write_recipe(folder: Path, text: str = RECIPE, name: str = "run") -> Path:
    """Writes a recipe file."""
    file = folder / f"{name}.yaml"
    file.write_text(text, encoding="utf-8")
    return file


def train(recipe: Path, overrides: tuple[str, ...] = (), stop_after: int | None = None, resume: str = "auto") -> None:
    """What `run.py` does; `stop_after` stops the last rank after that many steps in all."""
    loaded = load_recipe(recipe, overrides, [*Launch.read(file=Path("none")).checks(), *TASK_CHECKS])
    trainer = Trainer(loaded, resume)
    if stop_after is not None and trainer.rank == trainer.world_size - 1:
        step = trainer.train_step

        def stopping() -> None:
            step()
            if trainer.state.step == stop_after:
                STOP.signal_name = "SIGTERM"

        trainer.train_step = stopping  # type: ignore[method-assign]
    trainer.fit()
    trainer.accelerator.end_training()


def train_and_draw_curves(recipe: Path, overrides: tuple[str, ...] = ()) -> None:
    """`train` without what `run_processes` leaves out."""
    reporter.draw_curves = figures.draw_curves
    train(recipe, overrides)


def lines(run: Path, split: str | None = None) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl without what depends on the clock."""
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [
        {
            key: value
            for key, value in line.items()
            if not key.endswith("_per_second") and key not in ("seconds", "time")
        }
        for line in found
        if split in (None, line["split"])
    ]


def weights(run: Path) -> dict[str, str]:
    """SHA-256 of the weights, and of their average, in the newest checkpoint."""
    newest = max((run / "checkpoints").glob("step_*"))
    files = (newest / name for name in ("model.safetensors", "ema.safetensors"))
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files if file.exists()}
