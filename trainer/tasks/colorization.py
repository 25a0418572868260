"""Colourisation as classification: each pixel of a grey image has one of a few colours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from trainer.components import task
from trainer.losses.loss import Loss
from trainer.metrics.confusion import most_likely
from trainer.tasks.sums import EvaluationSums
from trainer.tasks.task import Batch, Forward, Task

SCALE = 256  # pixels are divided by it, so grey is in [0, 1)


@task(interface="dense", fields=("image", "mask", "colour_centres"))
class Colorization(Task[Tensor]):
    """Colour classes `mask` uint8 (B, 1, H, W) from the grey of `image` uint8 (B, 3, H, W), the mean of R, G and B.

    Args:
        model: grey float (B, 1, H, W) to logits (B, C, H, W).
        loss: takes the logits and class indices uint8 (B, H, W).
        statistics: of the data set: `colour_centres` (C, 3), RGB in [0, 1).
    """

    pipeline_tag = "image-to-image"
    metric_names = ("loss", "accuracy")
    panels = ("grey", "true colours", "predicted colours")

    def __init__(self, model: nn.Module, loss: Loss, statistics: Mapping[str, Any], /) -> None:
        super().__init__(model, loss)
        # Empty before the set is prepared.
        self.centres = torch.tensor(statistics.get("colour_centres", ()), dtype=torch.float64)

    def run(self, model: Forward, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logits (B, C, H, W) and the true classes uint8 (B, H, W)."""
        return self.infer(model, batch), batch["mask"][:, 0]

    def infer(self, model: Forward, batch: Batch) -> Tensor:
        """Logits (B, C, H, W)."""
        logits: Tensor = model(self.inputs(batch["image"]))
        return logits

    def decode(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Pictures uint8 (B, 3, H, W): each pixel has the centre of its most likely colour class."""
        palette = (self.centres.to(outputs.device) * SCALE).round().clamp(0, 255).to(torch.uint8)
        return palette[most_likely(outputs)].movedim(-1, 1)

    def sums(self, outputs: Tensor, batch: Batch) -> dict[str, Tensor]:
        """`correct` and `pixels`, int64."""
        targets = batch["mask"][:, 0]
        return {
            "correct": (most_likely(outputs) == targets).sum(),
            "pixels": torch.tensor(targets.numel(), device=targets.device),
        }

    def measure(self, sums: EvaluationSums) -> dict[str, Any]:
        """`accuracy`: the share of pixels whose colour class is correct."""
        return {"accuracy": float(sums.metrics["correct"] / sums.metrics["pixels"])}

    def pictures(self, model: Forward, batch: Batch) -> Tensor:
        """The grey image, the true colours and the predicted ones."""
        image = batch["image"]
        grey = (self.inputs(image) * SCALE).round().to(torch.uint8).expand_as(image)
        return torch.stack([grey, image, self.predict(model, batch)], dim=1)

    def inputs(self, image: Tensor) -> Tensor:
        """The grey image in [0, 1), (B, 1, H, W) in the dtype of the weights."""
        dtype = next(self.model.parameters()).dtype
        return image.to(dtype).mean(dim=1, keepdim=True) / SCALE
