"""Which weights a run begins with, and what is known to fail before it does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.scenes import RECIPES
from trainer.data.build import Data
from trainer.data.prepare import data_dir, prepare
from trainer.data.source import DataInfo
from trainer.errors import UserError
from trainer.models.deeplabv3 import deeplabv3
from trainer.models.mask_rcnn import mask_rcnn
from trainer.models.resnet_unet import resnet_unet
from trainer.models.yolo import yolo
from trainer.recipe.file import RecipeError
from trainer.recipe.load import load_recipe
from trainer.tasks.build import build_task
from trainer.tasks.checks import TASK_CHECKS, batch_checks, check_sizes
from trainer.trainer import Trainer

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
    with pytest.raises(UserError, match=r"to reset these layers, set model.reset_layers=\[classifier.4\]"):
        weights(tmp_path, f"model.weights={file}")


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["task.exclude=[flowr]"], r"task: exclude: the data set has no class 'flowr'; did you mean 'flower'\?"),
        (["evaluate.best=map"], "evaluate.best: unknown metric; known: loss, miou, pixel_accuracy, class_accuracy"),
        (["task.exclude=[background]", "evaluate.best=miou_without_flower"], "did you mean 'miou_without_background'"),
    ],
)
def test_what_the_task_of_this_data_set_cannot_measure_is_a_mistake_in_the_recipe(
    tmp_path: Path, overrides: list[str], expected: str
) -> None:
    (tmp_path / "r.yaml").write_text(TEXT, encoding="utf-8")
    with pytest.raises(RecipeError, match=expected):
        load_recipe(tmp_path / "r.yaml", overrides, TASK_CHECKS)


def test_the_best_checkpoint_may_be_that_of_any_metric_that_the_recipe_asks_for(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(TEXT, encoding="utf-8")
    for metric in ("map", "map_without_flower", "class_accuracy_without_flower"):
        load_recipe(
            tmp_path / "r.yaml",
            ["task.average_precision=true", "task.exclude=[flower]", f"evaluate.best={metric}"],
            TASK_CHECKS,
        )


def mistakes(folder: Path, text: str, *overrides: str, processes: int = 1) -> list[str]:
    """What `trainer check` finds in a recipe."""
    (folder / "r.yaml").write_text(text, encoding="utf-8")
    try:
        load_recipe(folder / "r.yaml", overrides, [*TASK_CHECKS, *batch_checks(processes)])
    except RecipeError as error:
        return [f"{'.'.join(map(str, problem.path))}: {problem.what}" for problem in error.problems]
    return []


def empty(model: torch.nn.Module, *lacking: str) -> dict[str, torch.Tensor]:
    """Tensors of the names and shapes of a model's on the meta device, but for those whose names end so."""
    return {
        name: torch.zeros(tensor.shape)
        for name, tensor in model.state_dict().items()
        if not name.endswith(lacking or ("\0",))
    }


def on_meta(factory: object, *arguments: object, **settings: object) -> torch.nn.Module:
    with torch.device("meta"):
        return factory(*arguments, **settings)  # type: ignore[operator, no-any-return]


PREDICTORS = (
    "roi_heads.box_predictor.cls_score, roi_heads.box_predictor.bbox_pred, roi_heads.mask_predictor.mask_fcn_logits"
)


