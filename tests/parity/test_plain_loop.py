"""The framework computes what a plain loop computes."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import plain_loop
from tests.processes import lines, run_processes, train, write_recipe
from trainer.data.order import Slices
from trainer.recipe import load_recipe
from trainer.trainer import Trainer

STEPS = 15
OPTIONS = ("loss=cross_entropy", f"train.duration={STEPS} steps", "schedule.warmup=0%", "train.precision=fp64")


def _plain(recipe: Path, out: Path) -> None:
    """Gives the plain loop the model and the batches of the framework, and nothing else of it."""
    trainer = Trainer(load_recipe(recipe, ("name=plain", *OPTIONS)))
    trainer.build()

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for positions in Slices(8, 1, 0, 1, 0):
            batch = trainer.data.train.__getitems__(positions)
            yield batch["image"], batch["mask"][:, 0]

    losses = plain_loop.train(trainer.task.model, batches(), STEPS, torch.optim.AdamW(trainer.task.model.parameters(), lr=1e-2))
    out.write_text(json.dumps([float(loss) for loss in losses]))


def test_losses_equal_those_of_a_plain_loop(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    run_processes(1, train, recipe, ("name=framework", *OPTIONS))
    run_processes(1, _plain, recipe, tmp_path / "losses.json")
    found = [line["loss"] for line in lines(tmp_path / "runs" / "framework", "train")]
    expected = json.loads((tmp_path / "losses.json").read_text())
    assert len(found) == len(expected) == STEPS
    assert all(math.isclose(a, b, rel_tol=1e-9) for a, b in zip(found, expected, strict=True)), (found, expected)
    assert expected[-1] < 0.8 * expected[0]
    assert torch.isfinite(torch.tensor(found)).all()
