"""A run goes on with another number of processes: the same batches, equal up to rounding."""

from __future__ import annotations

import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.faults.conftest import LONG, Tally
from tests.faults.hooks import before_step
from tests.processes import Job, lines, write_recipe

SIZES, STOPS = (1, 2, 4, 1, 2), (4, 8, 12, 16, None)


def signal_itself(trainer: Any) -> None:
    if trainer.rank == trainer.world_size - 1:
        os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize(("precision", "tolerance"), [("fp64", 1e-9), *([("fp32", 0.01)] if LONG else [])])
@pytest.mark.slow
def test_a_run_interrupted_and_continued_by_other_numbers_of_processes_sees_the_same_samples(
    tmp_path: Path, tally: Tally, precision: str, tolerance: float
) -> None:
    recipe, runs = write_recipe(tmp_path), tmp_path / "runs"
    with Job(1, recipe, "name=uninterrupted", f"train.precision={precision}") as job:
        assert job.wait() == [0], job.output
    for world_size, stop in zip(SIZES, STOPS, strict=True):
        with Job(
            world_size,
            recipe,
            f"train.precision={precision}",
            fault=lambda rank, stop=stop: before_step(stop - 1, signal_itself) if stop else None,
        ) as job:
            assert job.wait() == [0] * world_size, job.output
        assert (f"at step {stop}, checkpoint saved" if stop else "finished run") in job.output
        assert ("results may differ slightly" in job.output) == (stop != STOPS[0]), job.output
    found, expected = lines(runs / "run"), lines(runs / "uninterrupted")
    assert [line.get("data_fingerprint") for line in found] == [line.get("data_fingerprint") for line in expected]
    assert sum("data_fingerprint" in line for line in found) == 20
    for line, other in zip(found, expected, strict=True) if precision == "fp64" else [(found[-1], expected[-1])]:
        assert math.isclose(line["loss"], other["loss"], rel_tol=tolerance), (line, other)
    assert found[-1]["split"] == "validation"
    tally(
        f"runs of 1, 2, 4, 1, 2 processes across four interruptions, {precision}: same samples, loss within "
        f"{tolerance:g}"
    )
