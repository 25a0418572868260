"""What isn't finite, can't be read or has no room: one message, or skipped and counted if the recipe asks for it."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.faults.conftest import OPTIONS, Tally
from tests.faults.hooks import before_call, before_step
from tests.processes import Job, lines, weights, write_recipe
from trainer.data.order import Order
from trainer.data.parquet import RowGroups
from trainer.optim.guard import Finding, Guard
from trainer.runs.checkpoint import verify
from trainer.runs.state import Checkpoint
from trainer.runs.store import CheckpointStore
from trainer.tasks.segmentation import Segmentation

BAD = 17  # the sample


def make_nan(rank: int) -> None:
    """The loss of a micro-batch with that sample is nan."""
    loss_sums = Segmentation.loss_sums

    def non_finite(task: Segmentation, model: Any, batch: Any) -> dict[str, Tensor]:
        sums = loss_sums(task, model, batch)
        return {name: value * float("nan") for name, value in sums.items()} if BAD in batch["sample_id"] else sums

    Segmentation.loss_sums = non_finite


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_loss_that_is_not_finite_ends_the_run_and_names_term_step_and_samples(
    tmp_path: Path, tally: Tally, world_size: int
) -> None:
    recipe, root = write_recipe(tmp_path), tmp_path / "runs" / "run" / "checkpoints"
    with Job(world_size, recipe, *OPTIONS, "checkpoint.every=1 steps", "checkpoint.keep=30", fault=make_nan) as job:
        assert job.wait() == [3] * world_size, job.output
    found = re.search(
        r"training failed: step (\d+): loss is nan, gradient_norm is nan \(among samples ([\d, ]+)\)", job.output
    )
    assert found and "Traceback" not in job.output, job.output
    ids = [int(number) for number in found[2].split(", ")]
    assert BAD in ids and len(ids) == 8 // world_size  # those of the rank that had it
    assert CheckpointStore(root).steps() == list(range(1, int(found[1])))
    newest = Checkpoint.load(root / "last")
    verify(root / "last")
    assert all(bool(value.isfinite().all()) for value in (*newest.model.values(), *newest.optimizer.values()))
    tally(f"a loss that is nan, {world_size} processes: one message with term, step and samples")


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2])
def test_skipped_steps_are_counted_and_an_interrupted_run_skips_the_same(
    tmp_path: Path, tally: Tally, world_size: int
) -> None:
    recipe, skip = write_recipe(tmp_path), (*OPTIONS, "train.non_finite=skip")

    def interrupted(rank: int) -> None:
        make_nan(rank)
        before_step(9, lambda trainer: os.kill(os.getpid(), signal.SIGTERM))

    for name, fault in (("uninterrupted", make_nan), ("run", interrupted), ("run", make_nan)):
        with Job(world_size, recipe, f"name={name}", *skip, fault=fault) as job:
            assert job.wait() == [0] * world_size, job.output
    run, uninterrupted = (tmp_path / "runs" / name for name in ("run", "uninterrupted"))
    assert weights(run) == weights(uninterrupted) and lines(run) == lines(uninterrupted)
    # One an epoch.
    assert (
        lines(run, "train")[-1]["num_skipped_steps"]
        == json.loads((run / "summary.json").read_text())["skipped_steps"]
        >= 2
    )
    assert "skipped, 1 so far" not in job.output and "so far" in job.output  # the count continues
    tally(f"steps skipped, {world_size} processes: counted, interrupted and resumed equal to the bit")


class OnDevice(Tensor):
    """A tensor on the CPU whose flags, bools, claim to be on a GPU."""

    @property
    def device(self) -> Any:  # type: ignore[override]
        return SimpleNamespace(type="cuda") if self.dtype == torch.bool else Tensor.device.__get__(self)


@pytest.mark.parametrize("skip", [True, False])
def test_on_a_device_the_fused_optimizer_leaves_out_a_bad_step_without_the_host_looking(skip: bool) -> None:
    weight = torch.ones(3, requires_grad=True)
    optimizer = torch.optim.AdamW([weight], lr=0.1, fused=True)
    guard, seen = Guard(optimizer, [], skip=skip, scaled=False), [weight.tolist()]
    counted = []
    for step, loss in enumerate([1.0, float("nan"), 1.0]):
        weight.grad = torch.full((3,), loss)
        guard.begin_step()
        passes, counts = guard.judge(
            step, {"loss": torch.tensor(loss).as_subclass(OnDevice)}, [torch.tensor(loss == loss)]
        )
        assert passes  # the host never waits: the optimizer is called, and reads the flag
        optimizer.step()
        seen.append(weight.tolist())
        counted.append(bool(counts))
    first, second, third, fourth = seen
    assert first != second and second == third  # the bad one changed nothing
    assert (third != fourth) == skip  # later ones do only where bad steps are skipped
    assert counted == [True, False, skip]
    finding = guard.look()
    assert (finding.step, finding.what, finding.num_skipped) == (1, "loss is nan", 1) and guard.look() == Finding()


def test_when_out_of_memory_the_message_names_the_batch_size_and_what_to_do(tmp_path: Path, tally: Tally) -> None:
    recipe = write_recipe(tmp_path)

    def out_of_memory(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    with Job(
        2,
        recipe,
        *OPTIONS,
        "train.timeout=0.1 minutes",
        fault=lambda rank: before_call(Segmentation, "loss_sums", out_of_memory, 4) if rank else None,
    ) as job:
        assert job.wait() == [3, 3], job.output
    assert (
        "rank 1: training failed: out of memory with 4 samples at a time per process: train.accumulate=2 halves "
        "this" in job.output
    )
    assert "Traceback" not in job.output
    tally("out of memory on one rank: one message with the batch size")


@pytest.mark.parametrize(("tolerated", "code"), [(2, 0), (1, 3)])
def test_damaged_images_are_counted_over_all_processes_and_listed(
    tmp_path: Path, tally: Tally, tolerated: int, code: int
) -> None:
    recipe = write_recipe(tmp_path)
    # Of tests/tiny.py: 52 rows in 8 groups.
    order = Order([(i + 1) * 52 // 8 - i * 52 // 8 for i in range(8)], seed=0, window=3)
    # In the first batch, the first half of which rank 0 reads, and rank 1 the other.
    damaged = {order.sample(position)[1] for position in (1, 5)}

    def damage(rank: int) -> None:
        row = RowGroups.row

        def damaged_row(rows: RowGroups, group: int, index: int) -> dict[str, Any]:
            found = row(rows, group, index)
            sample_id = sum(count for _, count in rows.groups[:group]) + index
            is_train = "train" in rows.groups[group][0].parts
            return (
                found | {"image": {"bytes": found["image"]["bytes"][:60], "path": None}}
                if is_train and sample_id in damaged
                else found
            )

        RowGroups.row = damaged_row

    with Job(
        2,
        recipe,
        *OPTIONS,
        f"data.max_unreadable={tolerated}",
        "data.cache=off",
        "train.duration=6 steps",
        fault=damage,
    ) as job:
        assert job.wait() == [code, code], job.output
    run = tmp_path / "runs" / "run"
    if code == 0:
        assert json.loads((run / "summary.json").read_text())["unreadable"] == sorted(damaged)
        assert lines(run, "train")[-1]["num_unreadable"] == len(damaged)
    else:
        assert "more than data.max_unreadable" in job.output and all(
            str(sample_id) in job.output for sample_id in damaged
        ), job.output
    tally("damaged images over two processes: counted and listed, too many are one message")
