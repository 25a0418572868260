"""Which checkpoint a run goes on from."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.test_checkpoint import make
from trainer import checkpoint as checkpoints
from trainer.errors import UserError
from trainer.recipe import Recipe, load_recipe
from trainer.resume import open_run
from trainer.runs import lock_run
from trainer.tracking import RunFolder

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
            checkpoints.save(folder.checkpoints, make(step), keep=3, best=False)
    return folder


def test_the_newest_checkpoint_is_taken_and_the_metrics_go_back_to_it(run: RunFolder, recipe: Recipe) -> None:
    found = open_run(run, recipe, "auto", print)
    assert found == run.checkpoints / "step_00000006"
    assert [line["step"] for line in run.read_metrics()] == [1, 2, 3, 4, 5, 6]


def test_a_damaged_one_is_named_and_the_one_before_taken(run: RunFolder, recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    (run.checkpoints / "step_00000006" / "model.safetensors").write_bytes(b"half")
    assert open_run(run, recipe, "auto", print) == run.checkpoints / "step_00000004"
    assert "step_00000006 is not whole: model.safetensors" in capsys.readouterr().out
    assert [line["step"] for line in run.read_metrics()] == [1, 2, 3, 4]


def test_with_no_whole_checkpoint_nothing_is_lost_silently(run: RunFolder, recipe: Recipe) -> None:
    for step in (2, 4, 6):
        (run.checkpoints / f"step_{step:08d}" / "manifest.json").unlink()
    with pytest.raises(UserError, match="no checkpoint is whole; --resume never"):
        open_run(run, recipe, "auto", print)


def test_never_sets_the_old_run_aside(run: RunFolder, recipe: Recipe) -> None:
    assert open_run(run, recipe, "never", print) is None
    assert run.read_metrics() == [] and checkpoints.steps(run.checkpoints) == []
    assert checkpoints.steps(RunFolder(run.path.with_name("r.1")).checkpoints) == [2, 4, 6]


def test_a_given_checkpoint_of_the_run_keeps_the_metrics_before_it(run: RunFolder, recipe: Recipe) -> None:
    found = open_run(run, recipe, str(run.checkpoints / "step_00000004"), print)
    assert found == run.checkpoints / "step_00000004" and checkpoints.steps(run.checkpoints) == [4]
    assert open_run(run, recipe, "auto", print) == found  # a kill before the next save loses nothing
    assert [line["step"] for line in run.read_metrics()] == [1, 2, 3, 4]
    with pytest.raises(UserError, match="it takes auto, never, or a folder such as"):
        open_run(run, recipe, "nowhere", print)


def test_the_best_and_a_checkpoint_of_another_run_can_be_given(run: RunFolder, recipe: Recipe, tmp_path: Path) -> None:
    checkpoints.save(run.checkpoints, make(7), keep=3, best=True)
    other = RunFolder(tmp_path / "runs" / "other")
    found = open_run(other, recipe, str(run.checkpoints / "best"), print)
    assert found == other.checkpoints / "step_00000007"
    assert [line["step"] for line in other.read_metrics()] == [1, 2, 3, 4, 5, 6, 7]
    changed = load_recipe(tmp_path / "r.yaml", ["optimizer.lr=1"])
    with pytest.raises(UserError, match=r"these keys differ: optimizer\.lr"):
        open_run(other, changed, str(run.checkpoints / "best"), print)
    assert other.path.exists() and not other.path.with_name("other.1").exists()


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
