"""The metrics of a trained model on a split of a prepared set, by the code of training's own evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

import torch

from trainer.data.build import EvaluationData
from trainer.data.prepare import archives_dir, data_dir, ensure_prepared
from trainer.data.source import DataInfo
from trainer.distributed.accelerator import as_in_training, build_accelerator, launched_as
from trainer.distributed.control import Control
from trainer.distributed.failures import reported_to_peers
from trainer.distributed.launch import check_device
from trainer.distributed.watchdog import Watchdog
from trainer.errors import TrainingFailed, UserError
from trainer.inference.model import AS_TRAINED, load_task
from trainer.inference.predictions import prediction_files
from trainer.inference.trained import TrainedModel
from trainer.recipe.load import load_recipe
from trainer.recipe.recipe import Recipe
from trainer.recipe.settings import SHARED
from trainer.reporting.progress import Progress
from trainer.runs.folder import RunFolder
from trainer.signals import Stopped
from trainer.tasks.build import to_device
from trainer.tasks.checks import DATA_CHECKS, check_sizes
from trainer.tasks.evaluation import total_sums

CHANGEABLE = ("evaluate.batch_size", "train.precision", "train.threads")
"""The keys, besides those of `data`, that an evaluation may change: the network and the task stay."""


@dataclass(frozen=True)
class Evaluation:
    """How good a trained model is on a split.

    Attributes:
        trained: the model.
        split: of the set.
        data: the set's name.
        identity: of the prepared set, as runs record it.
        samples: number of samples in the split.
        metrics: as in a validation line of `metrics.jsonl`.
        headline: the metrics that people look at.
    """

    trained: TrainedModel
    split: str
    data: str
    identity: str
    samples: int
    metrics: dict[str, Any]
    headline: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return {
            "run": self.trained.name,
            "checkpoint": str(self.trained.checkpoint),
            "step": self.trained.step,
            "data": {"name": self.data, "identity": self.identity},
            "split": self.split,
            "samples": self.samples,
            "metrics": self.metrics,
        }


def evaluation_recipe(trained: TrainedModel, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of a trained model for another evaluation.

    Args:
        trained: the model.
        overrides: `key.path=value`, of `data` or `CHANGEABLE`.

    Raises:
        UserError: an override would change the network or the task, or is invalid; or the set has other classes.
    """
    for override in overrides:
        key = override.partition("=")[0].strip()
        if key.startswith("data.augment"):
            raise UserError(f"{key}: an evaluation never augments; leave it out")
        if "=" in override and key.partition(".")[0] != "data" and key not in CHANGEABLE:
            raise UserError(
                f"{key} can't change: an evaluation keeps the network and the task as they were trained; "
                f"it takes data.*, {', '.join(CHANGEABLE[:-1])} and {CHANGEABLE[-1]}"
            )
    checks = [*DATA_CHECKS, (("train",), check_device)]
    no_code = ["plugins=[]"] if trained.published else []  # a published recipe may name any
    recipe = load_recipe(trained.recipe, [*AS_TRAINED, *no_code, "data.augment=[]", *overrides], checks)
    own, others = trained.info.classes, recipe.source.info.classes
    if own != others:
        raise UserError(
            f"{recipe.source.name} has other classes than {trained.name} was trained on: {_difference(own, others)}"
        )
    return recipe


