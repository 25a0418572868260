"""Metrics of segmentation agree with scikit-learn's on the predictions of all processes,
and their pictures are drawn.
"""

from __future__ import annotations

import json
import os
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn import metrics

from tests.processes import lines, run_processes, train, train_and_draw_curves, write_recipe
from trainer.commands import main
from trainer.metrics.average_precision import log_odds
from trainer.tasks.segmentation import Segmentation

CLASSES = ("background", "square", "frame", "nothing")  # `frame` isn't in the validation set, `nothing` nowhere
IGNORED = 255
DATA = f"""
from __future__ import annotations

import numpy as np

from trainer.components import dataset
from trainer.data.images import encode_png
from trainer.data.source import DataInfo, Source


def rows(archives):
    for index in range(48 + 13):
        random = np.random.default_rng(index)
        image = random.integers(0, 160, (24, 24, 3), dtype=np.uint8)
        mask = np.zeros((24, 24), dtype=np.uint8)
        top, left = random.integers(2, 12, 2)
        mask[top : top + 10, left : left + 10] = 1
        if index < 48:
            mask[:2] = 2
        image[mask > 0] += 70
        mask[:, 0] = {IGNORED}
        yield "train" if index < 48 else "validation", {{"image": encode_png(image), "mask": encode_png(mask)}}


@dataset(fields=("image", "mask"))
def squares() -> Source:
    return Source("squares", DataInfo({CLASSES}, {IGNORED}), {{"image": "image", "mask": "mask"}}, rows)
"""
RECIPE = """
plugins: [squares.py]
task: {name: segmentation, average_precision: true, exclude: [nothing, frame]}
data: {name: squares, batch_size: 8, window: 3, workers: 0}
model: {name: unet, width: 4, depth: 2}
loss: cross_entropy
optimizer: {name: adamw, lr: 1e-2}
train: {duration: 2 epochs, threads: 1}
evaluate: {every: 2 epochs, best: map_without_nothing_frame, batch_size: 4, pictures: 0}
"""


def keep_what_is_counted(folder: Path) -> None:
    """Lets each process write down the logits and targets that it evaluates."""
    sums, numbers = Segmentation.sums, count()

    def keeping(task: Segmentation, outputs: torch.Tensor, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        np.savez(
            folder / f"rank{os.environ.get('RANK', 0)}_{next(numbers)}.npz",
            logits=outputs.numpy(),
            targets=batch["mask"][:, 0].numpy(),
        )
        return sums(task, outputs, batch)

    Segmentation.sums = keeping  # type: ignore[method-assign]


def train_and_keep(recipe: Path, overrides: tuple[str, ...], folder: Path) -> None:
    keep_what_is_counted(folder)
    train(recipe, overrides)


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    (tmp_path / "squares.py").write_text(DATA, encoding="utf-8")
    return write_recipe(tmp_path, RECIPE)


@pytest.mark.parametrize(("world_size", "precision"), [(1, "fp32"), (2, "fp32"), (2, "bf16")])
def test_they_are_scikit_learns_whatever_the_number_of_processes(
    tmp_path: Path, recipe: Path, world_size: int, precision: str
) -> None:
    kept = tmp_path / "kept"
    kept.mkdir()
    run_processes(world_size, train_and_keep, recipe, (f"train.precision={precision}",), kept)
    (line,) = lines(tmp_path / "runs" / "run", "validation")
    batches = [np.load(file) for file in sorted(kept.glob("*.npz"))]
    assert {file.name[:5] for file in kept.glob("*.npz")} == {f"rank{rank}" for rank in range(world_size)}
    logits = torch.cat([torch.from_numpy(batch["logits"]) for batch in batches])
    assert logits.shape == (13, len(CLASSES), 24, 24) and logits.dtype == torch.float32
    targets = np.concatenate([batch["targets"] for batch in batches])
    valid = targets != IGNORED
    true_labels, guess = targets[valid], logits.numpy().argmax(1)[valid]
    assert set(true_labels) == {0, 1} and set(guess) > {0, 1}

    expected = metrics.confusion_matrix(true_labels, guess, labels=range(len(CLASSES)))
    assert line["confusion"] == dict(zip(CLASSES, expected.tolist(), strict=True))
    scores = log_odds(logits).movedim(1, 0)[:, valid]
    for index in sorted({*true_labels, *guess}):
        iou = metrics.jaccard_score(true_labels, guess, labels=[index], average=None)[0]
        assert line[f"iou/{CLASSES[index]}"] == pytest.approx(iou, abs=1e-12)
    for index in (0, 1):
        rounded, exact = (
            metrics.average_precision_score(true_labels == index, each[index].double().numpy())
            for each in (scores.half(), scores)
        )
        assert line[f"ap/{CLASSES[index]}"] == pytest.approx(rounded, abs=1e-9)
        assert line[f"ap/{CLASSES[index]}"] == pytest.approx(exact, abs=1e-4)
    assert "ap/frame" not in line and "class_accuracy/frame" not in line
    assert (
        line["map"]
        == line["map_without_nothing_frame"]
        == pytest.approx((line["ap/background"] + line["ap/square"]) / 2)
    )
    assert (
        line["miou"]
        < line["miou_without_nothing_frame"]
        == pytest.approx((line["iou/background"] + line["iou/square"]) / 2)
    )
    assert line["pixel_accuracy"] == pytest.approx(metrics.accuracy_score(true_labels, guess))


def test_one_and_two_processes_count_the_same(tmp_path: Path, recipe: Path) -> None:
    for world_size in (1, 2):
        run_processes(world_size, train, recipe, (f"name=p{world_size}", "train.precision=fp64"))
    one, two = (lines(tmp_path / "runs" / f"p{n}", "validation")[0] for n in (1, 2))
    assert one.pop("confusion") == two.pop("confusion")
    assert one.keys() == two.keys() and one.pop("split") == two.pop("split")
    assert one == pytest.approx(two, abs=1e-6)


def test_the_confusion_matrix_and_the_samples_are_drawn_shown_and_reported(tmp_path: Path, recipe: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run_processes(
        1, train_and_draw_curves, recipe, ("evaluate.pictures=3", "evaluate.every=1 epoch", "track=[tensorboard]")
    )
    run = tmp_path / "runs" / "run"
    pictures = {file.name for file in (run / "pictures").glob("*.png")}
    assert pictures == {
        "curves.png",
        *(f"{kind}_step_{step:08d}.png" for kind in ("confusion", "validation") for step in (6, 12)),
    }
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    for tag, kind in (("pictures/0", "confusion"), ("pictures/1", "validation")):
        with Image.open(run / "pictures" / f"{kind}_step_00000012.png") as image:
            assert [(shown.step, shown.width, shown.height) for shown in events.Images(tag)] == [
                (step, *image.size) for step in (6, 12)
            ]
    assert main(["report", str(run), "--out", str(tmp_path / "report.html")]) == 0
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    best = max(lines(run, "validation"), key=lambda line: line["map_without_nothing_frame"])
    assert f'"customdata":{json.dumps(list(best["confusion"].values()), separators=(",", ":"))}' in page
