"""A checkpoint is saved before a time limit that is known, once."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.processes import Job, write_recipe
from trainer.runs.store import CheckpointStore
from trainer.signals import BEFORE_LIMIT_S, TimeLimit


@pytest.mark.parametrize(
    ("variable", "value"),
    [("TRAINER_END_TIME", "soon"), ("SLURM_JOB_END_TIME", "soon"), ("TRAINER_END_TIME", "late"), ("OTHER", "soon")],
)
def test_a_limit_is_near_once(monkeypatch: pytest.MonkeyPatch, variable: str, value: str) -> None:
    for name in ("TRAINER_END_TIME", "SLURM_JOB_END_TIME"):
        monkeypatch.delenv(name, raising=False)
    ends = time.time() + (BEFORE_LIMIT_S / 2 if value == "soon" else 10 * BEFORE_LIMIT_S)
    monkeypatch.setenv(variable, str(int(ends)))
    limit = TimeLimit()
    assert [limit.comes_near(), limit.comes_near()] == [variable != "OTHER" and value == "soon", False]


def test_a_job_that_ends_soon_saves_at_once_and_continues_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time() + 60)))
    options = ("train.duration=5 steps", "evaluate.every=100%", "checkpoint.every=100%", "checkpoint.keep=9")
    with Job(2, write_recipe(tmp_path), *options) as job:
        assert job.wait() == [0, 0], job.output
    assert job.output.count("the time limit of this job is near: saving a checkpoint at step 1") == 1
    assert CheckpointStore(tmp_path / "runs" / "run" / "checkpoints").steps() == [1, 5]
