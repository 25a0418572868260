"""fp16 in complete runs, on a CPU: gradients that overflow are counted,
and never finite ones end the run or are reported.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import trainer.trainer
from tests.faults.conftest import OPTIONS, Tally
from tests.processes import Job, lines, weights, write_recipe
from trainer.optim.guard import MAX_OVERFLOWS
from trainer.runs.state import Checkpoint
from trainer.tasks.segmentation import Segmentation

STEPS = 30


class Overflow(torch.autograd.Function):
    """Nothing forward, an infinite gradient backward."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * float("inf")


def scaled(overflows: Callable[[int], bool]) -> Callable[[int], None]:
    """Trains with the gradient scaler that fp16 has on GPUs; gradients overflow in the steps that `overflows` names."""

    def fault(rank: int) -> None:
        build, loss_sums, steps = trainer.trainer.build_accelerator, Segmentation.loss_sums, iter(range(10**6))

        def build_with_scaler(recipe: Any) -> Any:
            accelerator = build(recipe)
            accelerator.scaler = torch.amp.GradScaler("cpu")
            accelerator.unscale_gradients = lambda: accelerator.scaler.unscale_(accelerator._optimizers[0].optimizer)
            return accelerator

        def overflowing_sums(task: Segmentation, model: Any, batch: Any) -> dict[str, Tensor]:
            sums = loss_sums(task, model, batch)
            return {name: Overflow.apply(value) for name, value in sums.items()} if overflows(next(steps)) else sums

        trainer.trainer.build_accelerator = build_with_scaler
        Segmentation.loss_sums = overflowing_sums

    return fault


FP16 = (*OPTIONS, f"train.duration={STEPS} steps", "evaluate.every=100%", "checkpoint.every=100%")


def test_fp16_whose_gradients_are_never_finite_ends_the_run_with_advice(tmp_path: Path, tally: Tally) -> None:
    recipe = write_recipe(tmp_path)
    with Job(1, recipe, *FP16, fault=scaled(lambda step: step >= 3)) as job:
        assert job.wait() == [3], job.output
    step = 3 + MAX_OVERFLOWS
    assert (
        f"training failed: step {step}: the gradients overflow fp16 in {MAX_OVERFLOWS} steps in a row, at every scale"
        in job.output
    ), job.output
    assert (
        "set train.precision=bf16 or fp32" in job.output
        and "Traceback" not in job.output
        and "clip_norm" not in job.output
    )
    run = tmp_path / "runs" / "run"
    assert lines(run, "train")[-1]["num_skipped_steps"] == MAX_OVERFLOWS - 1  # the last one ended the run
    tally("fp16 whose gradients are never finite: one message with advice")


def test_where_bad_steps_are_skipped_the_run_continues_and_the_report_has_the_advice(
    tmp_path: Path, tally: Tally
) -> None:
    recipe = write_recipe(tmp_path)
    with Job(1, recipe, *FP16, "train.non_finite=skip", fault=scaled(lambda step: True)) as job:
        assert job.wait() == [0], job.output
    assert f"skipped, {MAX_OVERFLOWS} so far: set train.precision=bf16 or fp32" in job.output, job.output
    run = tmp_path / "runs" / "run"
    summary = json.loads((run / "summary.json").read_text())
    assert summary["skipped_steps"] == lines(run, "train")[-1]["num_skipped_steps"] == STEPS
    tally("fp16 whose gradients are never finite, skipped: reported with advice")


@pytest.mark.slow
@pytest.mark.parametrize("non_finite", ["error", "skip"])
def test_a_scaler_that_finds_its_scale_is_counted_resumed_and_not_reported(
    tmp_path: Path, tally: Tally, non_finite: str
) -> None:
    recipe, options = write_recipe(tmp_path), (*FP16, f"train.non_finite={non_finite}", "schedule=constant")
    overflowing = {0, 1, 7, 20}
    with Job(1, recipe, "name=uninterrupted", *options, fault=scaled(overflowing.__contains__)) as job:
        assert job.wait() == [0] and "skipped" not in job.output, job.output
    with Job(1, recipe, *options, "train.duration=10 steps", fault=scaled(overflowing.__contains__)) as job:
        assert job.wait() == [0], job.output
    with Job(1, recipe, *options, fault=scaled(lambda step: step + 10 in overflowing)) as job:
        assert job.wait() == [0], job.output
    run, uninterrupted = (tmp_path / "runs" / name for name in ("run", "uninterrupted"))
    assert weights(run) == weights(uninterrupted)
    assert Checkpoint.load(run / "checkpoints" / "last").counters["scaler"]["scale"] == 2.0**12  # type: ignore[index]
    for each in (run, uninterrupted):
        assert lines(each, "train")[-1]["num_skipped_steps"] == len(overflowing)
        losses = [line["loss"] for line in lines(each, "train")]
        assert [step for step, loss in enumerate(losses) if loss is None] == sorted(overflowing)  # means of no step
    tally("fp16 whose scaler finds its scale: counted, interrupted and resumed equal to the bit")
