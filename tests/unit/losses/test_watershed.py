"""The loss of the deep watershed: its two terms, and what counts in them."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from trainer.detection.watershed import IGNORE, WatershedOutput, WatershedTargets
from trainer.losses.watershed import WatershedLoss

CLASSES = 2


def outputs(batch: int = 3, dtype: torch.dtype = torch.float64, scale: float = 1.0) -> WatershedOutput:
    generator = torch.Generator().manual_seed(0)
    semantic = scale * torch.randn(batch, CLASSES + 1, 8, 12, generator=generator, dtype=torch.float64)
    distance = scale * torch.rand(batch, 8, 12, generator=generator, dtype=torch.float64)
    return WatershedOutput(semantic.to(dtype).requires_grad_(), distance.to(dtype).requires_grad_())


def sample_targets(batch: int = 3) -> WatershedTargets:
    """Random targets; the last rows of the first image don't count."""
    generator = torch.Generator().manual_seed(1)
    semantic = torch.randint(0, CLASSES + 1, (batch, 8, 12), generator=generator)
    semantic[:1, 5:] = IGNORE
    return WatershedTargets(semantic, torch.rand(batch, 8, 12, generator=generator) * (semantic > 0))


def terms(loss: WatershedLoss, predicted: WatershedOutput, targets: WatershedTargets) -> dict[str, float]:
    return {name: value.item() for name, value in loss.combine(loss(predicted, targets)).items()}


def test_what_is_known_for_sure_costs_nothing() -> None:
    targets = sample_targets()
    semantic = (
        100 * F.one_hot(targets.semantic.where(targets.semantic != IGNORE, 0), CLASSES + 1).movedim(-1, 1).double()
    )
    costs = terms(WatershedLoss(CLASSES), WatershedOutput(semantic, targets.distance), targets)
    assert costs == pytest.approx({"loss": 0, "semantic_loss": 0, "distance_loss": 0}, abs=1e-12)


def test_the_terms_are_means_over_pixels_by_hand() -> None:
    targets = WatershedTargets(torch.tensor([[[0, 1, IGNORE, 2]]]), torch.tensor([[[0.0, 1.0, 0.5, 0.25]]]))
    predicted = WatershedOutput(torch.zeros(1, 3, 1, 4), torch.tensor([[[0.5, 0.75, 9.0, 0.25]]]))
    expected = {"loss": math.log(3) + 2 * 0.25, "semantic_loss": math.log(3), "distance_loss": 0.25}
    assert terms(WatershedLoss(CLASSES, distance_weight=2.0), predicted, targets) == pytest.approx(expected)


def test_padding_and_crowds_change_neither_loss_nor_gradient() -> None:
    loss, predicted, targets = WatershedLoss(CLASSES), outputs(), sample_targets()
    padded = WatershedOutput(*(F.pad(field, (0, 5, 0, 3), value=7.0) for field in predicted))
    around = WatershedTargets(
        F.pad(targets.semantic, (0, 5, 0, 3), value=IGNORE), F.pad(targets.distance, (0, 5, 0, 3))
    )
    assert terms(loss, padded, around) == pytest.approx(terms(loss, predicted, targets), rel=1e-12)
    for gradient in torch.autograd.grad(loss.combine(loss(predicted, targets))["loss"], predicted):
        assert not gradient[:1, ..., 5:, :].any() and gradient[1:].all()


def test_parts_of_a_batch_on_several_processes_have_the_loss_and_gradient_of_the_whole() -> None:
    loss, predicted, targets = WatershedLoss(CLASSES), outputs(), sample_targets()
    whole = loss.combine(loss(predicted, targets))["loss"]
    gradients = torch.autograd.grad(whole, predicted)
    parts = [slice(0, 1), slice(1, 3)]
    local = [WatershedOutput(*(field[images].detach().requires_grad_() for field in predicted)) for images in parts]
    sums = [
        loss(mine, WatershedTargets(*(field[images] for field in targets)))
        for mine, images in zip(local, parts, strict=True)
    ]
    for images, mine, own, other in zip(parts, local, sums, reversed(sums), strict=True):
        combined = loss.combine({name: own[name] + other[name].detach() for name in own})["loss"]
        torch.testing.assert_close(combined, whole, rtol=1e-12, atol=0)
        for gradient, expected in zip(torch.autograd.grad(combined, mine), gradients, strict=True):
            torch.testing.assert_close(gradient, expected[images], rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    "targets",
    [WatershedTargets(torch.full((3, 8, 12), IGNORE), torch.zeros(3, 8, 12)), sample_targets(0)],
    ids=["ignored", "no image"],
)
def test_without_a_pixel_that_counts_the_loss_is_zero(targets: WatershedTargets) -> None:
    assert terms(WatershedLoss(CLASSES), outputs(len(targets.semantic)), targets) == {
        "loss": 0,
        "semantic_loss": 0,
        "distance_loss": 0,
    }


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_large_outputs_of_any_precision_keep_loss_and_gradient_finite(dtype: torch.dtype) -> None:
    loss, predicted = WatershedLoss(CLASSES), outputs(dtype=dtype, scale=1e2)
    sums = loss(predicted, sample_targets())
    assert {value.dtype for value in sums.values()} == {torch.float64}
    result = loss.combine(sums)["loss"]
    assert result.isfinite() and all(gradient.isfinite().all() for gradient in torch.autograd.grad(result, predicted))
