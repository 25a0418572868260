"""Which checkpoint a run resumes from."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.unit.runs.test_checkpoint import make
from trainer.errors import UserError
from trainer.recipe.load import load_recipe
from trainer.recipe.recipe import Recipe
from trainer.runs import checkpoint, store
from trainer.runs.folder import RunFolder
from trainer.runs.lock import lock_run
from trainer.runs.resume import open_run
from trainer.runs.state import Checkpoint

TEXT = """task: segmentation
data: {name: shapes, batch_size: 32}
model: {name: unet}
loss: cross_entropy
optimizer: {name: adamw, lr: 3e-3}
train: {duration: 10 epochs}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    (tmp_path / "r.yaml").write_text(TEXT, encoding="utf-8")
    return load_recipe(tmp_path / "r.yaml")


@pytest.fixture
def run(tmp_path: Path, recipe: Recipe) -> RunFolder:
    """A run that was killed at step 7, with checkpoints at 2, 4 and 6."""
    folder = RunFolder(tmp_path / "runs" / "r")
    assert open_run(folder, recipe, "auto", print) is None
    for step in range(1, 8):
        folder.log({"step": step, "epoch": step / 10, "split": "train", "loss": 1.0 / step})
        if step % 2 == 0:
            folder.checkpoints.save(make(step), keep=3, best=False)
    return folder


def test_the_newest_checkpoint_is_taken_and_the_metrics_go_back_to_it(run: RunFolder, recipe: Recipe) -> None:
    found = open_run(run, recipe, "auto", print)
    assert found == run.checkpoints.folder(6)
    assert [line["step"] for line in run.read_metrics()] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("evaluation_pending", [False, True])
def test_the_summary_of_a_resumed_run_is_that_of_an_uninterrupted_one_to_the_byte(
    tmp_path: Path, recipe: Recipe, evaluation_pending: bool
) -> None:
    """The best value after the checkpoint was that of steps which are computed again, with other values."""

    def log(run: RunFolder, step: int, miou: float) -> None:
        run.log({"step": step, "epoch": step / 10, "split": "train", "loss": 1.0 / step})
        if not (run is interrupted and step == 4 and evaluation_pending):
            run.log({"step": step, "epoch": step / 10, "split": "validation", "miou": miou, "loss": miou / 3})

    interrupted, uninterrupted = (RunFolder(tmp_path / "runs" / name) for name in ("interrupted", "uninterrupted"))
    values = [0.1 + 0.2, 0.7, 0.2, 0.1, 1 / 3, 0.6]
    for run in (interrupted, uninterrupted):
        open_run(run, recipe, "auto", print)
    for step, miou in enumerate(values, start=1):
        log(uninterrupted, step, miou)
        log(interrupted, step, miou if step <= 4 else 0.9)
        if step == 4:
            state = make(step)
            state.counters["evaluation_pending"] = evaluation_pending
            interrupted.checkpoints.save(state, keep=3, best=False)
            interrupted.write_summary("running", step=step)
    interrupted = RunFolder(interrupted.path)
    open_run(interrupted, recipe, "auto", print)
    if evaluation_pending:
        interrupted.log({"step": 4, "epoch": 0.4, "split": "validation", "miou": values[3], "loss": values[3] / 3})
    for step, miou in enumerate(values[4:], start=5):
        log(interrupted, step, miou)
    for run in (interrupted, uninterrupted):
        run.write_summary("finished", step=6)
    assert (interrupted.path / "summary.json").read_bytes() == (uninterrupted.path / "summary.json").read_bytes()
    assert uninterrupted.read_summary()["best"]["miou"] == {"value": 0.7, "step": 2}


def test_a_damaged_one_is_named_and_the_one_before_taken(
    run: RunFolder, recipe: Recipe, capsys: pytest.CaptureFixture[str]
) -> None:
    (run.checkpoints.folder(6) / "model.safetensors").write_bytes(b"half")
    assert open_run(run, recipe, "auto", print) == run.checkpoints.folder(4)
    assert "step_00000006 is not intact: model.safetensors" in capsys.readouterr().out
    assert [line["step"] for line in run.read_metrics()] == [1, 2, 3, 4]


def test_with_no_intact_checkpoint_nothing_is_lost_silently(run: RunFolder, recipe: Recipe) -> None:
    for step in (2, 4, 6):
        (run.checkpoints.folder(step) / "manifest.json").unlink()
    with pytest.raises(UserError, match="no checkpoint is intact; --resume never"):
        open_run(run, recipe, "auto", print)


