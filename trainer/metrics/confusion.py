"""Metrics of dense classification; all follow from one confusion matrix, which simply adds up."""

from __future__ import annotations

import torch
from torch import Tensor


def most_likely(logits: Tensor) -> Tensor:
    """The class of the highest logit: (B, C, H, W) to int64 (B, H, W)."""
    return logits.max(1).indices  # argmax(1) is several times slower on CPUs


def confusion_matrix(predictions: Tensor, targets: Tensor, num_classes: int, ignore_index: int | None) -> Tensor:
    """Counts pixels by true and predicted class.

    Args:
        predictions: class indices, any shape and integer type.
        targets: true class indices of the same shape; pixels equal to `ignore_index` count nowhere.
        num_classes: C.
        ignore_index: the label to leave out, or None.

    Returns:
        int64 (C, C): rows are the truth, columns the prediction.
    """
    rows = targets.long()
    if ignore_index is not None:
        # Ignored pixels go to a row of their own that is cut off: six times as fast as selecting the others.
        rows = torch.where(rows == ignore_index, num_classes, rows)
    counts = torch.bincount((rows * num_classes + predictions).flatten(), minlength=(num_classes + 1) * num_classes)
    return counts.view(num_classes + 1, num_classes)[:num_classes]


def jaccard(matrix: Tensor) -> Tensor:
    """Intersection over union of each class: diagonal / (row + column - diagonal).

    Args:
        matrix: a confusion matrix (C, C).

    Returns:
        float64 (C,); nan for a class that is absent from truth and prediction.
    """
    matrix = matrix.double()
    hits = matrix.diagonal()
    return hits / (matrix.sum(0) + matrix.sum(1) - hits)


def class_accuracy(matrix: Tensor) -> Tensor:
    """Share of each true class that is found: diagonal / row; float64 (C,), nan for a class absent from the truth."""
    matrix = matrix.double()
    return matrix.diagonal() / matrix.sum(1)


def pixel_accuracy(matrix: Tensor) -> Tensor:
    """Share of all pixels whose class is right: float64 scalar, nan where there are none."""
    matrix = matrix.double()
    return matrix.trace() / matrix.sum()


def mean_over_present(values: Tensor) -> Tensor:
    """Mean over the classes that have a value (are not nan): scalar, nan where none has."""
    return values.nanmean()
