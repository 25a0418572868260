"""What every loss of logits against class maps promises."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from trainer.components import catalogue
from trainer.errors import UserError
from trainer.losses.cross_entropy import CrossEntropy, weigh_classes
from trainer.losses.dice import Dice
from trainer.losses.focal import Focal
from trainer.losses.loss import Loss
from trainer.losses.soft_iou import SoftIoU

IGNORED = 255
STATISTICS = {"class_pixels": [600, 30, 200]}
WEIGHTED = {"class_weights": "inverse_frequency"}
LOSSES = [
    *(("cross_entropy", {}), ("cross_entropy", WEIGHTED), ("soft_iou", {}), ("dice", {})),
    *(("focal", {}), ("focal", WEIGHTED), ("focal", {"gamma": 0.5}), ("focal", {"gamma": 1})),
]


def sample(batch: int = 4, classes: int = 3, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Random logits and targets with a fifth of the pixels ignored."""
    generator = torch.Generator().manual_seed(batch + classes)
    logits = torch.randn(batch, classes, 5, 7, generator=generator, dtype=dtype, requires_grad=True)
    targets = torch.randint(classes, (batch, 5, 7), generator=generator).to(torch.uint8)
    targets[torch.rand(targets.shape, generator=generator) < 0.2] = IGNORED
    return logits, targets


def value(loss: Loss, logits: Tensor, targets: Tensor) -> Tensor:
    return loss.combine(loss(logits, targets))["loss"]


@pytest.fixture(params=LOSSES, ids=lambda param: "-".join([param[0], *map(str, param[1].values())]))
def loss(request: pytest.FixtureRequest) -> Loss:
    name, settings = request.param
    return catalogue("loss")[name].build(settings, num_classes=3, ignore_index=IGNORED, statistics=STATISTICS)


def test_cross_entropy_is_the_mean_over_valid_pixels() -> None:
    logits, targets = sample()
    expected = torch.nn.functional.cross_entropy(logits, targets.long(), ignore_index=IGNORED)
    torch.testing.assert_close(value(CrossEntropy(3, IGNORED, {}), logits, targets), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", ["cross_entropy", "focal"])
def test_a_single_label_for_each_sample_is_an_image_of_one_pixel(name: str) -> None:
    loss = catalogue("loss")[name].build(WEIGHTED, num_classes=3, ignore_index=IGNORED, statistics=STATISTICS)
    logits, targets = sample()
    logits, targets = logits[:, :, 0, 0], targets[:, 0, 0].long()
    assert value(loss, logits, targets) == value(loss, logits[..., None, None], targets[:, None, None])


def test_weighted_cross_entropy_is_divided_by_the_weights_of_the_valid_pixels() -> None:
    logits, targets = sample()
    weights = torch.tensor([200 / 600, 200 / 30, 1.0], dtype=torch.float64)
    expected = torch.nn.functional.cross_entropy(logits, targets.long(), weights, ignore_index=IGNORED)
    found = value(CrossEntropy(3, IGNORED, STATISTICS, class_weights="inverse_frequency"), logits, targets)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(
        *(torch.autograd.grad(each, logits)[0] for each in (found, expected)), rtol=1e-12, atol=1e-15
    )


def test_weights_are_inverse_to_the_pixels_and_clipped_at_a_multiple_of_their_median() -> None:
    pixels = [7_000_000, 6_000_000, 9_000_000, 3_000_000, 2_000_000, 9_500_000, 600_000, 5_000_000, 9_000]
    found = weigh_classes("inverse_frequency", 10.0, 9, {"class_pixels": pixels})
    expected = [5_000_000 / each for each in pixels]
    assert found.tolist() == pytest.approx([*expected[:-1], 10.0])
    assert expected[-1] > 500
    assert weigh_classes("inverse_frequency", 3.0, 9, {"class_pixels": pixels}).max() == 3
    assert weigh_classes("none", 10.0, 9, {"class_pixels": pixels}).tolist() == [1] * 9


def test_a_class_that_the_training_set_lacks_has_the_largest_weight_and_no_part_in_the_median() -> None:
    found = weigh_classes("inverse_frequency", 10.0, 4, {"class_pixels": [0, 100, 400, 0]})
    assert found.tolist() == pytest.approx([10.0, 1 / (1 + 1 / 4) * 2, 1 / (1 + 1 / 4) / 2, 10.0])


@pytest.mark.parametrize("name", ["cross_entropy", "focal"])
def test_weights_of_a_set_whose_pixels_nobody_counted_are_an_error_that_says_what_to_do(name: str) -> None:
    with pytest.raises(UserError, match=r"loss.class_weights: inverse_frequency needs .* set it to none"):
        catalogue("loss")[name].build(WEIGHTED, num_classes=3, ignore_index=IGNORED, statistics={"colour_centres": []})


@pytest.mark.parametrize("name", ["cross_entropy", "focal"])
def test_before_the_set_is_prepared_a_recipe_with_weights_can_be_checked_but_not_trained(name: str) -> None:
    loss = catalogue("loss")[name].build(WEIGHTED, num_classes=3, ignore_index=IGNORED, statistics={})
    assert value(loss, *sample()).isnan()


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0])
def test_focal_loss_is_its_formula(gamma: float) -> None:
    logits, targets = sample()
    loss = Focal(3, IGNORED, STATISTICS, gamma=gamma, class_weights="inverse_frequency")
    probabilities = logits.detach().softmax(1)
    total = weight = 0.0
    for b, row, column in (targets != IGNORED).nonzero().tolist():
        true = int(targets[b, row, column])
        alpha, p = 200 / STATISTICS["class_pixels"][true], float(probabilities[b, true, row, column])
        total -= alpha * (1 - p) ** gamma * math.log(p)
        weight += alpha
    assert value(loss, logits, targets).item() == pytest.approx(total / weight, rel=1e-12)