@pytest.mark.parametrize(
    ("text", "tensors", "overrides", "expected"),
    [
        (RECIPES["detection"], lambda: empty(on_meta(yolo, 3, size="s")), [], "but fits model.size=s"),
        (
            RECIPES["detection"],
            lambda: empty(on_meta(yolo, 80, size="m")),
            [],
            "but fits model.size=m with model.reset_layers=[model.24.m.0, model.24.m.1, model.24.m.2]",
        ),
        (
            RECIPES["detection"],
            lambda: empty(on_meta(yolo, 80, size="m")),
            ["model.reset_layers=[model.24.m]"],
            "but fits model.size=m",
        ),
        (
            RECIPES["detection"],
            lambda: empty(on_meta(yolo, 1)),
            [],
            "model: wrong shape of model.24.m.0.weight (18, 64, 1, 1) instead of (24, 64, 1, 1), model.24.m.0.bias "
            "(18,) instead of (24,), "
            "model.24.m.1.weight (18, 128, 1, 1) instead of (24, 128, 1, 1), model.24.m.1.bias (18,) instead of (24,), "
            "model.24.m.2.weight (18, 256, 1, 1) instead of (24, 256, 1, 1) and 1 more; "
            "to reset these layers, set model.reset_layers=[model.24.m.0, model.24.m.1, model.24.m.2]",
        ),
        (
            TEXT,
            lambda: empty(on_meta(deeplabv3, 21, backbone="resnet50", weights="none")),
            [],
            "resnet50 with model.reset_layers=[classifier.4]",
        ),
        (
            TEXT,
            lambda: empty(on_meta(deeplabv3, 2, backbone="resnet101", weights="none")),
            [],
            "but fits model.backbone=resnet101",
        ),
        (
            TEXT,
            lambda: empty(on_meta(resnet_unet, 2, backbone="resnet34", weights="none", skips=False)),
            ["model={name: resnet_unet, weights: none}"],
            "but fits model.backbone=resnet34 model.skips=false",
        ),
        (
            RECIPES["mask_rcnn"],
            lambda: empty(on_meta(mask_rcnn, 90), "num_batches_tracked"),
            ["model.backbone=resnet50"],
            f"but fits model.frozen_norm=true with model.reset_layers=[{PREDICTORS}]",
        ),
        (
            RECIPES["mask_rcnn"],
            lambda: empty(on_meta(mask_rcnn, 3), "num_batches_tracked"),
            [],
            "but fits model.backbone=resnet50 model.frozen_norm=true",
        ),
        (
            RECIPES["detection"],
            lambda: empty(on_meta(mask_rcnn, 3, backbone="resnet18")),
            [],
            "doesn't fit the model: it is a file of another network "
            "(0 of its 162 tensors fit; e.g. missing model.0.conv.weight, unexpected backbone.body.bn1.bias, missing "
            "model.0.bn.weight)",
        ),
    ],
)
def test_a_file_of_another_size_or_backbone_names_the_settings_that_it_fits(
    tmp_path: Path, text: str, tensors: object, overrides: list[str], expected: str
) -> None:
    file = tmp_path / "x.safetensors"
    save_file(tensors(), file)  # type: ignore[operator]
    found = mistakes(tmp_path, text, *overrides, f"model.weights={file}")
    assert (
        len(found) == 1
        and found[0].startswith(f"model.weights: {file} doesn't fit the model")
        and found[0].endswith(expected)
    )


def test_the_check_of_a_file_and_training_report_the_same(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    wrong = {"a": torch.zeros(1)}
    for write in (lambda: save_file(wrong, file), lambda: torch.save(wrong, file), lambda: file.write_bytes(b"1234")):
        write()
        found = mistakes(tmp_path, TEXT, f"model.weights={file}")
        with pytest.raises(UserError) as caught:
            weights(tmp_path, f"model.weights={file}")
        assert found == [str(caught.value)]


def test_published_weights_that_there_are_not_are_found_without_a_download(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda *args, **kwargs: pytest.fail("a download"))
    monkeypatch.setattr(
        "torchvision.models._api.load_state_dict_from_url", lambda *args, **kwargs: pytest.fail("a download")
    )
    settings = "model={name: mask_rcnn, backbone: %s, weights: coco}"
    assert mistakes(tmp_path, RECIPES["mask_rcnn"], settings % "resnet18") == [
        "model: there are no weights coco for backbone resnet18; set model.weights=none, or model.backbone=resnet50"
    ]
    assert mistakes(tmp_path, RECIPES["mask_rcnn"], settings % "resnet50") == []
    assert mistakes(tmp_path, RECIPES["mask_rcnn"], settings % "resnet50_v2", "model.reset_layers=[rpn.head]") == []
    assert mistakes(tmp_path, TEXT, "model.weights=coco") == []
    assert mistakes(tmp_path, TEXT, "model={name: resnet_unet}") == []
    assert mistakes(tmp_path, RECIPES["mask_rcnn"], "model.frozen_norm=true") == [
        "model: frozen_norm is for backbone resnet50; the batch norms of resnet18 are trainable"
    ]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["data.resize=[100,128]", "data.augment=[horizontal_flip]"], "data.resize: {} validation split are 100 x 128"),
        (
            ["data.resize=[128,96]", "data.augment=[{name: random_crop, size: [32,33]}, vertical_flip]"],
            "data.augment: {} train split are 32 x 33",
        ),
        (
            ["data.augment=[{name: mosaic, p: 0.5, size: [64,65]}]", "data.batch_size=1"],
            "data.augment: {} train split are 64 x 65",
        ),
        (["data.augment=[{name: random_resized_crop, size: [16,64]}]"], "data.augment: {} train split are 16 x 64"),
        (["data.augment=[{name: mosaic, size: [100,100]}, {name: random_crop, size: [64,64]}]"], ""),
        (["data.augment=[{name: mosaic, p: 0, size: [100,100]}]"], ""),
        # Of a set that isn't prepared nothing is known.
        (["data.resize=null", "data.resize_mode=stretch", "data.augment=[]"], ""),
        (["data.resize=[64,96]", "data.augment=[]"], ""),
    ],
)
def test_sides_that_the_model_cannot_take_are_a_mistake_in_the_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides: list[str], expected: str
) -> None:
    monkeypatch.setenv("TRAINER_DATA", str(tmp_path))
    advice = ": resize, pad or crop them to such a size"
    printed = expected.format("the model takes images whose sides are divisible by 32, and those of the") + advice
    assert mistakes(tmp_path, RECIPES["detection"], *overrides) == ([printed] if expected else [])


