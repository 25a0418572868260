"""Detection and instance segmentation go through the same Trainer: exact over processes, resumed bit for bit,
drawn and reported.
"""

from __future__ import annotations

import json
import os
import re
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from tests.processes import Job, lines, run_processes, train, train_and_draw_curves, weights, write_recipe
from tests.scenes import CLASSES, RECIPES, TRAIN, VALIDATION, box, scene
from trainer.detection.boxes import Detections
from trainer.metrics import coco
from trainer.tasks import detection
from trainer.tasks.detection import Detection
from trainer.tasks.objects import ObjectTask

AT_THE_END = ("evaluate.every=100%", "checkpoint.every=100%", "evaluate.pictures=0")
TASKS = pytest.mark.parametrize("task", RECIPES)


def recipe(tmp_path: Path, task: str) -> Path:
    return write_recipe(tmp_path, RECIPES[task])


def train_and_export(file: Path, overrides: tuple[str, ...], folder: Path) -> None:
    """Lets each process write down what is true and what is found in the images that it evaluates, as COCO's files."""
    rows, numbers = ObjectTask.rows, count()

    def keeping(task: ObjectTask, outputs: Any, batch: dict[str, Any]) -> coco.Rows:
        found = rows(task, outputs, batch)
        truth, results = coco.as_coco(found, CLASSES)
        (folder / f"{os.environ.get('RANK', 0)}_{next(numbers)}.json").write_text(json.dumps([truth, results]))
        return found

    ObjectTask.rows = keeping  # type: ignore[method-assign]
    train(file, overrides)


