"""The status of runs, read from their folders in a moment: nothing here imports torch or reads the metrics."""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NotRequired

from pydantic import TypeAdapter, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from typing_extensions import TypedDict

from trainer.runs.folder import RECIPE, SUMMARY
from trainer.runs.lock import is_locked
from trainer.runs.store import CheckpointStore

TO_BE_RESUMED, FAILED = 75, 3  # exit codes; 0 is finished


class Best(TypedDict):
    """The best validation value of a metric."""

    value: float
    step: int


class Summary(TypedDict):
    """What is read of `summary.json`."""

    status: NotRequired[str]
    best: NotRequired[dict[str, Best]]
    step: NotRequired[int | None]
    total_steps: NotRequired[int | None]
    seconds: NotRequired[float | None]
    error: NotRequired[str]


_summary = TypeAdapter(Summary)


@dataclass
class Standing:
    """The status of a run.

    Attributes:
        name: of the run.
        status: finished, running, stopped, failed, interrupted (killed), not started, cancelled, or damaged.
        code: 0 finished, 75 to be resumed, 3 failed.
        note: what to do next.
        step: optimizer steps done, as far as is known.
        total_steps: that the recipe asks for; None where it gives a time.
        checkpoint: step of the newest checkpoint.
        best: `metric`, `value` and `step` of the recipe's `evaluate.best`.
        seconds: of training.
    """

    name: str
    status: str
    code: int
    note: str
    step: int | None = None
    total_steps: int | None = None
    checkpoint: int | None = None
    best: dict[str, Any] | None = None
    seconds: float | None = None

    def row(self) -> list[str]:
        """Cells of a table."""
        step = (
            "" if self.step is None else f"step {self.step}" + (f" of {self.total_steps}" if self.total_steps else "")
        )
        seconds = "" if self.seconds is None else f"{self.seconds:.0f} s"
        return [self.name, self.status, step, self.best_text(), seconds, self.note]

    def best_text(self) -> str:
        """Metric and value, e.g. `miou 0.9300`."""
        return "" if self.best is None else f"{self.best['metric']} {self.best['value']:.4f}"


def standing_of(folder: Path) -> Standing:
    """The status of the run in a folder; `not started` if there is none."""
    try:
        if not (folder / "checkpoints").is_dir():
            return Standing(folder.name, "not started", TO_BE_RESUMED, "no training step done yet")
        summary = _read_summary(folder)
        newest = max(CheckpointStore(folder / "checkpoints").steps(), default=None)
        status, code, note = _status(folder, summary, newest)
        best = _best(folder, summary)
    except (OSError, ValueError) as error:
        return Standing(folder.name, "damaged", FAILED, " ".join(str(error).split()))
    step, total_steps = summary.get("step", newest), summary.get("total_steps")
    return Standing(folder.name, status, code, note, step, total_steps, newest, best, summary.get("seconds"))


def _status(folder: Path, summary: Summary, newest: int | None) -> tuple[str, int, str]:
    rerun = "rerun to start from scratch" if newest is None else f"rerun to resume from step {newest}"
    if is_locked(folder):
        return "running", TO_BE_RESUMED, "a process is training it"
    match summary.get("status"):
        case "finished":
            return "finished", 0, f"see {folder}"
        case "failed":
            return "failed", FAILED, f"{summary.get('error', 'see its log')}; fix this and {rerun}"
        case "stopped":
            return "stopped", TO_BE_RESUMED, rerun
    return "interrupted", TO_BE_RESUMED, rerun  # recorded as running, but no process holds its lock


def _read_summary(folder: Path) -> Summary:
    """`summary.json`, empty where there is none; raises ValueError where it is damaged."""
    file = folder / SUMMARY
    try:
        return _summary.validate_python(json.loads(file.read_text(encoding="utf-8")) if file.exists() else {})
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ValueError(f"{SUMMARY} is damaged: {where + ': ' if where else ''}{first['msg']}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{SUMMARY} is damaged: {error}") from error


def _best(folder: Path, summary: Summary) -> dict[str, Any] | None:
    """Best value of the metric that the recipe watches."""
    bests = summary.get("best")
    if not bests:
        return None
    section = read_section(folder, "evaluate")
    metric = section.get("best") if isinstance(section, dict) else None
    return {"metric": metric, **bests[metric]} if metric in bests else None


# ---------------------------------------------------------------- of many runs


def read_section(folder: Path, section: str) -> Any:
    """A section of the resolved recipe, None where it lacks it; the others are not parsed, which takes long.

    Raises:
        OSError, ValueError: the recipe can't be read.
    """
    try:
        text = (folder / RECIPE).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{RECIPE} is damaged: {error}") from error
    found = re.search(rf"^{section}:.*\n(?:(?:[ \t#-].*)?\n)*", text + "\n", re.MULTILINE)
    if found is None:
        return None
    try:
        return _parse(found[0]).get(section)
    except (YAMLError, AttributeError) as error:
        raise ValueError(f"{RECIPE} is damaged: its section {section} is not valid YAML") from error


@lru_cache(maxsize=1024)  # runs of a project have most of their sections in common
def _parse(text: str) -> Any:
    return YAML(typ="safe", pure=True).load(text)


@dataclass
class RunInfo:
    """A run in a list of runs.

    Attributes:
        standing: where it stands.
        task: that its recipe names, None where that can't be read.
        size: bytes of its files.
        modified: when something was last written in it, in seconds since 1970.
    """

    standing: Standing
    task: str | None
    size: int
    modified: float


def run_infos(parent: Path) -> list[RunInfo]:
    """All runs below a folder, also half-made and damaged ones, by name. A folder with none of a run's files is none.

    Raises:
        OSError: the folder can't be read.
    """
    if not parent.is_dir():
        return []
    return [_run_info(path) for path in sorted(parent.iterdir()) if not path.name.startswith(".") and _is_run(path)]


def _is_run(path: Path) -> bool:
    return any(os.path.lexists(path / name) for name in ("checkpoints", RECIPE, SUMMARY))


def _run_info(folder: Path) -> RunInfo:
    standing, task = standing_of(folder), None
    try:
        section = read_section(folder, "task")
        task = section.get("name") if isinstance(section, dict) else section
    except FileNotFoundError:
        pass  # half-made: killed before it was written
    except (OSError, ValueError) as error:
        if standing.status not in ("running", "damaged"):
            standing.status, standing.code, standing.note = "damaged", FAILED, str(error)
    size, modified = 0, 0.0
    for found in _files(folder):
        size, modified = size + found.st_size, max(modified, found.st_mtime)
    return RunInfo(standing, None if task is None else str(task), size, modified or folder.lstat().st_mtime)


def _files(folder: Path) -> Iterator[os.stat_result]:
    """Each regular file of a folder once, however many hard links it has there; what can't be read is left out."""
    seen: set[tuple[int, int]] = set()
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                found = os.lstat(os.path.join(parent, name))
            except OSError:  # removed in this moment
                continue
            if stat.S_ISREG(found.st_mode) and (key := (found.st_dev, found.st_ino)) not in seen:
                seen.add(key)
                yield found
