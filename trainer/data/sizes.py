"""Which image sizes reach the model, derived before training from the recipe and the prepared set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torchvision.transforms import v2

from trainer.data.augment import Mosaic
from trainer.data.card import Card
from trainer.data.objects import ROLES
from trainer.data.parquet import RowGroups
from trainer.data.prepare import data_dir
from trainer.data.roles import has_pixels
from trainer.errors import UserError
from trainer.recipe.recipe import Recipe, build

Sizes = npt.NDArray[np.int64]
"""Distinct heights and widths: (N, 2)."""

CROPS = (v2.RandomCrop, v2.RandomResizedCrop)
KEEP_SIZE = (v2.RandomHorizontalFlip, v2.RandomVerticalFlip, v2.ColorJitter)


def sizes_fed(recipe: Recipe) -> dict[str, Sizes]:
    """The sizes of each split's images after resize and augmentation; splits of unknown sizes are omitted.

    Sizes are unknown if the set is neither prepared nor resized, and after a plugin's augmentation.
    """
    settings = recipe.data
    try:  # neither argument affects the size
        transforms = [
            build(component, chosen, ignore_index=None, resize=settings.resize, has_objects=False)
            for component, chosen in recipe.augmentations
        ]
    except ValueError:  # another check reports it
        return {}
    fed = {"train": _augmented(sizes_of(recipe, "train"), transforms), "validation": sizes_of(recipe, "validation")}
    return {split: sizes for split, sizes in fed.items() if sizes is not None}


def sizes_of(recipe: Recipe, split: str) -> Sizes | None:
    """The sizes that images of a split have after the resize alone; None where they aren't known, see `sizes_fed`."""
    settings = recipe.data
    if settings.resize:
        return np.array([settings.resize], dtype=np.int64)
    folder = data_dir() / recipe.source.name
    with suppress(UserError):  # not prepared, or damaged: reported when it is read
        card = Card.load(folder)
        card = card.of_first(settings.overfit) if settings.overfit else card
        if has_pixels(card.columns) and split in card.splits:
            return _native(folder, card, split)
    return None


def micro_batch_sizes(recipe: Recipe, processes: int) -> dict[str, int]:
    """How many samples of each split a process feeds to the model at once."""
    train = recipe.data.batch_size // (recipe.train.accumulate * processes)
    validation = (recipe.evaluate.batch_size or recipe.data.batch_size) // processes
    return {"train": max(1, train), "validation": max(1, validation)}


def check_one_size(recipe: Recipe, columns: Mapping[str, Any], processes: int, evaluated: str | None = None) -> None:
    """Checks that images of a batch have one size, unless they are padded and the task takes each at its own size.

    Args:
        recipe: names the set, its resize and its augmentations.
        columns: roles of the set's columns.
        processes: number of processes.
        evaluated: the split that is evaluated; None where the recipe trains and validates.

    Raises:
        UserError: images of a batch differ in size.
    """
    has_objects = bool({*columns.values()} & {*ROLES})  # their images are padded to one size
    if has_objects and not getattr(recipe.components["task"].factory, "fixed_shapes", True):
        return
    together, fed = micro_batch_sizes(recipe, processes), sizes_fed(recipe)
    if evaluated:
        sizes = sizes_of(recipe, evaluated)
        together, fed = {evaluated: together["validation"]}, {} if sizes is None else {evaluated: sizes}
    differing = {split: sizes for split, sizes in fed.items() if len(sizes) > 1 and together[split] > 1}
    if not differing:
        return
    first, second, *_ = (f"{height} x {width}" for height, width in next(iter(differing.values())).tolist())
    if recipe.data.resize:
        advice = "give all augmentations the size of data.resize"
    else:
        advice = "set data.resize=[H,W]" + (
            ", with data.resize_mode=letterbox to keep their aspect" if has_objects else ""
        )
        advice += "" if "train" in differing and not evaluated else ", or evaluate.batch_size=1"
    which = f"{recipe.source.name} ({' and '.join(differing)})"
    raise UserError(f"images of {which} differ in size ({first}, {second}, …), so they can't be batched: {advice}")


def _native(folder: Path, card: Card, split: str) -> Sizes:
    """The sizes of a split's images as prepared."""
    rows = RowGroups({folder / file.name: file.row_groups for file in card.splits[split].files}, keep=1)
    return np.unique(rows.sizes(), axis=0)


def _augmented(sizes: Sizes | None, transforms: Sequence[Any]) -> Sizes | None:
    """The sizes after the augmentations; None if unknown."""
    for transform in transforms:
        if isinstance(transform, CROPS) or (isinstance(transform, Mosaic) and transform.p == 1):
            sizes = np.array([transform.size], dtype=np.int64)
        elif isinstance(transform, Mosaic) and transform.p and sizes is not None:
            sizes = np.unique(np.concatenate([sizes, [transform.size]]), axis=0)
        elif not isinstance(transform, (*KEEP_SIZE, Mosaic)):
            return None
    return sizes
