"""The files of a trained model: where they are, and what the network's data set was."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.components import HUB
from trainer.data.card import CARD, Card
from trainer.data.prepare import data_dir
from trainer.data.source import DataInfo
from trainer.errors import UserError
from trainer.runs.checkpoint import COUNTERS, MANIFEST, InvalidCheckpoint, read_counters, verify
from trainer.runs.folder import DATA, RECIPE, RunFolder, find_run
from trainer.runs.published import MODEL, fetch
from trainer.runs.published import verify as verify_published

EMA = "ema.safetensors"


@dataclass(frozen=True)
class TrainedModel:
    """A trained model on disk.

    Attributes:
        name: of the run.
        recipe: the resolved recipe.
        weights: those that are evaluated: the averaged ones, where the run has them.
        info: classes and statistics of the data set.
        size: height and width of all images that validation shows to the network; None where they differ.
        step: optimizer steps done.
        checkpoint: its folder.
        published: whether this is a published folder, apart from its run and data set.
        identity: of the prepared set that it was trained on; None where that is unknown.
    """

    name: str
    recipe: Path
    weights: Path
    info: DataInfo
    size: tuple[int, int] | None
    step: int
    checkpoint: Path
    published: bool = False
    identity: str | None = None


def find_trained(given: str, checkpoint: str = "best") -> TrainedModel:
    """Finds the model of a run, of a single checkpoint or of a published folder.

    Args:
        given: a run's name or folder, a checkpoint folder in it, a published model on the Hub (`hf://OWNER/NAME`,
            optionally with `@REVISION`), or its folder: recipe.yaml, data.json and model.safetensors.
        checkpoint: of a run: `best` (the newest one, where none is the best), `last`, or a name such as
            `step_00000100`.

    Raises:
        UserError: there is no such run or checkpoint, or it is damaged.
    """
    on_hub = given.startswith(HUB)
    path = fetch(given) if on_hub else Path(given)
    if (path / RECIPE).is_file() and (path / MODEL).is_file():
        if checkpoint not in ("best", "last"):
            raise UserError(f"{given} is a published model with only one set of weights: leave out {checkpoint!r}")
        if not on_hub and (path / MANIFEST).exists():  # `fetch` has verified the others
            verify_published(path)
        return _published(path, given.partition("@")[0].rpartition("/")[2] if on_hub else path.resolve().name)
    if (path / MODEL).is_file():
        folder = path.resolve()
        run = next((parent.parent for parent in folder.parents if parent.name == "checkpoints"), None)
        if run is None:
            raise UserError(f"{given}: not in the checkpoints/ of a run folder, so its recipe is unknown")
        return _checkpoint(run, folder)
    run = find_run(given)
    return _checkpoint(run, _chosen(run, checkpoint))


def _chosen(run: Path, checkpoint: str) -> Path:
    store = RunFolder(run).checkpoints
    if not store.steps():
        raise UserError(f"{run} has no checkpoint yet: nothing can be loaded from it")
    names = ("best", "last") if checkpoint == "best" else (checkpoint,)
    for name in names:
        if "/" not in name and (folder := store.path / name).is_dir():
            return folder.resolve()
    if (path := Path(checkpoint)).is_dir() and "/" in checkpoint:
        if run.resolve() not in path.resolve().parents:
            raise UserError(f"{checkpoint} is no checkpoint of {run}; give it instead of the run to use its own recipe")
        return path.resolve()
    raise UserError(f"{run} has no checkpoint {checkpoint!r}; it has best, last, or {_listed(store.steps())}")


def _listed(steps: list[int]) -> str:
    return ", ".join(f"step_{step:08d}" for step in steps)


def _checkpoint(run: Path, folder: Path) -> TrainedModel:
    try:
        verify(folder)
    except InvalidCheckpoint as error:
        raise UserError(f"{folder} is not intact: {error}") from None
    ema = folder / EMA
    weights = ema if ema.exists() else folder / MODEL
    info, size = _data(run)
    counters = read_counters(folder)
    step, identity = counters["step"], counters.get("data")
    return TrainedModel(RunFolder(run).path.name, run / RECIPE, weights, info, size, step, folder, identity=identity)


def _published(folder: Path, name: str) -> TrainedModel:
    info, size = _data(folder)
    counters = folder / COUNTERS
    try:
        step = int(json.loads(counters.read_text(encoding="utf-8"))["step"]) if counters.exists() else 0
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{counters}: can't be read: {error}") from None
    return TrainedModel(name, folder / RECIPE, folder / MODEL, info, size, step, folder, published=True)


def _data(folder: Path) -> tuple[DataInfo, tuple[int, int] | None]:
    """Classes, statistics and input size, as the run noted them, or from the prepared set of a run that didn't."""
    file = folder / DATA
    if file.exists():
        try:
            noted: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
            info = DataInfo(tuple(noted["classes"]), noted["ignore_index"], noted["statistics"])
            size = noted["size"]
            return info, None if size is None else (int(size[0]), int(size[1]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{file}: can't be read: {type(error).__name__}: {error}") from None
    settings = RunFolder(folder).read_recipe()["data"]
    prepared = data_dir() / str(settings.get("set") or settings["name"])
    if not (prepared / CARD).exists():
        raise UserError(
            f"{folder} is of an older version, and says nothing of its data set; prepare that set again "
            f"({settings['name']}), or train a step more"
        )
    resize = settings.get("resize")
    return Card.load(prepared).info, None if resize is None else (resize[0], resize[1])
