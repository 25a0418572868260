"""The batches of a recipe follow its section `data:`."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.reference_order import stream_of
from tests.scenes import RECIPES, TRAIN, scene, scenes
from trainer.data.build import Data
from trainer.data.prepare import data_dir, prepare
from trainer.recipe.load import load_recipe

Build = Callable[..., Data]


@pytest.fixture
def build(tmp_path: Path) -> Build:
    """The data of a recipe with these overrides."""
    prepare(scenes(), data_dir(), None, lambda line: None)
    (tmp_path / "r.yaml").write_text(RECIPES["detection"], encoding="utf-8")

    def built(*overrides: str, rank: int = 0, world_size: int = 1) -> Data:
        return Data(
            load_recipe(tmp_path / "r.yaml", ("data.augment=[]", *overrides)), rank, world_size, torch.device("cpu")
        )

    return built


def bars(images: torch.Tensor) -> list[int]:
    """For each image, how many of its rows and columns have nothing but a letterbox's grey."""
    grey = (images == 114).all(dim=1)
    return (grey.all(dim=1).sum(dim=1) + grey.all(dim=2).sum(dim=1)).tolist()


@pytest.mark.parametrize("cache", ["auto", "off"])
def test_resize_mode_is_that_of_both_splits(build: Build, cache: str) -> None:
    shapes = [scene(index)[0].shape[:2] for index in (0, TRAIN)]
    missing = [64 - round(64 * min(shape) / max(shape)) for shape in shapes]
    assert min(missing) > 0
    for mode, expected in (("letterbox", missing), ("stretch", [0, 0])):
        data = build(f"data.resize_mode={mode}", f"data.cache={cache}")
        first = next(position for position in range(TRAIN) if data.order.sample(position)[1] == 0)
        images = [split.batch([index])["image"] for split, index in ((data.train, first), (data.validation, 0))]
        assert [image.shape for image in images] == [(1, 3, 64, 64)] * 2
        assert [count for image in images for count in bars(image)] == expected


@pytest.mark.parametrize(("seed", "window"), [(0, 1), (0, 4), (7, 2)])
def test_seed_and_window_say_which_samples_a_batch_holds(build: Build, seed: int, window: int) -> None:
    data = build(f"train.seed={seed}", f"data.window={window}")
    groups = [TRAIN // 8] * 8
    batches = list(islice(data.train_batches(first_step=0), 15))
    found = [
        pair for batch in batches for pair in zip(batch["epoch"].tolist(), batch["sample_id"].tolist(), strict=True)
    ]
    assert found == stream_of(groups, seed, window, 60)
    later = list(islice(data.train_batches(first_step=11), 4))
    assert all(torch.equal(a["sample_id"], b["sample_id"]) for a, b in zip(later, batches[11:], strict=True))


def test_processes_and_micro_batches_share_a_batch_and_the_ids_of_each_are_known(build: Build) -> None:
    samples = [sample for _, sample in stream_of([3] * 8, 0, 3, 40)]
    for rank in (0, 1):
        data = build("train.accumulate=2", rank=rank, world_size=2)
        found = [batch["sample_id"].tolist() for batch in islice(data.train_batches(first_step=2), 4)]
        assert found == [[samples[8 + 2 * micro + rank]] for micro in range(4)]
        assert [data.sample_ids(2 + micro // 2, micro % 2, each) for micro in range(4) for each in (0, 1)] == [
            [sample] for sample in samples[8:16]
        ]


def test_augmentation_is_for_training_alone(build: Build) -> None:
    plain, augmented = build(), build("data.augment=[{name: horizontal_flip, p: 1}]")
    positions = list(range(6))

    def images(split: Any) -> torch.Tensor:
        found: torch.Tensor = split.batch(positions)["image"]
        return found

    assert torch.equal(images(augmented.train), images(plain.train).flip(-1)) and torch.equal(
        images(augmented.validation), images(plain.validation)
    )


def test_a_set_of_a_few_samples_of_another_resize_or_mode_never_reads_what_another_recipe_cached(build: Build) -> None:
    recipes = [
        (),
        ("data.overfit=5",),
        ("data.overfit=6",),
        ("data.resize=[32,128]",),
        ("data.resize=[128,32]",),
        ("data.resize_mode=stretch",),
        ("data.resize=[32,128]", "data.resize_mode=stretch"),
    ]

    def pixels(*overrides: str) -> list[torch.Tensor]:
        data = build(*overrides)
        return [split.batch(list(range(5)))["image"] for split in (data.train, data.validation) for _ in range(2)]

    expected = [pixels(*overrides, "data.cache=off") for overrides in recipes]
    assert not list(data_dir().rglob("pixels.u8"))
    for overrides, images in zip(recipes, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(pixels(*overrides), images, strict=True)), overrides
    assert len(list(data_dir().rglob("pixels.u8"))) == 2 * len(recipes)
