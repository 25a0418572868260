from __future__ import annotations

import json
import math
from typing import Any

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
    return {"image": image, "mask": mask, "sample_id": torch.arange(size)}


def segmentation(model: nn.Module | None = None, **keys: Any) -> Segmentation:
    torch.manual_seed(0)
    model = model or nn.Conv2d(3, 3, 3, padding=1)
    return Segmentation(model, SoftIoU(3, IGNORED), 3, IGNORED, CLASSES, **keys)


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
    task, whole = segmentation(average_precision=True, exclude=["leaf"]), batch()
    parts = [{name: field[part] for name, field in whole.items()} for part in (slice(0, 1), slice(1, 6), slice(6, 6))]
    first, *others = (task.evaluation_sums(task.model, part) for part in parts)
    total = sum(others, first)
    assert total.samples == 6
    assert total.metrics["confusion"].dtype == torch.int64
    found, expected = task.metrics(total), task.metrics(task.evaluation_sums(task.model, whole))
    assert found.pop("confusion") == expected.pop("confusion")
    assert found == pytest.approx(expected, rel=1e-9)


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
    task = Segmentation(Oracle(), CrossEntropy(3, IGNORED, {}), 3, IGNORED, CLASSES)
    image = torch.zeros(1, 3, 1, 6, dtype=torch.uint8)
    image[..., :3] = 255  # predicted flower
    mask = torch.tensor([1, 1, 0, 0, 0, IGNORED], dtype=torch.uint8).view(1, 1, 1, 6)
    metrics = task.metrics(
        task.evaluation_sums(task.model, {"image": image, "mask": mask, "sample_id": torch.tensor([0])})
    )
    assert metrics["pixel_accuracy"] == pytest.approx(4 / 5)
    assert metrics["iou/background"] == pytest.approx(2 / 3)
    assert metrics["iou/flower"] == pytest.approx(2 / 3)
    assert metrics["class_accuracy"] == pytest.approx((1 + 2 / 3) / 2)
    assert metrics["miou"] == pytest.approx(2 / 3)
    assert metrics["num_classes_present"] == 2
    assert metrics["class_accuracy/background"] == pytest.approx(2 / 3) and metrics["class_accuracy/flower"] == 1
    assert metrics["confusion"] == {"background": [2, 1, 0], "flower": [0, 2, 0], "leaf": [0, 0, 0]}
    assert not any(name.endswith("/leaf") or "map" in name or name.startswith("ap/") for name in metrics)
    assert set(task.metric_names) <= set(metrics)


@torch.no_grad()
def test_average_precision_and_means_without_some_classes_are_measured_on_request() -> None:
    task = Segmentation(
        Oracle(),
        CrossEntropy(3, IGNORED, {}),
        3,
        IGNORED,
        CLASSES,
        average_precision=True,
        exclude=["background", "leaf"],
    )
    image = torch.tensor([9, 8, 7, 6, 5, 4], dtype=torch.uint8).view(1, 1, 1, 6).expand(1, 3, 1, 6)
    mask = torch.tensor([1, 0, 1, 0, 0, IGNORED], dtype=torch.uint8).view(1, 1, 1, 6)
    metrics = task.metrics(
        task.evaluation_sums(task.model, {"image": image, "mask": mask, "sample_id": torch.tensor([0])})
    )
    assert metrics["ap/flower"] == pytest.approx((1 + 2 / 3) / 2)
    assert metrics["ap/background"] == pytest.approx((1 + 1 + 3 / 4) / 3)
    assert metrics["map"] == pytest.approx((metrics["ap/flower"] + metrics["ap/background"]) / 2)
    for mean, name in (("miou", "iou"), ("class_accuracy", "class_accuracy"), ("map", "ap")):
        assert metrics[f"{mean}_without_background_leaf"] == metrics[f"{name}/flower"]
    assert set(task.metric_names) <= set(metrics)


@torch.no_grad()
def test_metrics_under_autocast_are_those_of_the_logits_as_they_are() -> None:
    task, data = segmentation(nn.Conv2d(3, 3, 3, padding=1), average_precision=True), batch()
    with torch.autocast("cpu", torch.bfloat16):
        logits = task.model(task.inputs(data["image"]))
    assert logits.dtype == torch.bfloat16
    found, expected = (
        task.metrics(task.evaluation_sums(lambda _, dtype=dtype: logits.to(dtype), data))
        for dtype in (torch.float32, torch.float64)
    )
    assert found.pop("confusion") == expected.pop("confusion")
    assert found == pytest.approx(expected, rel=1e-6)


