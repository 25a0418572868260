"""From a recipe to a Task: model, weights, what learns, loss; and the checks that need a model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from itertools import product
from typing import Any, Literal, get_args, get_origin

import torch
from torch import nn

from trainer.components import SUFFIX
from trainer.data.roles import has_pixels
from trainer.data.seeds import Use, mix
from trainer.data.sizes import check_one_size, sizes_fed
from trainer.data.source import DataInfo
from trainer.errors import UserError
from trainer.models.freeze import layers_after, train_only
from trainer.models.layers import check_layers, check_sides, is_below
from trainer.models.weights import check_safetensors, load_safetensors
from trainer.recipe.file import Problem, nearest
from trainer.recipe.recipe import Recipe
from trainer.tasks.task import Task

MAX_CHANGED = 2  # settings of a model that are changed at once to find the one that a file fits


def _build_model(recipe: Recipe, info: DataInfo, weights: str, **changed: Any) -> nn.Module:
    """The model with the named weights; `changed` are settings that replace the recipe's."""
    component = recipe.components["model"]
    settings = {key: getattr(recipe.model, key) for key in component.schema.model_fields} | changed
    if "weights" in settings:
        settings["weights"] = weights
    model: nn.Module = component.build(settings, num_classes=info.num_classes)
    return model


def _named_weights(recipe: Recipe) -> str:
    """The published weights that the model is built with; a file is loaded into it once it is built."""
    weights: str = recipe.model.weights
    return "none" if weights.endswith(SUFFIX) else weights


def _alternatives(recipe: Recipe, info: DataInfo) -> Iterator[tuple[str, nn.Module]]:
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
                model = _build_model(recipe, info, "none", **changed)
            yield (
                " ".join(
                    f"model.{key}={str(value).lower() if isinstance(value, bool) else value}"
                    for key, value in changed.items()
                ),
                model,
            )


def _choices(annotation: Any) -> tuple[Any, ...]:
    """The values of a setting that has a few."""
    return (False, True) if annotation is bool else get_args(annotation) if get_origin(annotation) is Literal else ()


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
        model = _build_model(recipe, info, _named_weights(recipe))
        if weights.endswith(SUFFIX):
            load_safetensors(model, weights, reset_layers, _alternatives(recipe, info))
        elif weights != "none" and reset_layers:
            torch.manual_seed(seed)
            fresh = _build_model(recipe, info, "none").state_dict()
            model.load_state_dict(
                {key: value for key, value in fresh.items() if is_below(key, reset_layers)}, strict=False
            )
    except (ConnectionError, ValueError) as error:
        raise UserError(f"model.weights: {error}") from error
    train_only(model, learning_layers(recipe, model))
    task: Task[Any] = recipe.build("task", model=model, loss=recipe.build("loss", **_context(info)), **_context(info))
    return task


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


def learning_layers(recipe: Recipe, model: nn.Module) -> list[str]:
    """The layers that learn, by `train.freeze` or `model.train_only`; none means all of them.

    Raises:
        ValueError: see `layers_after`.
    """
    return layers_after(model, recipe.train.freeze) if recipe.train.freeze else recipe.model.train_only


def _context(info: DataInfo) -> dict[str, Any]:
    return {
        "num_classes": info.num_classes,
        "ignore_index": info.ignore_index,
        "classes": info.classes,
        "statistics": info.statistics,
    }


def build_untrained(recipe: Recipe, device: str = "meta") -> nn.Module:
    """The model without published weights, all of which learns; on the meta device it takes no memory."""
    with torch.device(device):
        return _build_model(recipe, recipe.build("data").info, "none")


def check_data(recipe: Recipe) -> Iterator[Problem]:
    """Asks the data set what it holds. Where it can't say, that is the one problem: its section is taken out,
    and checks that need it don't run.
    """
    try:
        recipe.build("data")
    except (ValueError, UserError) as error:
        del recipe.sections["data"]
        yield recipe.problem("data", str(error))


