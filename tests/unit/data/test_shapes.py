from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from trainer.data.images import read_indices
from trainer.data.sets.shapes import CLASSES, IGNORE, draw, shapes
from trainer.data.source import Row


@pytest.fixture(scope="module")
def rows() -> list[tuple[str, Row]]:
    return list(shapes().rows({}))


def test_the_set_is_the_same_every_time(rows: list[tuple[str, Row]]) -> None:
    again = shapes().rows({})
    assert [next(again) for _ in range(20)] == rows[:20]


def test_samples_differ_within_and_between_splits(rows: list[tuple[str, Row]]) -> None:
    assert len({row["image"] for _, row in rows}) == len(rows)


def test_no_common_number_of_processes_divides_the_validation_set(rows: list[tuple[str, Row]]) -> None:
    counts = Counter(split for split, _ in rows)
    assert counts["train"] >= 500
    assert all(counts["validation"] % processes for processes in range(2, 9))


def test_every_class_is_seen_and_outlines_are_ignored(rows: list[tuple[str, Row]]) -> None:
    counts = sum(np.bincount(read_indices(row["mask"]).ravel(), minlength=256) for _, row in rows[:100])
    assert set(np.flatnonzero(counts)) == {*range(len(CLASSES)), IGNORE}
    assert counts[:4].min() > 0.01 * counts.sum()
    assert counts[IGNORE] < 0.1 * counts.sum()


def test_colour_does_not_give_the_class_away() -> None:
    samples = [draw(np.random.default_rng((9, i))) for i in range(200)]
    pixels = np.concatenate([image.reshape(-1, 3) for image, _ in samples])
    labels = np.concatenate([mask.ravel() for _, mask in samples])
    means = np.stack([pixels[labels == index].mean(axis=0) for index in range(1, 4)])
    spread = pixels[(labels > 0) & (labels < 4)].std(axis=0)
    assert (np.ptp(means, axis=0) < 0.5 * spread).all()