def test_sizes_that_are_known_once_a_set_is_prepared_are_checked_at_the_start_of_training_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRAINER_DATA", str(tmp_path))
    native = [
        "data.resize=null",
        "data.resize_mode=stretch",
        "data.batch_size=1",
        "evaluate.batch_size=1",
        "data.augment=[]",
    ]
    (tmp_path / "r.yaml").write_text(RECIPES["detection"], encoding="utf-8")
    recipe = load_recipe(tmp_path / "r.yaml", native, TASK_CHECKS)
    prepare(recipe.source, data_dir(), None)
    with pytest.raises(
        UserError,
        match=r"^data.resize: the model takes images whose sides are divisible by 32, and those of the "
        r"validation split are \d+ x \d+: ",
    ):
        check_sizes(recipe, on_meta(yolo, 3))
    assert len(mistakes(tmp_path, RECIPES["detection"], *native)) == 1
    monkeypatch.setenv("TRAINER_RUNS", str(tmp_path / "runs"))
    with pytest.raises(UserError, match="sides are divisible by 32"):
        Trainer(recipe).build()


def test_a_number_of_processes_that_is_none_is_left_to_the_launcher(tmp_path: Path) -> None:
    assert mistakes(tmp_path, TEXT, processes=0) == []


@pytest.mark.parametrize(
    ("task", "overrides", "processes", "expected"),
    [
        (
            "detection",
            ["data.augment=[]"],
            1,
            r"scenes \(train and validation\) differ .* batched: set data.resize=\[H,W\], with "
            r"data.resize_mode=letterbox to",
        ),
        (
            "watershed",
            ["data.augment=[vertical_flip]"],
            1,
            r"scenes \(train and validation\) differ in size \(48 x 64, 51 x 51, …\), so",
        ),
        (
            "watershed",
            ["data.augment=[{name: random_crop, size: [32,32]}]"],
            1,
            r"scenes \(validation\) differ .* or evaluate.batch_size=1$",
        ),
        ("watershed", ["data.augment=[{name: random_crop, size: [32,32]}]", "evaluate.batch_size=1"], 1, ""),
        ("watershed", ["evaluate.batch_size=2"], 2, r"scenes \(train\) differ .* batched: set data.resize"),
        (
            "detection",
            ["data.resize=[64,64]", "data.augment=[{name: mosaic, p: 0.5, size: [32,32]}]"],
            1,
            r"\(train\) .* all augmentations the size of data.resize$",
        ),
        ("watershed", ["evaluate.batch_size=2"], 4, ""),  # each has one image at a time
        ("watershed", ["evaluate.batch_size=1", "train.accumulate=2"], 2, ""),
        ("watershed", ["data.resize=[64,64]"], 1, ""),
        ("mask_rcnn", [], 1, ""),  # each image is run at its own size
    ],
)
def test_images_of_several_sizes_are_a_mistake_where_batches_need_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: str, overrides: list[str], processes: int, expected: str
) -> None:
    monkeypatch.setenv("TRAINER_DATA", str(tmp_path))
    text = RECIPES[task]
    native = ["data.resize=null", "data.resize_mode=stretch", *overrides] if task != "mask_rcnn" else overrides
    if "data.resize=[64,64]" not in overrides:
        assert not [
            each for each in mistakes(tmp_path, text, *native, processes=processes) if "differ in size" in each
        ], "nothing is known before"
    (tmp_path / "r.yaml").write_text(text, encoding="utf-8")
    recipe = load_recipe(tmp_path / "r.yaml", native)
    prepare(recipe.source, data_dir(), None)
    found = [each for each in mistakes(tmp_path, text, *native, processes=processes) if "differ in size" in each]
    if not expected:
        assert found == []
        Data(recipe, 0, processes, torch.device("cpu"))
        return
    assert len(found) == 1
    with pytest.raises(UserError, match=expected) as caught:
        Data(recipe, 0, processes, torch.device("cpu"))
    assert found == [f"{'data.augment' if recipe.data.resize else 'data.resize'}: {caught.value}"]