def check_model(recipe: Recipe) -> Iterator[Problem]:
    """Builds the model without memory, to see that it can be built,
    that the layers the recipe names exist and that its weights fit.
    """
    info = recipe.build("data").info
    try:
        with torch.device("meta"):
            model = _build_model(recipe, info, _named_weights(recipe))
    except (ValueError, UserError) as error:
        yield recipe.problem("model", str(error))
        return
    settings = recipe.model
    for key, apply in (("train_only", train_only), ("reset_layers", partial(check_layers, key="model.reset_layers"))):
        try:
            apply(model, getattr(settings, key))
        except ValueError as error:
            yield recipe.problem(f"model.{key}", str(error).removeprefix(f"model.{key}: "), getattr(settings, key))
            return
    if settings.weights.endswith(SUFFIX):
        try:
            check_safetensors(model, settings.weights, settings.reset_layers, _alternatives(recipe, info))
        except ValueError as error:
            yield recipe.problem("model.weights", str(error))
    yield from (recipe.problem(key, what) for key, what in _wrong_sides(recipe, model))
    if recipe.train.freeze:
        if settings.train_only:
            yield recipe.problem(
                "train.freeze", "says what learns, and so does model.train_only: keep one of them", recipe.train.freeze
            )
        try:
            layers_after(model, recipe.train.freeze)
        except ValueError as error:
            yield recipe.problem("train.freeze", str(error).removeprefix("train.freeze: "), recipe.train.freeze)
    if settings.train_only and not any(parameter.requires_grad for parameter in model.parameters()):
        yield recipe.problem(
            "model.train_only", "these layers have no parameters, so nothing would learn", settings.train_only
        )


def check_sizes(recipe: Recipe, model: nn.Module) -> None:
    """Makes sure that a model which states a `size_divisor` gets images whose sides it divides, as far as their sizes
    are known.

    Raises:
        UserError: in training or validation a side isn't divisible.
    """
    for key, what in _wrong_sides(recipe, model):
        raise UserError(f"{key}: {what}")


def _wrong_sides(recipe: Recipe, model: nn.Module) -> Iterator[tuple[str, str]]:
    """The first size that the model can't take: the key that decides on it, and what is wrong."""
    fed = sizes_fed(recipe)
    for split, key in (
        ("validation", "data.resize"),
        ("train", "data.augment" if recipe.augmentations else "data.resize"),
    ):
        try:
            for height, width in fed[split].tolist() if split in fed else ():
                check_sides(getattr(model, "size_divisor", 1), height, width, f"those of the {split} split")
        except UserError as error:
            yield key, str(error)
            return


def check_batches(recipe: Recipe, processes: int) -> Iterator[Problem]:
    """Sees whether so many processes can join the images into batches."""
    try:
        check_one_size(recipe, recipe.build("data").columns, processes)
    except UserError as error:
        yield recipe.problem("data.augment" if recipe.data.resize else "data.resize", str(error))


def check_columns(recipe: Recipe) -> Iterator[Problem]:
    """Sees whether the set has what the recipe asks for and its component can't say: masks for the task, images to
    resize and augment.
    """
    columns = recipe.build("data").columns
    roles = columns.values()
    for key, changes in (("resize", recipe.data.resize), ("augment", recipe.augmentations)):
        if changes and not has_pixels(columns):
            yield recipe.problem(f"data.{key}", f"samples of {recipe.data.name} are no images: leave it out")
    if "masks" in recipe.components["task"].fields and "boxes" in roles:
        yield recipe.problem(
            "data", f"task {recipe.task.name} needs masks, and this set has only boxes", recipe.data.name
        )


def check_loss(recipe: Recipe) -> Iterator[Problem]:
    """Builds the loss, to see that its settings fit the data."""
    try:
        recipe.build("loss", **_context(recipe.build("data").info))
    except (ValueError, UserError) as error:
        yield recipe.problem("loss", str(error))


def check_task(recipe: Recipe) -> Iterator[Problem]:
    """Builds the task, with nothing in the place of model and loss,
    to see that its settings fit the data and that it has `evaluate.best`.
    """
    try:
        task: Task[Any] = recipe.build(
            "task", model=nn.Module(), loss=nn.Module(), **_context(recipe.build("data").info)
        )
    except (ValueError, UserError) as error:
        yield recipe.problem("task", str(error))
        return
    if recipe.evaluate.best not in task.metric_names:
        yield recipe.problem(
            "evaluate.best", f"unknown metric; {nearest(recipe.evaluate.best, task.metric_names)}", recipe.evaluate.best
        )


def batch_checks(processes: int) -> Any:
    """For `load_recipe`, beside `TASK_CHECKS`: those that depend on the number of processes."""
    return ((("data", "task", "train", "evaluate"), partial(check_batches, processes=max(1, processes))),)


TASK_CHECKS = (
    (("data",), check_data),
    (("data", "task"), check_columns),
    (("data", "model", "train"), check_model),
    (("data", "loss"), check_loss),
    (("data", "task", "evaluate"), check_task),
)
"""For `load_recipe`."""
