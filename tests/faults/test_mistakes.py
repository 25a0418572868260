"""A run that can't begin because of what the user has to fix keeps its work,
and `trainer status` repeats what it is.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.faults.conftest import BRIEF
from tests.faults.hooks import before_call
from tests.faults.test_guards import make_nan
from tests.processes import Job, lines, weights, write_recipe
from trainer import trainer as trainer_module
from trainer.commands import main
from trainer.errors import UserError
from trainer.signals import STOP


def summary(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "summary.json").read_text())
    return found


def status(capsys: pytest.CaptureFixture[str], recipe: Path) -> tuple[int, str]:
    """The exit code of `trainer status`, and what it prints."""
    capsys.readouterr()
    return main(["status", str(recipe)]), capsys.readouterr().out


def stop(rank: int) -> None:
    """As a signal does that comes while the model is built."""

    def ask(*_: Any) -> None:
        STOP.signal_name = "SIGTERM"

    before_call(trainer_module, "build_task", ask)


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_run_whose_data_are_damaged_says_so_until_they_are_mended_and_then_resumes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], world_size: int
) -> None:
    recipe, run = write_recipe(tmp_path), tmp_path / "runs" / "run"
    with Job(world_size, recipe, *BRIEF, "train.duration=7 steps") as job:
        assert job.wait() == [0] * world_size, job.output
    finished, metrics = summary(run), lines(run)
    (run / "summary.json").write_text(json.dumps(finished | {"status": "stopped"}))
    (shard,) = (tmp_path / "data" / "tiny" / "train").iterdir()
    content = shard.read_bytes()
    shard.write_bytes(content[::-1])
    with Job(world_size, recipe, *BRIEF) as job:
        assert job.wait() == [2] * world_size, job.output
    code, said = status(capsys, recipe)
    assert code == 3 and "failed" in said and f"{shard} has changed since it was prepared" in said, said
    assert said.rstrip().endswith("fix this and rerun to resume from step 7"), said
    failed = summary(run)
    assert failed.pop("error") in job.output and failed == finished | {"status": "failed"} and lines(run) == metrics
    shard.write_bytes(content)
    with Job(world_size, recipe, *BRIEF, fault=stop) as job:
        assert job.wait() == [0] * world_size and "before training began" in job.output, job.output
    assert status(capsys, recipe)[0] == 75  # it isn't known to fail again
    with Job(world_size, recipe, *BRIEF) as job:
        assert job.wait() == [0] * world_size, job.output
    assert status(capsys, recipe)[0] == 0 and "error" not in summary(run)


def test_a_run_whose_first_start_fails_says_why_and_starts_from_scratch(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: Any) -> None:
        raise UserError("these weights don't fit")

    recipe = write_recipe(tmp_path)
    with Job(2, recipe, *BRIEF, fault=lambda rank: before_call(trainer_module, "build_task", refuse)) as job:
        assert job.wait() == [2, 2], job.output
    code, said = status(capsys, recipe)
    assert code == 3 and "these weights don't fit; fix this and rerun to start from scratch" in said, said
    assert summary(tmp_path / "runs" / "run") == {
        "status": "failed",
        "best": {},
        "final": {},
        "error": "these weights don't fit",
    }


def test_another_recipe_or_a_wrong_checkpoint_under_the_same_name_leaves_a_run_as_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, run = write_recipe(tmp_path), tmp_path / "runs" / "run"
    with Job(1, recipe, *BRIEF) as job:
        assert job.wait() == [0], job.output
    before, its_weights = summary(run), weights(run)
    for overrides in (("optimizer.lr=0.5",), ("--resume", "nowhere")):
        with Job(1, recipe, *BRIEF, *overrides) as job:
            assert job.wait() == [2], job.output
        assert status(capsys, recipe)[0] == 0 and summary(run) == before and weights(run) == its_weights


def test_a_run_without_an_intact_checkpoint_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe, run = write_recipe(tmp_path), tmp_path / "runs" / "run"
    with Job(1, recipe, *BRIEF) as job:
        assert job.wait() == [0], job.output
    for manifest in run.glob("checkpoints/step_*/manifest.json"):
        manifest.unlink()
    (run / "summary.json").write_text(json.dumps(summary(run) | {"status": "stopped"}))
    with Job(1, recipe, *BRIEF, "train.duration=12 steps") as job:
        assert job.wait() == [2], job.output
    code, said = status(capsys, recipe)
    assert code == 3 and "no checkpoint is intact; --resume never starts from scratch" in said, said


def test_a_failed_training_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = write_recipe(tmp_path)
    with Job(2, recipe, *BRIEF, fault=make_nan) as job:
        assert job.wait() == [3, 3], job.output
    code, said = status(capsys, recipe)
    assert code == 3 and "loss is nan" in said and "samples" in said, said
