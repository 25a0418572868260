"""Deep watershed: from instances to training targets, and from predictions back to instances."""

from __future__ import annotations

import os
import sys
import zipfile
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from trainer.detection.boxes import Detections
from trainer.detection.watershed import IGNORE, boundary_distance, instances, watershed_targets
from trainer.errors import UserError

SIZE = 48


def rectangle(left: int, top: int, right: int, bottom: int) -> Tensor:
    """A mask bool (48, 48)."""
    mask = torch.zeros(SIZE, SIZE, dtype=torch.bool)
    mask[top:bottom, left:right] = True
    return mask


def certain(masks: Tensor, labels: Tensor, num_classes: int = 2, certainty: float = 0.9) -> Tensor:
    """Probabilities (C + 1, H, W) of a network that knows the class of each pixel."""
    probabilities = torch.full((num_classes + 1, SIZE, SIZE), (1 - certainty) / num_classes)
    classes = (masks * (labels + 1)[:, None, None]).amax(0)
    return probabilities.scatter(0, classes[None], certainty)


def found(*masks: Tensor, labels: list[int] | None = None, min_pixels: int = 20) -> Detections:
    """What is recovered from the ground-truth maps of these instances."""
    true_masks, classes = torch.stack(masks), torch.tensor(labels or [0] * len(masks))
    return instances(certain(true_masks, classes), boundary_distance(true_masks).amax(0), min_pixels=min_pixels)


def test_depth_is_counted_from_the_boundary_up_to_the_limit() -> None:
    mask = torch.zeros(1, 9, 9, dtype=torch.bool)
    mask[0, 1:8, 1:8] = True
    rows = {limit: (boundary_distance(mask, limit) * limit)[0, 4].tolist() for limit in (1, 3, 8)}
    assert rows == {1: [0, 1, 1, 1, 1, 1, 1, 1, 0], 3: [0, 1, 2, 3, 3, 3, 2, 1, 0], 8: [0, 1, 2, 3, 4, 3, 2, 1, 0]}


def test_depth_is_the_chessboard_distance_to_the_nearest_pixel_outside() -> None:
    ndimage = pytest.importorskip("scipy.ndimage")
    generator = torch.Generator().manual_seed(0)
    masks = torch.rand(5, 40, 60, generator=generator) > torch.tensor([0.5, 0.1, 0.02, 0.005, 0.001]).view(-1, 1, 1)
    expected = np.stack([ndimage.distance_transform_cdt(mask, "chessboard") for mask in masks.numpy()])
    assert expected.max() > 8
    assert np.array_equal((boundary_distance(masks, 8) * 8).numpy(), expected.clip(max=8))


def test_the_edge_of_the_image_is_no_boundary() -> None:
    depth = boundary_distance(rectangle(0, 0, 20, SIZE)[None], 8)
    assert depth[0, 0, 0] == 1 and depth[0, 0, 19] == 1 / 8


def test_targets_say_what_each_pixel_is_and_count_neither_padding_nor_crowds() -> None:
    masks = torch.stack(
        [rectangle(0, 0, 10, 10), rectangle(20, 0, 30, 10), rectangle(5, 5, 15, 15), rectangle(0, 0, 4, 4)]
    )
    semantic, distance = watershed_targets(
        masks.byte(),
        labels=torch.tensor([0, 1, 1, 0]),
        crowd=torch.tensor([False, True, False, False]),
        image_index=torch.tensor([0, 0, 0, 2]),
        height=torch.tensor([SIZE, SIZE, 30]),
        width=torch.tensor([40, SIZE, SIZE]),
    )
    assert (semantic.dtype, distance.dtype) == (torch.int64, torch.float32)
    assert semantic[0, 2, 2] == 1 and semantic[0, 12, 12] == 2 and semantic[0, 30, 30] == 0
    assert semantic[0, 7, 7] == 2 and distance[0, 7, 7] == 3 / 8, "the last instance is on top"
    assert (semantic[0, :10, 20:30] == IGNORE).all() and (semantic[0, :, 40:] == IGNORE).all()
    assert not semantic[1].any() and not distance[1].any()
    assert (semantic[2] == 1).sum() == 16 and (semantic[2, 30:] == IGNORE).all() and (semantic[2, :30] != IGNORE).all()


def test_a_batch_without_instances_is_background() -> None:
    nothing, size = torch.zeros(0, dtype=torch.int64), torch.tensor([SIZE])
    semantic, distance = watershed_targets(
        torch.zeros(0, SIZE, SIZE, dtype=torch.uint8), nothing, nothing.bool(), nothing, size, size
    )
    assert semantic.shape == distance.shape == (1, SIZE, SIZE) and not semantic.any() and not distance.any()


def test_instances_that_touch_are_told_apart_with_class_box_and_score() -> None:
    masks = [rectangle(2, 5, 20, 40), rectangle(20, 8, 40, 30)]
    result = found(*masks, labels=[1, 0])
    assert result.masks is not None and result.masks.dtype == torch.bool
    order = result.labels.argsort(descending=True)
    assert torch.equal(result.masks[order], torch.stack(masks)) and result.labels[order].tolist() == [1, 0]
    assert result.boxes[order].tolist() == [[2, 5, 20, 40], [20, 8, 40, 30]]
    assert result.scores.tolist() == pytest.approx([0.95, 0.95])


