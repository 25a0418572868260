"""The task seam: what differs between kinds of assignments, behind five methods."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from trainer.losses.loss import Loss

Batch = dict[str, Any]
"""Fields of a batch on the device, e.g. `image` uint8 (B, 3, H, W) and `mask` uint8 (B, 1, H, W)."""
Forward = Callable[..., Any]
"""The model as the Trainer wrapped it (DDP, autocast, compile), or a bare one in evaluation."""


class Task(ABC):
    """One kind of assignment: owns model and loss, and knows what a batch means.

    Attributes:
        model: the network, unwrapped.
        loss: its loss.
        metric_names: what `metrics` returns; a recipe's `evaluate.best` is one of them. Names that end in
            `loss` are better when lower, all others when higher.
    """

    metric_names: tuple[str, ...] = ("loss",)

    def __init__(self, model: nn.Module, loss: Loss) -> None:
        self.model = model
        self.loss = loss

    @abstractmethod
    def loss_sums(self, model: Forward, batch: Batch) -> dict[str, Tensor]:
        """Runs the model on a training batch; returns the loss's local sums, with gradients."""

    @abstractmethod
    def evaluation_sums(self, model: Forward, batch: Batch) -> dict[str, Tensor]:
        """Runs the model on an evaluation batch; returns sums (any shape) from which `metrics` can be computed."""

    @abstractmethod
    def metrics(self, sums: dict[str, Tensor]) -> dict[str, float]:
        """Metrics of the whole set from the summed `evaluation_sums`; fractions are 0 to 1."""

    @abstractmethod
    def pictures(self, model: Forward, batch: Batch) -> Tensor:
        """Draws a few samples: uint8 (N, 3, H, W), each one row such as image | truth | prediction."""
