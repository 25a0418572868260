"""Runs in a notebook: trained by a call, their metrics as a table."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.inference.model import Model, load
from trainer.runs.folder import RunFolder, find_run

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


def as_overrides(settings: Mapping[str, Any]) -> list[str]:
    """`{"optimizer.lr": 1e-3}` as a command line has it: `optimizer.lr=0.001`."""
    return [f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in settings.items()]