def test_never_moves_the_old_run_to_the_next_number(run: RunFolder, recipe: Recipe) -> None:
    assert open_run(run, recipe, "never", print) is None
    assert run.read_metrics() == [] and run.checkpoints.steps() == []
    assert RunFolder(run.path.with_name("r.1")).checkpoints.steps() == [2, 4, 6]


def test_a_given_checkpoint_of_the_run_keeps_the_metrics_before_it(run: RunFolder, recipe: Recipe) -> None:
    found = open_run(run, recipe, str(run.checkpoints.folder(4)), print)
    assert found == run.checkpoints.folder(4) and run.checkpoints.steps() == [4]
    assert open_run(run, recipe, "auto", print) == found  # a kill before the next save loses nothing
    assert [line["step"] for line in run.read_metrics()] == [1, 2, 3, 4]
    with pytest.raises(UserError, match="must be auto, never, or a folder such as"):
        open_run(run, recipe, "nowhere", print)


def test_the_best_and_a_checkpoint_of_another_run_can_be_given(run: RunFolder, recipe: Recipe, tmp_path: Path) -> None:
    run.checkpoints.save(make(7), keep=3, best=True)
    other = RunFolder(tmp_path / "runs" / "other")
    found = open_run(other, recipe, str(run.checkpoints.path / "best"), print)
    assert found == other.checkpoints.folder(7)
    assert [line["step"] for line in other.read_metrics()] == [1, 2, 3, 4, 5, 6, 7]
    changed = load_recipe(tmp_path / "r.yaml", ["optimizer.lr=1"])
    with pytest.raises(UserError, match=r"these keys differ: optimizer\.lr"):
        open_run(other, changed, str(run.checkpoints.path / "best"), print)
    assert other.path.exists() and not other.path.with_name("other.1").exists()


def improve(run: RunFolder, step: int, best_step: int | None) -> None:
    """Saves a checkpoint of the run; the best so far is that of `best_step`."""
    state = make(step)
    state.counters |= {"best": 0.5, "best_step": best_step}
    run.checkpoints.save(state, keep=2, best=best_step == step)


@pytest.mark.parametrize("name", ["r", "other"])
def test_a_run_that_resumes_from_a_given_checkpoint_keeps_the_best_so_far(
    run: RunFolder, recipe: Recipe, name: str
) -> None:
    """The folder of step 8 itself is pruned."""
    for step in (8, 9, 10):
        improve(run, step, 8)
    resumed = RunFolder(run.path.with_name(name))
    found = open_run(resumed, recipe, str(run.checkpoints.folder(9)), print)
    assert found is not None and checkpoint.read_counters(found)["best_step"] == 8
    checkpoint.verify(resumed.checkpoints.path / "best")
    assert Checkpoint.load(resumed.checkpoints.path / "best").step == 8
    assert resumed.checkpoints.steps() == [9]


def test_a_better_checkpoint_after_the_given_one_is_not_its_best(
    run: RunFolder, recipe: Recipe, capsys: pytest.CaptureFixture[str]
) -> None:
    """That of step 8 gave way to that of step 10, so its weights are gone."""
    for step, best_step in ((8, 8), (9, 8), (10, 10), (11, 10)):
        improve(run, step, best_step)
    shutil.copytree(run.path, run.path.with_name("copy"), symlinks=True)
    open_run(run, recipe, str(run.checkpoints.folder(10)), print)
    assert Checkpoint.load(run.checkpoints.path / "best").step == 10
    improve(run, 9, 8)  # as if step 9 had been kept
    capsys.readouterr()
    open_run(run, recipe, str(run.checkpoints.folder(9)), print)
    assert not (run.checkpoints.path / "best").exists()
    assert "the best checkpoint so far, that of step 8, no longer exists" in capsys.readouterr().out


def ending_at(number: int) -> None:
    """In a forked child: ends the process in place of the n-th call that changes the file system's tree."""
    left = number

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0:
                os._exit(9)
            return function(*arguments, **options)

        return call

    for name in ("rename", "replace", "link", "symlink", "mkdir", "unlink", "rmdir"):
        setattr(os, name, counted(getattr(os, name)))


