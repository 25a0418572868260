from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn import metrics
from torch import Tensor

from trainer.metrics.confusion import accuracy, class_accuracy, confusion_matrix, jaccard, mean_over_present

CLASSES, IGNORED = 5, 255


def sample(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(CLASSES, (3, 11, 13), generator=generator)
    guess = torch.where(
        torch.rand(targets.shape, generator=generator) < 0.6,
        targets,
        torch.randint(CLASSES, targets.shape, generator=generator),
    )
    targets[torch.rand(targets.shape, generator=generator) < 0.3] = IGNORED
    return guess, targets.to(torch.uint8)


@pytest.mark.parametrize("seed", range(3))
def test_matrix_and_metrics_agree_with_scikit_learn(seed: int) -> None:
    guess, targets = sample(seed)
    valid = targets != IGNORED
    expected_targets, expected_guess = targets[valid].numpy(), guess[valid].numpy()
    matrix = confusion_matrix(guess, targets, CLASSES, IGNORED)
    assert matrix.dtype == torch.int64
    np.testing.assert_array_equal(
        matrix, metrics.confusion_matrix(expected_targets, expected_guess, labels=range(CLASSES))
    )
    np.testing.assert_allclose(
        jaccard(matrix), metrics.jaccard_score(expected_targets, expected_guess, average=None), rtol=1e-12
    )
    np.testing.assert_allclose(
        class_accuracy(matrix), metrics.recall_score(expected_targets, expected_guess, average=None), rtol=1e-12
    )
    assert float(accuracy(matrix)) == pytest.approx(metrics.accuracy_score(expected_targets, expected_guess))


def test_matrices_of_parts_add_up_to_that_of_the_whole() -> None:
    guess, targets = sample(7)
    parts = [confusion_matrix(guess[i], targets[i], CLASSES, IGNORED) for i in range(3)]
    assert torch.equal(sum(parts, torch.zeros(())), confusion_matrix(guess, targets, CLASSES, IGNORED))


def test_rows_are_the_ground_truth_and_columns_the_prediction() -> None:
    matrix = confusion_matrix(torch.tensor([1, 1, 0]), torch.tensor([0, 0, 0]), 2, None)
    assert matrix.tolist() == [[1, 2], [0, 0]]


def test_a_class_that_is_neither_there_nor_predicted_has_no_iou_and_no_weight_in_the_mean() -> None:
    matrix = torch.tensor([[3, 1, 0], [0, 4, 0], [0, 0, 0]])
    iou = jaccard(matrix)
    assert iou[2].isnan()
    assert float(mean_over_present(iou)) == pytest.approx((3 / 4 + 4 / 5) / 2)


def test_a_class_that_is_only_predicted_counts_as_iou_zero_and_has_no_accuracy() -> None:
    matrix = torch.tensor([[3, 1], [0, 0]])
    assert jaccard(matrix).tolist() == [0.75, 0.0]
    assert class_accuracy(matrix)[0] == 0.75
    assert math.isnan(class_accuracy(matrix)[1])


def test_only_ignored_pixels_give_an_empty_matrix() -> None:
    targets = torch.full((2, 4, 4), IGNORED, dtype=torch.uint8)
    assert not confusion_matrix(torch.ones_like(targets).long(), targets, CLASSES, IGNORED).any()
    assert not confusion_matrix(targets[:0].long(), targets[:0], CLASSES, IGNORED).any()


def test_counts_beyond_what_a_float_holds_stay_exact() -> None:
    big = torch.tensor([[2**40 + 1, 1], [0, 2**40]])
    assert float(accuracy(big)) == pytest.approx(1.0, abs=1e-11)
    assert float(jaccard(big)[0]) == (2**40 + 1) / (2**40 + 2)
