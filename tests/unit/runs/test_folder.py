"""Promises of the run folder."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.faults.hooks import before_call
from tests.processes import Job, write_recipe
from trainer.metrics.best import lower_is_better
from trainer.runs import environment as environment_module
from trainer.runs.durable import atomic_write
from trainer.runs.environment import environment
from trainer.runs.folder import RunFolder, move_aside


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    run = RunFolder(tmp_path / "run")
    run.create()
    return run


def validation(step: int, **metrics: float) -> dict:
    return {"step": step, "epoch": step / 10, "split": "validation", **metrics}


def test_a_line_comes_back_with_every_bit(folder: RunFolder) -> None:
    line = {
        "step": 3,
        "epoch": 0.1 + 0.2,
        "split": "train",
        "loss": 5e-324,
        "learning_rate": 1 / 3,
        "data_fingerprint": "0f",
    }
    folder.log(line)
    assert folder.read_metrics() == [line]


def test_nan_and_infinity_are_valid_json(folder: RunFolder) -> None:
    folder.log(validation(1, loss=math.nan, miou=math.inf) | {"iou_by_class": [0.5, math.nan]})

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    line = json.loads(folder.metrics.read_text(), parse_constant=refuse)
    assert (line["loss"], line["miou"], line["iou_by_class"]) == (None, None, [0.5, None])


def test_logged_lines_survive_a_kill(folder: RunFolder) -> None:
    child = os.fork()
    if child == 0:
        folder.log({"step": 1, "split": "train"})
        os.kill(os.getpid(), signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert folder.read_metrics() == [{"step": 1, "split": "train"}]


def test_a_resume_cuts_the_metrics_at_the_checkpoint(folder: RunFolder) -> None:
    for step in range(1, 6):
        folder.log({"step": step, "epoch": step / 2, "split": "train", "loss": 1 / step})
    before = folder.metrics.read_text().splitlines(keepends=True)
    with folder.metrics.open("a") as file:
        file.write('{"step": 6, "lo')  # a kill in the middle of a write
    assert len(folder.read_metrics()) == 5
    folder.truncate_metrics(3)
    assert folder.metrics.read_text() == "".join(before[:3])
    folder.log({"step": 4, "split": "train"})
    assert [line["step"] for line in folder.read_metrics()] == [1, 2, 3, 4]


def test_a_new_run_can_be_truncated(folder: RunFolder) -> None:
    folder.truncate_metrics(0)
    assert folder.read_metrics() == []


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "summary.json"
    atomic_write(file, "old")

    def power_cut(descriptor: int) -> None:
        raise OSError("power cut")

    monkeypatch.setattr(os, "fsync", power_cut)
    with pytest.raises(OSError, match="power cut"):
        atomic_write(file, "new")
    assert file.read_text() == "old"
    monkeypatch.undo()
    atomic_write(file, "new")
    assert [path.name for path in tmp_path.iterdir()] == ["summary.json"]
    assert file.read_text() == "new"


def test_the_summary_has_each_metric_at_its_own_best(folder: RunFolder) -> None:
    folder.log({"step": 5, "epoch": 0.5, "split": "train", "loss": 0.001})
    folder.log(
        validation(
            10, loss=0.5, box_loss=0.1, miou=0.8, samples=7, num_classes_present=2, seconds=1.0, samples_per_second=99.0
        )
    )
    folder.log(
        validation(
            20, loss=0.3, box_loss=0.1, miou=0.9, samples=7, num_classes_present=2, seconds=1.0, samples_per_second=98.0
        )
    )
    folder.log(
        validation(
            30, loss=0.4, box_loss=0.3, miou=0.9, samples=7, num_classes_present=2, seconds=1.0, samples_per_second=97.0
        )
    )
    folder.log(
        validation(
            40,
            loss=math.nan,
            box_loss=0.4,
            miou=0.7,
            samples=7,
            num_classes_present=2,
            seconds=1.0,
            samples_per_second=96.0,
        )
    )
    summary = folder.write_summary("finished", seconds=12.5, samples_per_second=80.0, world_size=2)
    assert summary["best"] == {
        "loss": {"value": 0.3, "step": 20},
        "box_loss": {"value": 0.1, "step": 10},
        "miou": {"value": 0.9, "step": 20},
    }
    assert summary["final"] == {
        "loss": {"value": 0.4, "step": 30},
        "box_loss": {"value": 0.4, "step": 40},
        "miou": {"value": 0.7, "step": 40},
    }
    assert {key: summary[key] for key in ("status", "seconds", "samples_per_second", "world_size")} == {
        "status": "finished",
        "seconds": 12.5,
        "samples_per_second": 80.0,
        "world_size": 2,
    }
    assert RunFolder(folder.path).read_summary() == summary


def test_a_best_value_beyond_the_checkpoint_is_forgotten_by_a_resume(folder: RunFolder) -> None:
    folder.log(validation(10, miou=0.5))
    folder.log(validation(20, miou=0.9))
    folder.truncate_metrics(10)
    assert folder.write_summary("running", seconds=1.0, samples_per_second=1.0, world_size=1)["best"] == {
        "miou": {"value": 0.5, "step": 10}
    }


def test_saving_a_summary_reads_no_metrics(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """However long the run is: the values are kept up to date as lines are logged."""
    for step in (10, 20):
        folder.log(validation(step, miou=0.5 + step / 100))
    resumed = RunFolder(folder.path)
    resumed.truncate_metrics(10)
    reads, opening = [], Path.open

    def counting(path: Path, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        reads.extend([path] if path == folder.metrics and "a" not in mode else [])
        return opening(path, mode, *arguments, **options)

    monkeypatch.setattr(Path, "open", counting)
    for step in (20, 30, 40):
        resumed.log(validation(step, miou=step / 100, loss=1 / step))
        resumed.write_summary("running", step=step)
    assert reads == []
    assert resumed.read_summary()["best"] == {"miou": {"value": 0.6, "step": 10}, "loss": {"value": 1 / 40, "step": 40}}
    resumed.read_metrics()
    assert reads == [folder.metrics]


def test_a_training_reads_its_metrics_at_its_start_and_for_the_curves_however_often_it_saves(tmp_path: Path) -> None:
    def refuse(run: RunFolder) -> None:
        raise AssertionError("metrics.jsonl is read again")

    options = ("train.duration=4 steps", "checkpoint.every=1 steps", "evaluate.every=2 steps", "track=[]")
    with Job(
        1,
        write_recipe(tmp_path),
        *options,
        fault=lambda rank: before_call(RunFolder, "_complete_lines", refuse, on_call=3),
    ) as job:
        assert job.wait() == [0], job.output
    run = RunFolder(tmp_path / "runs" / "run")
    assert run.read_summary()["final"]["miou"]["step"] == 4


def test_a_run_without_a_summary_has_an_empty_one(folder: RunFolder) -> None:
    assert folder.read_summary() == {}


def test_losses_are_better_when_lower() -> None:
    assert lower_is_better("loss") and lower_is_better("box_loss") and not lower_is_better("miou")


def test_the_recipe_comes_back_as_it_was(folder: RunFolder) -> None:
    recipe = {
        "name": "no",
        "data": {"name": "shapes", "resize": [224, 288], "augment": [{"name": "flip", "p": 0.5}]},
        "optimizer": {"lr": 1e-3, "eps": 1e-08, "weight_decay": 0.0},
        "train": {"duration": "25 epochs", "ema": None, "compile": False, "deterministic": "auto", "seed": 2**62},
        "schedule": {"warmup": "5%", "note": "a: b # c"},
        "track": [],
    }
    folder.write_recipe(recipe)
    assert folder.read_recipe() == recipe
    assert "\ntrain:\n  duration: 25 epochs\n" in (folder.path / "recipe.yaml").read_text()


def test_old_runs_are_moved_to_the_first_free_number(tmp_path: Path) -> None:
    path = tmp_path / "run.v2"
    for number in (1, 2):
        path.mkdir()
        (path / "mark").write_text(str(number))
        assert move_aside(path) == tmp_path / f"run.v2.{number}"
        assert not path.exists()
    assert (tmp_path / "run.v2.1" / "mark").read_text() == "1"


def test_the_environment_names_versions_and_machine_but_no_secret(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "s3cret-value")
    folder.write_environment(environment())
    text = (folder.path / "environment.json").read_text()
    found = json.loads(text)
    assert found["packages"]["torch"] and found["python"].startswith("3.") and found["threads"] >= 1
    assert found["world_size"] == 1 and found["cpu"] and found["host"]
    assert "s3cret-value" not in text


def test_the_commit_of_a_checkout_is_known_and_whether_it_is_dirty(tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        identity = ("-c", "user.name=a", "-c", "user.email=a@b")
        return subprocess.run(
            ["git", "-C", str(tmp_path), *identity, *arguments], check=True, capture_output=True, text=True
        ).stdout.strip()

    assert environment_module._git(tmp_path) is None
    git("init", "--quiet")
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("commit", "--quiet", "--message", "first")
    assert environment_module._git(tmp_path) == {"commit": git("rev-parse", "HEAD"), "dirty": False}
    (tmp_path / "file").write_text("2")
    assert environment_module._git(tmp_path) == {"commit": git("rev-parse", "HEAD"), "dirty": True}
