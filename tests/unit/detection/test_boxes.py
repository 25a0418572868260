"""From a detector's output to the boxes that were found."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from trainer.detection import boxes as detection
from trainer.detection.boxes import Level, decode, decode_levels, postprocess

ANCHORS = torch.tensor([[16.0, 32.0], [32.0, 16.0]])


def level(classes: int = 3, images: int = 1, dtype: torch.dtype = torch.float32) -> Level:
    """Nothing anywhere: 4 x 6 cells of 8 pixels with two anchors."""
    logits = torch.zeros(images, 2, 4, 6, 5 + classes, dtype=dtype)
    logits[..., 4:] = -10
    return Level(logits, ANCHORS, 8)


def put(logits: Tensor, score: float, label: int | None = 0) -> None:
    """An object of this score in a prediction (5 + C,), with a class that is certain, and where zeros put it."""
    logits[4] = torch.tensor(score).logit()
    if label is not None:
        logits[5 + label] = 30


def test_logits_of_zero_are_the_anchor_in_the_middle_of_the_cell() -> None:
    found = decode(torch.zeros(4), torch.tensor([3, 1]), ANCHORS[0], 8)
    assert found.tolist() == [3.5 * 8, 1.5 * 8, 16, 32]


def test_centres_reach_half_a_cell_outside_and_sides_four_times_the_anchor() -> None:
    low, high = decode(torch.tensor([[-50.0] * 4, [50.0] * 4]), torch.tensor([3, 1]), ANCHORS[0], 8)
    assert low.tolist() == pytest.approx([2.5 * 8, 0.5 * 8, 0, 0], abs=1e-5)
    assert high.tolist() == pytest.approx([4.5 * 8, 2.5 * 8, 64, 128])


def test_boxes_of_all_cells_and_levels_are_where_their_cell_is() -> None:
    fine, coarse = level(), level()._replace(stride=16)
    boxes, scores = decode_levels([fine, coarse])
    assert boxes.shape == (1, 2 * 48, 4) and scores.shape == (1, 2 * 48, 3)
    index = (1 * 4 + 2) * 6 + 5  # second anchor, row 2, column 5
    assert boxes[0, index].tolist() == [5.5 * 8 - 16, 2.5 * 8 - 8, 5.5 * 8 + 16, 2.5 * 8 + 8]
    assert boxes[0, 48 + index].tolist() == [5.5 * 16 - 16, 2.5 * 16 - 8, 5.5 * 16 + 16, 2.5 * 16 + 8]


def test_the_best_of_overlapping_boxes_of_a_class_is_kept_and_other_classes_stay() -> None:
    one = level()
    put(one.logits[0, 0, 1, 1], 0.9)
    put(one.logits[0, 0, 1, 2], 0.6)  # 8 pixels to the right: IoU 1/3
    put(one.logits[0, 1, 1, 1], 0.7, label=2)
    (kept,) = postprocess([one], conf_threshold=0.5, iou_threshold=0.3, max_detections=10)
    assert kept.labels.tolist() == [0, 2] and kept.scores.tolist() == pytest.approx([0.9, 0.7])
    assert kept.boxes[0].tolist() == [12 - 8, 12 - 16, 12 + 8, 12 + 16]
    (all_,) = postprocess([one], conf_threshold=0.5, iou_threshold=0.4, max_detections=10)
    assert all_.scores.tolist() == pytest.approx([0.9, 0.7, 0.6])


def test_only_scores_above_the_threshold_count_and_only_the_best_are_kept() -> None:
    one = level()
    for column, score in enumerate((0.2, 0.8, 0.4, 0.6)):
        put(one.logits[0, 0, 0, column], score)
    kept = [postprocess([one], 0.3, 0.9, number)[0].scores.tolist() for number in (10, 2)]
    assert kept == [pytest.approx([0.8, 0.6, 0.4]), pytest.approx([0.8, 0.6])]


def test_a_box_counts_for_each_class_that_it_may_be() -> None:
    one = level()
    put(one.logits[0, 0, 0, 0], 0.8)
    one.logits[0, 0, 0, 0, 6] = 0.0
    (kept,) = postprocess([one], 0.3, 0.5, 10)
    assert kept.labels.tolist() == [0, 1] and kept.scores.tolist() == pytest.approx([0.8, 0.4])


def test_with_a_single_class_its_logit_is_not_asked() -> None:
    one = level(classes=1)
    put(one.logits[0, 0, 0, 0], 0.8, label=None)
    (kept,) = postprocess([one], 0.3, 0.5, 10)
    assert kept.scores.tolist() == pytest.approx([0.8]) and kept.labels.tolist() == [0]


def test_what_is_found_in_an_image_does_not_depend_on_the_others_and_may_be_nothing() -> None:
    torch.manual_seed(0)
    many = level(images=3)
    many.logits[:2] = torch.randn(2, 2, 4, 6, 8)
    together = postprocess([many], 0.2, 0.5, 100)
    for index, found in enumerate(together):
        (alone,) = postprocess([many._replace(logits=many.logits[index : index + 1])], 0.2, 0.5, 100)
        assert all(torch.equal(a, b) for a, b in zip(found[:3], alone[:3], strict=True)) and found.masks is None
    assert len(together[0].scores) > 5
    assert [tuple(field.shape) for field in together[2][:3]] == [(0, 4), (0,), (0,)]


def test_of_too_many_candidates_the_best_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(detection, "MAX_CANDIDATES", 2)
    one = level()
    for column, score in enumerate((0.5, 0.8, 0.6, 0.7)):
        put(one.logits[0, 0, 0, column], score)
    assert postprocess([one], 0.3, 0.99, 10)[0].scores.tolist() == pytest.approx([0.8, 0.7])