def test_focal_loss_without_focus_is_cross_entropy() -> None:
    logits, targets = sample()
    for settings in ({}, {"class_weights": "inverse_frequency", "max_weight": 4.0}):
        focal, entropy = (
            Focal(3, IGNORED, STATISTICS, gamma=0.0, **settings),
            CrossEntropy(3, IGNORED, STATISTICS, **settings),
        )  # type: ignore[arg-type]
        torch.testing.assert_close(value(focal, logits, targets), value(entropy, logits, targets), rtol=1e-12, atol=0)


def test_dice_is_its_formula() -> None:
    logits, targets = sample()
    probabilities = logits.detach().softmax(1)
    overlap, areas = [0.0] * 3, [0.0] * 3
    for b, row, column in (targets != IGNORED).nonzero().tolist():
        for label in range(3):
            x, y = float(probabilities[b, label, row, column]), float(targets[b, row, column] == label)
            overlap[label] += x * y
            areas[label] += x + y
    expected = sum(1 - 2 * o / a for o, a in zip(overlap, areas, strict=True)) / 3
    assert value(Dice(3, IGNORED), logits, targets).item() == pytest.approx(expected, rel=1e-12)


def test_a_class_that_is_nowhere_true_has_no_term_in_dice_but_costs_where_it_is_predicted() -> None:
    logits, targets = sample()
    targets = torch.where(targets == 1, IGNORED, targets)
    terms = Dice(3, IGNORED)(logits, targets)
    expected = 1 - 2 * terms["overlap"] / (terms["predicted"] + terms["true"])
    torch.testing.assert_close(value(Dice(3, IGNORED), logits, targets), expected[[0, 2]].mean(), rtol=1e-12, atol=0)
    raised = logits.detach() + torch.tensor([0.0, 5.0, 0.0]).view(1, 3, 1, 1)
    assert value(Dice(3, IGNORED), raised, targets) > value(Dice(3, IGNORED), logits, targets) + 0.1


def test_soft_iou_is_its_formula() -> None:
    logits, targets = sample()
    probabilities = logits.detach().softmax(1)
    intersection = union = 0.0
    for b, row, column in (targets != IGNORED).nonzero().tolist():
        x, y = float(probabilities[b, 2, row, column]), float(targets[b, row, column] == 2)
        intersection += x * y
        union += x + y - x * y
    assert value(SoftIoU(3, IGNORED, channel=2), logits, targets).item() == pytest.approx(
        1 - intersection / union, rel=1e-12
    )


def test_gradient_is_that_of_finite_differences(loss: Loss) -> None:
    logits, targets = sample(batch=2)
    assert torch.autograd.gradcheck(lambda x: value(loss, x, targets), (logits,))


def test_sums_of_two_parts_combine_to_the_whole(loss: Loss) -> None:
    logits, targets = sample()
    first, second = loss(logits[:1], targets[:1]), loss(logits[1:], targets[1:])
    combined = loss.combine({name: first[name] + second[name] for name in first})["loss"]
    torch.testing.assert_close(combined, value(loss, logits, targets), rtol=1e-12, atol=0)