@pytest.mark.slow
@pytest.mark.parametrize("again", ["auto", "the same command"])
def test_a_kill_at_any_rename_or_link_of_resume_path_leaves_the_old_run_or_the_new_one(
    tmp_path: Path, run: RunFolder, recipe: Recipe, capsys: pytest.CaptureFixture[str], again: str
) -> None:
    for step in (8, 9, 10):
        improve(run, step, 8)
    before = run.path.parent.rename(tmp_path / "before")
    kills, found_steps = 0, set()
    for number in range(1, 1000):
        runs = shutil.copytree(before, tmp_path / "runs", symlinks=True)
        given = str(run.checkpoints.folder(9))
        child = os.fork()
        if child == 0:
            ending_at(number)
            open_run(run, recipe, given, lambda line: None)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if status == 0:
            break
        kills += 1
        found = open_run(run, recipe, "auto" if again == "auto" else given, print)
        assert found in (run.checkpoints.folder(9), run.checkpoints.folder(10))
        found_steps.add(found.name)
        checkpoint.verify(found)
        assert Checkpoint.load(run.checkpoints.path / "best").step == 8
        assert [line["step"] for line in run.read_metrics()] == [1, 2, 3, 4, 5, 6, 7]
        assert run.read_recipe() == recipe.resolved()
        (old,) = [
            path for path in runs.iterdir() if path.is_dir() and (path / "checkpoints" / "step_00000010").exists()
        ]
        assert old.name in ("r", "r.1")  # nothing of the old run is lost
        assert not list(runs.glob(".r.*"))
        shutil.rmtree(runs)
    assert kills > 10 and found_steps == ({"step_00000009", "step_00000010"} if again == "auto" else {"step_00000009"})


def test_a_checkpoint_that_was_unreadable_for_a_moment_never_comes_back(
    run: RunFolder, recipe: Recipe, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A network file system's hiccup: the run resumed from an older one, so the newer ones are of another history."""
    run.checkpoints.save(make(8), keep=4, best=False)
    verify = checkpoint.verify

    def hiccup(folder: Path) -> None:
        if folder.name in ("step_00000006", "step_00000008"):
            raise checkpoint.InvalidCheckpoint("model.safetensors: missing")
        verify(folder)

    with monkeypatch.context() as patch:
        patch.setattr(store, "verify", hiccup)
        assert run.checkpoints.newest_intact()[0] == 4
        assert run.checkpoints.steps() == [2, 4, 6, 8]  # whoever only reads moves nothing
        open_run(run, recipe, "auto", print)
    assert capsys.readouterr().out.splitlines() == [
        f"step_0000000{step} is not intact: model.safetensors: missing; moved to .invalid-step_0000000{step}"
        for step in (8, 6)
    ]
    assert (run.checkpoints.path / "last").resolve().name == "step_00000004"
    # Killed before its next checkpoint.
    assert open_run(run, recipe, "auto", print) == run.checkpoints.folder(4)
    improve(run, 5, None)
    assert open_run(run, recipe, "auto", print) == run.checkpoints.folder(5)
    assert len(list(run.checkpoints.path.glob(".invalid-*"))) == 2
    improve(run, 7, None)  # what it has trained past is no longer of use
    assert [path.name for path in run.checkpoints.path.glob(".invalid-*")] == [".invalid-step_00000008"]


def test_no_checkpoint_is_moved_while_none_is_intact(
    run: RunFolder, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file system may be back a moment later."""
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "read_counters", lambda folder: {}["step"])
        with pytest.raises(UserError, match="no checkpoint is intact"):
            open_run(run, recipe, "auto", print)
    assert open_run(run, recipe, "auto", print) == run.checkpoints.folder(6)


def test_an_unreadable_recipe_of_the_run_is_a_clear_error(run: RunFolder, recipe: Recipe) -> None:
    (run.path / "recipe.yaml").write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match=r"recipe\.yaml can't be read"):
        open_run(run, recipe, "auto", print)


def test_a_run_that_saved_nothing_may_change_its_recipe(tmp_path: Path, recipe: Recipe) -> None:
    folder = RunFolder(tmp_path / "runs" / "r")
    open_run(folder, recipe, "auto", print)
    folder.log({"step": 1, "epoch": 0.1, "split": "train", "loss": 1.0})
    assert open_run(folder, load_recipe(tmp_path / "r.yaml", ["optimizer.lr=1"]), "auto", print) is None
    assert folder.read_metrics() == []


def test_a_run_in_use_is_refused(run: RunFolder) -> None:
    lock = lock_run(run.path)
    with pytest.raises(UserError, match="in use by another process"):
        lock_run(run.path)
    lock.release()
    lock_run(run.path).release()
