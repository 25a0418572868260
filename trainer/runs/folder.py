"""Where runs lie and who has them; nothing here imports torch."""

from __future__ import annotations

import io
import json
import math
import os
from pathlib import Path
from typing import Any, Literal

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from trainer.errors import UserError
from trainer.metrics.best import lower_is_better
from trainer.recipe.file import nearest

Status = Literal["running", "finished", "stopped", "failed"]

Line = dict[str, Any]
"""One line of `metrics.jsonl`: `step`, `epoch`, `split`, then metrics by name."""

# What stands in a line beside its metrics; `*_per_second` too.
BOOKKEEPING = ("step", "epoch", "samples", "seconds", "time")


def atomic_write(path: Path, text: str) -> None:
    """Replaces `path` by `text` (UTF-8): a reader, or a kill at any moment, meets the old or the new file,
    never half of one.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)  # the rename itself lives in the folder
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def set_aside(path: Path) -> Path:
    """Moves a run folder to `<name>.1`, or the first number that is free; returns where it is now."""
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


class RunFolder:
    """The files of one run.

    Attributes:
        path: `runs/<name>`.
        is_open: whether this process has the run, and its recipe is the one that is trained, see `open_run`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.is_open = False

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def pictures(self) -> Path:
        """Folder of the PNG files."""
        return self.path / "pictures"

    def pictures_of(self, step: int) -> list[Path]:
        """The PNG files that were drawn after a step, e.g. `validation_step_00000123.png`."""
        return sorted(self.pictures.glob(f"*_step_{step:08d}.png"))

    @property
    def metrics(self) -> Path:
        """The file with a JSON object a line."""
        return self.path / "metrics.jsonl"

    def create(self) -> None:
        """Makes the folders; those that are there stay as they are."""
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        self.pictures.mkdir(exist_ok=True)

    def write_recipe(self, resolved: dict[str, Any]) -> None:
        """Writes the resolved recipe as YAML that can be run again."""
        text = io.StringIO("# The recipe of this run, with every default written out.\n")
        text.seek(0, io.SEEK_END)
        YAML().dump(resolved, text)
        atomic_write(self.path / "recipe.yaml", text.getvalue())

    def read_recipe(self) -> dict[str, Any]:
        """The resolved recipe that this run was started with."""
        file = self.path / "recipe.yaml"
        try:
            recipe = YAML(typ="safe", pure=True).load(file)
        except (OSError, YAMLError) as error:
            raise UserError(
                f"{file} can't be read, so what the run was is unknown: {error}; --resume never sets the folder aside"
            ) from error
        if not isinstance(recipe, dict) or "train" not in recipe:
            raise UserError(f"{file} is no resolved recipe; --resume never sets the folder aside")
        return recipe

    def write_environment(self, environment: dict[str, Any]) -> None:
        """Writes what the run computes with, see `environment`."""
        atomic_write(self.path / "environment.json", _pretty(environment))

    def log(self, line: Line) -> None:
        """Appends a line to `metrics.jsonl`, in the operating system's hands when this returns.

        Floats keep every bit. JSON knows no nan and no infinity: they become null.
        """
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(_finite(line), allow_nan=False) + "\n")

    def read_metrics(self) -> list[Line]:
        """All whole lines of `metrics.jsonl`, in order."""
        return [json.loads(line) for line in self._whole_lines()]

    def truncate_metrics(self, step: int, evaluation_pending: bool = False) -> None:
        """Takes `metrics.jsonl` back to a checkpoint: lines after `step`, which will be computed again, go.

        So does the validation line of `step` itself, where the checkpoint is from before that evaluation.
        """

        def stays(line: Line) -> bool:
            return line["step"] < step or (
                line["step"] == step and not (evaluation_pending and line["split"] == "validation")
            )

        kept = [line for line in self._whole_lines() if stays(json.loads(line))]
        atomic_write(self.metrics, "".join(kept))

    def _whole_lines(self) -> list[str]:
        if not self.metrics.exists():
            return []
        with self.metrics.open(encoding="utf-8", newline="\n") as file:
            return [line for line in file if line.endswith("\n")]

    def write_summary(self, status: Status, **facts: Any) -> dict[str, Any]:
        """Writes and returns `summary.json`: where the run stands, each metric's best and last validation value with
        its step.

        The values come from `metrics.jsonl`, so that they cover the whole run however often it was interrupted.

        Args:
            status: what the run is from now on.
            facts: what else it says, e.g. `seconds` of training over all interruptions, or the `error` that ended it.
        """
        best: dict[str, dict[str, float]] = {}
        final: dict[str, dict[str, float]] = {}
        for line in self.read_metrics():
            if line["split"] != "validation":
                continue
            for name, value in metrics_of(line).items():
                final[name] = {"value": value, "step": line["step"]}
                if name not in best or (
                    value < best[name]["value"] if lower_is_better(name) else value > best[name]["value"]
                ):
                    best[name] = final[name]
        summary = {"status": status, "best": best, "final": final, **facts}
        atomic_write(self.path / "summary.json", _pretty(summary))
        return summary

    def write_standing(self, status: Status, **facts: Any) -> None:
        """Changes the status in `summary.json` before training begins, if this process has the run;
        a finished one stays finished.
        """
        before = self.read_summary()
        if self.is_open and before.get("status") != "finished":
            kept = {key: value for key, value in before.items() if key not in ("status", "best", "final", "error")}
            self.write_summary(status, **kept, **facts)

    def read_summary(self) -> dict[str, Any]:
        """What `write_summary` wrote last; empty for a run that hasn't come so far."""
        file = self.path / "summary.json"
        return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value


def _pretty(tree: dict[str, Any]) -> str:
    return json.dumps(_finite(tree), indent=2, allow_nan=False) + "\n"


def runs_dir() -> Path:
    """Where run folders lie: `$TRAINER_RUNS`, else `runs`."""
    return Path(os.environ.get("TRAINER_RUNS") or "runs")


def find_run(given: str) -> Path:
    """The folder of a run that is there: its path, or its name below `runs_dir()`.

    Raises:
        UserError: there is none; with the nearest names.
    """
    for folder in (runs_dir() / given, Path(given)):
        if (folder / "checkpoints").is_dir():
            return folder
    known = sorted(path.parent.name for path in runs_dir().glob("[!.]*/checkpoints"))
    raise UserError(f"no run {given!r} in {runs_dir()}; {nearest(given, known)}")
