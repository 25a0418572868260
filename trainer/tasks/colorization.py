"""Colourisation as classification: for each pixel of a grey image, which of a few colours it has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from trainer.components import task
from trainer.losses.loss import Loss
from trainer.tasks.task import Batch, Forward, Task

SCALE = 256  # pixels are divided by it, so grey is in [0, 1)


@task(interface="dense", fields=("image", "mask", "colour_centres"))
class Colorization(Task):
    """Colour classes `mask` uint8 (B, 1, H, W) from the grey of `image` uint8 (B, 3, H, W), the mean of R, G and B.

    Args:
        model: grey float (B, 1, H, W) to logits (B, C, H, W).
        loss: takes the logits and class indices uint8 (B, H, W).
        statistics: of the data set: `colour_centres` (C, 3), RGB in [0, 1).
    """

    metric_names = ("loss", "accuracy")

    def __init__(self, model: nn.Module, loss: Loss, statistics: Mapping[str, Any], /) -> None:
        super().__init__(model, loss)
        self.centres = torch.tensor(statistics.get("colour_centres", ()), dtype=torch.float64)  # none before the set is prepared

    def loss_sums(self, model: Forward, batch: Batch) -> dict[str, Tensor]:
        """The sums of `loss` on a batch."""
        return self.loss(model(self.inputs(batch["image"])), batch["mask"][:, 0])

    def evaluation_sums(self, model: Forward, batch: Batch) -> dict[str, Tensor]:
        """`correct`, `pixels` and `samples`, int64, and the sums of the loss as `loss/…`."""
        targets = batch["mask"][:, 0]
        logits = model(self.inputs(batch["image"]))
        sums = {
            "correct": (logits.max(1).indices == targets).sum(),
            "pixels": torch.tensor(targets.numel(), device=targets.device),
            "samples": torch.tensor(len(targets), device=targets.device),
        }
        return sums | {f"loss/{name}": value for name, value in self.loss(logits, targets).items()}

    def metrics(self, sums: dict[str, Tensor]) -> dict[str, float]:
        """The loss and its terms over the whole set, and `accuracy`: the share of pixels whose colour is right."""
        terms = self.loss.combine({name.removeprefix("loss/"): value for name, value in sums.items() if name.startswith("loss/")})
        return {name: float(value) for name, value in terms.items()} | {"accuracy": float(sums["correct"] / sums["pixels"])}

    def pictures(self, model: Forward, batch: Batch) -> Tensor:
        """Rows of grey | true colours | predicted colours: uint8 (N, 3, H, 3W)."""
        image = batch["image"]
        grey = (self.inputs(image) * SCALE).round().to(torch.uint8).expand(-1, 3, -1, -1)
        predicted = model(self.inputs(image)).max(1).indices
        palette = (self.centres.to(image.device) * SCALE).round().clamp(0, 255).to(torch.uint8)
        return torch.cat([grey, image, palette[predicted].movedim(-1, 1)], dim=-1)

    def inputs(self, image: Tensor) -> Tensor:
        """The grey image in [0, 1), (B, 1, H, W) in the dtype of the weights."""
        dtype = next(self.model.parameters()).dtype
        return image.to(dtype).mean(dim=1, keepdim=True) / SCALE
