"""What the loop does in each step and over interruptions, seen from outside."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.faults.hooks import before_step
from tests.processes import Job, write_recipe
from tests.reference_order import stream_of
from trainer import trainer as loop
from trainer.losses.soft_iou import SoftIoU
from trainer.reporting import stopwatch
from trainer.runs.checkpoint import verify
from trainer.runs.state import Checkpoint
from trainer.runs.store import CheckpointStore
from trainer.tasks.segmentation import Segmentation

GROUPS = [(i + 1) * 52 // 8 - i * 52 // 8 for i in range(8)]  # of tests/tiny.py: 52 rows in 8 row groups


def stop(trainer: Any) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def drawing(folder: Path, then: Callable[[], Any] | None = None) -> Callable[[int], None]:
    """Writes down what dropout would draw in each forward pass of each process."""

    def fault(rank: int) -> None:
        loss_sums = Segmentation.loss_sums

        def draw(task: Segmentation, model: Any, batch: Any) -> Any:
            with (folder / f"rank{rank}").open("a") as file:
                file.write(f"{torch.rand(4).tolist()}\n")
            return loss_sums(task, model, batch)

        Segmentation.loss_sums = draw  # type: ignore[method-assign]
        if then:
            then()

    return fault


def test_dropout_draws_differ_between_steps_micro_batches_and_ranks_and_resume_where_they_were(tmp_path: Path) -> None:
    recipe, options = (
        write_recipe(tmp_path),
        ("train.duration=6 steps", "train.accumulate=2", "checkpoint.every=100%", "evaluate.every=100%"),
    )
    kept = {}
    for name, faults in {"whole": (None,), "cut": (lambda: before_step(3, stop), None)}.items():
        folder = tmp_path / name
        folder.mkdir()
        for then in faults:
            with Job(2, recipe, f"name={name}", *options, fault=drawing(folder, then)) as job:
                assert job.wait() == [0, 0], job.output
        # Two processes run a forward pass before the first step, and throw it away.
        kept[name] = [draws[1:] for file in sorted(folder.iterdir()) if (draws := file.read_text().splitlines())]
    assert [len(draws) for draws in kept["whole"]] == [12, 12]
    assert len({draw for draws in kept["whole"] for draw in draws}) == 24
    assert [[*draws[:8], *draws[9:]] for draws in kept["cut"]] == kept["whole"]


def ticking(then: Callable[[], Any] | None = None, evaluation_s: float = 0.0) -> Callable[[int], None]:
    """A clock on which every optimizer step takes ten seconds, and each batch of an evaluation so many."""

    def fault(rank: int) -> None:
        train_step, evaluation_sums, now = loop.Trainer.train_step, Segmentation.evaluation_sums, [1000.0]

        def evaluating(*arguments: Any) -> Any:
            now[0] += evaluation_s
            return evaluation_sums(*arguments)

        def step(trainer: Any) -> None:
            now[0] += 10
            train_step(trainer)

        loop.Trainer.train_step = step  # type: ignore[method-assign]
        Segmentation.evaluation_sums = evaluating  # type: ignore[method-assign]
        stopwatch.time = SimpleNamespace(monotonic=lambda: now[0])  # type: ignore[attr-defined]
        if then:
            then()

    return fault


def test_a_training_in_minutes_lasts_as_long_however_often_it_is_interrupted(tmp_path: Path) -> None:
    recipe, options = (
        write_recipe(tmp_path),
        ("train.duration=2 minutes", "evaluate.every=1 minutes", "checkpoint.every=1 minutes", "checkpoint.keep=9"),
    )
    for then in (lambda: before_step(3, stop), lambda: before_step(7, stop), None):
        with Job(1, recipe, *options, fault=ticking(then)) as job:
            assert job.wait() == [0], job.output
    run = tmp_path / "runs" / "run"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["seconds"]) for line in lines if line["split"] == "train"] == [
        (step, 10.0 * step) for step in range(1, 13)
    ]
    assert [line["step"] for line in lines if line["split"] == "validation"] == [6, 12]
    assert CheckpointStore(run / "checkpoints").steps() == [4, 6, 8, 12]
    summary = json.loads((run / "summary.json").read_text())
    assert summary["seconds"] == 120 and summary["samples_per_second"] == 12 * 8 / 120


def test_the_logged_speed_is_that_of_training_alone(tmp_path: Path) -> None:
    with Job(
        1, write_recipe(tmp_path), "train.duration=7 steps", "evaluate.every=2 steps", fault=ticking(evaluation_s=50.0)
    ) as job:
        assert job.wait() == [0], job.output
    lines = [json.loads(line) for line in (tmp_path / "runs" / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["samples_per_second"] for line in lines if line["split"] == "train"] == pytest.approx([0.8] * 7)
    assert [line["split"] for line in lines].count("validation") == 4


class OnDevice(torch.Tensor):
    """A tensor on the CPU whose flags, bools, claim to be on a GPU:
    there the host learns later which steps were bad.
    """

    @property
    def device(self) -> Any:  # type: ignore[override]
        return SimpleNamespace(type="cuda") if self.dtype == torch.bool else torch.Tensor.device.__get__(self)


class Overflowing(torch.autograd.Function):
    """A value whose gradient is infinite."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor) -> torch.Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient * torch.inf


