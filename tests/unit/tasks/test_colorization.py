from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from trainer.losses.cross_entropy import CrossEntropy
from trainer.tasks.colorization import SCALE, Colorization

CENTRES = [[0.0, 0.0, 0.0], [0.25, 0.5, 0.75], [1.0, 1.0, 1.0]]


class Threshold(nn.Module):
    """Answers class 1 where the grey image is brighter than one half, else class 0."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, grey: Tensor) -> Tensor:
        assert grey.shape[1] == 1 and grey.min() >= 0 and grey.max() < 1
        bright = grey - 0.5
        return self.scale * torch.cat([-bright, bright, torch.full_like(bright, -9)], dim=1)


def batch() -> dict[str, Tensor]:
    """Two images of 2 x 2 pixels, the upper row of each bright."""
    image = torch.zeros(2, 3, 2, 2, dtype=torch.uint8)
    image[:, :, 0] = torch.tensor([150, 180, 210], dtype=torch.uint8).view(3, 1)
    mask = torch.tensor([[[1, 1], [0, 0]], [[1, 2], [0, 2]]], dtype=torch.uint8)[:, None]
    return {"image": image, "mask": mask, "sample_id": torch.arange(2)}


def task() -> Colorization:
    return Colorization(Threshold(), CrossEntropy(3, None, {}), {"colour_centres": CENTRES})


@torch.no_grad()
def test_accuracy_and_loss_are_those_of_all_pixels_of_the_set() -> None:
    colorization, data = task(), batch()
    parts = [
        colorization.evaluation_sums(colorization.model, {name: field[part] for name, field in data.items()})
        for part in (slice(0, 1), slice(1, 2))
    ]
    sums = parts[0] + parts[1]
    metrics = colorization.metrics(sums)
    assert sums.samples == 2
    assert metrics["accuracy"] == 6 / 8
    whole = colorization.loss_sums(colorization.model, data)
    assert metrics["loss"] == pytest.approx(float(colorization.loss.combine(whole)["loss"]))
    assert set(metrics) == set(colorization.metric_names)


@torch.no_grad()
def test_pictures_show_grey_true_and_predicted_colours() -> None:
    colorization, data = task(), batch()
    pictures = colorization.pictures(colorization.model, data)
    assert pictures.dtype == torch.uint8 and pictures.shape == (2, len(colorization.panels), 3, 2, 2)
    grey, true, predicted = pictures[0]
    assert grey[:, 0, 0].tolist() == [180, 180, 180]
    assert torch.equal(true, data["image"][0])
    assert predicted[:, 0, 0].tolist() == [value * SCALE for value in CENTRES[1]] and not predicted[:, 1].any()


def test_a_prediction_is_the_picture_in_predicted_colours_and_needs_no_colour_classes() -> None:
    colorization, data = task(), batch()
    predicted = colorization.predict(colorization.model, {"image": data["image"]})
    assert torch.equal(predicted, colorization.pictures(colorization.model, data)[:, 2])
