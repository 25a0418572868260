"""Builds the data of a recipe: the order of its prepared set, and the batches of both splits."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms import v2

from trainer.data.card import Card
from trainer.data.loader import Batches, to_device
from trainer.data.objects import ROLES, Letterbox
from trainer.data.order import Order, Shard, Slices
from trainer.data.prepare import data_dir
from trainer.data.reader import Reader
from trainer.data.sizes import check_one_size, micro_batch_sizes
from trainer.data.stream import TrainingSamples, ValidationSamples
from trainer.distributed.accelerator import num_workers
from trainer.errors import UserError
from trainer.recipe.recipe import Recipe, build


class EvaluationData:
    """A split of a prepared data set as one process evaluates it; batches arrive on its device.

    Args:
        recipe: names the set, which must be prepared in `$TRAINER_DATA`.
        rank, world_size, device: of this process.
        split: the one that is evaluated; never augmented.

    Attributes:
        card: of the set, or of that part of it that `data.overfit` leaves.
        info: classes and ignored label.
        validation: the samples of the split, by id.
        validation_batches: this process's share of them.
        validation_rounds: the largest number of validation batches on any process.
        identity: hash of the prepared set; it changes with the samples and with their order.

    Raises:
        UserError: the set isn't prepared or has no such split, or its images can't be batched.
    """

    def __init__(
        self, recipe: Recipe, rank: int, world_size: int, device: torch.device, split: str = "validation"
    ) -> None:
        settings = recipe.data
        self.rank, self.world_size, self.device = rank, world_size, device
        self.folder = folder = _folder(recipe)
        card = Card.load(folder)
        self.identity = card.identity
        self.card = card = card.of_first(settings.overfit) if settings.overfit else card
        self.info = card.info
        if split not in card.splits:
            raise UserError(f"{folder.name} has no {split} split, only {' and '.join(card.splits)}")
        check_one_size(recipe, card.columns, world_size, split)
        self.workers = num_workers(settings.workers, int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
        resize: v2.Resize | Letterbox | None = None
        if settings.resize:
            letterbox = settings.resize_mode == "letterbox"
            resize = Letterbox(settings.resize) if letterbox else v2.Resize(settings.resize, antialias=True)
        self._read = partial(
            Reader, folder, card, resize=resize, cache=settings.cache == "auto", window=settings.window
        )
        self.validation = ValidationSamples(self._read(split))
        batch_size = micro_batch_sizes(recipe, world_size)["validation"]
        shards = [Shard(len(self.validation), batch_size, each, world_size) for each in range(world_size)]
        self.validation_batches = Batches(self.validation, shards[rank], self.workers, device)
        self.validation_rounds = max(len(shard) for shard in shards)

    def validation_batch(self, sample_ids: Sequence[int]) -> dict[str, Tensor]:
        """These samples of the split as one batch."""
        return to_device(self.validation.batch(sample_ids), self.device)


class Data(EvaluationData):
    """A prepared data set as one process trains on it and validates.

    Args:
        recipe, rank, world_size, device: see `EvaluationData`.

    Attributes:
        order: of the training samples.
        train: the training samples, by position in the order.

    Raises:
        UserError: see `EvaluationData`.
    """

    def __init__(self, recipe: Recipe, rank: int, world_size: int, device: torch.device) -> None:
        check_one_size(recipe, Card.load(_folder(recipe)).columns, world_size)
        super().__init__(recipe, rank, world_size, device)
        settings, card = recipe.data, self.card
        self.batch_size, self.accumulate = settings.batch_size, recipe.train.accumulate
        self.order = Order(card.row_groups("train"), recipe.train.seed, settings.window)
        has_objects = bool({*card.columns.values()} & {*ROLES})
        context = {"ignore_index": card.ignore_index, "resize": settings.resize, "has_objects": has_objects}
        augmentations = [build(component, chosen, **context) for component, chosen in recipe.augmentations]
        reader = self._read("train", max_unreadable=settings.max_unreadable)
        self.train = TrainingSamples(reader, self.order, augmentations)

    def train_batches(self, first_step: int) -> Iterator[dict[str, Tensor]]:
        """This process's micro-batches, endlessly, starting at `first_step`."""
        slices = Slices(self.batch_size, self.accumulate, self.rank, self.world_size, first_step)
        return iter(Batches(self.train, slices, self.workers, self.device))

    def description(self) -> dict[str, Any]:
        """What a trained model must know of the set to predict (JSON): its classes and statistics, and the size of the
        images that it sees, None where they differ.
        """
        pixels = self.train.reader.pixels
        size = pixels.sizes[0].tolist() if pixels and pixels.uniform else None
        return {"name": self.folder.name, **asdict(self.info), "size": size}

    def check_unchanged(self, identity: str | None) -> None:
        """Checks that the set is the one a run started with; None means unknown, as in checkpoints of older versions.

        Raises:
            UserError: it is a different one.
        """
        if identity not in (None, self.identity):
            raise UserError(
                f"{self.folder} has changed since this run started: it was prepared again, with different samples. "
                "Prepare it from the original files to resume, or start a new run with another name=… (--resume never "
                "starts from scratch)"
            )

    def sample_ids(self, step: int, micro_batch: int, rank: int) -> list[int]:
        """Ids of the samples in one micro-batch of a step, on the process with this rank."""
        slices = iter(Slices(self.batch_size, self.accumulate, rank, self.world_size, step))
        for _ in range(micro_batch):
            next(slices)
        return [self.order.sample(position)[1] for position in next(slices)]


def _folder(recipe: Recipe) -> Path:
    return data_dir() / recipe.source.name
