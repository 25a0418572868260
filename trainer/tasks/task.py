"""The task seam: what differs between kinds of assignments."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from math import isnan
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from trainer.detection.boxes import Detections
from trainer.losses.loss import Loss
from trainer.tasks.sums import EvaluationSums

Batch = dict[str, Any]
"""Fields of a batch on the device, e.g. `image` uint8 (B, 3, H, W) and `mask` uint8 (B, 1, H, W)."""
Forward = Callable[..., Any]
"""The model as the Trainer wrapped it (DDP, autocast, compile), or a bare one in evaluation."""
Predictions = TypeVar("Predictions", bound=Tensor | list[Detections])
"""Of a batch, one for each sample: class indices int64 (B, …), pictures uint8 (B, 3, H, W), or the objects in it."""
Observer = Callable[[Any, Batch], None]
"""Called with the predictions for each evaluation batch, and the batch."""
Color = tuple[int, int, int]
"""RGB, 0 to 255."""


class Task(ABC, Generic[Predictions]):
    """One kind of assignment: owns model and loss, and knows what a batch means.

    A task defines how the model runs on a batch, what is predicted, which sums and rows metrics follow from, which
    metrics these are and what is drawn.

    Attributes:
        model: the network, unwrapped.
        loss: its loss.
        metric_names: the metrics that people look at; a recipe's `evaluate.best` is one of them. Names that end in
            `loss` are better when lower, all others when higher.
        pipeline_tag: what the Hugging Face Hub calls this kind of assignment, for model cards; "" if it has no name.
        panels: names of the panels of `pictures`.
        legend: the meaning of the colours in them.
        fixed_shapes: whether the network computes at the size of the images it gets, not at one that it chooses for
            each.
        has_validation_loss: whether `run` works in evaluation mode, with the outputs of `infer`; otherwise validation
            has metrics alone.
    """

    metric_names: tuple[str, ...] = ("loss",)
    pipeline_tag: str = ""
    panels: tuple[str, ...] = ()
    legend: Mapping[str, Color] = {}
    fixed_shapes: bool = True
    has_validation_loss: bool = True

    def __init__(self, model: nn.Module, loss: Loss) -> None:
        self.model = model
        self.loss = loss

    # ---------------------------------------------------------------- what a task defines

    @abstractmethod
    def run(self, model: Forward, batch: Batch) -> tuple[Any, Any]:
        """Runs the model on a batch; returns outputs and targets as the loss takes them."""

    @abstractmethod
    def infer(self, model: Forward, batch: Batch) -> Any:
        """Runs the model, in evaluation mode, on a batch that needs no ground truth; returns its outputs."""

    @abstractmethod
    def decode(self, outputs: Any, batch: Batch) -> Predictions:
        """Turns the outputs of `infer` into predictions; reads no ground truth."""

    def sums(self, outputs: Any, batch: Batch) -> dict[str, Tensor]:
        """Sums over an evaluation batch that `measure` needs, of any shape; none by default."""
        return {}

    def rows(self, outputs: Any, batch: Batch) -> dict[str, Tensor]:
        """Tensors that `measure` needs and that cannot be summed, to be joined along their first dimension; none by
        default.
        """
        return {}

    @abstractmethod
    def measure(self, sums: EvaluationSums) -> dict[str, Any]:
        """Metrics of the whole set, apart from the loss; the order of the rows depends on the number of processes.

        Floats, of which fractions are 0 to 1 and nan is left out, as it is no value. Two get a picture: `confusion` has
        for each true class the counts of its predicted classes, in the same order; `precision_recall` has for each
        class the precision at recalls evenly spaced from 0 to 1.
        """

    def advice(self, metrics: Mapping[str, Any]) -> str | None:
        """One line of advice if these are the metrics of a model that learns nothing; otherwise None, the default."""
        return None

    def pictures(self, model: Forward, batch: Batch) -> Iterable[Tensor]:
        """Draws the samples of a batch, uint8 (P, 3, H, W) each: P panels such as image, ground truth and prediction;
        none by default.
        """
        return ()

    # ---------------------------------------------------------------- what follows

    def loss_sums(self, model: Forward, batch: Batch) -> dict[str, Tensor]:
        """Runs the model on a training batch; returns the loss's local sums, with gradients."""
        sums: dict[str, Tensor] = self.loss(*self.run(model, batch))
        return sums

    @torch.no_grad()
    def predict(self, model: Forward, batch: Batch) -> Predictions:
        """Runs the model, in evaluation mode, on a batch that needs no ground truth; returns its predictions."""
        return self.decode(self.infer(model, batch), batch)

    def evaluation_sums(self, model: Forward, batch: Batch, observe: Observer | None = None) -> EvaluationSums:
        """Runs the model on an evaluation batch; returns all that its metrics follow from."""
        if self.has_validation_loss:
            outputs, targets = self.run(model, batch)
            loss = self.loss(outputs, targets)
        else:
            outputs, loss = self.infer(model, batch), {}
        if observe:
            observe(self.decode(outputs, batch), batch)
        samples = torch.tensor(len(batch["sample_id"]), device=next(self.model.parameters()).device)
        return EvaluationSums(loss, self.sums(outputs, batch), self.rows(outputs, batch), samples)

    def metrics(self, sums: EvaluationSums) -> dict[str, Any]:
        """Metrics of the whole set: those of `measure`, and the loss and its terms, taken over the set as one batch."""
        terms = self.loss.combine(sums.loss) if sums.loss else {}
        return {name: float(value) for name, value in terms.items()} | {
            name: value for name, value in self.measure(sums).items() if not (isinstance(value, float) and isnan(value))
        }

    def pixels(self, image: Tensor) -> Tensor:
        """Pixels uint8 (B, 3, H, W), in the dtype and memory format of the model's weights; still 0 to 255."""
        weights = list(self.model.parameters())
        channels_last = any(w.dim() == 4 and not w.is_contiguous() for w in weights)
        return image.to(
            weights[0].dtype, memory_format=torch.channels_last if channels_last else torch.contiguous_format
        )
