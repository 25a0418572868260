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
ROWS = "rows/"  # what isn't summed but joined


class Task(ABC):
    """One kind of assignment: owns model and loss, and knows what a batch means.

    A task says how the model is run on a batch, what of it is counted or kept, which metrics follow and what is drawn.

    Attributes:
        model: the network, unwrapped.
        loss: its loss.
        metric_names: what `metrics` returns and people look at; a recipe's `evaluate.best` is one of them. Names that
            end in `loss` are better when lower, all others when higher.
        panels: names of the panels of `pictures`.
        legend: what the colours in them mean.
        fixed_shapes: whether the network computes at the size of the images it gets, not at one that it chooses for
            each.
    """

    metric_names: tuple[str, ...] = ("loss",)
    panels: tuple[str, ...] = ()
    legend: Mapping[str, Color] = {}
    fixed_shapes: bool = True

    def __init__(self, model: nn.Module, loss: Loss) -> None:
        self.model = model
        self.loss = loss

    @abstractmethod
    def run(self, model: Forward, batch: Batch) -> tuple[Any, Any]:
        """Runs the model on a batch; returns outputs and targets as the loss takes them."""

    @abstractmethod
    def counts(self, outputs: Any, targets: Any) -> dict[str, Tensor]:
        """What `measure` needs of an evaluation batch: sums of any shape that add up over batches and processes."""

    def rows(self, outputs: Any, batch: Batch) -> dict[str, Tensor]:
        """What `measure` needs of an evaluation batch and can't be summed:
        tensors that are joined along their first dimension. None by default.
        """
        return {}

    @abstractmethod
    def measure(self, sums: dict[str, Tensor]) -> dict[str, Any]:
        """Metrics of the whole set from the summed `counts` and the joined `rows`, whose order depends on the number of
        processes.

        Floats, of which fractions are 0 to 1 and nan is left out, as it is no value. Two get a picture: `confusion` has
        for each true class the counts of its predicted classes, in the same order; `precision_recall` has for each
        class the precision at recalls evenly spaced from 0 to 1.
        """

    def advice(self, metrics: Mapping[str, Any]) -> str | None:
        """What to do about metrics of a model that learns nothing, in one line; None otherwise, and by default."""
        return None

    @abstractmethod
    def pictures(self, model: Forward, batch: Batch) -> Tensor:
        """Draws samples: uint8 (N, P, 3, H, W), each in P panels such as image, truth and prediction."""

    def loss_sums(self, model: Forward, batch: Batch) -> dict[str, Tensor]:
        """Runs the model on a training batch; returns the loss's local sums, with gradients."""
        sums: dict[str, Tensor] = self.loss(*self.run(model, batch))
        return sums

    def evaluation_sums(self, model: Forward, batch: Batch) -> dict[str, Tensor]:
        """Runs the model on an evaluation batch; returns `counts`, `samples` (int64),
        the sums of the loss as `loss/…`, and `rows` as `rows/…`.
        """
        outputs, targets = self.run(model, batch)
        terms = {TERM + name: value for name, value in self.loss(outputs, targets).items()}
        rows = {ROWS + name: value for name, value in self.rows(outputs, batch).items()}
        samples = torch.tensor(len(batch["image"]), device=batch["image"].device)
        return self.counts(outputs, targets) | terms | rows | {"samples": samples}

    def metrics(self, sums: dict[str, Tensor]) -> dict[str, Any]:
        """Metrics of the whole set from the summed `evaluation_sums`: those of `measure`, and the loss and its terms
        where there are any.

        The loss is that of the whole set taken as one batch.
        """
        local = {name.removeprefix(TERM): value for name, value in sums.items() if name.startswith(TERM)}
        terms = self.loss.combine(local) if local else {}
        measured = self.measure({name.removeprefix(ROWS): value for name, value in sums.items()})
        return {name: float(value) for name, value in terms.items()} | {
            name: value for name, value in measured.items() if not (isinstance(value, float) and isnan(value))
        }

    def pixels(self, image: Tensor) -> Tensor:
        """Pixels uint8 (B, 3, H, W) on their device, in the dtype and memory format of the model's weights;
        0 to 255 still.
        """
        weights = list(self.model.parameters())
        channels_last = any(w.dim() == 4 and not w.is_contiguous() for w in weights)
        return image.to(
            weights[0].dtype, memory_format=torch.channels_last if channels_last else torch.contiguous_format
        )
