"""Checks that involve several keys of a recipe."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from trainer.components import catalogue
from trainer.recipe.durations import Clock, Span
from trainer.recipe.file import Problem
from trainer.recipe.recipe import Recipe, build

Check = tuple[tuple[str, ...], Callable[[Recipe], Iterator[Problem]]]
"""The parts of a recipe that a check reads (sections, or `source`), and the check. It runs if all of them are valid."""


def _check_interfaces(recipe: Recipe) -> Iterator[Problem]:
    task = recipe.components["task"]
    shared = {*task.interfaces}
    for section in ("model", "loss"):
        component = recipe.components[section]
        if shared & {*component.interfaces}:
            shared &= {*component.interfaces}
        else:
            fits = [c.name for c in catalogue(section).values() if shared & {*c.interfaces}]
            yield recipe.problem(
                section,
                f"{section} {component.name} doesn't fit task {task.name}; choose one of {', '.join(fits)}",
                component.name,
            )
    data = recipe.components["data"]
    lacking = [f for f in task.fields if f not in data.fields]
    if lacking:
        fits = [c.name for c in catalogue("dataset").values() if set(task.fields) <= set(c.fields)]
        yield recipe.problem(
            "data",
            f"task {task.name} needs {', '.join(lacking)}, which {data.name} doesn't have; data sets that fit: "
            f"{', '.join(fits)}",
        )


def _check_augmentations(recipe: Recipe) -> Iterator[Problem]:
    for index, (component, chosen) in enumerate(recipe.augmentations):
        try:
            build(component, chosen, ignore_index=None, resize=recipe.data.resize, has_objects=False)
        except ValueError as error:
            yield recipe.problem(f"data.augment.{index}", str(error))
        if component.name == "mosaic" and index:
            yield recipe.problem(
                f"data.augment.{index}", "must come first: the other augmentations apply to the mosaic", component.name
            )


def _check_resize(recipe: Recipe) -> Iterator[Problem]:
    if recipe.data.resize_mode == "letterbox":
        if not recipe.data.resize:
            yield recipe.problem("data.resize_mode", "needs data.resize, the size to pad to", recipe.data.resize_mode)
        if "mask" in recipe.components["data"].fields:
            yield recipe.problem(
                "data.resize_mode", "can't be used with class masks: padding has no class", recipe.data.resize_mode
            )


def _check_batch(recipe: Recipe) -> Iterator[Problem]:
    batch, accumulate = recipe.data.batch_size, recipe.train.accumulate
    if batch % accumulate:
        yield recipe.problem(
            "data.batch_size",
            f"must be divisible by train.accumulate ({accumulate}): it is the number of samples in an optimizer step",
            batch,
        )


def _check_durations(recipe: Recipe) -> Iterator[Problem]:
    clock = Clock(recipe.train.duration, recipe.data.batch_size, 1)
    if recipe.train.duration.unit == "%":
        yield recipe.problem(
            "train.duration", "can't be a percentage of itself; use steps, epochs or minutes", recipe.train.duration
        )
        return
    if recipe.train.timeout.unit != "minutes":
        yield recipe.problem("train.timeout", "must be in minutes", recipe.train.timeout)
    for key, value in recipe.schedule:
        if not isinstance(value, Span):
            continue
        try:
            share = clock.share(value)
        except ValueError as error:
            yield recipe.problem(f"schedule.{key}", str(error))
        else:
            # Comparing steps with epochs needs the size of the data set.
            comparable = {value.unit, clock.duration.unit} != {"steps", "epochs"}
            if comparable and share > 1:
                yield recipe.problem(
                    f"schedule.{key}", f"is longer than the training (train.duration {clock.duration})", value
                )


CHECKS: tuple[Check, ...] = (
    (("task", "data", "model", "loss"), _check_interfaces),
    (("data",), _check_augmentations),
    (("data",), _check_resize),
    (("data", "train"), _check_batch),
    (("data", "train", "schedule"), _check_durations),
)
