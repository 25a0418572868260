"""Boxes and masks stay with their images through resizing, augmentation and batching."""

from __future__ import annotations

from itertools import islice
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from tests.scenes import COLORS, TRAIN, box, scene, scenes
from trainer.components import catalogue
from trainer.data.card import Card
from trainer.data.loader import Batches
from trainer.data.objects import Letterbox
from trainer.data.order import Order, Slices
from trainer.data.prepare import prepare
from trainer.data.reader import Reader
from trainer.data.stream import TrainingSamples, ValidationSamples

SIZE = [64, 96]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Card]:
    folder = tmp_path_factory.mktemp("data")
    return folder / "scenes", prepare(scenes(), folder, None, lambda line: None)


def samples(prepared: tuple[Path, Card], transforms: Any = (), **options: Any) -> TrainingSamples:
    return TrainingSamples(
        Reader(*prepared, "train", **options), Order(prepared[1].row_groups("train"), 5, 2), transforms
    )


def validation_samples(prepared: tuple[Path, Card], **options: Any) -> ValidationSamples:
    return ValidationSamples(Reader(*prepared, "validation", **options))


def augmentation(name: str, **settings: Any) -> Any:
    return catalogue("augmentation")[name].build(settings, ignore_index=None, resize=SIZE, has_objects=True)


def check_batch(batch: dict[str, Tensor], tolerance: float, border: int = 1) -> int:
    """Asserts that masks lie on pixels of their class's colour and boxes around their masks;
    returns how many objects there were.
    """
    for mask, label, each, index in zip(
        batch["masks"].bool(), batch["labels"], batch["boxes"], batch["image_index"], strict=True
    ):
        color = torch.tensor(COLORS[label], dtype=torch.float32)
        # Borders may be mixtures after a resize.
        inner = -torch.nn.functional.max_pool2d(-mask[None].float(), 2 * border + 1, 1, border)[0] > 0
        image = batch["image"][index].float()
        if inner.any():
            assert (image[:, inner] - color[:, None]).abs().mean() < 40
            assert torch.tensor(box(mask.numpy())).sub(each).abs().max() <= tolerance
    return len(batch["labels"])


def test_a_batch_holds_images_of_different_sizes_and_all_their_objects(prepared: tuple[Path, Card]) -> None:
    validation = validation_samples(prepared)
    batch = validation.batch(list(range(7)))
    expected = [scene(TRAIN + index) for index in range(7)]
    sizes = [image.shape[:2] for image, *_ in expected]
    assert len(set(sizes)) > 1 and batch["image"].shape == (7, 3, max(h for h, _ in sizes), max(w for _, w in sizes))
    assert list(zip(batch["height"].tolist(), batch["width"].tolist(), strict=True)) == sizes
    assert batch["image_index"].tolist() == [index for index, (_, masks, *_) in enumerate(expected) for _ in masks]
    assert 0 in [len(masks) for _, masks, *_ in expected] and batch["crowd"].sum() == 1
    for index, (image, masks, labels, _) in enumerate(expected):
        height, width = image.shape[:2]
        assert np.array_equal(batch["image"][index, :, :height, :width].permute(1, 2, 0).numpy(), image)
        assert not batch["image"][index, :, height:].any() and not batch["image"][index, :, :, width:].any()
        mine = batch["image_index"] == index
        assert batch["labels"][mine].tolist() == labels
        assert [tuple(each) for each in batch["boxes"][mine].tolist()] == [box(mask) for mask in masks]
        for mask, found in zip(masks, batch["masks"][mine], strict=True):
            assert np.array_equal(found[:height, :width].numpy(), mask) and found.sum() == mask.sum()


