"""fp16's gradient scaler, on a CPU: in fp64 its powers of two are exact,
so a scaled training must end with the very bits of one without.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.faults.hooks import before_step
from tests.processes import Job, lines, weights, write_recipe
from trainer import trainer as loop
from trainer.tasks.segmentation import Segmentation

STEPS = 12
OPTIONS = (
    "train.precision=fp64",
    f"train.duration={STEPS} steps",
    "checkpoint.every=100%",
    "optimizer={name: sgd, lr: 0.02}",
    "train.accumulate=2",
    "train.clip_norm=0.05",
)
LARGEST = 2.0**15  # of a gradient, above which it overflows, as in fp16


class Narrow(torch.autograd.Function):
    """Gradients that overflow."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return torch.where(gradient.abs() > LARGEST, torch.inf, gradient)


def scaled(initial: float, overflows: bool = False, then: Callable[[], Any] | None = None) -> Callable[[int], None]:
    """Makes a process train with a gradient scaler that doubles its scale after every third good step."""

    def fault(rank: int) -> None:
        build, loss_sums = loop.build_accelerator, Segmentation.loss_sums

        def with_scaler(recipe: Any) -> Any:
            accelerator = build(recipe)
            accelerator.scaler, accelerator.native_amp = (
                torch.amp.GradScaler("cpu", init_scale=initial, growth_interval=3),
                True,
            )
            accelerator.state._mixed_precision = "fp16"
            return accelerator

        def narrow(task: Segmentation, model: Any, batch: Any) -> dict[str, Tensor]:
            return {name: 2**12 * Narrow.apply(value / 2**12) for name, value in loss_sums(task, model, batch).items()}

        loop.build_accelerator = with_scaler
        if overflows:
            Segmentation.loss_sums = narrow  # type: ignore[method-assign]
        if then:
            then()

    return fault


def run(recipe: Path, *options: str, fault: Callable[[int], None] | None = None) -> Path:
    with Job(1, recipe, *OPTIONS, *options, fault=fault) as job:
        assert job.wait() == [0], job.output
    return recipe.parent / "runs" / options[0].removeprefix("name=")


def scaler_of(folder: Path) -> dict[str, float]:
    """The scaler's state in the newest checkpoint."""
    found: dict[str, float] = json.loads((folder / "checkpoints" / "last" / "trainer.json").read_text())["scaler"]
    return found


@pytest.mark.parametrize("initial", [1.0, 2.0**20])
def test_gradients_are_logged_and_clipped_as_if_nothing_had_scaled_them(tmp_path: Path, initial: float) -> None:
    recipe = write_recipe(tmp_path)
    plain, with_scaler = run(recipe, "name=plain"), run(recipe, "name=scaled", fault=scaled(initial))
    assert weights(with_scaler) == weights(plain)
    assert lines(with_scaler) == lines(plain)
    assert min(line["gradient_norm"] for line in lines(plain, "train")) > 0.05  # clipping does something
    assert scaler_of(with_scaler)["scale"] == initial * 2.0 ** (STEPS // 3)


@pytest.mark.slow
def test_an_interrupted_training_skips_the_steps_that_an_uninterrupted_one_skips(tmp_path: Path) -> None:
    """Which ones overflow depends on the scale and on how many good steps it has seen."""
    recipe = write_recipe(tmp_path)
    uninterrupted = run(recipe, "name=uninterrupted", fault=scaled(2.0**15, overflows=True))
    for step in (5, 8):
        stop = partial(before_step, step, lambda trainer: os.kill(os.getpid(), signal.SIGTERM))
        run(recipe, "name=cut", fault=scaled(2.0**15, overflows=True, then=stop))
    cut = run(recipe, "name=cut", fault=scaled(2.0**15, overflows=True))
    assert scaler_of(cut) == scaler_of(uninterrupted)
    assert scaler_of(uninterrupted)["scale"] < 2.0**15
    assert weights(cut) == weights(uninterrupted) != weights(run(recipe, "name=plain"))
    assert lines(cut) == lines(uninterrupted)
