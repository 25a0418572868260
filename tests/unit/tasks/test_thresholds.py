"""The settings of a detector's boxes under `task:` do what they say."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trainer.components import catalogue
from trainer.detection.boxes import Level
from trainer.losses.yolo import YoloLoss

SIDE, STRIDE = 64, 8


def found(**settings: Any) -> list[tuple[float, float]]:
    """Left border and score of what is found among four boxes of 16 x 16 pixels of one class: three in a row,
    each 4 pixels from the next, and one far away.
    """
    logits = torch.full((1, 4, 8, 8, 7), -20.0)
    logits[..., :4] = 0
    scores = {(0, 2): 0.9, (1, 2): 0.8, (2, 2): 0.7, (3, 6): 0.3}  # by anchor and column
    for (anchor, column), score in scores.items():
        logits[0, anchor, 4, column, 4:6] = torch.tensor([torch.tensor(score).logit(), 20.0])
    for anchor in (1, 2):  # sigmoid ± 1/4, 1/2 cells of 8 pixels each
        logits[0, anchor, 4, 2, 0] = torch.tensor(0.5 + anchor / 4 - 1e-7).logit()
    level = Level(logits, torch.full((4, 2), 16.0), STRIDE)
    component = catalogue("task")["detection"]
    task = component.build(
        dict(component.schema(**settings)), model=nn.Conv2d(3, 1, 1), loss=YoloLoss(2), classes=("a", "b")
    )
    batch: dict[str, Tensor] = {
        "image": torch.zeros(1, 3, SIDE, SIDE, dtype=torch.uint8),
        "height": torch.tensor([SIDE]),
        "width": torch.tensor([SIDE]),
        "content": torch.tensor([[0.0, 0, SIDE, SIDE]]),
    }
    (each,) = task.decode([level], batch)
    return [(round(float(box[0])), round(float(score), 3)) for box, score in zip(each.boxes, each.scores, strict=True)]


@pytest.mark.parametrize(
    ("threshold", "kept"),
    [
        (0.7, [(12, 0.9), (16, 0.8), (20, 0.7), (44, 0.3)]),
        (0.5, [(12, 0.9), (20, 0.7), (44, 0.3)]),  # neighbours overlap by 3/5, the first and the third by 1/3
        (0.2, [(12, 0.9), (44, 0.3)]),
    ],
)
def test_of_boxes_that_overlap_by_more_than_iou_threshold_the_best_is_found(
    threshold: float, kept: list[tuple[float, float]]
) -> None:
    assert found(iou_threshold=threshold) == kept


def test_boxes_that_score_no_more_than_conf_threshold_and_those_beyond_max_detections_are_not_found() -> None:
    assert found(iou_threshold=0.7, conf_threshold=0.75) == [(12, 0.9), (16, 0.8)]
    assert found(iou_threshold=0.7, max_detections=3) == [(12, 0.9), (16, 0.8), (20, 0.7)]