@pytest.mark.parametrize("cache", [True, False], ids=["cached", "decoded"])
@pytest.mark.parametrize("mode", ["stretch", "letterbox"])
def test_a_resize_moves_boxes_and_masks_too(prepared: tuple[Path, Card], cache: bool, mode: str) -> None:
    found = validation_samples(
        prepared, cache=cache, resize=Letterbox(SIZE) if mode == "letterbox" else v2.Resize(SIZE, antialias=True)
    )
    for _ in range(2):  # what is decoded, and what the cache gives back
        batch = found.batch(list(range(7)))
        assert batch["image"].shape == (7, 3, *SIZE)
        assert check_batch(batch, tolerance=1.5) == 12
    boxes = batch["boxes"][batch["image_index"] == 1]
    height, width = scene(TRAIN + 1)[0].shape[:2]
    scales = [SIZE[1] / width, SIZE[0] / height]
    original = torch.tensor([box(mask) for mask in scene(TRAIN + 1)[1]])
    if mode == "stretch":
        assert torch.allclose(boxes, original * torch.tensor(scales * 2), atol=1e-3)
    else:  # one scale for both sides, up to the rounding of the inner size
        ratio = (boxes[:, 2:] - boxes[:, :2]) / (original[:, 2:] - original[:, :2])
        assert torch.allclose(ratio, torch.full_like(ratio, min(scales)), rtol=0.02)


def test_letterbox_pads_on_both_sides_with_grey() -> None:
    image = v2.functional.to_image(np.zeros((10, 40, 3), np.uint8))
    boxed = Letterbox([32, 32])(image)
    assert boxed.shape == (3, 32, 32)
    assert (boxed[:, :12] == 114).all() and (boxed[:, 20:] == 114).all() and not boxed[:, 12:20].any()


@pytest.mark.parametrize(
    ("height", "width", "inner"),
    [
        (10, 40, (8, 32)),
        (40, 10, (32, 8)),
        (20, 20, (32, 32)),
        (48, 60, (26, 32)),
        (64, 63, (32, 32)),
        (300, 2, (32, 1)),
    ],
)
def test_a_letterboxed_image_fills_one_side_and_boxes_and_masks_cover_it_exactly(
    height: int, width: int, inner: tuple[int, int]
) -> None:
    size = (height, width)
    whole = {
        "image": v2.functional.to_image(np.full((height, width, 3), 250, np.uint8)),
        "masks": tv_tensors.Mask(torch.ones(1, *size, dtype=torch.uint8)),
        "boxes": tv_tensors.BoundingBoxes(torch.tensor([[0.0, 0, width, height]]), format="XYXY", canvas_size=size),
    }
    boxed = Letterbox([32, 32])(whole)
    top, left = (32 - inner[0]) // 2, (32 - inner[1]) // 2
    expected = torch.zeros(32, 32, dtype=torch.bool)
    expected[top : top + inner[0], left : left + inner[1]] = True
    assert torch.equal(boxed["masks"][0].bool(), expected)
    assert all(
        torch.equal(channel == 250, expected) and torch.equal(channel == 114, ~expected)
        for channel in boxed["image"].as_subclass(Tensor)
    )
    assert boxed["boxes"].tolist() == [pytest.approx([left, top, left + inner[1], top + inner[0]])]


AUGMENTATIONS = {
    "flips": [("horizontal_flip", {"p": 0.5}), ("vertical_flip", {"p": 0.5})],
    "crop": [("random_crop", {"size": [40, 44]})],
    "resized crop": [("random_resized_crop", {"scale": [0.3, 1.0]})],
    "mosaic": [("mosaic", {"scale": [0.6, 1.4]}), ("horizontal_flip", {"p": 0.5})],
}


@pytest.mark.parametrize("names", AUGMENTATIONS)
def test_objects_move_with_their_images_under_every_augmentation(prepared: tuple[Path, Card], names: str) -> None:
    transforms = [augmentation(name, **settings) for name, settings in AUGMENTATIONS[names]]
    batches = list(islice(Batches(samples(prepared, transforms=transforms), Slices(4, 1, 0, 1, 0), 0), 12))
    assert sum(check_batch(batch, tolerance=3) for batch in batches) > 20
    for batch in batches:
        sides = batch["boxes"][:, 2:] - batch["boxes"][:, :2]
        assert (sides >= 1).all() and (batch["boxes"] >= 0).all()
        assert (batch["boxes"][:, 2] <= batch["width"][batch["image_index"]]).all() and (
            batch["boxes"][:, 3] <= batch["height"][batch["image_index"]]
        ).all()
        assert len(batch["masks"]) == len(batch["boxes"]) == len(batch["labels"]) == len(batch["crowd"])


