"""Average precision over labels in bounded memory: scores are rounded to 16 bits, and labels counted by score."""

from __future__ import annotations

import torch
from torch import Tensor

NUM_SCORES = 2**16  # values of a float16
ZERO = NUM_SCORES // 2


def log_odds(logits: Tensor) -> Tensor:
    """log(p / (1 - p)) of each class's softmax probability p: its logit minus the logsumexp of the others.

    Unlike p it still distinguishes scores where p rounds to 1: up to 88, and is infinite beyond 103.

    Args:
        logits: (B, C, …).

    Returns:
        float32 (B, C, …).
    """
    logits = logits.float()
    top, winner = logits.max(1, keepdim=True)
    wins = winner == _classes(logits)
    weights = (logits - top).exp()
    rest = weights.masked_fill(wins, 0).sum(1, keepdim=True)  # without the winner's, which is 1
    others = torch.where(wins, rest, 1 + rest - weights)  # no cancellation: a difference here is at least 1
    return logits - top - others.log()


def score_counts(logits: Tensor, targets: Tensor, ignore_index: int | None) -> Tensor:
    """Counts labels (of pixels, say) by their score for each class: the log-odds, rounded to float16.

    Counts of batches and processes simply add up, and hold all that average precision needs. Rounding joins scores that
    differ by less than 1 in 1,000, which changes the average precision of a trained model's scores by about 1e-5. Equal
    bins of probability do far worse, as most scores are near 0 or 1.

    Args:
        logits: (B, C, …).
        targets: class indices (B, …), any integer type; those equal to `ignore_index` are not counted.
        ignore_index: the label to leave out, or None.

    Returns:
        int64 (C, 2, 65536), 1 MiB for each class: labels of other classes and of this one, by ascending score.
    """
    num_classes = logits.shape[1]
    bits = log_odds(logits).half().view(torch.int16)
    score = ZERO + torch.where(bits < 0, -ZERO - bits, bits).int()  # floats have a sign and a magnitude; -0 becomes 0
    classes = _classes(logits)
    index = (2 * classes + (targets[:, None] == classes)) * NUM_SCORES + score
    size = 2 * num_classes * NUM_SCORES
    if ignore_index is not None:
        index = torch.where(targets[:, None] == ignore_index, size, index)  # to an entry of their own that is cut off
    return torch.bincount(index.flatten(), minlength=size + 1)[:size].view(num_classes, 2, NUM_SCORES)


def average_precision(counts: Tensor) -> Tensor:
    """Area under the steps of the precision-recall curve: Σ (R_n - R_(n-1)) P_n over the scores, highest first.

    As scikit-learn's `average_precision_score` defines it: all labels of equal score are one step, and nothing is
    interpolated.

    Args:
        counts: int64 (C, 2, 65536) of `score_counts`.

    Returns:
        float64 (C,); nan for a class that is absent from the ground truth.
    """
    predicted = counts.flip(-1).cumsum(-1).double()  # labels that score at least as high
    true = predicted[:, 1]
    precision = true / predicted.sum(1).clamp(min=1)
    recall = true / true[:, -1:]
    return (recall.diff(dim=-1, prepend=torch.zeros_like(recall[:, :1])) * precision).sum(-1)


def _classes(logits: Tensor) -> Tensor:
    """0 to C - 1, to be compared with (B, 1, …)."""
    classes = torch.arange(logits.shape[1], dtype=torch.int32, device=logits.device)
    return classes.view(-1, *(1 for _ in logits.shape[2:]))
