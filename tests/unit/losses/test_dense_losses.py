"""What every loss of logits against class maps promises."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from trainer.components import catalogue
from trainer.losses.cross_entropy import CrossEntropy
from trainer.losses.loss import Loss
from trainer.losses.soft_iou import SoftIoU

IGNORED = 255


def sample(batch: int = 4, classes: int = 3, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Random logits and targets with a fifth of the pixels ignored."""
    generator = torch.Generator().manual_seed(batch + classes)
    logits = torch.randn(batch, classes, 5, 7, generator=generator, dtype=dtype, requires_grad=True)
    targets = torch.randint(classes, (batch, 5, 7), generator=generator).to(torch.uint8)
    targets[torch.rand(targets.shape, generator=generator) < 0.2] = IGNORED
    return logits, targets


def value(loss: Loss, logits: Tensor, targets: Tensor) -> Tensor:
    return loss.combine(loss(logits, targets))["loss"]


@pytest.fixture(params=["cross_entropy", "soft_iou"])
def loss(request: pytest.FixtureRequest) -> Loss:
    return catalogue("loss")[request.param].build({}, num_classes=3, ignore_index=IGNORED)


def test_cross_entropy_is_the_mean_over_valid_pixels() -> None:
    logits, targets = sample()
    expected = torch.nn.functional.cross_entropy(logits, targets.long(), ignore_index=IGNORED)
    torch.testing.assert_close(value(CrossEntropy(3, IGNORED), logits, targets), expected, rtol=1e-12, atol=0)


def test_soft_iou_is_its_formula() -> None:
    logits, targets = sample()
    probabilities = logits.detach().softmax(1)
    intersection = union = 0.0
    for b, row, column in (targets != IGNORED).nonzero().tolist():
        x, y = float(probabilities[b, 2, row, column]), float(targets[b, row, column] == 2)
        intersection += x * y
        union += x + y - x * y
    assert value(SoftIoU(3, IGNORED, channel=2), logits, targets).item() == pytest.approx(1 - intersection / union, rel=1e-12)


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
    assert all(total == 0 for total in sums.values())


def test_without_an_ignored_label_every_pixel_counts() -> None:
    logits, targets = sample()
    targets = targets.clamp(max=2)
    expected = torch.nn.functional.cross_entropy(logits, targets.long())
    torch.testing.assert_close(value(CrossEntropy(3, None), logits, targets), expected)
    torch.testing.assert_close(value(SoftIoU(3, None), logits, targets), value(SoftIoU(3, IGNORED), logits, targets), rtol=0, atol=0)


def test_an_ignored_label_may_be_one_of_the_classes() -> None:
    logits, targets = sample()
    targets = targets.clamp(max=2)
    expected = torch.nn.functional.cross_entropy(logits, targets.long(), ignore_index=0)
    torch.testing.assert_close(value(CrossEntropy(3, 0), logits, targets), expected)


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


def test_soft_iou_of_a_class_the_data_has_not_says_which_there_are() -> None:
    with pytest.raises(ValueError, match=r"loss.channel must be 0 to 2, as the data set has 3 classes \(got 3\)"):
        SoftIoU(3, IGNORED, channel=3)


def test_the_form_for_deterministic_gpus_is_the_same_loss() -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 5, 4, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 3, (2, 5, 4), dtype=torch.uint8)
    targets[0, 0] = 255
    loss = CrossEntropy(3, 255)
    usual = loss(logits, targets)["nll"]
    masked = loss._nll_without_scatter(logits, targets, targets != 255)
    torch.testing.assert_close(masked, usual, rtol=1e-12, atol=0)
    torch.testing.assert_close(*(torch.autograd.grad(value, logits)[0] for value in (masked, usual)), rtol=1e-12, atol=1e-15)