def evaluate_trained(
    trained: TrainedModel, split: str = "validation", overrides: Sequence[str] = (), predictions: Path | None = None
) -> Evaluation:
    """Evaluates a trained model, on all processes of a launch together.

    Args:
        trained: the model.
        split: `validation`, `test` or `train`; never augmented.
        overrides: see `evaluation_recipe`.
        predictions: where the predictions go, see `prediction_files`.

    Returns:
        The same on all processes.

    Raises:
        UserError: an override is invalid, the set has no such split or other classes than the model, or the
            predictions can't be written.
        TrainingFailed: out of memory, or a sample can't be read.
    """
    recipe = evaluation_recipe(trained, overrides)
    rank, world_size = launched_as()
    with _watched(recipe, rank, world_size) as watchdog:
        accelerator, control, display = build_accelerator(recipe), Control(), Progress(enabled=rank == 0)
        watchdog.enter("preparing", patient=True)
        control.on_main(lambda: ensure_prepared(recipe.source, data_dir(), archives_dir(), display.say).name)
        data = EvaluationData(recipe, rank, world_size, accelerator.device, split)
        if trained.identity not in (None, data.identity) and _is_own_set(trained, recipe):
            display.say(f"note: {data.folder} was prepared again since this run: its samples differ")
        task = load_task(recipe, trained, _info(trained, data, recipe.components["task"].fields))
        check_sizes(recipe, task.model, split)
        pixels = data.validation.reader.pixels
        model = to_device(task, recipe, accelerator.device, uniform=pixels is None or pixels.uniform)
        model.requires_grad_(False)
        forward, rounds = as_in_training(accelerator, model), count()

        def next_round() -> bool:
            watchdog.enter("evaluating", trained.step)
            display.step(next(rounds))
            return True

        with prediction_files(predictions, task, data, control) as files:
            display.start(data.validation_rounds, 0)
            try:
                sums = total_sums(task, model, forward, data, next_round, files.add if files else None)
            finally:
                display.close()
            assert sums is not None
            if files:
                watchdog.enter("writing predictions", trained.step, patient=True)
                control.on_main(lambda: files.finish(sums))
        metrics = task.metrics(sums)
    card = data.card
    return Evaluation(trained, split, card.name, data.identity, len(data.validation), metrics, task.metric_names)


@contextmanager
def _watched(recipe: Recipe, rank: int, world_size: int) -> Iterator[Watchdog]:
    """Inside, no process waits for one that is lost, and what fails is reported as a failed evaluation."""
    failure = "evaluation failed: {reason}"
    watchdog = Watchdog(rank, world_size, 60 * float(recipe.train.timeout.value), failure=failure)
    try:
        with reported_to_peers(watchdog, world_size):
            yield watchdog
    except Stopped:
        watchdog.close()
        raise
    except (torch.OutOfMemoryError, MemoryError) as error:
        together = recipe.evaluate.batch_size or recipe.data.batch_size
        advice = "a smaller evaluate.batch_size computes the same"
        raise _failed(TrainingFailed(f"out of memory with evaluate.batch_size={together}: {advice}"), True) from error
    except TrainingFailed as error:
        raise _failed(error, error.on_one_rank) from None
    watchdog.close()


def _failed(error: TrainingFailed, on_one_rank: bool) -> TrainingFailed:
    error.label, error.on_one_rank = "evaluation failed: ", on_one_rank
    return error


def _is_own_set(trained: TrainedModel, recipe: Recipe) -> bool:
    """Whether this recipe names the set that the model was trained on."""
    own, now = RunFolder(trained.recipe.parent).read_recipe()["data"], recipe.resolved()["data"]
    return all(own.get(key) == now[key] for key in now if key == "name" or key not in SHARED["data"])


def _info(trained: TrainedModel, data: EvaluationData, fields: Sequence[str]) -> DataInfo:
    """What the task must know: the classes and statistics are the network's, the ignored label is the set's.

    Raises:
        UserError: the set has other values of what gives the classes their meaning, e.g. colour centres.
    """
    for field in fields:
        if trained.info.statistics.get(field) != data.info.statistics.get(field):
            raise UserError(
                f"{data.folder.name} has other {field.replace('_', ' ')} than the set that {trained.name} was trained "
                "on, so its classes mean something else"
            )
    return replace(trained.info, ignore_index=data.info.ignore_index)


def _difference(own: Sequence[str], others: Sequence[str]) -> str:
    missing, extra = ([name for name in a if name not in b] for a, b in ((own, others), (others, own)))
    if not missing and not extra:
        place = next(index for index, (a, b) in enumerate(zip(own, others, strict=False)) if a != b)
        return f"their order differs, class {place} is {others[place]!r} instead of {own[place]!r}"
    parts = [f"it lacks {_listed(missing)}"] * bool(missing) + [f"it adds {_listed(extra)}"] * bool(extra)
    return " and ".join(parts)


def _listed(names: Sequence[str], shown: int = 5) -> str:
    listed = ", ".join(map(repr, names[:shown]))
    return listed + (f" and {len(names) - shown} more" if len(names) > shown else "")