def making_non_finite(bad: set[int], what: str, device: str) -> Callable[[int], None]:
    """Makes batches with these samples have a loss that isn't finite, gradients that aren't where the loss is,
    or images that corrupt batch norms too.
    """

    def fault(rank: int) -> None:
        loss_sums, inputs, combine = Segmentation.loss_sums, Segmentation.inputs, SoftIoU.combine
        is_bad = False

        def non_finite_images(task: Segmentation, image: torch.Tensor) -> torch.Tensor:
            return inputs(task, image) * (torch.nan if is_bad and what == "images" else 1.0)

        def non_finite_sums(task: Segmentation, model: Any, batch: Any) -> Any:
            nonlocal is_bad
            is_bad = bool(bad & {*batch["sample_id"].tolist()})
            sums = loss_sums(task, model, batch)
            if is_bad and what == "loss":
                sums = {name: torch.nan * value for name, value in sums.items()}
            elif is_bad and what == "gradients":
                sums = {name: Overflowing.apply(value) for name, value in sums.items()}
            is_bad = False
            return sums

        Segmentation.loss_sums, Segmentation.inputs = non_finite_sums, non_finite_images  # type: ignore[method-assign]
        if device == "gpu":
            SoftIoU.combine = lambda loss, sums: {
                name: term.as_subclass(OnDevice) for name, term in combine(loss, sums).items()
            }  # type: ignore[method-assign]

    return fault


BAD = {5, 6, 17, 30, 40, 51}
SKIPPED = sorted(
    {position // 8 for position, (_, sample) in enumerate(stream_of(GROUPS, 0, 3, 20 * 8)) if sample in BAD}
)


@pytest.mark.parametrize("device", ["cpu", "gpu"])
@pytest.mark.parametrize("what", ["loss", "gradients", "images"])
def test_a_skipped_step_leaves_no_trace(tmp_path: Path, device: str, what: str) -> None:
    options = (
        "train.non_finite=skip",
        "checkpoint.every=1 steps",
        "checkpoint.keep=30",
        "evaluate.every=100%",
        "train.precision=fp32",
    )
    with Job(1, write_recipe(tmp_path), *options, fault=making_non_finite(BAD, what, device)) as job:
        assert job.wait() == [0], job.output
    store = CheckpointStore(tmp_path / "runs" / "run" / "checkpoints")
    states = [Checkpoint.load(store.folder(step)) for step in range(1, 21)]
    for step, (before, after) in enumerate(pairwise(states), start=1):
        tensors = [state.model | state.optimizer for state in (before, after)]
        same = [torch.equal(value, tensors[1][name]) for name, value in tensors[0].items() if value.is_floating_point()]
        assert all(same) if step in SKIPPED else not any(same), step
        assert all(bool(value.isfinite().all()) for value in tensors[1].values())
    assert [state.counters["num_skipped"] for state in states] == [
        len([step for step in SKIPPED if step <= number]) for number in range(20)
    ]


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_every_skipped_step_is_counted_once_however_many_come_between_two_logs(tmp_path: Path, device: str) -> None:
    assert 8 < len(SKIPPED) < 19
    options = (
        "train.non_finite=skip",
        "train.log_every=4 steps",
        "checkpoint.every=100%",
        "evaluate.every=100%",
        "train.precision=fp32",
    )
    with Job(1, write_recipe(tmp_path), *options, fault=making_non_finite(BAD, "loss", device)) as job:
        assert job.wait() == [0], job.output
    run = tmp_path / "runs" / "run"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    counted = [(line["step"], line.get("num_skipped_steps", 0)) for line in lines if line["split"] == "train"]
    assert counted == [(last, len([step for step in SKIPPED if step < last])) for last in (4, 8, 12, 16, 20)]
    assert json.loads((run / "summary.json").read_text())["skipped_steps"] == len(SKIPPED)


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_gradients_that_are_not_finite_end_the_training_though_the_loss_is(tmp_path: Path, device: str) -> None:
    with Job(
        1,
        write_recipe(tmp_path),
        "train.precision=fp32",
        fault=making_non_finite({stream_of(GROUPS, 0, 3, 21)[20][1]}, "gradients", device),
    ) as job:
        assert job.wait() == [3], job.output
    assert "training failed: step 3: gradient_norm is " in job.output and "each sample's loss is finite" in job.output


def test_the_best_checkpoint_is_that_of_the_best_evaluation_and_outlives_newer_ones(tmp_path: Path) -> None:
    values = iter([0.1, 0.5, 0.3, 0.5, 0.2, 0.4])

    def measuring(rank: int) -> None:
        measure = Segmentation.measure
        Segmentation.measure = lambda task, sums: measure(task, sums) | {"miou": next(values)}  # type: ignore[method-assign]

    options = ("train.duration=12 steps", "evaluate.every=2 steps", "checkpoint.every=100%", "checkpoint.keep=2")
    with Job(1, write_recipe(tmp_path), *options, fault=measuring) as job:
        assert job.wait() == [0], job.output
    run = tmp_path / "runs" / "run"
    assert json.loads((run / "summary.json").read_text())["best"]["miou"] == {"value": 0.5, "step": 4}
    verify(run / "checkpoints" / "best")
    best = Checkpoint.load(run / "checkpoints" / "best")
    assert (best.step, best.counters["best"], best.counters["best_step"]) == (4, 0.5, 4)
    assert CheckpointStore(run / "checkpoints").steps() == [4, 12]  # the last two that were saved
