"""The folder of a run: recipe, environment, metrics, summary, pictures, checkpoints; nothing here imports torch."""

from __future__ import annotations

import io
import json
import math
import os
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from trainer.errors import UserError
from trainer.metrics.best import lower_is_better
from trainer.recipe.file import nearest
from trainer.runs.durable import atomic_write
from trainer.runs.store import CheckpointStore

RECIPE, DATA, SUMMARY = "recipe.yaml", "data.json", "summary.json"

if TYPE_CHECKING:
    from filelock import FileLock

Status = Literal["running", "finished", "stopped", "failed"]

Line = dict[str, Any]
"""One line of `metrics.jsonl`: `step`, `epoch`, `split`, then metrics by name."""

# Entries of a line that are no metrics; neither is `*_per_second`.
BOOKKEEPING = ("step", "epoch", "samples", "seconds", "time")


def move_aside(path: Path) -> Path:
    """Moves a run folder to `<name>.1`, or the first free number; returns where it is now."""
    number = 1
    while (target := path.with_name(f"{path.name}.{number}")).exists():
        number += 1
    return path.rename(target)


def metrics_of(line: Line) -> dict[str, float]:
    """The finite metrics of a line, without counters (`num_…`), times and rates."""
    return {
        name: value
        for name, value in line.items()
        if isinstance(value, int | float)
        and math.isfinite(value)
        and name not in BOOKKEEPING
        and not name.startswith("num_")
        and not name.endswith("_per_second")
    }


class ValidationSummary:
    """Best and last validation value of each metric, with its step.

    Args:
        lines: of `metrics.jsonl`, in order.

    Attributes:
        best, final: metric -> `{"value": …, "step": …}`.
    """

    def __init__(self, lines: Iterable[Line]) -> None:
        self.best: dict[str, dict[str, float]] = {}
        self.final: dict[str, dict[str, float]] = {}
        for line in lines:
            self.add(line)

    def add(self, line: Line) -> None:
        """Takes the next line into account."""
        if line["split"] != "validation":
            return
        for name, value in metrics_of(line).items():
            self.final[name] = {"value": value, "step": line["step"]}
            if name not in self.best or (
                value < self.best[name]["value"] if lower_is_better(name) else value > self.best[name]["value"]
            ):
                self.best[name] = self.final[name]


