"""Checks of a recipe that need its data set, model, loss or task."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from trainer.components import is_trained
from trainer.data.roles import has_pixels
from trainer.data.sizes import check_one_size, sizes_fed, sizes_of
from trainer.errors import UserError
from trainer.models.freeze import layers_after, train_only
from trainer.models.layers import check_layers, check_sides
from trainer.models.weights import check_safetensors
from trainer.recipe.checks import Check
from trainer.recipe.file import Problem, nearest
from trainer.recipe.recipe import Recipe
from trainer.runs.published import local_weights
from trainer.tasks.build import alternatives, build_model, context, published_weights
from trainer.tasks.task import Task


def _check_columns(recipe: Recipe) -> Iterator[Problem]:
    """Checks that the data set has the masks that the task needs, and images if they are resized or augmented."""
    for key, changes in (("resize", recipe.data.resize), ("augment", recipe.augmentations)):
        if changes and not has_pixels(recipe.source.columns):
            yield recipe.problem(f"data.{key}", f"samples of {recipe.data.name} aren't images: remove this key")
    if "masks" in recipe.components["task"].fields and "boxes" in recipe.source.columns.values():
        yield recipe.problem(
            "data", f"task {recipe.task.name} needs masks, but this data set has only boxes", recipe.data.name
        )


def _check_model(recipe: Recipe) -> Iterator[Problem]:
    """Checks, without memory, that the model can be built, that the recipe's layers exist and that its weights fit."""
    info, settings = recipe.source.info, recipe.model
    try:
        with torch.device("meta"):
            model = build_model(recipe, info, weights=published_weights(recipe))
    except (ValueError, UserError) as error:
        yield recipe.problem("model", str(error))
        return
    for key, apply in (("train_only", train_only), ("reset_layers", partial(check_layers, key="model.reset_layers"))):
        try:
            apply(model, getattr(settings, key))
        except ValueError as error:
            yield recipe.problem(f"model.{key}", str(error).removeprefix(f"model.{key}: "), getattr(settings, key))
            return
    if is_trained(settings.weights):
        try:
            check_safetensors(model, local_weights(settings.weights), settings.reset_layers, alternatives(recipe, info))
        except (ValueError, UserError) as error:
            yield recipe.problem("model.weights", str(error))
    yield from (recipe.problem(key, what) for key, what in _wrong_sides(recipe, model))
    if recipe.train.freeze:
        if settings.train_only:
            yield recipe.problem(
                "train.freeze",
                "conflicts with model.train_only, which also chooses the trainable layers: remove one of them",
                recipe.train.freeze,
            )
        try:
            layers_after(model, recipe.train.freeze)
        except ValueError as error:
            yield recipe.problem("train.freeze", str(error).removeprefix("train.freeze: "), recipe.train.freeze)
    if settings.train_only and not any(parameter.requires_grad for parameter in model.parameters()):
        yield recipe.problem(
            "model.train_only", "these layers have no parameters, so nothing would be trainable", settings.train_only
        )


def check_sizes(recipe: Recipe, model: nn.Module, evaluated: str | None = None) -> None:
    """Checks that the model's `size_divisor` divides the sides of all images whose size is known.

    Args:
        recipe: names the set and what is done to its images.
        model: see above.
        evaluated: the split that is evaluated; None where the recipe trains and validates.

    Raises:
        UserError: a side isn't divisible.
    """
    for key, what in _wrong_sides(recipe, model, evaluated):
        raise UserError(f"{key}: {what}")


def _wrong_sides(recipe: Recipe, model: nn.Module, evaluated: str | None = None) -> Iterator[tuple[str, str]]:
    """The first size that doesn't fit the model: the key that sets it, and a message."""
    fed = {evaluated: sizes_of(recipe, evaluated)} if evaluated else sizes_fed(recipe)
    for split in ("validation", "train", "test"):
        key = "data.augment" if split == "train" and recipe.augmentations else "data.resize"
        sizes = fed.get(split)
        try:
            for height, width in () if sizes is None else sizes.tolist():
                check_sides(getattr(model, "size_divisor", 1), height, width, f"those of the {split} split")
        except UserError as error:
            yield key, str(error)
            return


def _check_loss(recipe: Recipe) -> Iterator[Problem]:
    """Checks that the loss can be built with its settings for this data."""
    try:
        recipe.build("loss", **context(recipe.source.info))
    except (ValueError, UserError) as error:
        yield recipe.problem("loss", str(error))


def _check_task(recipe: Recipe) -> Iterator[Problem]:
    """Checks that the task can be built with its settings for this data, and that it has the metric `evaluate.best`."""
    try:
        task: Task[Any] = recipe.build("task", model=nn.Module(), loss=nn.Module(), **context(recipe.source.info))
    except (ValueError, UserError) as error:
        yield recipe.problem("task", str(error))
        return
    best = recipe.evaluate.best
    if best not in task.metric_names:
        yield recipe.problem("evaluate.best", f"unknown metric; {nearest(best, task.metric_names)}", best)


def _check_batches(recipe: Recipe, processes: int) -> Iterator[Problem]:
    """Checks that the images can be batched with this number of processes."""
    try:
        check_one_size(recipe, recipe.source.columns, processes)
    except UserError as error:
        yield recipe.problem("data.augment" if recipe.data.resize else "data.resize", str(error))


DATA_CHECKS: tuple[Check, ...] = ((("source", "data", "task"), _check_columns),)
"""For `load_recipe`: whether the set has what the task needs."""

TASK_CHECKS: tuple[Check, ...] = (
    *DATA_CHECKS,
    (("source", "data", "model", "train"), _check_model),
    (("source", "loss"), _check_loss),
    (("source", "task", "evaluate"), _check_task),
)
"""For `load_recipe`."""


def batch_checks(processes: int) -> tuple[Check, ...]:
    """Further checks for `load_recipe`, which depend on the number of processes."""
    needs = ("source", "data", "task", "train", "evaluate")
    return ((needs, partial(_check_batches, processes=max(1, processes))),)
