"""What a notebook uses: `trainer.train`, `trainer.Run`, `trainer.load`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import trainer
from tests.faults.hooks import before_step
from tests.processes import run_processes, write_recipe
from trainer.errors import UserError

STEPS = {"train.duration": "4 steps", "evaluate.every": "2 steps", "track": []}


def _session(recipe: Path, out: Path) -> None:
    """The cells of a notebook, in one process."""
    handler = signal.getsignal(signal.SIGINT)
    before_step(2, lambda _: os.kill(os.getpid(), signal.SIGINT))  # the kernel's interrupt
    stopped = trainer.train(recipe, name="first", **STEPS)
    assert (stopped.summary["status"], stopped.summary["step"]) == ("stopped", 3)
    assert signal.getsignal(signal.SIGINT) is handler
    run = trainer.train(recipe, name="first", **STEPS)
    assert run.summary["status"] == "finished" and "first: finished" in repr(run)
    table = run.metrics
    assert list(table[table.split == "validation"].step) == [2, 4]
    assert table[table.split == "train"].loss.notna().all()
    assert run.recipe["train"]["duration"] == "4 steps"
    model = run.load("last")
    image = (out / "image.png").read_bytes()
    assert model(image).mask.shape == (31, 45)
    assert [each.classes for each in model([image, image])] == [("background", "square")] * 2
    (out / "done").touch()


def test_cells_of_a_notebook_train_are_interrupted_resume_and_predict(tmp_path: Path) -> None:
    from PIL import Image

    Image.new("RGB", (45, 31), "red").save(tmp_path / "image.png")
    run_processes(1, _session, write_recipe(tmp_path), tmp_path)
    assert (tmp_path / "done").exists()


def test_a_run_that_does_not_exist_and_an_unknown_attribute_are_errors() -> None:
    with pytest.raises(UserError, match="no run 'nothing'"):
        trainer.Run("nothing")
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        trainer.lod  # type: ignore[attr-defined]  # noqa: B018


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = "import sys, trainer; print([m for m in ('torch', 'numpy', 'pydantic', 'PIL') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
