"""Average precision of boxes and masks as COCO defines it (Lin et al., "Microsoft COCO", 2014), computed by
pycocotools.

Precision depends on the order of all scores, so it can't be summed up: the detections in each image are kept as rows,
which are joined over batches and processes.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from contextlib import redirect_stdout
from math import nan
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from trainer.detection.boxes import Detections
from trainer.detection.rle import codec, encode_masks
from trainer.errors import UserError

Kind = Literal["bbox", "segm"]
"""Whether boxes or masks are compared, in COCO's words."""
Rows = dict[str, Tensor]
THRESHOLDS = [0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95]  # of the IoU
RECALLS = 101  # 0, 0.01, … 1, at which precision is sampled


def rows(batch: dict[str, Any], detections: Sequence[Detections]) -> Rows:
    """Ground truth and detections in the images of a batch, as tensors that can be joined along their first dimension.

    `images` int64 (B, 3): sample id, height, width. `true` float64 (M, 7): sample id, class, crowd, box. `detected`
    float64 (D, 7): sample id, class, score, box. If the detections have masks, `true_rle` and `detected_rle` uint8 hold
    the masks' run lengths one after the other, and `true_rle_bytes` and `detected_rle_bytes` int64 the length of each.
    """
    device = batch["boxes"].device
    ids, heights, widths = (batch[name].cpu() for name in ("sample_id", "height", "width"))
    index = batch["image_index"].cpu()
    detected_index = torch.repeat_interleave(torch.tensor([len(each.labels) for each in detections]))
    labels, scores, boxes = (
        torch.cat([getattr(each, name) for each in detections]).double().cpu() for name in ("labels", "scores", "boxes")
    )
    out = {
        "images": torch.stack([ids, heights, widths], dim=1),
        "true": _columns(ids[index], batch["labels"], batch["crowd"], batch["boxes"]),
        "detected": _columns(ids[detected_index], labels, scores, boxes),
    }
    if "masks" in batch and all(each.masks is not None for each in detections):
        sizes = list(zip(heights.tolist(), widths.tolist(), strict=True))
        true = [mask[: sizes[i][0], : sizes[i][1]] for mask, i in zip(batch["masks"], index.tolist(), strict=True)]
        detected = [mask for each in detections for mask in (() if each.masks is None else each.masks)]
        for name, masks in (("true", true), ("detected", detected)):
            counts = [encode_masks(mask[None])[0] for mask in masks]
            out[f"{name}_rle"] = (
                torch.frombuffer(bytearray(b"".join(counts)), dtype=torch.uint8)
                if counts
                else torch.zeros(0, dtype=torch.uint8)
            )
            out[f"{name}_rle_bytes"] = torch.tensor([len(each) for each in counts], dtype=torch.int64)
    return {name: value.to(device) for name, value in out.items()}


def _columns(ids: Tensor, labels: Tensor, third: Tensor, boxes: Tensor) -> Tensor:
    return torch.cat(
        [torch.stack([column.cpu().double() for column in (ids, labels, third)], dim=1), boxes.cpu().double()], dim=1
    )


def as_coco(joined: Rows, classes: Sequence[str]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The joined rows in the form of COCO's files: an annotation file, and a result file with `bbox` and, if there are
    masks, `segmentation`.

    Category ids count from 1, as COCO's do.
    """
    sizes = {sample_id: (height, width) for sample_id, height, width in joined["images"].tolist()}
    entries: dict[str, list[dict[str, Any]]] = {}
    for name in ("true", "detected"):
        entries[name] = []
        counts = _split(joined[f"{name}_rle"], joined[f"{name}_rle_bytes"]) if f"{name}_rle" in joined else None
        for number, (sample_id, label, third, *box) in enumerate(joined[name].tolist()):
            left, top, right, bottom = box
            entry: dict[str, Any] = {
                "image_id": int(sample_id),
                "category_id": int(label) + 1,
                "bbox": [left, top, right - left, bottom - top],
            }
            if counts is not None:
                entry["segmentation"] = {"size": list(sizes[int(sample_id)]), "counts": counts[number]}
            if name == "true":
                area = (
                    codec().area(entry["segmentation"]) if counts is not None else entry["bbox"][2] * entry["bbox"][3]
                )
                entry |= {"id": number + 1, "iscrowd": int(third), "area": float(area)}
            else:
                entry["score"] = third
            entries[name].append(entry)
    annotations = {
        "info": {},
        "images": [
            {"id": sample_id, "height": height, "width": width} for sample_id, (height, width) in sorted(sizes.items())
        ],
        "categories": [{"id": index + 1, "name": name} for index, name in enumerate(classes)],
        "annotations": entries["true"],
    }
    return annotations, entries["detected"]


def _split(joined: Tensor, lengths: Tensor) -> list[str]:
    parts, start, whole = [], 0, joined.cpu().numpy().tobytes()
    for length in lengths.tolist():
        parts.append(whole[start : start + length].decode("ascii"))
        start += length
    return parts


class AveragePrecision(NamedTuple):
    """The result of COCO's evaluation, over all sizes of objects and at most 100 detections an image.

    Attributes:
        mean: mean over the IoU thresholds 0.50, 0.55, … 0.95 and the classes that have objects; nan without any.
        at_50, at_75: at a single threshold.
        by_class: float64 (C,), the mean over thresholds; nan where a class has no objects.
        curves: float64 (C, 101), precision at recalls 0, 0.01, … 1 at threshold 0.50; nan where a class has no objects.
    """

    mean: float
    at_50: float
    at_75: float
    by_class: np.ndarray
    curves: np.ndarray


def average_precision(annotations: dict[str, Any], results: Sequence[dict[str, Any]], kind: Kind) -> AveragePrecision:
    """Average precision of COCO results against COCO annotations.

    Raises:
        UserError: pycocotools isn't installed.
    """
    try:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    except ImportError:
        raise UserError(
            "average precision of boxes needs pycocotools: pip install 'recipe-trainer[detection]'"
        ) from None

    num_classes = len(annotations["categories"])
    if not results:  # which pycocotools can't load
        objects = [each["category_id"] for each in annotations["annotations"] if not each["iscrowd"]]
        present = np.isin(np.arange(1, num_classes + 1), objects)
        zero = np.where(present, 0.0, np.nan)
        return _averaged(np.tile(zero, (len(THRESHOLDS), RECALLS, 1)))
    if kind == "segm":  # the area of a result with a box would be that of the box
        results = [{name: value for name, value in each.items() if name != "bbox"} for each in results]
    with redirect_stdout(io.StringIO()):  # it prints tables
        ground_truth = COCO()
        ground_truth.dataset = annotations
        ground_truth.createIndex()
        evaluation = COCOeval(ground_truth, ground_truth.loadRes([dict(each) for each in results]), kind)
        evaluation.evaluate()
        evaluation.accumulate()
    precision = evaluation.eval["precision"][:, :, :, 0, -1]  # (thresholds, recalls, classes)
    return _averaged(np.where(precision < 0, np.nan, precision))


def _averaged(precision: np.ndarray) -> AveragePrecision:
    """From precisions (thresholds, recalls, classes), nan for classes without objects."""
    by_class = precision.mean(axis=(0, 1))
    present = precision[..., ~np.isnan(by_class)]
    chosen = [present, present[THRESHOLDS.index(0.5)], present[THRESHOLDS.index(0.75)]]
    mean, at_50, at_75 = (float(each.mean()) if each.size else nan for each in chosen)
    return AveragePrecision(mean, at_50, at_75, by_class, precision[THRESHOLDS.index(0.5)].T)
