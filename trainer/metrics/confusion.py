"""Metrics of classification; all follow from one confusion matrix, which simply adds up."""

from __future__ import annotations

import torch
from torch import Tensor


def most_likely(logits: Tensor) -> Tensor:
    """The class of the highest logit: (B, C, …) to int64 (B, …)."""
    return logits.max(1).indices  # argmax(1) is several times slower on CPUs


def confusion_matrix(predictions: Tensor, targets: Tensor, num_classes: int, ignore_index: int | None) -> Tensor:
    """Counts labels by true and predicted class.

    Args:
        predictions: class indices, any shape and integer type.
        targets: true class indices of the same shape; those equal to `ignore_index` are not counted.
        num_classes: C.
        ignore_index: the label to leave out, or None.

    Returns:
        int64 (C, C): a row for each true class, a column for each predicted one.
    """
    rows = targets.long()
    if ignore_index is not None:
        # Ignored labels go to a row of their own that is cut off: six times as fast as selecting the others.
        rows = torch.where(rows == ignore_index, num_classes, rows)
    counts = torch.bincount((rows * num_classes + predictions).flatten(), minlength=(num_classes + 1) * num_classes)
    return counts.view(num_classes + 1, num_classes)[:num_classes]


def jaccard(matrix: Tensor) -> Tensor:
    """Intersection over union of each class: diagonal / (row + column - diagonal).

    Args:
        matrix: a confusion matrix (C, C).

    Returns:
        float64 (C,); nan for a class that is absent from ground truth and predictions.
    """
    matrix = matrix.double()
    hits = matrix.diagonal()
    return hits / (matrix.sum(0) + matrix.sum(1) - hits)


def class_accuracy(matrix: Tensor) -> Tensor:
    """Recall of each class, diagonal / row: float64 (C,), nan for a class that is absent from the ground truth."""
    matrix = matrix.double()
    return matrix.diagonal() / matrix.sum(1)


def accuracy(matrix: Tensor) -> Tensor:
    """Share of all labels that are predicted correctly: float64 scalar, nan without labels."""
    matrix = matrix.double()
    return matrix.trace() / matrix.sum()


def mean_over_present(values: Tensor) -> Tensor:
    """Mean over the classes that have a value (are not nan): scalar, nan if none has."""
    return values.nanmean()