@torch.no_grad()
def test_metrics_are_finite_numbers_that_json_can_hold() -> None:
    task, data = segmentation(average_precision=True), batch()
    data["mask"][:] = IGNORED
    metrics = task.metrics(task.evaluation_sums(task.model, data))
    assert all(math.isfinite(value) for name, value in metrics.items() if name != "confusion")
    json.dumps(metrics, allow_nan=False)


def advice(rows: dict[str, list[int]]) -> str | None:
    return segmentation().advice({"miou": 0.16, "confusion": rows})


def test_a_model_that_predicts_one_class_everywhere_gets_advice() -> None:
    found = advice({"background": [70_000, 3, 0], "flower": [20_000, 2, 0], "leaf": [10_000, 0, 0]})
    assert found and found.startswith(
        "the model predicts background for 100.0% of the validation pixels, of which 70.0% are background:"
    )
    for key in ("optimizer.lr", "loss=cross_entropy", "loss.class_weights", "model.train_only"):
        assert key in found
    assert advice({"background": [0, 70_000, 0], "flower": [0, 20_000, 0], "leaf": [0, 0, 0]})


@pytest.mark.parametrize(
    "rows",
    [
        {"background": [70, 10, 0], "flower": [15, 5, 0], "leaf": [10, 0, 0]},
        {"background": [99_990, 10, 0], "flower": [10, 20, 0], "leaf": [0, 0, 0]},
        {"background": [100, 0, 0], "flower": [0, 0, 0], "leaf": [0, 0, 0]},
        {"background": [0, 0, 0], "flower": [0, 0, 0], "leaf": [0, 0, 0]},
    ],
    ids=["two classes", "rare classes", "nothing else there", "nothing"],
)
def test_a_model_that_predicts_what_is_there_gets_none(rows: dict[str, list[int]]) -> None:
    assert advice(rows) is None


@torch.no_grad()
def test_a_prediction_is_the_most_likely_class_of_each_pixel_and_needs_no_mask() -> None:
    task, images = segmentation(), batch()["image"]
    predicted = task.predict(task.model, {"image": images})
    assert predicted.shape == (6, 8, 9) and torch.equal(predicted, task.model(task.inputs(images)).argmax(1))


@torch.no_grad()
def test_pictures_show_image_ground_truth_and_prediction() -> None:
    task, data = segmentation(), batch(size=2)
    pictures = task.pictures(task.model, data)
    assert pictures.dtype == torch.uint8
    assert pictures.shape == (2, len(task.panels), 3, 8, 9)
    assert torch.equal(pictures[:, 0], data["image"])


@torch.no_grad()
def test_pictures_colour_classes_as_the_legend_says_and_ignored_pixels_like_no_class() -> None:
    task = Segmentation(Oracle(), CrossEntropy(3, IGNORED, {}), 3, IGNORED, CLASSES)
    image = torch.full((1, 3, 4, 8), 255, dtype=torch.uint8)
    mask = torch.ones(1, 1, 4, 8, dtype=torch.uint8)
    mask[..., 4:] = IGNORED
    _, true, predicted = task.pictures(task.model, {"image": image, "mask": mask})[0]
    assert torch.equal(true[..., :4], predicted[..., :4])  # both flower
    assert true[:, 0, 0].tolist() == [round(0.65 * value + 0.35 * 255) for value in task.legend["flower"]]
    grey = true[..., 4:]
    assert (grey == grey[:1]).all()
    assert len(set(class_colors(40))) == 40
    assert class_colors(40)[:3] == class_colors(3) == list(task.legend.values())


def test_recipes_set_mean_and_deviation_of_three_channels_and_which_metrics() -> None:
    component = catalogue("task")["segmentation"]
    assert component.fields == ("image", "mask")
    assert component.context == ("model", "loss", "num_classes", "ignore_index", "classes")
    defaults = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD, "average_precision": False, "exclude": ()}
    assert component.schema.model_validate({}).model_dump() == defaults
    assert component.schema.model_validate({"exclude": ["leaf"]}).model_dump(mode="json")["exclude"] == ["leaf"]
    for wrong in ({"mean": [0.5]}, {"std": [0.2, 0.2, 0.0]}, {"exclude": "leaf"}, {"average_precision": 1}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            component.schema.model_validate(wrong)
