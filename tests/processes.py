"""Runs the framework in forked processes: a launch takes ten seconds, a fork of a parent that has imported everything 0.2."""

from __future__ import annotations

import json
import os
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Imported here, not in every child: what the framework imports at first use takes seconds.
import datasets  # noqa: F401
import matplotlib.figure  # noqa: F401
import torch
import torch._dynamo
import torch.multiprocessing as mp

from trainer.accelerator import Launch
from trainer.recipe import load_recipe
from trainer.signals import STOP
from trainer.tasks.build import TASK_CHECKS
from trainer.trainer import Trainer

TINY = Path(__file__).with_name("tiny.py")
RECIPE = f"""
plugins: [{TINY}]
task: segmentation
data: {{name: tiny, batch_size: 8, window: 3, workers: 0, augment: [{{name: random_crop, size: [16, 16]}}, horizontal_flip]}}
model: {{name: unet, width: 4, depth: 2}}
loss: soft_iou
optimizer: {{name: adamw, lr: 1e-2}}
schedule: {{name: cosine, warmup: 10%}}
train: {{duration: 3 epochs, precision: fp64, threads: 1, log_every: 1 steps}}
evaluate: {{every: 1 epoch, best: miou, batch_size: 5, pictures: 0}}
checkpoint: {{every: 5 steps}}
"""


def _child(rank: int, function: Callable[..., Any], world_size: int, port: int, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)  # a forked child hangs in OpenMP otherwise
    if world_size > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}  # as launchers do
    code = 1
    try:
        function(*arguments)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # not through the parent's exit handlers


def run_processes(world_size: int, function: Callable[..., Any], *arguments: Any) -> None:
    """Calls `function` in `world_size` forked processes of one group; raises if one of them failed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.start_processes(_child, (function, world_size, port, arguments), nprocs=world_size, start_method="fork")


def write_recipe(folder: Path, text: str = RECIPE, name: str = "run") -> Path:
    """Writes a recipe file."""
    file = folder / f"{name}.yaml"
    file.write_text(text, encoding="utf-8")
    return file


def train(recipe: Path, overrides: tuple[str, ...] = (), stop_after: int | None = None, resume: str = "auto") -> None:
    """What `run.py` does; `stop_after` asks the last rank to stop after that many steps in all."""
    loaded = load_recipe(recipe, overrides, [*Launch.read(file=Path("none")).checks(), *TASK_CHECKS])
    trainer = Trainer(loaded, resume)
    if stop_after is not None and trainer.rank == trainer.world_size - 1:
        step = trainer._train_step

        def stopping(batches: Any) -> None:
            step(batches)
            if trainer.step == stop_after:
                STOP.signal_name = "SIGTERM"

        trainer._train_step = stopping  # type: ignore[method-assign]
    trainer.fit()
    trainer.accelerator.end_training()


def lines(run: Path, split: str | None = None) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl without what depends on the clock."""
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [
        {key: value for key, value in line.items() if not key.endswith("_per_second") and key not in ("seconds", "time")}
        for line in found
        if split in (None, line["split"])
    ]
