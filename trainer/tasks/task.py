"""The task seam: what differs between kinds of assignments."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from math import isnan
from typing import Any

import torch
from torch import Tensor, nn

from trainer.losses.loss import Loss

Batch = dict[str, Any]
"""Fields of a batch on the device, e.g. `image` uint8 (B, 3, H, W) and `mask` uint8 (B, 1, H, W)."""
Forward = Callable[..., Any]
"""The model as the Trainer wrapped it (DDP, autocast, compile), or a bare one in evaluation."""
Color = tuple[int, int, int]
"""RGB, 0 to 255."""
TERM = "loss/"  # sums of the loss stand under it beside those of the metrics


class Task(ABC):
    """One kind of assignment: owns model and loss, and knows what a batch means.

    A task says how the model is run on a batch, what of it is counted, which metrics follow and what is drawn.

    Attributes:
        model: the network, unwrapped.
        loss: its loss.
        metric_names: what `metrics` returns and people look at; a recipe's `evaluate.best` is one of them. Names that end
            in `loss` are better when lower, all others when higher.
        panels: names of the panels of `pictures`.
        legend: what the colours in them mean.
    """

    metric_names: tuple[str, ...] = ("loss",)
    panels: tuple[str, ...] = ()
    legend: Mapping[str, Color] = {}

    def __init__(self, model: nn.Module, loss: Loss) -> None:
        self.model = model
        self.loss = loss

    @abstractmethod
    def run(self, model: Forward, batch: Batch) -> tuple[Any, Any]:
        """Runs the model on a batch; returns outputs and targets as the loss takes them."""

    @abstractmethod
    def counts(self, outputs: Any, targets: Any) -> dict[str, Tensor]:
        """What `measure` needs of an evaluation batch: sums of any shape that add up over batches and processes."""

    @abstractmethod
    def measure(self, sums: dict[str, Tensor]) -> dict[str, Any]:
        """Metrics of the whole set from the summed `counts`.

        Floats, of which fractions are 0 to 1 and nan is left out, as it is no value. Where there is a confusion matrix,
        `confusion` has for each true class the counts of its predicted classes, in the same order; it gets a picture.
        """

    @abstractmethod
    def pictures(self, model: Forward, batch: Batch) -> Tensor:
        """Draws samples: uint8 (N, P, 3, H, W), each in P panels such as image, truth and prediction."""

    def loss_sums(self, model: Forward, batch: Batch) -> dict[str, Tensor]:
        """Runs the model on a training batch; returns the loss's local sums, with gradients."""
        return self.loss(*self.run(model, batch))

    def evaluation_sums(self, model: Forward, batch: Batch) -> dict[str, Tensor]:
        """Runs the model on an evaluation batch; returns `counts`, `samples` (int64) and the sums of the loss as `loss/…`."""
        outputs, targets = self.run(model, batch)
        terms = {TERM + name: value for name, value in self.loss(outputs, targets).items()}
        samples = torch.tensor(len(batch["image"]), device=batch["image"].device)
        return self.counts(outputs, targets) | terms | {"samples": samples}

    def metrics(self, sums: dict[str, Tensor]) -> dict[str, Any]:
        """Metrics of the whole set from the summed `evaluation_sums`: those of `measure`, and the loss and its terms.

        The loss is that of the whole set taken as one batch.
        """
        terms = self.loss.combine({name.removeprefix(TERM): value for name, value in sums.items() if name.startswith(TERM)})
        measured = {name: value for name, value in self.measure(sums).items() if not (isinstance(value, float) and isnan(value))}
        return {name: float(value) for name, value in terms.items()} | measured
