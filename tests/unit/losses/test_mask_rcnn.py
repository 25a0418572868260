"""The loss of Mask R-CNN: torchvision's terms, over processes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from trainer.losses.mask_rcnn import MaskRCNNLoss


def means(scale: float = 1.0) -> dict[str, Tensor]:
    """What torchvision's model returns in training."""
    names = ("loss_classifier", "loss_box_reg", "loss_mask", "loss_objectness", "loss_rpn_box_reg")
    return {name: torch.tensor(scale * (index + 1), requires_grad=True) for index, name in enumerate(names)}


def test_the_loss_is_the_sum_of_the_models_terms_whatever_the_number_of_images() -> None:
    loss = MaskRCNNLoss()
    expected = {
        "loss": 15,
        "classifier_loss": 1,
        "box_reg_loss": 2,
        "mask_loss": 3,
        "objectness_loss": 4,
        "rpn_box_reg_loss": 5,
    }
    for images in (1, 7):
        sums = loss(means(), images)
        assert {value.dtype for value in sums.values()} == {torch.float64}
        assert {name: value.item() for name, value in loss.combine(sums).items()} == pytest.approx(expected)


def test_over_processes_each_image_counts_the_same() -> None:
    loss = MaskRCNNLoss()
    one, two = loss(means(1.0), 1), loss(means(10.0), 3)
    assert loss.combine({name: one[name] + two[name] for name in one})["mask_loss"].item() == pytest.approx(
        (3 * 1 + 30 * 3) / 4
    )


def test_every_term_has_the_gradient_of_a_plain_sum() -> None:
    loss, outputs = MaskRCNNLoss(), means()
    gradients = torch.autograd.grad(loss.combine(loss(outputs, 4))["loss"], list(outputs.values()))
    assert [gradient.item() for gradient in gradients] == pytest.approx([1] * 5)