@TASKS
@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.slow
def test_average_precision_is_pycocotools_on_exported_predictions(tmp_path: Path, task: str, world_size: int) -> None:
    kept = tmp_path / "kept"
    kept.mkdir()
    steps = 30 if task == "watershed" else 10  # the others always find something
    overrides = (f"train.duration={steps} steps", *AT_THE_END)
    run_processes(world_size, train_and_export, recipe(tmp_path, task), overrides, kept)
    (line,) = lines(tmp_path / "runs" / "run", "validation")
    truth: dict[str, Any] = {}
    results = []
    for file in kept.glob("*.json"):
        part, found = json.loads(file.read_text())
        for annotation in part["annotations"]:
            annotation["id"] += 1000 * len(truth.get("images", ()))  # which are of each batch alone
        truth = part | {key: truth.get(key, []) + part[key] for key in ("images", "annotations")}
        results += found
    assert sorted(image["id"] for image in truth["images"]) == list(range(VALIDATION))
    assert {file.name[0] for file in kept.glob("*.json")} == {str(rank) for rank in range(world_size)}
    assert results
    for prefix, kind in {
        "detection": {"": "bbox"},
        "watershed": {"mask_": "segm"},
        "mask_rcnn": {"mask_": "segm", "box_": "bbox"},
    }[task].items():
        annotations = COCO()
        annotations.dataset = truth
        annotations.createIndex()
        shown = [
            {key: value for key, value in result.items() if key != ("bbox" if kind == "segm" else "segmentation")}
            for result in results
        ]
        evaluation = COCOeval(annotations, annotations.loadRes(shown), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        assert [line[f"{prefix}{name}"] for name in ("map", "map_50", "map_75")] == pytest.approx(
            evaluation.stats[:3].tolist(), abs=1e-6
        )
    if task == "watershed":  # the quickest to learn
        assert line["mask_map_50"] > 0.1


def evaluate_jittered_truth(file: Path, overrides: tuple[str, ...], folder: Path) -> None:
    """Lets each process find the true boxes, moved at random, also beyond the image, and write them down: sample id,
    class, score, box.
    """
    decode, numbers = Detection.decode, count()

    def decoding(task: Detection, outputs: Any, batch: dict[str, Any]) -> Any:
        found = []
        for index, number in enumerate(batch["sample_id"].tolist()):
            mine, random = batch["image_index"] == index, torch.Generator().manual_seed(number)
            boxes, labels = (batch[name][mine].repeat_interleave(3, dim=0) for name in ("boxes", "labels"))
            scores = torch.rand(len(labels), generator=random).sort(descending=True).values
            found.append(
                Detections(
                    boxes + 2 * torch.randn(boxes.shape, generator=random) + torch.tensor([-3.0, -1, 0, 1]),
                    scores,
                    labels,
                )
            )
            rows = zip(found[-1].labels.tolist(), scores.tolist(), found[-1].boxes.tolist(), strict=True)
            (folder / f"{os.environ.get('RANK', 0)}_{next(numbers)}.json").write_text(
                json.dumps([[number, *row] for row in rows])
            )
        detection.postprocess = lambda *_: found  # type: ignore[assignment]
        return decode(task, outputs, batch)

    Detection.decode = decoding  # type: ignore[method-assign]
    train(file, overrides)


@pytest.mark.parametrize("world_size", [1, 2])
def test_average_precision_of_letterboxed_images_is_that_in_the_original_images(
    tmp_path: Path, world_size: int
) -> None:
    """The truth comes from the scenes as they were drawn;
    what is found is mapped back and clipped at the original image.
    """
    side, kept = (96, 288), tmp_path / "kept"
    kept.mkdir()
    overrides = ("train.duration=1 steps", "evaluate.pictures=0", f"data.resize={list(side)}")
    run_processes(world_size, evaluate_jittered_truth, recipe(tmp_path, "detection"), overrides, kept)
    (line,) = lines(tmp_path / "runs" / "run", "validation")
    truth: dict[str, Any] = {
        "info": {},
        "images": [],
        "annotations": [],
        "categories": [{"id": label, "name": name} for label, name in enumerate(CLASSES)],
    }
    for number in range(VALIDATION):
        image, masks, labels, crowds = scene(TRAIN + number)
        truth["images"].append({"id": number, "height": image.shape[0], "width": image.shape[1]})
        for mask, label, crowd in zip(masks, labels, crowds, strict=True):
            left, top, right, bottom = box(mask)
            entry = {
                "bbox": [left, top, right - left, bottom - top],
                "area": (right - left) * (bottom - top),
                "iscrowd": int(crowd),
            }
            truth["annotations"].append(
                entry | {"id": len(truth["annotations"]) + 1, "image_id": number, "category_id": label}
            )
    results, num_outside = [], 0
    for number, label, score, corners in (row for file in kept.glob("*.json") for row in json.loads(file.read_text())):
        size = scene(TRAIN + number)[0].shape[:2]
        assert size[0] != size[1]
        original = []
        for axis in (0, 1):  # y, x
            inner = round(min(full / part for full, part in zip(side, size, strict=True)) * size[axis])
            ends = [(end - (side[axis] - inner) // 2) * size[axis] / inner for end in corners[1 - axis :: 2]]
            original.append([min(max(end, 0), size[axis]) for end in ends])
            num_outside += original[-1] != ends
        (top, bottom), (left, right) = original
        results.append(
            {"image_id": number, "category_id": label, "score": score, "bbox": [left, top, right - left, bottom - top]}
        )
    annotations = COCO()
    annotations.dataset = truth
    annotations.createIndex()
    evaluation = COCOeval(annotations, annotations.loadRes(results), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    assert num_outside > 10 and 0.1 < evaluation.stats[0] < evaluation.stats[1] < 1
    assert [line[name] for name in ("map", "map_50", "map_75")] == pytest.approx(
        evaluation.stats[:3].tolist(), abs=1e-6
    )


@TASKS
@pytest.mark.slow
def test_one_and_two_processes_see_the_same_and_evaluate_every_image(tmp_path: Path, task: str) -> None:
    """Losses are equal but for Mask R-CNN, each process of which draws its own regions."""
    # Adam's first steps magnify rounding errors.
    precision = "fp32" if task == "mask_rcnn" else "fp64"
    overrides = (f"train.precision={precision}", "optimizer={name: sgd, lr: 1e-3}", *AT_THE_END)
    for world_size in (1, 2):
        run_processes(world_size, train, recipe(tmp_path, task), (f"name=p{world_size}", *overrides))
    one, two = (lines(tmp_path / "runs" / f"p{n}", "train") for n in (1, 2))
    assert [line["data_fingerprint"] for line in one] == [line["data_fingerprint"] for line in two]
    if task != "mask_rcnn":
        assert [line["loss"] for line in one] == pytest.approx([line["loss"] for line in two], rel=1e-9)
        first, second = (lines(tmp_path / "runs" / f"p{n}", "validation")[-1] for n in (1, 2))
        assert first["loss"] == pytest.approx(second["loss"], rel=1e-9)


@TASKS
@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.slow
def test_an_interrupted_run_ends_with_the_same_weights_and_metrics(tmp_path: Path, task: str, world_size: int) -> None:
    file = recipe(tmp_path, task)
    options = ("train.ema=0.9", "evaluate.pictures=0")
    run_processes(world_size, train, file, ("name=uninterrupted", *options))
    for stop_after in (5, None):
        run_processes(world_size, train, file, ("name=parts", *options), stop_after)
    uninterrupted, parts = (tmp_path / "runs" / name for name in ("uninterrupted", "parts"))
    assert weights(uninterrupted) == weights(parts)
    assert lines(uninterrupted) == lines(parts)


@pytest.mark.slow
@TASKS
def test_pictures_show_truth_beside_prediction_and_curves(tmp_path: Path, task: str) -> None:
    run_processes(1, train_and_draw_curves, recipe(tmp_path, task), ("train.duration=4 steps",))
    names = {file.name for file in (tmp_path / "runs" / "run" / "pictures").glob("*.png")}
    assert names == {"curves.png", "validation_step_00000004.png", "precision_recall_step_00000004.png"}


def test_frozen_layers_stay_bit_for_bit_and_the_others_learn(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    run_processes(
        1,
        train,
        recipe(tmp_path, "detection"),
        ("train.freeze=10", "train.duration=4 steps", "checkpoint.every=2 steps", "evaluate.pictures=0"),
    )
    before, after = (
        load_file(tmp_path / "runs" / "run" / "checkpoints" / f"step_0000000{step}" / "model.safetensors")
        for step in (2, 4)
    )
    frozen = {name for name in before if int(name.split(".")[1]) < 10}
    assert len(frozen) > 100
    assert all(torch.equal(before[name], after[name]) for name in frozen)
    fixed = {"model.24.anchors"}
    assert all(not torch.equal(before[name], after[name]) for name in before.keys() - frozen - fixed)


@pytest.mark.parametrize("task", ["detection", "watershed"])
def test_images_of_different_sizes_in_one_batch_are_refused_where_their_padding_would_count(
    tmp_path: Path, task: str
) -> None:
    with Job(1, recipe(tmp_path, task), "data.resize=null", "data.resize_mode=stretch", "data.augment=[]") as job:
        assert job.wait() == [2], job.output
        assert re.search(
            r"images of scenes \(train and validation\) differ in size .*: set data.resize=\[H,W\]", job.output
        )