def test_the_instance_that_is_most_surely_foreground_comes_first() -> None:
    masks = torch.stack([rectangle(2, 2, 20, 20), rectangle(25, 25, 45, 45)])
    foreground = 0.6 * masks[0] + 0.8 * masks[1]
    result = instances(torch.stack([1 - foreground, foreground]), boundary_distance(masks).amax(0))
    assert result.scores.tolist() == pytest.approx([0.8, 0.6]) and result.boxes[0].tolist() == [25, 25, 45, 45]


def test_an_instance_with_a_narrow_neck_is_not_split() -> None:
    # Body, neck, head: the head is deep enough.
    neck = rectangle(5, 5, 25, 30) | rectangle(14, 30, 17, 36) | rectangle(12, 36, 19, 43)
    result = found(neck, min_pixels=40)
    assert result.masks is not None and torch.equal(result.masks, neck[None])


def test_a_thin_instance_is_found_and_a_tiny_one_is_not() -> None:
    thin, tiny = rectangle(5, 5, 8, 40), rectangle(30, 30, 34, 34)
    result = found(thin, tiny)
    assert result.masks is not None and torch.equal(result.masks, thin[None])


def test_a_pixel_that_hangs_on_by_a_corner_belongs_to_its_instance() -> None:
    mask = rectangle(5, 5, 20, 20) | rectangle(20, 20, 21, 21)
    result = found(mask)
    assert result.masks is not None and torch.equal(result.masks, mask[None])


def test_an_instance_has_the_class_of_most_of_its_pixels() -> None:
    mask = rectangle(5, 5, 25, 25)
    probabilities = certain(torch.stack([mask, mask & rectangle(5, 5, 12, 25)]), torch.tensor([0, 1]))
    result = instances(probabilities, boundary_distance(mask[None])[0])
    assert result.labels.tolist() == [0] and result.boxes.tolist() == [[5, 5, 25, 25]]


def test_an_empty_image_has_no_instances() -> None:
    background = torch.tensor([0.9, 0.1]).view(2, 1, 1).expand(2, SIZE, SIZE)
    result = instances(background, torch.zeros(SIZE, SIZE))
    assert result.masks is not None
    assert [tuple(field.shape) for field in (result.boxes, result.scores, result.labels, result.masks)] == [
        (0, 4),
        (0,),
        (0,),
        (0, SIZE, SIZE),
    ]


def test_without_scikit_image_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "skimage.measure", None)
    with pytest.raises(UserError, match=r"pip install 'recipe-trainer\[detection\]'"):
        found(rectangle(5, 5, 25, 25))


def _average_precision(truths: list[Tensor], results: list[Detections]) -> float:
    """Mask AP50 by pycocotools."""
    from pycocotools import mask as rle
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    def table(masks_of_images: list[Tensor], scores: list[Tensor]) -> COCO:
        rows: list[dict[str, object]] = []
        for image, (masks, values) in enumerate(zip(masks_of_images, scores, strict=True), start=1):
            for mask, score in zip(masks.numpy(), values.tolist(), strict=True):
                counts = rle.encode(np.asfortranarray(mask.astype(np.uint8)))
                row = {
                    "id": len(rows) + 1,
                    "image_id": image,
                    "category_id": 1,
                    "segmentation": counts,
                    "iscrowd": 0,
                    "score": score,
                }
                rows.append(row | {"area": float(mask.sum()), "bbox": rle.toBbox(counts).tolist()})
        coco = COCO()
        images = [
            {"id": image, "height": masks.shape[1], "width": masks.shape[2]}
            for image, masks in enumerate(masks_of_images, start=1)
        ]
        coco.dataset = {"images": images, "annotations": rows, "categories": [{"id": 1}]}
        coco.createIndex()
        return coco

    masks = [result.masks for result in results if result.masks is not None]
    evaluation = COCOeval(
        table(truths, [torch.ones(len(each)) for each in truths]),
        table(masks, [result.scores for result in results]),
        "segm",
    )
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return float(evaluation.stats[1])


@pytest.mark.slow
@pytest.mark.realdata
@pytest.mark.skipif(
    not os.environ.get("TRAINER_ARCHIVES"), reason="TRAINER_ARCHIVES names no folder with PennFudanPed.zip"
)
@pytest.mark.parametrize("size", [None, (256, 256)], ids=["native", "256x256"])
def test_the_true_maps_of_penn_fudan_give_the_true_instances(size: tuple[int, int] | None) -> None:
    truths = []
    with zipfile.ZipFile(Path(os.environ["TRAINER_ARCHIVES"], "PennFudanPed.zip")) as archive:
        for name in archive.namelist():
            if name.endswith("_mask.png"):
                numbered = Image.open(BytesIO(archive.read(name)))
                pixels = np.array(numbered.resize(size, Image.Resampling.NEAREST) if size else numbered)
                truths.append(torch.from_numpy(pixels == np.unique(pixels)[1:, None, None]))
    assert len(truths) == 170 and sum(map(len, truths)) == 423
    results = []
    for masks in truths:
        foreground = masks.any(0).float()
        results.append(instances(torch.stack([1 - foreground, foreground]), boundary_distance(masks).amax(0)))
    assert _average_precision(truths, results) >= 0.95
