"""Average precision of boxes and masks is that of pycocotools, run on files that are made without the framework."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from tests.scenes import CLASSES, TRAIN, VALIDATION, box, scene
from trainer.detection.boxes import Detections
from trainer.detection.rle import decode_masks, encode_masks
from trainer.metrics import coco


def batch(first: int, last: int) -> dict[str, Any]:
    """The generated validation images with these ids, as the stream gives them."""
    scenes = [scene(TRAIN + index) for index in range(first, last)]
    height, width = (max(image.shape[side] for image, *_ in scenes) for side in (0, 1))
    masks = [
        np.pad(mask, ((0, height - mask.shape[0]), (0, width - mask.shape[1])))
        for _, each, *_ in scenes
        for mask in each
    ]
    return {
        "image": torch.zeros(len(scenes), 3, height, width, dtype=torch.uint8),
        "sample_id": torch.arange(first, last),
        "height": torch.tensor([image.shape[0] for image, *_ in scenes]),
        "width": torch.tensor([image.shape[1] for image, *_ in scenes]),
        "boxes": torch.tensor([box(mask) for mask in masks]).reshape(-1, 4),
        "labels": torch.tensor([label for _, _, labels, _ in scenes for label in labels], dtype=torch.int64),
        "crowd": torch.tensor([crowd for *_, crowds in scenes for crowd in crowds], dtype=torch.bool),
        "image_index": torch.tensor(
            [index for index, (_, each, *_) in enumerate(scenes) for _ in each], dtype=torch.int64
        ),
        "masks": torch.tensor(np.array(masks, dtype=np.uint8)).reshape(-1, height, width),
    }


def found(index: int) -> Detections:
    """What a mediocre detector finds in an image: shifted masks, wrong classes, doubles, nothing in some."""
    random = np.random.default_rng(100 + index)
    image, masks, labels, _ = scene(TRAIN + index)
    shifted = [np.roll(mask, tuple(random.integers(-4, 5, 2)), (0, 1)) for mask in masks for _ in range(2)]
    kinds = [label if random.random() < 0.8 else 1 - label for label in labels for _ in range(2)]
    scores = torch.tensor(random.random(len(shifted)))
    boxes = torch.tensor([box(mask) for mask in shifted]).reshape(-1, 4)
    pixels = torch.tensor(np.array(shifted, dtype=bool)).reshape(-1, *image.shape[:2])
    return Detections(boxes, scores, torch.tensor(kinds, dtype=torch.int64), pixels)


def independently(kind: str, folder: Path) -> COCOeval:
    """pycocotools as its manual describes: an annotation file, a result file."""
    ground_truth: dict[str, Any] = {
        "info": {},
        "images": [],
        "annotations": [],
        "categories": [{"id": i + 1, "name": name} for i, name in enumerate(CLASSES)],
    }
    results = []
    for index in range(VALIDATION):
        image, masks, labels, crowds = scene(TRAIN + index)
        ground_truth["images"].append({"id": index, "height": image.shape[0], "width": image.shape[1]})
        for mask, label, crowd in zip(masks, labels, crowds, strict=True):
            left, top, right, bottom = box(mask)
            entry = {
                "id": len(ground_truth["annotations"]) + 1,
                "image_id": index,
                "category_id": label + 1,
                "iscrowd": int(crowd),
            }
            counts = encode_masks(torch.tensor(mask)[None])[0].decode()
            entry |= {
                "bbox": [left, top, right - left, bottom - top],
                "area": float(mask.sum()),
                "segmentation": {"size": list(mask.shape), "counts": counts},
            }
            ground_truth["annotations"].append(entry)
        for each_box, score, label, mask in zip(*found(index), strict=True):
            left, top, right, bottom = each_box.tolist()
            result = {"image_id": index, "category_id": int(label) + 1, "score": float(score)}
            segmentation = {"size": list(mask.shape), "counts": encode_masks(mask[None])[0].decode()}
            results.append(
                result
                | (
                    {"bbox": [left, top, right - left, bottom - top]}
                    if kind == "bbox"
                    else {"segmentation": segmentation}
                )
            )
    (folder / "ground_truth.json").write_text(json.dumps(ground_truth))
    (folder / "results.json").write_text(json.dumps(results))
    annotations = COCO(folder / "ground_truth.json")
    evaluation = COCOeval(annotations, annotations.loadRes(str(folder / "results.json")), kind)
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return evaluation


def joined() -> coco.Rows:
    """The rows of three batches, not in the order of the images."""
    parts = [coco.rows(batch(a, b), [found(index) for index in range(a, b)]) for a, b in ((5, 7), (0, 2), (2, 5))]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_it_is_what_pycocotools_computes_from_exported_files(tmp_path: Path, kind: Any) -> None:
    ground_truth, results = coco.as_coco(joined(), CLASSES)
    precision = coco.average_precision(ground_truth, results, kind)
    expected = independently(kind, tmp_path)
    assert [precision.mean, precision.at_50, precision.at_75] == pytest.approx(expected.stats[:3].tolist(), abs=1e-6)
    assert 0.02 < precision.mean < precision.at_50 < 1
    by_class = np.where(expected.eval["precision"] < 0, np.nan, expected.eval["precision"])[..., 0, -1].mean((0, 1))
    assert np.allclose(precision.by_class, by_class, atol=1e-9, equal_nan=True) and np.isnan(precision.by_class[2])
    assert precision.curves.shape == (3, coco.RECALLS)
    assert precision.curves[:2].mean() == pytest.approx(precision.at_50)


def test_the_order_of_batches_and_processes_changes_nothing() -> None:
    rows = joined()
    backwards = [coco.rows(batch(i, i + 1), [found(i)]) for i in reversed(range(VALIDATION))]
    other = {name: torch.cat([part[name] for part in backwards]) for name in rows}
    first, second = (coco.average_precision(*coco.as_coco(each, CLASSES), "segm") for each in (rows, other))
    assert first[:3] == second[:3]


def test_perfect_detections_have_a_precision_of_1_and_none_has_0() -> None:
    everything = batch(0, VALIDATION)
    perfect, nothing = [], []
    for index in range(VALIDATION):
        mine = (everything["image_index"] == index) & ~everything["crowd"]
        height, width = int(everything["height"][index]), int(everything["width"][index])
        masks = everything["masks"][mine][:, :height, :width].bool()
        perfect.append(
            Detections(everything["boxes"][mine], torch.ones(int(mine.sum())), everything["labels"][mine], masks)
        )
        nothing.append(Detections(*(part[:0] for part in perfect[-1])))
    for kind in ("bbox", "segm"):
        best, worst = (
            coco.average_precision(*coco.as_coco(coco.rows(everything, each), CLASSES), kind)
            for each in (perfect, nothing)
        )
        assert best[:3] == (1, 1, 1) and best.by_class[:2].tolist() == [1, 1]
        assert worst[:3] == (0, 0, 0) and worst.by_class[:2].tolist() == [0, 0] and np.isnan(worst.by_class[2])


def test_without_any_object_there_is_no_precision() -> None:
    empty = batch(0, 1)
    assert not len(empty["labels"])
    for detections in (
        found(0),
        Detections(
            torch.rand(1, 4), torch.ones(1), torch.zeros(1, dtype=torch.int64), torch.ones(1, 9, 9, dtype=torch.bool)
        ),
    ):
        precision = coco.average_precision(*coco.as_coco(coco.rows(empty, [detections]), CLASSES), "bbox")
        assert np.isnan(precision[:3]).all()


def test_masks_survive_their_run_lengths() -> None:
    masks = torch.rand(3, 17, 23) > 0.5
    assert torch.equal(decode_masks(encode_masks(masks), (17, 23)).bool(), masks)
    assert decode_masks([], (4, 5)).shape == (0, 4, 5)
