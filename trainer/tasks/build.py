"""Builds the Task of a recipe: model, weights, trainable layers, loss."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from itertools import product
from typing import Any, Literal, get_args, get_origin

import torch
from torch import nn

from trainer.components import is_trained
from trainer.data.seeds import Use, mix
from trainer.data.source import DataInfo
from trainer.errors import UserError
from trainer.models.freeze import layers_after, train_only
from trainer.models.layers import is_below
from trainer.models.weights import load_safetensors
from trainer.recipe.recipe import Recipe, build
from trainer.runs.published import local_weights
from trainer.tasks.task import Task

MAX_CHANGED = 2  # settings of a model to change at once in the search for one that a weight file fits


def build_task(recipe: Recipe, info: DataInfo) -> Task[Any]:
    """Builds the task of a recipe, with the same initial weights on every process.

    The weights are random, from `train.seed`. `model.weights` (published weights or a safetensors file) then replaces
    those outside `model.reset_layers`. When a run resumes, its checkpoint replaces them all later.

    Raises:
        UserError: weights can't be downloaded or don't fit.
    """
    weights, reset_layers = recipe.model.weights, recipe.model.reset_layers
    seed = mix(recipe.train.seed, Use.INITIALISE)
    try:
        torch.manual_seed(seed)
        model = build_model(recipe, info, weights=published_weights(recipe))
        if is_trained(weights):
            load_safetensors(model, local_weights(weights), reset_layers, alternatives(recipe, info))
        elif weights != "none" and reset_layers:
            torch.manual_seed(seed)
            fresh = build_model(recipe, info, weights="none").state_dict()
            model.load_state_dict(
                {key: value for key, value in fresh.items() if is_below(key, reset_layers)}, strict=False
            )
    except (ConnectionError, ValueError) as error:
        raise UserError(f"model.weights: {error}") from error
    train_only(model, trainable_layers(recipe, model))
    task: Task[Any] = recipe.build("task", model=model, loss=recipe.build("loss", **context(info)), **context(info))
    return task


def build_model(recipe: Recipe, info: DataInfo, **changed: Any) -> nn.Module:
    """The model of a recipe, with the settings in `changed` replaced."""
    settings = recipe.model.model_copy(update=changed)
    model: nn.Module = build(recipe.components["model"], settings, num_classes=info.num_classes)
    return model


def build_untrained(recipe: Recipe, device: str = "meta") -> nn.Module:
    """The model with random weights, all trainable; on the meta device it takes no memory."""
    with torch.device(device):
        return build_model(recipe, recipe.source.info, weights="none")


def published_weights(recipe: Recipe) -> str:
    """The published weights to build the model with; `none` for a file, which is loaded afterwards."""
    weights = recipe.model.weights
    return "none" if is_trained(weights) else weights


def trainable_layers(recipe: Recipe, model: nn.Module) -> list[str]:
    """The trainable layers, from `train.freeze` or `model.train_only`; an empty list means all.

    Raises:
        ValueError: see `layers_after`.
    """
    return layers_after(model, recipe.train.freeze) if recipe.train.freeze else recipe.model.train_only


def context(info: DataInfo) -> dict[str, Any]:
    """The values that tasks and losses may take before `/`."""
    return {
        "num_classes": info.num_classes,
        "ignore_index": info.ignore_index,
        "classes": info.classes,
        "statistics": info.statistics,
    }


def alternatives(recipe: Recipe, info: DataInfo) -> Iterator[tuple[str, nn.Module]]:
    """Models with other values of one or two settings (one first), as overrides and a model on the meta device."""
    fields = recipe.components["model"].schema.model_fields
    choices = {key: values for key, field in fields.items() if (values := _choices(field.annotation))}
    changes = [
        {key: value for key, value in zip(choices, values, strict=True) if value != getattr(recipe.model, key)}
        for values in product(*choices.values())
    ]
    for changed in sorted(changes, key=len):
        if not 1 <= len(changed) <= MAX_CHANGED:
            continue
        with suppress(ValueError):  # an invalid combination
            with torch.device("meta"):
                model = build_model(recipe, info, **(changed | {"weights": "none"}))
            yield " ".join(f"model.{key}={_as_written(value)}" for key, value in changed.items()), model


def _choices(annotation: Any) -> tuple[Any, ...]:
    """The values of a setting that has only a few."""
    return (False, True) if annotation is bool else get_args(annotation) if get_origin(annotation) is Literal else ()


def _as_written(value: Any) -> str:
    """A value as written in a recipe."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def to_device(task: Task[Any], recipe: Recipe, device: torch.device, uniform: bool) -> nn.Module:
    """Moves model and loss to the device, in the recipe's precision and memory format, and lets cuDNN search for the
    fastest kernels if that pays off.

    Args:
        task: owns model and loss.
        recipe: of the run.
        device: also `meta`.
        uniform: whether all images have one size before augmentation.

    Returns:
        The same model object.
    """
    task.loss.to(device)
    model = task.model.to(device)
    if recipe.train.precision == "fp64":
        model.double()
    if recipe.train.channels_last:
        model.to(memory_format=torch.channels_last)
    # Two searches may choose different kernels, so with different bits.
    torch.backends.cudnn.benchmark = (
        shapes_are_fixed(recipe, task, uniform) and not torch.are_deterministic_algorithms_enabled()
    )
    return model


def shapes_are_fixed(recipe: Recipe, task: Task[Any], uniform: bool) -> bool:
    """Whether all training steps have the same shapes; cuDNN searches for the fastest kernels again for each new shape.

    Args:
        recipe: its augmentations may crop all images to one size.
        task: its model may resize images internally.
        uniform: whether all images have one size before augmentation, e.g. by `data.resize`.
    """
    return task.fixed_shapes and (
        uniform or any(getattr(settings, "size", None) for _, settings in recipe.augmentations)
    )
