"""What a user sees of detection and instance segmentation: which recipes fit, what is drawn, what is trained."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.scenes import CLASSES, RECIPES, scenes
from trainer.commands import main
from trainer.data.build import Data
from trainer.data.objects import Letterbox
from trainer.data.prepare import data_dir, prepare
from trainer.data.reader import Reader
from trainer.data.stream import ValidationSamples
from trainer.detection.boxes import Detections, Level
from trainer.errors import UserError
from trainer.losses.yolo import YoloLoss
from trainer.recipe.file import RecipeError
from trainer.recipe.load import load_recipe
from trainer.tasks.build import build_task, build_untrained, trainable_layers
from trainer.tasks.checks import TASK_CHECKS
from trainer.tasks.detection import Detection
from trainer.tasks.drawing import LEGIBLE, draw_objects

RECIPE = """
plugins: [tests.scenes]
task: detection
data: {name: scenes, batch_size: 4, resize: [64, 64], resize_mode: letterbox, augment: [mosaic]}
model: yolo
loss: yolo
optimizer: {name: sgd, lr: 1e-3}
train: {duration: 1 epochs}
evaluate: {best: map}
"""


def problems(folder: Path, *overrides: str) -> str:
    (folder / "r.yaml").write_text(RECIPE, encoding="utf-8")
    with pytest.raises(RecipeError) as caught:
        load_recipe(folder / "r.yaml", overrides, TASK_CHECKS)
    return str(caught.value)


def test_freeze_names_the_trainable_layers(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(RECIPE, encoding="utf-8")
    recipe = load_recipe(tmp_path / "r.yaml", ["train.freeze=10"], TASK_CHECKS)
    assert trainable_layers(recipe, build_untrained(recipe)) == [f"model.{index}" for index in range(10, 25)]


def test_a_freeze_that_leaves_nothing_or_contradicts_is_refused(tmp_path: Path) -> None:
    assert "train.freeze: the model has 25 layers, so at most 24 can be frozen (got 25)" in problems(
        tmp_path, "train.freeze=25"
    )
    assert "train.freeze: conflicts with model.train_only" in problems(
        tmp_path, "train.freeze=3", "model.train_only=[model.24]"
    )


def test_a_task_without_a_validation_loss_says_so(tmp_path: Path) -> None:
    found = problems(
        tmp_path,
        "task=mask_rcnn",
        "model={name: mask_rcnn, backbone: resnet18}",
        "loss=mask_rcnn",
        "evaluate.best=loss",
    )
    assert "evaluate.best: unknown metric" in found and "mask_map" in found


def test_a_set_of_ones_own_without_masks_doesnt_fit_a_task_that_needs_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dataclasses import replace

    from trainer.components import catalogue

    component = catalogue("dataset")["scenes"]
    source = scenes()
    monkeypatch.setitem(
        component.__dict__, "factory", lambda: replace(source, columns={"image": "image", "objects": "boxes"})
    )
    found = problems(tmp_path, "task=watershed", "model=watershed_unet", "loss=watershed", "evaluate.best=mask_map")
    assert "data: task watershed needs masks, but this data set has only boxes (got scenes)" in found


@pytest.mark.parametrize("name", RECIPES)
def test_predictions_need_no_ground_truth_and_are_what_is_evaluated(name: str, tmp_path: Path) -> None:
    card = prepare(scenes(), data_dir(), None, lambda line: None)
    (tmp_path / "r.yaml").write_text(RECIPES[name], encoding="utf-8")
    recipe = load_recipe(tmp_path / "r.yaml", ["task.conf_threshold=0"] if name == "detection" else [], TASK_CHECKS)
    task = build_task(recipe, card.info)
    task.model.eval()
    batch = Data(recipe, 0, 1, torch.device("cpu")).validation_batch([0, 1, 2])
    inputs = {key: batch[key] for key in ("image", "height", "width", "content", "sample_id")}
    detections = task.predict(task.model, inputs)
    assert len(detections) == 3 and sum(len(each.labels) for each in detections)
    with torch.no_grad():
        rows = task.evaluation_sums(task.model, batch).rows
    assert torch.equal(rows["detected"][:, 3:], torch.cat([each.boxes for each in detections]).double())


class Fixed(nn.Module):
    """Answers with the same box in every cell: one that covers 64 x 64 pixels."""

    def forward(self, image: Tensor) -> list[Level]:
        logits = torch.full((len(image), 1, 2, 2, 8), -9.0)
        logits[:, 0, 0, 0] = torch.tensor([9.0, 9, 9, 9, 9, 9, -9, -9])
        return [Level(logits, torch.tensor([[30.0, 30.0]]), 32)]


def test_boxes_end_where_the_letterboxed_image_does(tmp_path: Path) -> None:
    card = prepare(scenes(), tmp_path, None, lambda line: None)
    samples = ValidationSamples(
        Reader(tmp_path / "scenes", card, "validation", resize=Letterbox([64, 64]), cache=False)
    )
    batch = samples.batch([0, 1, 2])
    task = Detection(Fixed(), YoloLoss(3), CLASSES, conf_threshold=0.5)
    for number, found in enumerate(task.decode(task.model(batch["image"]), batch)):
        seen = (batch["image"][number] != Letterbox.GREY).any(0)
        rows, columns = seen.any(1).nonzero(), seen.any(0).nonzero()
        assert found.boxes.tolist() == [[columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]]
        assert found.boxes[0].tolist() != [0, 0, 64, 64]


def test_a_batch_whose_sizes_were_not_known_before_is_refused_where_padding_would_count() -> None:
    task = Detection(torch.nn.Identity(), YoloLoss(3), CLASSES)
    batch = {
        "image": torch.zeros(2, 3, 64, 64, dtype=torch.uint8),
        "height": torch.tensor([64, 64]),
        "width": torch.tensor([64, 32]),
    }
    with pytest.raises(UserError, match=r"images of a batch differ in width \(32 to 64\): set data.resize=\[H,W\]"):
        task.images_of_one_size(batch)


def test_objects_are_drawn_with_boxes_masks_and_names() -> None:
    image = torch.zeros(3, 60, 100, dtype=torch.uint8)
    masks = torch.zeros(2, 60, 100, dtype=torch.bool)
    masks[0, 10:30, 60:80], masks[1, 10:30, 5:25] = True, True
    boxes = torch.tensor([[60.0, 10, 80, 30], [5, 10, 25, 30]])
    found = Detections(boxes, torch.tensor([0.9, 0.5]), torch.tensor([0, 1]), masks)
    drawn = draw_objects(image, found, CLASSES, with_scores=True)
    factor = LEGIBLE // 100
    assert drawn.shape == (3, 60 * factor, 100 * factor) and drawn.dtype == torch.uint8
    left, right = (drawn[:, 25 * factor, column * factor] for column in (15, 70))
    assert left.any() and right.any() and not torch.equal(left, right)
    assert not drawn[:, 57 * factor, 40 * factor].any()
    alone = draw_objects(image, Detections(*(part[[1, 0]] for part in found)), CLASSES, with_scores=True)
    assert torch.equal(alone, drawn)  # colours go from left to right
    nothing = draw_objects(
        image, Detections(boxes[:0], torch.zeros(0), torch.zeros(0, dtype=torch.int64)), CLASSES, with_scores=True
    )
    assert not nothing.any()


def test_check_compares_anchors_and_draws_samples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TRAINER_DATA", str(tmp_path / "data"))
    prepare(scenes(), tmp_path / "data", None, lambda line: None)
    (tmp_path / "r.yaml").write_text(RECIPE, encoding="utf-8")
    assert main(["check", str(tmp_path / "r.yaml"), "--anchors", "--show-samples", str(tmp_path / "samples.png")]) == 0
    printed = capsys.readouterr().err
    assert (
        "the model's anchors fit" in printed
        and "re-estimated anchors fit 100.00%" in printed
        and "model.anchors=[[[" in printed
    )
    assert (tmp_path / "samples.png").stat().st_size > 10_000
    replaced = {
        "detection": "watershed",
        "model: yolo": "model: watershed_unet",
        "loss: yolo": "loss: watershed",
        "best: map": "best: mask_map",
    }
    text = RECIPE
    for before, after in replaced.items():
        text = text.replace(before, after)
    (tmp_path / "s.yaml").write_text(text, encoding="utf-8")
    assert main(["check", str(tmp_path / "s.yaml"), "--anchors"]) == 2
    assert "doesn't train a detection model with anchors" in capsys.readouterr().err
