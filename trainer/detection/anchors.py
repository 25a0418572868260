"""Anchors for a data set: how well given ones fit its boxes, and ones that fit better.

An anchor fits a box if their widths and their heights differ by less than the factor `max_ratio`: the rule by which
the loss assigns boxes to anchors. A box that no anchor fits is not trained on.
Sizes are (width, height) in pixels of the network's input, thus after resizing.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from trainer.errors import UserError

Sizes = npt.NDArray[np.floating]


def side_ratios(sizes: Sizes, anchors: Sizes) -> npt.NDArray[np.float64]:
    """The factor by which each box differs from the most similar anchor: float64 (M,), at least 1.

    For a box and an anchor this is the larger ratio of their sides, the longer side over the shorter one.

    Args:
        sizes: (M, 2), of boxes.
        anchors: (K, 2).
    """
    ratios = np.asarray(sizes, np.float64)[:, None] / anchors
    return np.asarray(np.maximum(ratios, 1 / ratios).max(axis=2).min(axis=1), np.float64)


def best_possible_recall(sizes: Sizes, anchors: Sizes, max_ratio: float = 4.0) -> float:
    """The share of boxes (M, 2) that one of the anchors (K, 2) fits; nan without boxes."""
    return float((side_ratios(sizes, anchors) < max_ratio).mean()) if len(sizes) else float("nan")


def estimate_anchors(sizes: Sizes, count: int = 9, seed: int = 0) -> npt.NDArray[np.float64]:
    """Anchors for boxes of these sizes, the smallest area first: float64 (count, 2).

    They are the centres of k-means over (log width, log height), so geometric means: distances there are ratios of
    sides, and ratios decide whether an anchor fits. (Redmon & Farhadi, "YOLO9000", 2017, cluster by IoU.) The best of
    ten seeded starts is taken. For a model of three levels with three anchors each:
    `estimate_anchors(sizes).round().reshape(3, 3, 2).tolist()`.

    Args:
        sizes: (M, 2), above 0.
        count: number of anchors.
        seed: of the random starts.

    Raises:
        UserError: scikit-learn isn't installed.
        ValueError: there are fewer different sizes than anchors.
    """
    try:
        from sklearn.cluster import KMeans
    except ImportError:
        raise UserError("estimating anchors needs scikit-learn: pip install scikit-learn") from None

    num_sizes = len(np.unique(sizes, axis=0))
    if num_sizes < count:
        raise ValueError(f"{count} anchors can't be estimated from boxes of {num_sizes} different sizes")
    fitted = KMeans(count, n_init=10, random_state=seed).fit(np.log(np.asarray(sizes, np.float64)))
    anchors = np.exp(fitted.cluster_centers_)
    return np.asarray(anchors[np.argsort(anchors.prod(axis=1))], np.float64)
