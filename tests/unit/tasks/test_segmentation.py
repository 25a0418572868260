from __future__ import annotations

import json
import math

import pytest
import torch
from torch import Tensor, nn
from torchvision.transforms.v2.functional import normalize, to_dtype

from trainer.components import catalogue
from trainer.losses.cross_entropy import CrossEntropy
from trainer.losses.soft_iou import SoftIoU
from trainer.tasks.segmentation import IMAGENET_MEAN, IMAGENET_STD, Segmentation, class_colors

IGNORED = 255
CLASSES = ("background", "flower", "leaf")


def batch(size: int = 6) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(size)
    image = torch.randint(256, (size, 3, 8, 9), generator=generator, dtype=torch.uint8)
    mask = torch.randint(2, (size, 1, 8, 9), generator=generator, dtype=torch.uint8)
    mask[torch.rand(mask.shape, generator=generator) < 0.2] = IGNORED
    return {"image": image, "mask": mask}


def segmentation(model: nn.Module | None = None) -> Segmentation:
    torch.manual_seed(0)
    model = model or nn.Conv2d(3, 3, 3, padding=1)
    return Segmentation(model, SoftIoU(3, IGNORED), 3, IGNORED, CLASSES)


def test_images_are_normalised_as_torchvision_does() -> None:
    task, images = segmentation(), batch()["image"]
    expected = normalize(to_dtype(images, torch.float32, scale=True), IMAGENET_MEAN, IMAGENET_STD)
    torch.testing.assert_close(task.inputs(images), expected)


def test_the_input_has_the_precision_and_memory_format_of_the_model() -> None:
    images = batch()["image"]
    assert segmentation(nn.Conv2d(3, 3, 3).double()).inputs(images).dtype == torch.float64
    assert segmentation().inputs(images).is_contiguous()
    channels_last = segmentation(nn.Conv2d(3, 3, 3).to(memory_format=torch.channels_last))
    assert channels_last.inputs(images).is_contiguous(memory_format=torch.channels_last)


def test_training_sums_carry_gradients_to_the_model() -> None:
    task = segmentation()
    task.loss.combine(task.loss_sums(task.model, batch()))["loss"].backward()
    assert all(p.grad is not None and p.grad.any() for p in task.model.parameters())


@torch.no_grad()
def test_evaluation_in_parts_gives_the_metrics_of_the_whole_set() -> None:
    task, whole = segmentation(), batch()
    parts = [{name: field[part] for name, field in whole.items()} for part in (slice(0, 1), slice(1, 6), slice(6, 6))]
    sums = [task.evaluation_sums(task.model, part) for part in parts]
    total = {name: torch.stack([s[name] for s in sums]).sum(0) for name in sums[0]}
    assert total["samples"] == 6
    assert total["confusion"].dtype == torch.int64
    assert task.metrics(total) == pytest.approx(task.metrics(task.evaluation_sums(task.model, whole)), rel=1e-9)


@torch.no_grad()
def test_the_evaluation_loss_is_the_loss_of_the_set_as_one_batch() -> None:
    task, data = segmentation(), batch()
    metrics = task.metrics(task.evaluation_sums(task.model, data))
    logits = task.model(task.inputs(data["image"]))
    assert metrics["loss"] == float(task.loss.combine(task.loss(logits, data["mask"][:, 0]))["loss"])


class Oracle(nn.Module):
    """Answers class 1 where the image is bright, else class 0."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, images: Tensor) -> Tensor:
        bright = images[:, :1]
        return self.scale * torch.cat([-bright, bright, torch.full_like(bright, -99)], dim=1)


@torch.no_grad()
def test_metrics_of_a_known_answer() -> None:
    task = Segmentation(Oracle(), CrossEntropy(3, IGNORED), 3, IGNORED, CLASSES)
    image = torch.zeros(1, 3, 1, 6, dtype=torch.uint8)
    image[..., :3] = 255  # predicted flower
    mask = torch.tensor([1, 1, 0, 0, 0, IGNORED], dtype=torch.uint8).view(1, 1, 1, 6)
    metrics = task.metrics(task.evaluation_sums(task.model, {"image": image, "mask": mask}))
    assert metrics["pixel_accuracy"] == pytest.approx(4 / 5)
    assert metrics["iou/background"] == pytest.approx(2 / 3)
    assert metrics["iou/flower"] == pytest.approx(2 / 3)
    assert metrics["class_accuracy"] == pytest.approx((1 + 2 / 3) / 2)
    assert metrics["miou"] == pytest.approx(2 / 3)
    assert metrics["num_classes_present"] == 2
    assert "iou/leaf" not in metrics
    assert set(task.metric_names) <= set(metrics)


@torch.no_grad()
def test_metrics_are_finite_numbers_that_json_can_hold() -> None:
    task, data = segmentation(), batch()
    data["mask"][:] = IGNORED
    metrics = task.metrics(task.evaluation_sums(task.model, data))
    assert all(math.isfinite(value) for value in metrics.values())
    json.dumps(metrics, allow_nan=False)


@torch.no_grad()
def test_pictures_show_image_truth_and_prediction_side_by_side() -> None:
    task, data = segmentation(), batch(size=2)
    pictures = task.pictures(task.model, data)
    assert pictures.dtype == torch.uint8
    assert pictures.shape == (2, 3, 8, 27)
    assert torch.equal(pictures[..., :9], data["image"])


@torch.no_grad()
def test_pictures_colour_classes_always_the_same_and_ignored_pixels_like_no_class() -> None:
    task = Segmentation(Oracle(), CrossEntropy(3, IGNORED), 3, IGNORED, CLASSES)
    image = torch.full((1, 3, 4, 8), 255, dtype=torch.uint8)
    mask = torch.ones(1, 1, 4, 8, dtype=torch.uint8)
    mask[..., 4:] = IGNORED
    truth, prediction = task.pictures(task.model, {"image": image, "mask": mask})[0, :, :, 8:].split(8, dim=-1)
    assert torch.equal(truth[..., 2:4], prediction[..., 2:4])  # both flower
    grey = truth[..., 4:]
    assert (grey == grey[:1]).all()
    assert len(set(class_colors(40))) == 40
    assert class_colors(40)[:3] == class_colors(3)


def test_recipes_set_mean_and_deviation_of_three_channels() -> None:
    component = catalogue("task")["segmentation"]
    assert component.fields == ("image", "mask")
    assert component.context == ("model", "loss", "num_classes", "ignore_index", "classes")
    assert component.schema.model_validate({}).model_dump() == {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}
    for wrong in ({"mean": [0.5]}, {"std": [0.2, 0.2, 0.0]}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            component.schema.model_validate(wrong)
