"""The loss seam: local sums that the Trainer adds over processes, and a pure function of the totals."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from torch import Tensor, nn


class Loss(nn.Module):
    """A loss as a function of sums over the whole micro-batch.

    `forward` returns this process's sums; the Trainer adds those of the other processes and calls `combine` on the
    totals. A ratio of sums (soft IoU, weighted cross entropy) thus has the value and the gradient that one process
    would compute on the whole micro-batch.
    """

    @abstractmethod
    def forward(self, outputs: Any, targets: Any) -> dict[str, Tensor]:
        """Local sums: float64 scalars or vectors, differentiable with respect to `outputs`."""

    @abstractmethod
    def combine(self, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        """Turns summed totals into `loss` and its named terms (scalars); has no state and no side effect."""
