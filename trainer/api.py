"""Runs in a notebook: trained by a call, their metrics as a table."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.distributed.launch import Launch
from trainer.inference.model import Model, load
from trainer.recipe.load import load_recipe
from trainer.runs.folder import RunFolder, find_run, runs_dir
from trainer.signals import STOP
from trainer.tasks.checks import TASK_CHECKS, batch_checks

if TYPE_CHECKING:
    import pandas as pd


class Run:
    """A run, finished or not: `trainer.Run("runs/x").metrics`.

    Args:
        run: its folder or name.

    Raises:
        UserError: there is no such run.
    """

    def __init__(self, run: str | Path) -> None:
        self.folder = RunFolder(find_run(str(run)))

    def __repr__(self) -> str:
        return f"Run({self.folder.path}: {self.summary.get('status', 'not started')})"

    @property
    def metrics(self) -> pd.DataFrame:
        """A row for each line of `metrics.jsonl`, a column for each metric; nan where a line doesn't have it."""
        import pandas as pd

        return pd.DataFrame(self.folder.read_metrics())

    @property
    def summary(self) -> dict[str, Any]:
        """`summary.json`: status, best and final value of each metric."""
        return self.folder.read_summary()

    @property
    def recipe(self) -> dict[str, Any]:
        """The resolved recipe."""
        return self.folder.read_recipe()

    def load(self, checkpoint: str = "best") -> Model:
        """The trained model."""
        return load(self.folder.path, checkpoint)


def train(recipe: str | Path, overrides: Mapping[str, Any], resume: str = "auto") -> Run:
    """Trains a recipe in this process, until it is finished or interrupted: by the kernel's interrupt, in a notebook.

    Args:
        recipe: a YAML file.
        overrides: values by dotted key, e.g. `{"optimizer.lr": 1e-3}`.
        resume: `auto`, `never` or a checkpoint folder, as for `trainer/run.py`.

    Raises:
        UserError: the recipe is invalid, or the run can't be what it asks for.
        TrainingFailed: something isn't finite, a sample can't be read, a checkpoint can't be written, out of memory.
    """
    from trainer.trainer import Trainer

    arguments = [f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in overrides.items()]
    loaded = load_recipe(recipe, arguments, [*Launch.read().checks(), *TASK_CHECKS, *batch_checks(1)])
    with STOP.installed():
        training = Trainer(loaded, resume)
        try:
            training.fit()
        finally:
            training.folder.release()
    return Run(runs_dir() / loaded.name)