@pytest.mark.parametrize("size", [[64, 96], [96, 40]], ids=["wide", "high"])
def test_a_mosaic_of_letterboxed_samples_has_no_padding_and_their_objects_move_along(
    prepared: tuple[Path, Card], size: list[int]
) -> None:
    mosaic = catalogue("augmentation")["mosaic"].build(
        {"scale": [0.5, 1.4]}, ignore_index=None, resize=size, has_objects=True
    )
    found = samples(prepared, transforms=[mosaic], resize=Letterbox(size))
    batches = list(islice(Batches(found, Slices(4, 1, 0, 1, 0), 0), 12))
    for batch in batches:  # scenes have dark pixels and two colours
        assert not ((batch["image"] > Letterbox.GREY - 20) & (batch["image"] < Letterbox.GREY + 20)).all(dim=1).any()
    assert all(batch["image"].shape[-2:] == (size[0], size[1]) for batch in batches)
    assert sum(check_batch(batch, tolerance=3, border=3) for batch in batches) > 50


@pytest.mark.parametrize("names", ["flips", "crop"])
def test_boxes_end_exactly_where_their_masks_do(prepared: tuple[Path, Card], names: str) -> None:
    transforms = [augmentation(name, **settings) for name, settings in AUGMENTATIONS[names]]
    batches = list(islice(Batches(samples(prepared, transforms=transforms), Slices(4, 1, 0, 1, 0), 0), 6))
    assert sum(check_batch(batch, tolerance=0) for batch in batches) > 20


def test_a_mosaic_is_the_same_wherever_training_begins_and_whoever_loads_it(prepared: tuple[Path, Card]) -> None:
    def batches(workers: int, first: int, cache: bool = True) -> list[dict[str, Tensor]]:
        found = samples(prepared, transforms=[augmentation("mosaic", p=0.7)], cache=cache)
        return list(islice(Batches(found, Slices(4, 1, 0, 1, first), workers), 10 - first))

    reference = batches(0, 0)
    assert any(len(batch["labels"]) > 8 for batch in reference)  # more than four samples have without a mosaic
    for found, first in ((batches(2, 0), 0), (batches(0, 6), 6), (batches(0, 0, cache=False), 0)):
        for a, b in zip(found, reference[first:], strict=True):
            assert all(torch.equal(a[key], b[key]) for key in a)


def test_loader_workers_that_dont_fork_get_them_too(prepared: tuple[Path, Card]) -> None:
    found = samples(prepared, transforms=[augmentation("mosaic"), augmentation("horizontal_flip")])
    copy = ForkingPickler.loads(ForkingPickler.dumps(found))
    assert all(
        torch.equal(a, b) for a, b in zip(copy.batch([3, 4]).values(), found.batch([3, 4]).values(), strict=True)
    )


def test_overfit_trains_and_validates_on_the_first_samples(prepared: tuple[Path, Card]) -> None:
    folder, card = prepared
    first = card.of_first(5)
    assert [split.rows for split in first.splits.values()] == [5, 5]
    train = TrainingSamples(Reader(folder, first, "train"), Order(first.row_groups("train"), 0, 2))
    validation = ValidationSamples(Reader(folder, first, "validation"))
    assert len(train) == len(validation) == 5
    ids = [
        sample
        for batch in islice(Batches(train, Slices(5, 1, 0, 1, 0), 0), 2)
        for sample in batch["sample_id"].tolist()
    ]
    assert sorted(ids) == sorted(2 * list(range(5)))
    assert all(
        torch.equal(a, b)
        for a, b in zip(train.reader.pixels.read(3).values(), validation.reader.pixels.read(3).values(), strict=True)
    )
    assert card.of_first(1000).splits["train"].rows == TRAIN
