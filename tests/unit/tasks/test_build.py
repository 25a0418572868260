"""Which weights a run begins with."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from trainer.data.source import DataInfo
from trainer.errors import UserError
from trainer.recipe import load_recipe
from trainer.recipe_file import RecipeError
from trainer.tasks.build import TASK_CHECKS, build_task

INFO = DataInfo(("background", "flower"), 255)
TEXT = """task: segmentation
data: {name: flowers17, batch_size: 4}
model: {name: deeplabv3, backbone: mobilenet_v3_large, weights: none}
loss: soft_iou
optimizer: {name: adamw, lr: 1e-3}
train: {duration: 1 epoch}
"""


def weights(folder: Path, *overrides: str) -> dict[str, torch.Tensor]:
    (folder / "r.yaml").write_text(TEXT, encoding="utf-8")
    return build_task(load_recipe(folder / "r.yaml", overrides), INFO).model.state_dict()


def differing(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> set[str]:
    return {key for key in a if not torch.equal(a[key], b[key])}


def test_random_weights_depend_on_the_seed_alone(tmp_path: Path) -> None:
    first = weights(tmp_path)
    torch.rand(7)
    assert differing(first, weights(tmp_path)) == set()
    assert "classifier.4.weight" in differing(first, weights(tmp_path, "train.seed=1"))


def test_a_file_gives_all_layers_but_those_that_start_new(tmp_path: Path) -> None:
    theirs = {key: value + 1 if value.is_floating_point() else value for key, value in weights(tmp_path).items()}
    file = tmp_path / "theirs.safetensors"
    save_file(theirs, file)
    assert differing(weights(tmp_path, f"model.weights={file}"), theirs) == set()
    new = weights(tmp_path, f"model.weights={file}", "model.reset_layers=[classifier.4]")
    assert differing(new, theirs) == {"classifier.4.weight", "classifier.4.bias"}
    assert torch.equal(new["classifier.4.weight"], weights(tmp_path)["classifier.4.weight"])
    save_file({**theirs, "classifier.4.weight": torch.zeros(21, 256, 1, 1)}, file)
    with pytest.raises(UserError, match=r"to start these layers new, set model.reset_layers=\[classifier.4\]"):
        weights(tmp_path, f"model.weights={file}")


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["task.exclude=[flowr]"], r"task: exclude: the data set has no class 'flowr'; did you mean 'flower'\?"),
        (["evaluate.best=map"], "evaluate.best: unknown metric; known: loss, miou, pixel_accuracy, class_accuracy"),
        (["task.exclude=[background]", "evaluate.best=miou_without_flower"], "did you mean 'miou_without_background'"),
    ],
)
def test_what_the_task_of_this_data_set_cannot_measure_is_a_mistake_in_the_recipe(tmp_path: Path, overrides: list[str], expected: str) -> None:
    (tmp_path / "r.yaml").write_text(TEXT, encoding="utf-8")
    with pytest.raises(RecipeError, match=expected):
        load_recipe(tmp_path / "r.yaml", overrides, TASK_CHECKS)


def test_the_best_checkpoint_may_be_that_of_any_metric_that_the_recipe_asks_for(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(TEXT, encoding="utf-8")
    for metric in ("map", "map_without_flower", "class_accuracy_without_flower"):
        load_recipe(tmp_path / "r.yaml", ["task.average_precision=true", "task.exclude=[flower]", f"evaluate.best={metric}"], TASK_CHECKS)
