"""Whether anchors fit the boxes of a data set, and ones that do."""

from __future__ import annotations

import io
import math
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from trainer.detection.anchors import best_possible_recall, estimate_anchors, side_ratios
from trainer.models.yolo import PUBLISHED_ANCHORS

ANCHORS = np.array([[10.0, 10.0], [40.0, 20.0]])


def test_a_box_is_compared_side_by_side_with_the_anchor_most_like_it() -> None:
    boxes = np.array([[10.0, 10.0], [20.0, 10.0], [5.0, 30.0], [160.0, 20.0]])
    assert side_ratios(boxes, ANCHORS).tolist() == [1, 2, 3, 4]


def test_recall_is_the_share_of_boxes_that_an_anchor_fits() -> None:
    boxes = np.array([[10.0, 10.0], [20.0, 10.0], [5.0, 30.0], [160.0, 20.0]])
    assert best_possible_recall(boxes, ANCHORS) == 0.75  # at the limit of 4 it doesn't fit, for the loss neither
    assert best_possible_recall(boxes, ANCHORS, max_ratio=2.5) == 0.5
    assert math.isnan(best_possible_recall(boxes[:0], ANCHORS))


def test_estimated_anchors_are_the_geometric_means_of_clusters_from_small_to_large() -> None:
    random = np.random.default_rng(0)
    centres = np.array([[8.0, 12.0], [60.0, 20.0], [150.0, 210.0]])
    boxes = np.concatenate([centre * np.exp(random.normal(0, 0.1, (50, 2))) for centre in centres[[2, 0, 1]]])
    found = estimate_anchors(boxes, count=3)
    np.testing.assert_allclose(found, centres, rtol=0.05)
    np.testing.assert_allclose(found[0], np.exp(np.log(boxes[50:100]).mean(axis=0)), rtol=1e-9)
    assert np.array_equal(found, estimate_anchors(boxes, count=3))


def test_estimated_anchors_fit_boxes_that_the_given_ones_do_not() -> None:
    random = np.random.default_rng(0)
    boxes = np.exp(random.uniform(np.log(2), np.log(16), (400, 2))) * [1, 4]
    published = np.array(PUBLISHED_ANCHORS).reshape(-1, 2)
    assert best_possible_recall(boxes, published) < 0.9
    assert best_possible_recall(boxes, estimate_anchors(boxes)) == 1


def test_too_few_sizes_for_so_many_anchors_are_an_error_that_says_so() -> None:
    with pytest.raises(ValueError, match="9 anchors can't be estimated from boxes of 3 different sizes"):
        estimate_anchors(np.repeat([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], 10, axis=0))


def _coco128_sizes(archive: Path, side: int = 640) -> np.ndarray:
    """Width and height of every box where the image's longer side is `side` pixels."""
    sizes = []
    with zipfile.ZipFile(archive) as files:
        for name in sorted(files.namelist()):
            if name.endswith(".txt") and "/labels/" in name:
                with Image.open(
                    io.BytesIO(files.read(name.replace("/labels/", "/images/").replace(".txt", ".jpg")))
                ) as image:
                    scaled = np.array(image.size) * side / max(image.size)
                sizes.append(np.loadtxt(io.BytesIO(files.read(name)), ndmin=2)[:, 3:] * scaled)
    return np.concatenate(sizes)


@pytest.mark.realdata
@pytest.mark.skipif(not os.environ.get("TRAINER_ARCHIVES"), reason="TRAINER_ARCHIVES names no folder with coco128.zip")
def test_the_published_anchors_fit_nearly_every_box_of_coco128() -> None:
    sizes = _coco128_sizes(Path(os.environ["TRAINER_ARCHIVES"], "coco128.zip"))
    published = np.array(PUBLISHED_ANCHORS).reshape(-1, 2)
    assert len(sizes) == 929
    assert best_possible_recall(sizes, published) == pytest.approx(0.9946, abs=1e-3)
    estimated = estimate_anchors(sizes)
    assert best_possible_recall(sizes, estimated) > best_possible_recall(sizes, published)
    assert np.log(side_ratios(sizes, estimated)).mean() < np.log(side_ratios(sizes, published)).mean()
