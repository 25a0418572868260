"""A rank that is gone before the processes have found each other: the others end soon, with one message."""

from __future__ import annotations

import os
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist

from tests.faults.conftest import BRIEF, Tally
from tests.processes import Job, write_recipe
from trainer import accelerator


def dies_before_it_connects() -> None:
    os._exit(1)


def dies_once_all_are_counted() -> None:
    join = dist.rendezvous

    def rendezvous(*arguments: object, **keywords: object) -> object:
        for found in join(*arguments, **keywords):  # type: ignore[arg-type]
            found[0].set("counted", "")
            os._exit(1)

    dist.distributed_c10d.rendezvous = rendezvous


@pytest.mark.parametrize("death", [dies_before_it_connects, dies_once_all_are_counted])
def test_a_rank_that_dies_before_the_group_is_complete_ends_the_job_in_time_with_one_message(tmp_path: Path, tally: Tally, death: object) -> None:
    recipe = write_recipe(tmp_path)

    def fault(rank: int) -> None:
        accelerator.AFTER_WATCHDOG = timedelta(0)
        if rank == 1:
            death()  # type: ignore[operator]

    began = time.monotonic()
    with Job(2, recipe, *BRIEF, "train.timeout=0.05 minutes", fault=fault) as job:
        assert job.wait() == [3, 1], job.output
    assert "training failed: the 2 processes didn't find each other within 3 s" in job.output and "Traceback" not in job.output, job.output
    tally(f"a rank {death.__name__.replace('_', ' ')}: one message", seconds=time.monotonic() - began)  # type: ignore[attr-defined]