class RunFolder:
    """The files of one run.

    Attributes:
        path: `runs/<name>`.
        checkpoints: its checkpoints.
        is_open: whether this process holds the run, and its recipe is the one being trained, see `open_run`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = CheckpointStore(path / "checkpoints")
        self.is_open = False
        self.lock: FileLock | None = None  # while this process holds the run

    def release(self) -> None:
        """Lets other processes, or this one again, train this run."""
        if self.lock:
            self.lock.release()

    @property
    def pictures(self) -> Path:
        """Folder of the PNG files."""
        return self.path / "pictures"

    def pictures_of(self, step: int) -> list[Path]:
        """The PNG files drawn after a step, e.g. `validation_step_00000123.png`."""
        return sorted(self.pictures.glob(f"*_step_{step:08d}.png"))

    @property
    def metrics(self) -> Path:
        """The file with one JSON object per line."""
        return self.path / "metrics.jsonl"

    def create(self) -> None:
        """Creates the folders; existing ones stay as they are."""
        self.checkpoints.path.mkdir(parents=True, exist_ok=True)
        self.pictures.mkdir(exist_ok=True)

    def write_recipe(self, resolved: dict[str, Any]) -> None:
        """Writes the resolved recipe as YAML that can be run again."""
        text = io.StringIO("# The recipe of this run, with every default written out.\n")
        text.seek(0, io.SEEK_END)
        YAML().dump(resolved, text)
        atomic_write(self.path / RECIPE, text.getvalue())

    def read_recipe(self) -> dict[str, Any]:
        """The resolved recipe that this run was started with.

        Raises:
            UserError: it can't be read.
        """
        file = self.path / RECIPE
        try:
            recipe = YAML(typ="safe", pure=True).load(file)
        except (OSError, YAMLError) as error:
            raise UserError(
                f"{file} can't be read, so the run's recipe is unknown: {error}; "
                f"--resume never moves the folder to {self.path.name}.1"
            ) from error
        if not isinstance(recipe, dict) or "train" not in recipe:
            raise UserError(f"{file} is not a resolved recipe; --resume never moves the folder to {self.path.name}.1")
        return recipe

    def write_data(self, description: dict[str, Any]) -> None:
        """Writes what a model must know of its data set to predict, see `Data.description`."""
        atomic_write(self.path / DATA, pretty(description))

    def write_environment(self, environment: dict[str, Any]) -> None:
        """Writes `environment.json`, see `environment`."""
        atomic_write(self.path / "environment.json", pretty(environment))

    def log(self, line: Line) -> None:
        """Appends a line to `metrics.jsonl`, in the operating system's hands when this returns.

        Floats keep every bit. JSON has no nan and no infinity: they become null.
        """
        validation = self._validation
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(_finite(line), allow_nan=False) + "\n")
        validation.add(line)

    def read_metrics(self) -> list[Line]:
        """All complete lines of `metrics.jsonl`, in order."""
        return [json.loads(line) for line in self._complete_lines()]

    def truncate_metrics(self, step: int, evaluation_pending: bool = False) -> None:
        """Takes `metrics.jsonl` back to a checkpoint: removes lines after `step`, which will be computed again.

        So will the validation line of `step` itself, where the checkpoint was saved before that evaluation.
        """

        def stays(line: Line) -> bool:
            return line["step"] < step or (
                line["step"] == step and not (evaluation_pending and line["split"] == "validation")
            )

        kept = [(text, line) for text in self._complete_lines() if stays(line := json.loads(text))]
        atomic_write(self.metrics, "".join(text for text, _ in kept))
        self._validation = ValidationSummary(line for _, line in kept)

    def _complete_lines(self) -> list[str]:
        if not self.metrics.exists():
            return []
        with self.metrics.open(encoding="utf-8", newline="\n") as file:
            return [line for line in file if line.endswith("\n")]

    @cached_property
    def _validation(self) -> ValidationSummary:
        """Those of `metrics.jsonl`: read once, then kept up to date as lines are logged."""
        return ValidationSummary(self.read_metrics())

    def write_summary(self, status: Status, **facts: Any) -> dict[str, Any]:
        """Writes and returns `summary.json`: the status, each metric's best and last validation value with its step.

        The values are those of `metrics.jsonl`, so they cover the whole run however often it was interrupted.

        Args:
            status: of the run from now on.
            facts: further entries, e.g. `seconds` of training over all interruptions, or the `error` that ended it.
        """
        summary = {"status": status, "best": self._validation.best, "final": self._validation.final, **facts}
        atomic_write(self.path / SUMMARY, pretty(summary))
        return summary

    def update_status(self, status: Status, **facts: Any) -> None:
        """Changes the status in `summary.json` before training begins, if this process holds the run;
        a finished run stays finished.
        """
        before = self.read_summary()
        if self.is_open and before.get("status") != "finished":
            kept = {key: value for key, value in before.items() if key not in ("status", "best", "final", "error")}
            self.write_summary(status, **kept, **facts)

    def read_summary(self) -> dict[str, Any]:
        """What `write_summary` wrote last; empty before that."""
        file = self.path / SUMMARY
        return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value


def pretty(tree: dict[str, Any]) -> str:
    """Indented JSON; nan and infinity become null."""
    return json.dumps(_finite(tree), indent=2, allow_nan=False) + "\n"


def runs_dir() -> Path:
    """The parent of all run folders: `$TRAINER_RUNS`, else `runs`."""
    return Path(os.environ.get("TRAINER_RUNS") or "runs")


def find_run(given: str) -> Path:
    """The folder of an existing run, given by its path or its name below `runs_dir()`.

    Raises:
        UserError: no such run; suggests the nearest names.
    """
    for folder in (runs_dir() / given, Path(given)):
        if (folder / "checkpoints").is_dir():
            return folder
    known = sorted(path.parent.name for path in runs_dir().glob("[!.]*/checkpoints"))
    raise UserError(f"no run {given!r} in {runs_dir()}; {nearest(given, known)}")
