"""From a recipe to a Task: model, weights, trainable layers, loss."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from itertools import product
from typing import Any, Literal, get_args, get_origin

import torch
from torch import nn

from trainer.components import SUFFIX
from trainer.data.seeds import Use, mix
from trainer.data.source import DataInfo
from trainer.errors import UserError
from trainer.models.freeze import layers_after, train_only
from trainer.models.layers import is_below
from trainer.models.weights import load_safetensors
from trainer.recipe.recipe import Recipe, build
from trainer.tasks.task import Task

MAX_CHANGED = 2  # settings of a model that are changed at once to find the one that a file fits


def build_task(recipe: Recipe, info: DataInfo) -> Task[Any]:
    """Builds what a recipe trains; the same initial weights on every process.

    The initial weights are, each over the one before: random ones from `train.seed`; those that `model.weights` names,
    or a safetensors file's, but for `model.reset_layers`; a checkpoint's, where the run is resumed.

    Raises:
        UserError: weights can't be downloaded or don't fit.
    """
    weights, reset_layers = recipe.model.weights, recipe.model.reset_layers
    seed = mix(recipe.train.seed, Use.INITIALISE)
    try:
        torch.manual_seed(seed)
        model = build_model(recipe, info, weights=published_weights(recipe))
        if weights.endswith(SUFFIX):
            load_safetensors(model, weights, reset_layers, alternatives(recipe, info))
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
    """The model; `changed` are settings that replace the recipe's."""
    settings = recipe.model.model_copy(update=changed)
    model: nn.Module = build(recipe.components["model"], settings, num_classes=info.num_classes)
    return model


def build_untrained(recipe: Recipe, device: str = "meta") -> nn.Module:
    """The model without published weights, all of it trainable; on the meta device it takes no memory."""
    with torch.device(device):
        return build_model(recipe, recipe.source.info, weights="none")


def published_weights(recipe: Recipe) -> str:
    """The published weights that the model is built with; a file is loaded into it once it is built."""
    weights = recipe.model.weights
    return "none" if weights.endswith(SUFFIX) else weights


def trainable_layers(recipe: Recipe, model: nn.Module) -> list[str]:
    """The trainable layers, by `train.freeze` or `model.train_only`; none means all of them.

    Raises:
        ValueError: see `layers_after`.
    """
    return layers_after(model, recipe.train.freeze) if recipe.train.freeze else recipe.model.train_only


def context(info: DataInfo) -> dict[str, Any]:
    """What tasks and losses may take before `/`."""
    return {
        "num_classes": info.num_classes,
        "ignore_index": info.ignore_index,
        "classes": info.classes,
        "statistics": info.statistics,
    }


def alternatives(recipe: Recipe, info: DataInfo) -> Iterator[tuple[str, nn.Module]]:
    """The models that other values of at most two settings would make, without memory, and these settings;
    those of one setting first.
    """
    fields = recipe.components["model"].schema.model_fields
    choices = {key: values for key, field in fields.items() if (values := _choices(field.annotation))}
    changes = [
        {key: value for key, value in zip(choices, values, strict=True) if value != getattr(recipe.model, key)}
        for values in product(*choices.values())
    ]
    for changed in sorted(changes, key=len):
        if not 1 <= len(changed) <= MAX_CHANGED:
            continue
        with suppress(ValueError):  # values that don't go together
            with torch.device("meta"):
                model = build_model(recipe, info, **(changed | {"weights": "none"}))
            yield " ".join(f"model.{key}={_as_written(value)}" for key, value in changed.items()), model


def _choices(annotation: Any) -> tuple[Any, ...]:
    """The values of a setting that has a few."""
    return (False, True) if annotation is bool else get_args(annotation) if get_origin(annotation) is Literal else ()


def _as_written(value: Any) -> str:
    """A value as a recipe has it."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def place(task: Task[Any], recipe: Recipe, device: torch.device, uniform: bool) -> nn.Module:
    """Moves model and loss to the device, in the recipe's precision and memory layout, and has cuDNN search kernels
    where that pays.

    Args:
        task: owns both.
        recipe: see above.
        device: also `meta`.
        uniform: whether all images have one size before augmentation.

    Returns:
        The model, which is the same object.
    """
    task.loss.to(device)
    model = task.model.to(device)
    if recipe.train.precision == "fp64":
        model.double()
    if recipe.train.channels_last:
        model.to(memory_format=torch.channels_last)
    # Two searches may end with different kernels, so with different bits.
    torch.backends.cudnn.benchmark = (
        shapes_are_fixed(recipe, task, uniform) and not torch.are_deterministic_algorithms_enabled()
    )
    return model


def shapes_are_fixed(recipe: Recipe, task: Task[Any], uniform: bool) -> bool:
    """Whether all training steps see the same shapes: cuDNN searches its fastest kernels anew for every other one.

    Args:
        recipe: an augmentation of it may cut everything to one size.
        task: its network may resize images by itself.
        uniform: whether all images have one size before augmentation, e.g. by `data.resize`.
    """
    return task.fixed_shapes and (
        uniform or any(getattr(settings, "size", None) for _, settings in recipe.augmentations)
    )
