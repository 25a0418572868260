"""Groups of objects that can't be told apart are never trained on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trainer.components import catalogue
from trainer.detection.boxes import Level, Targets
from trainer.detection.watershed import IGNORE, WatershedOutput

CLASSES = ("a", "b", "c")
BOXES = [[0.0, 0, 8, 8], [8, 8, 16, 16], [4, 0, 16, 8], [0, 8, 8, 16]]
LABELS, CROWD, INDEX = [0, 2, 1, 2], [False, True, False, False], [0, 0, 1, 1]  # the crowd is in the first image


def batch() -> dict[str, Tensor]:
    masks = torch.zeros(4, 16, 16, dtype=torch.uint8)
    for mask, (left, top, right, bottom) in zip(masks, BOXES, strict=True):
        mask[int(top) : int(bottom), int(left) : int(right)] = 1
    return {
        "image": torch.zeros(2, 3, 16, 16, dtype=torch.uint8),
        "height": torch.tensor([16, 16]),
        "width": torch.tensor([16, 16]),
        "boxes": torch.tensor(BOXES),
        "labels": torch.tensor(LABELS),
        "crowd": torch.tensor(CROWD),
        "image_index": torch.tensor(INDEX),
        "masks": masks,
    }


def run(name: str, model: Any) -> Any:
    component = catalogue("task")[name]
    task = component.build(dict(component.schema()), model=nn.Conv2d(3, 1, 1), loss=nn.Module(), classes=CLASSES)
    return task.run(model, batch())


def test_a_detector_is_given_the_boxes_of_all_others() -> None:
    targets: Targets = run("detection", lambda images: [Level(torch.zeros(2, 1, 2, 2, 8), torch.ones(1, 2), 8)])[1]
    assert targets.boxes.tolist() == [BOXES[0], BOXES[2], BOXES[3]]
    assert targets.labels.tolist() == [0, 1, 2] and targets.image_index.tolist() == [0, 1, 1]


def test_mask_rcnn_is_given_boxes_classes_and_masks_of_all_others_counted_from_1() -> None:
    given: list[dict[str, Tensor]] = []
    run("mask_rcnn", lambda images, targets: given.extend(targets))
    assert [each["boxes"].tolist() for each in given] == [[BOXES[0]], [BOXES[2], BOXES[3]]]
    assert [each["labels"].tolist() for each in given] == [[1], [2, 3]]
    masks = batch()["masks"]
    assert [torch.equal(each["masks"], masks[kept]) for each, kept in zip(given, ([0], [2, 3]), strict=True)] == [
        True,
        True,
    ]


@pytest.mark.parametrize("image", [0, 1])
def test_a_watershed_ignores_their_pixels(image: int) -> None:
    targets = run("watershed", lambda images: WatershedOutput(torch.zeros(2, 4, 16, 16), torch.zeros(2, 16, 16)))[1]
    expected = torch.zeros(16, 16, dtype=torch.int64)
    for (left, top, right, bottom), label, crowd, index in zip(BOXES, LABELS, CROWD, INDEX, strict=True):
        if index == image:
            expected[int(top) : int(bottom), int(left) : int(right)] = IGNORE if crowd else label + 1
    assert torch.equal(targets.semantic[image], expected)