def test_ignored_pixels_have_no_influence(loss: Loss) -> None:
    logits, targets = sample()
    other = torch.where((targets == IGNORED)[:, None], 9.0, logits.detach())
    assert value(loss, other, targets) == value(loss, logits.detach(), targets)
    value(loss, logits, targets).backward()
    assert logits.grad is not None
    assert not logits.grad.movedim(1, -1)[targets == IGNORED].any()


def test_a_batch_without_valid_pixels_costs_nothing_and_keeps_gradients_finite(loss: Loss) -> None:
    logits, targets = sample()
    result = value(loss, logits, torch.full_like(targets, IGNORED))
    result.backward()
    assert result == 0
    assert logits.grad is not None
    assert not logits.grad.any()


def test_no_image_at_all_gives_sums_of_zero(loss: Loss) -> None:
    sums = loss(torch.zeros(0, 3, 4, 4), torch.zeros(0, 4, 4, dtype=torch.uint8))
    assert not any(total.any() for total in sums.values())


def test_without_an_ignored_label_every_pixel_counts() -> None:
    logits, targets = sample()
    targets = targets.clamp(max=2)
    expected = torch.nn.functional.cross_entropy(logits, targets.long())
    torch.testing.assert_close(value(CrossEntropy(3, None, {}), logits, targets), expected)
    for kind in (SoftIoU, Dice):
        torch.testing.assert_close(
            value(kind(3, None), logits, targets), value(kind(3, IGNORED), logits, targets), rtol=0, atol=0
        )


def test_an_ignored_label_may_be_one_of_the_classes() -> None:
    logits, targets = sample()
    targets = targets.clamp(max=2)
    expected = torch.nn.functional.cross_entropy(logits, targets.long(), ignore_index=0)
    torch.testing.assert_close(value(CrossEntropy(3, 0, {}), logits, targets), expected)
    others = torch.where(targets == 0, IGNORED, targets)
    for kind in (SoftIoU, Dice):
        torch.testing.assert_close(
            value(kind(3, 0), logits, targets), value(kind(3, IGNORED), logits, others), rtol=0, atol=0
        )


def test_sums_are_double_precision_for_single_precision_logits(loss: Loss) -> None:
    logits, targets = sample(dtype=torch.float32)
    assert {total.dtype for total in loss(logits, targets).values()} == {torch.float64}


def test_long_and_uint8_targets_give_the_same(loss: Loss) -> None:
    logits, targets = sample()
    assert value(loss, logits, targets) == value(loss, logits, targets.long())


def test_extreme_logits_keep_loss_and_gradient_finite(loss: Loss) -> None:
    logits, targets = sample(dtype=torch.float32)
    extreme = (logits.detach() * 1e4).requires_grad_()
    result = value(loss, extreme, targets)
    result.backward()
    assert result.isfinite()
    assert extreme.grad is not None
    assert extreme.grad.isfinite().all()


def test_soft_iou_of_a_class_that_is_neither_there_nor_predicted_is_zero() -> None:
    logits = torch.tensor([800.0, -800.0, -800.0]).view(1, 3, 1, 1).expand(1, 3, 4, 4).clone().requires_grad_()
    result = value(SoftIoU(3, IGNORED), logits, torch.zeros(1, 4, 4, dtype=torch.uint8))
    result.backward()
    assert result == 0
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


def test_soft_iou_of_a_class_that_the_data_lacks_names_those_there_are() -> None:
    with pytest.raises(ValueError, match=r"loss.channel must be 0 to 2, as the data set has 3 classes \(got 3\)"):
        SoftIoU(3, IGNORED, channel=3)


@pytest.mark.parametrize("place", [..., (..., 0, 0)], ids=["dense", "labels"])
def test_the_form_for_deterministic_gpus_is_the_same_loss(place: Any) -> None:
    logits, targets = (each[place] for each in sample())
    loss = CrossEntropy(3, IGNORED, STATISTICS, class_weights="inverse_frequency")
    usual = loss(logits, targets)["nll"]
    masked = loss._nll_without_scatter(logits, loss.labels(targets))
    torch.testing.assert_close(masked, usual, rtol=1e-12, atol=0)
    torch.testing.assert_close(
        *(torch.autograd.grad(value, logits)[0] for value in (masked, usual)), rtol=1e-12, atol=1e-15
    )
