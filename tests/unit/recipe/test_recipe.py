"""Every mistake in a recipe is found at once, with its place and what to do."""

from __future__ import annotations

import copy
import os
import sys
import time
from pathlib import Path

import pytest

from trainer.commands import main
from trainer.distributed.launch import Launch
from trainer.recipe.checks import CHECKS
from trainer.recipe.file import RecipeError
from trainer.recipe.load import load_recipe
from trainer.recipe.recipe import Recipe, differences
from trainer.recipe.settings import SCHEMAS
from trainer.tasks.checks import TASK_CHECKS, batch_checks

ALONE = Launch()
BASE = """task: segmentation
data: {name: shapes, batch_size: 32, augment: [horizontal_flip]}
model: {name: unet}
loss: cross_entropy
optimizer: {name: adamw, lr: 3e-3}
train: {duration: 10 epochs}
evaluate: {best: miou}
"""


def check(folder: Path, text: str, *overrides: str, launch: Launch = ALONE) -> Recipe:
    (folder / "base.yaml").write_text(BASE, encoding="utf-8")
    (folder / "r.yaml").write_text(f"inherit: base.yaml\n{text}\n", encoding="utf-8")
    return load_recipe(folder / "r.yaml", overrides, [*launch.checks(), *TASK_CHECKS])


def problems(folder: Path, text: str, *overrides: str, launch: Launch = ALONE) -> list[str]:
    with pytest.raises(RecipeError) as error:
        check(folder, text, *overrides, launch=launch)
    return [line.removeprefix(f"{folder}/") for line in str(error.value).splitlines()]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "optimizer: {weigth_decay: 1}",
            "r.yaml:2:13: optimizer.weigth_decay: unknown key; did you mean 'weight_decay'? (got 1)",
        ),
        ("data: {batch_size: eight}", "r.yaml:2:8: data.batch_size: must be a valid integer (got 'eight')"),
        (
            "data: {batch_size: 100000000}",
            "r.yaml:2:8: data.batch_size: must be less than or equal to 1048576 (got 100000000)",
        ),
        ("data: {workers: 100000}", "data.workers: must be 'auto' or less than or equal to 1024 (got 100000)"),
        ("data: {max_unreadable: -1}", "r.yaml:2:8: data.max_unreadable: must be greater than or equal to 0 (got -1)"),
        ("data: {workers: many}", "r.yaml:2:8: data.workers: must be 'auto' or a valid integer (got 'many')"),
        ("optimizer: {lr: -1}", "r.yaml:2:13: optimizer.lr: must be greater than 0 (got -1)"),
        ("optimizer: {lr: .inf}", "r.yaml:2:13: optimizer.lr: must be a finite number (got inf)"),
        ("optimizer: {lr: 1e999}", "r.yaml:2:13: optimizer.lr: must be a finite number (got inf)"),
        ("optimizer: {lr: .nan}", "r.yaml:2:13: optimizer.lr: must be a finite number (got nan)"),
        (
            f"train: {{seed: {2**63}}}",
            "r.yaml:2:15: train.seed: must fit in a 64-bit integer (got '9223372036854775808')",
        ),
        ("train: {seed: !!bool maybe}", "r.yaml:2:15: train.seed: not a plain value (got 'maybe')"),
        ("model: {name: deeplabv3, weights: 'a\0b.safetensors'}", "not valid YAML"),
        ('model: {name: deeplabv3, weights: "a\\0b.safetensors"}', "no such file"),
        (f"model: {{name: deeplabv3, weights: {'x' * 300}.safetensors}}", "no such file"),
        ("plugins: ['']", "plugins[0]: can't be imported: Empty module name (got '')"),
        ("plugins: [..]", "plugins[0]: can't be imported: "),
        ("optimizer: {lr: true}", "r.yaml:2:13: optimizer.lr: must be a valid number (got True)"),
        ("loss: soft_iuo", "r.yaml:2:1: loss.name: unknown loss; did you mean 'soft_iou'? (got 'soft_iuo')"),
        ("modle: unet", "r.yaml:2:1: modle: unknown key; did you mean 'model'? (got 'unet')"),
        ("loss:", "r.yaml:2:1: loss: this section is required"),
        ("track: wandb", "r.yaml:2:1: track: must be a list; known: tensorboard, wandb (got 'wandb')"),
        (
            "name: ../up",
            "r.yaml:2:1: name: must consist of letters, digits and . _ - + = , (it names a folder) (got '../up')",
        ),
        (
            "data: {augment: [{name: horizontal_flip, p: 3}]}",
            "r.yaml:2:42: data.augment[0].p: must be less than or equal to 1 (got 3)",
        ),
        ("evaluate: {best: mIoU}", "unknown metric; did you mean 'miou'? (got mIoU)"),
        ("evaluate: {best: map}", "unknown metric; known: loss, miou, pixel_accuracy, class_accuracy (got map)"),
        (
            "train: {duration: 3 parsecs}",
            "must be a number and a unit: '500 steps', '2 epochs', '10%' or '30 minutes' (got '3 parsecs')",
        ),
        (
            "schedule: {name: cosine, warmup: 20 epochs}",
            "schedule.warmup: is longer than the training (train.duration 10 epochs) (got 20 epochs)",
        ),
        ("schedule: {name: cosine, warmup: 3 minutes}", "use minutes for both, or % here"),
        (
            "model: {train_only: [haed]}",
            "model.train_only: the model has no layer 'haed'; did you mean head? (got ['haed'])",
        ),
        (
            "model: {train_only: [pool]}",
            "model.train_only: these layers have no parameters, so nothing would be trainable",
        ),
        ("model: {reset_layers: [haed]}", "model.reset_layers: the model has no layer 'haed'; did you mean head?"),
        (
            "model: {name: deeplabv3, weights: none.safetensors}",
            "must be coco, none or an existing .safetensors file; no such file",
        ),
        ("loss: {name: soft_iou, channel: 9}", "r.yaml:2:1: loss: "),
        (
            "model: {weights: coco}",
            "model.weights: must be none or an existing .safetensors file; to start from scratch, set "
            "model.weights=none (got 'coco')",
        ),
        (
            "train: {freeze: 3}",
            "train.freeze: this model doesn't number its layers; name the trainable ones in model.train_only (got 3)",
        ),
        ("data: {resize_mode: letterbox}", "data.resize_mode: needs data.resize, the size to pad to (got letterbox)"),
        (
            "data: {resize: [64, 64], resize_mode: letterbox}",
            "data.resize_mode: can't be used with class masks: padding has no class (got letterbox)",
        ),
        (
            "data: {resize: [64, 64], augment: [horizontal_flip, mosaic]}",
            "data.augment.1: must come first: the other augmentations apply to the mosaic",
        ),
        ("data: {augment: [mosaic]}", "data.augment.0: mosaic needs a size: set its size=[H,W], or data.resize"),
        ("data: {overfit: 0}", "data.overfit: must be greater than 0 (got 0)"),
        ("train: {seed: 1, seed: 2}", "r.yaml:2:18: train.seed: duplicate key; first defined on line 2"),
        ("loss: [unclosed", "r.yaml:3:1: not valid YAML"),
        (
            "loss: !!python/object/apply:os.system [ls]",
            "r.yaml:2:7: loss: YAML tags aren't allowed: a recipe holds plain values",
        ),
        ("plugins: [no_such_module]", "plugins[0]: can't be imported: No module named 'no_such_module'"),
    ],
)
def test_a_mistake_is_named_with_its_place_and_what_to_do(tmp_path: Path, text: str, expected: str) -> None:
    found = problems(tmp_path, text)
    assert any(expected in line for line in found), found


def test_all_mistakes_are_reported_at_once_in_the_order_of_the_file(tmp_path: Path) -> None:
    found = problems(
        tmp_path,
        "optimizer: {lr: -1, foo: 2}\ndata: {workers: many}\ntrain: {precision: fp8}\nmodle: unet",
        "loss=nothing",
    )
    assert [line.split(": ")[1] for line in found] == [
        "optimizer.lr",
        "optimizer.foo",
        "data.workers",
        "train.precision",
        "modle",
        "loss.name",
    ]


def test_a_mistake_in_the_parent_is_reported_in_the_parent(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(BASE.replace("unet", "unett"), encoding="utf-8")
    (tmp_path / "r.yaml").write_text("inherit: base.yaml\ntrain: {seed: 1}\n", encoding="utf-8")
    with pytest.raises(RecipeError, match=r"base.yaml:3:9: model.name: unknown model; did you mean 'unet'"):
        load_recipe(tmp_path / "r.yaml")


def test_missing_and_circular_parents(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("inherit: b.yaml\n")
    (tmp_path / "b.yaml").write_text("inherit: a.yaml\n")
    with pytest.raises(RecipeError, match=r"b.yaml:1:1: inherit: circular inheritance: a.yaml -> b.yaml -> .*a.yaml"):
        load_recipe(tmp_path / "a.yaml")
    (tmp_path / "c.yaml").write_text("inherit: d.yaml\n")
    with pytest.raises(RecipeError, match=r"c.yaml:1:1: inherit: the parent recipe doesn't exist"):
        load_recipe(tmp_path / "c.yaml")
    with pytest.raises(RecipeError, match=r"no such recipe; did you mean .*a\.yaml\?"):
        load_recipe(tmp_path / "aa.yaml")


@pytest.mark.parametrize(
    ("parent", "expected"),
    [
        ("folder.yaml", "can't be read: it is not a file"),
        ("/dev/zero", "can't be read: it is not a file"),
        ("pipe.yaml", "can't be read: it is not a file"),
        ("large.yaml", "can't be read: it is larger than 128 KiB"),
        ('"a\\0b"', "can't be read: embedded null byte"),
        ("x" * 300, "can't be read: [Errno 36] File name too long"),
        ("binary.yaml", "can't be read: 'utf-8' codec can't decode"),
    ],
)
def test_a_parent_that_is_no_recipe_file_is_refused_at_its_line(tmp_path: Path, parent: str, expected: str) -> None:
    (tmp_path / "folder.yaml").mkdir()
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "large.yaml").write_bytes(b"#\n" * 2**20)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe")
    (tmp_path / "r.yaml").write_text(f"inherit: {parent}\n")
    with pytest.raises(RecipeError) as error:
        load_recipe(tmp_path / "r.yaml")
    assert f"r.yaml:1:1: {expected}" in str(error.value)


def test_batches_that_processes_or_micro_batches_dont_divide(tmp_path: Path) -> None:
    assert "must be divisible by 3 processes" in problems(tmp_path, "", launch=Launch(processes=3))[0]
    assert (
        "must be divisible by 4 processes x train.accumulate 16"
        in problems(tmp_path, "train: {accumulate: 16}", launch=Launch(processes=4))[0]
    )
    assert "must be divisible by train.accumulate (5)" in problems(tmp_path, "train: {accumulate: 5}")[0]


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"ACCELERATE_MIXED_PRECISION": "fp16"}, "sets mixed_precision: fp16, the recipe auto"),
        (
            {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"},
            "sets gradient_accumulation_steps: 4, the recipe 1",
        ),
        ({"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, "sets dynamo backend inductor"),
    ],
)
def test_a_launcher_that_contradicts_the_recipe_is_refused(
    tmp_path: Path, environment: dict[str, str], expected: str
) -> None:
    assert expected in problems(tmp_path, "", launch=Launch.read(environment))[0]


def test_the_launch_file_counts_where_no_launcher_was(tmp_path: Path) -> None:
    file = tmp_path / "accelerate_config.yaml"
    file.write_text("mixed_precision: bf16\n")
    assert f"{file} sets mixed_precision: bf16" in problems(tmp_path, "", launch=Launch.read({}, file))[0]
    assert check(tmp_path, "train: {precision: bf16}", launch=Launch.read({}, file)).train.precision == "bf16"
    file.write_text("mixed_precision: 'no'\n")
    check(tmp_path, "", launch=Launch.read({}, file))


def test_mappings_merge_deeply(tmp_path: Path) -> None:
    recipe = check(tmp_path, "optimizer: {weight_decay: 0.5}", "train.seed=7", "data.augment=[]")
    assert (recipe.optimizer.lr, recipe.optimizer.weight_decay, recipe.train.seed, recipe.augmentations) == (
        3e-3,
        0.5,
        7,
        [],
    )
    assert recipe.dropped == []


PARENT = """task: {name: segmentation, average_precision: true}
data:
  name: cifar10
  category: ship
  batch_size: 12
  workers: 0
  cache: "off"
  window: 3
  resize: [64, 96]
  augment: [horizontal_flip, {name: color_jitter, brightness: 0.5}]
  max_unreadable: 4
  overfit: 24
model: {name: resnet_unet, skips: false, weights: imagenet, reset_layers: [head], train_only: [head]}
loss: {name: soft_iou, channel: 1}
optimizer: {name: sgd, lr: 0.25, momentum: 0.5, weight_decay: 0.5}
schedule: {name: cosine, warmup: 7%, final: 0.1}
train: {duration: 1 epoch}
evaluate: {best: miou}
track: [{name: wandb, project: mine}]
reference: {miou: 0.5, loss: 1}
"""


def inherit(folder: Path, text: str, *overrides: str, parent: str = PARENT) -> Recipe:
    (folder / "parent.yaml").write_text(parent, encoding="utf-8")
    (folder / "r.yaml").write_text(f"inherit: parent.yaml\n{text}\n", encoding="utf-8")
    return load_recipe(folder / "r.yaml", overrides)


def test_where_data_changes_the_keys_of_every_set_stay_and_those_of_the_old_one_go(tmp_path: Path) -> None:
    before = inherit(tmp_path, "")
    for text, overrides in (
        ("data:\n  name: shapes", ()),
        ("data: shapes", ()),
        ("", ("data.name=shapes",)),
        ("", ("data=shapes",)),
    ):
        recipe = inherit(tmp_path, text, *overrides)
        stays = {
            key: value for key, value in before.data.model_dump().items() if key not in ("category", "num_colours")
        }
        assert recipe.data.model_dump() == stays | {"name": "shapes"}
        assert recipe.resolved()["data"]["augment"] == before.resolved()["data"]["augment"] != []
    assert inherit(tmp_path, "data: {name: cifar10, batch_size: 6}").data.category == "ship"


def test_where_the_model_changes_its_weights_and_trainable_layers_stay(tmp_path: Path) -> None:
    model = inherit(tmp_path, "model: {name: deeplabv3, weights: coco}").model
    assert (model.weights, model.reset_layers, model.train_only, model.backbone) == (
        "coco",
        ["head"],
        ["head"],
        "resnet101",
    )


def test_where_the_optimizer_changes_only_the_learning_rate_stays(tmp_path: Path) -> None:
    for text, overrides in (
        ("optimizer: adamw", ()),
        ("optimizer: {name: adamw}", ()),
        ("", ("optimizer.name=adamw",)),
        ("", ("optimizer=adamw",)),
    ):
        settings = inherit(tmp_path, text, *overrides).optimizer
        assert settings.model_dump() == {
            "name": "adamw",
            "lr": 0.25,
            "beta1": 0.9,
            "beta2": 0.999,
            "eps": 1e-8,
            "weight_decay": 0.01,
        }
    for overrides in (
        ("optimizer.name=adamw", "optimizer.lr=1"),
        ("optimizer=adamw", "optimizer.lr=1"),
        ("optimizer={name: adamw, lr: 1}",),
    ):
        assert inherit(tmp_path, "", *overrides).optimizer.lr == 1
    settings = inherit(tmp_path, "", "optimizer=adamw", "optimizer.beta1=0.5", "optimizer=adam").optimizer
    assert (settings.name, settings.lr, settings.beta1) == ("adam", 0.25, 0.9)


def test_task_loss_and_schedule_have_no_key_that_outlives_a_change_of_name(tmp_path: Path) -> None:
    recipe = inherit(tmp_path, "loss: dice\nschedule: polynomial")
    assert (recipe.loss.model_dump(), recipe.schedule.name, recipe.schedule.warmup.value) == (
        {"name": "dice"},
        "polynomial",
        0,
    )


def test_lists_of_components_are_replaced_as_a_whole(tmp_path: Path) -> None:
    recipe = inherit(tmp_path, "data: {name: shapes, augment: [vertical_flip]}\ntrack: [wandb]")
    assert [chosen.name for _, chosen in recipe.augmentations] == ["vertical_flip"]
    assert (
        [chosen.project for _, chosen in recipe.trackers]
        == [inherit(tmp_path, "track: [wandb]").trackers[0][1].project]
        != ["mine"]
    )


def test_names_may_change_at_every_level(tmp_path: Path) -> None:
    (tmp_path / "parent.yaml").write_text(PARENT, encoding="utf-8")
    (tmp_path / "middle.yaml").write_text(
        "inherit: parent.yaml\ndata: {name: flowers17, window: 5}\noptimizer: {name: adamw, beta1: 0.5}\n"
    )
    (tmp_path / "r.yaml").write_text("inherit: middle.yaml\ndata: {name: cifar10, workers: 2}\noptimizer: sgd\n")
    recipe = load_recipe(tmp_path / "r.yaml", ["data.name=shapes"])
    assert (recipe.data.batch_size, recipe.data.window, recipe.data.workers, len(recipe.augmentations)) == (12, 5, 2, 2)
    assert (recipe.optimizer.lr, recipe.optimizer.momentum, recipe.optimizer.weight_decay) == (0.25, 0.9, 0.0)
    assert [line.removeprefix(f"{tmp_path}/") for line in recipe.dropped] == [
        "middle.yaml:2:8: data.name changed from cifar10 to flowers17: dropped data.category, reference",
        "middle.yaml:3:13: optimizer.name changed from sgd to adamw: dropped optimizer.momentum, "
        "optimizer.weight_decay",
        "r.yaml:3:1: optimizer.name changed from adamw to sgd: dropped optimizer.beta1",
    ]


def test_published_values_hold_for_their_data_only(tmp_path: Path) -> None:
    assert inherit(tmp_path, "reference: {loss: 2}").reference == {"miou": 0.5, "loss": 2}
    assert inherit(tmp_path, "data: shapes").reference == {}
    assert inherit(tmp_path, "", "data.name=shapes").reference == {}
    assert inherit(tmp_path, "data: shapes\nreference: {loss: 2}").reference == {"loss": 2}


def test_a_mistake_beside_a_change_of_name_is_reported_where_it_is(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"parent.yaml:12:3: data.overfit: must be greater than 0 \(got 0\)"):
        inherit(tmp_path, "", "data.name=flowers17", "data=shapes", parent=PARENT.replace("overfit: 24", "overfit: 0"))
    with pytest.raises(RecipeError, match=r"r.yaml:2:1: loss.name: unknown loss"):
        inherit(tmp_path, "loss: dyce")


def test_published_weights_that_the_new_model_doesnt_know_are_an_error_with_advice(tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as error:
        inherit(tmp_path, "model: unet")
    expected = (
        "model.weights: must be none or an existing .safetensors file; to start from scratch, set model.weights=none "
        "(got 'imagenet')"
    )
    assert str(error.value).removeprefix(f"{tmp_path}/") == f"parent.yaml:13:42: {expected}"
    assert inherit(tmp_path, "model: unet", "model.weights=none").model.weights == "none"


def test_check_lists_what_a_change_of_name_drops(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "base.yaml").write_text(
        BASE.replace("lr: 3e-3", "lr: 3e-3, beta1: 0.8, weight_decay: 0.5") + "reference: {miou: 0.5}\n",
        encoding="utf-8",
    )
    (tmp_path / "r.yaml").write_text(
        "inherit: base.yaml\noptimizer:\n  name: sgd\n  weight_decay: 0.1\n", encoding="utf-8"
    )
    assert (
        main(
            ["check", str(tmp_path / "r.yaml"), "model={name: unet, depth: 2}", "model.name=base_conv", "data.window=2"]
        )
        == 0
    )
    found = [line.removeprefix(f"{tmp_path}/") for line in capsys.readouterr().err.splitlines() if "dropped" in line]
    assert found == [
        "r.yaml:3:3: optimizer.name changed from adamw to sgd: dropped optimizer.beta1",
        "command line: model.name changed from unet to base_conv: dropped model.depth",
    ]
    assert main(["check", str(tmp_path / "base.yaml")]) == 0
    assert "dropped" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("parent", "expected"),
    [
        (None, "inherit: the parent recipe doesn't exist"),
        ("loss: [unclosed", "not valid YAML"),
        ("- a list", "must be a mapping of sections"),
        ("inherit: r.yaml", "circular inheritance"),
        ("inherit: absent.yaml\nmodel: unet", "the parent recipe doesn't exist"),
    ],
)
def test_a_parent_that_cant_be_read_causes_no_other_problems_and_unknown_keys_are_still_reported(
    tmp_path: Path, parent: str | None, expected: str
) -> None:
    if parent is not None:
        (tmp_path / "parent.yaml").write_text(parent, encoding="utf-8")
    (tmp_path / "r.yaml").write_text(
        "inherit: parent.yaml\noptimizer: {lr: 1}\nmodle: unet\ndata: {window: 2, window: 3}\n", encoding="utf-8"
    )
    with pytest.raises(RecipeError) as error:
        load_recipe(tmp_path / "r.yaml")
    found = str(error.value).splitlines()
    assert [expected in line for line in found].count(True) == 1, found
    others = [line.removeprefix(f"{tmp_path}/") for line in found if expected not in line]
    assert others == [
        "r.yaml:3:1: modle: unknown key; did you mean 'model'? (got 'unet')",
        "r.yaml:4:19: data.window: duplicate key; first defined on line 4",
    ]


def test_of_two_overrides_of_a_key_the_last_counts(tmp_path: Path) -> None:
    recipe = check(
        tmp_path,
        "",
        "optimizer.lr=1",
        "train={seed: 3, accumulate: 2}",
        "optimizer.lr=0.5",
        "train.seed=4",
        "data.augment=[vertical_flip]",
        "data.augment=[]",
    )
    assert (recipe.optimizer.lr, recipe.train.seed, recipe.train.accumulate, recipe.augmentations) == (0.5, 4, 2, [])
    assert (
        check(tmp_path, "", "optimizer=sgd", "optimizer.lr=2", "optimizer={lr: 0.25, momentum: 0.5}").optimizer.lr
        == 0.25
    )
    assert check(tmp_path, "", "loss=dice", "loss={name: soft_iou, channel: 2}").loss.channel == 2


def test_the_name_is_the_files_unless_the_recipe_sets_one(tmp_path: Path) -> None:
    assert check(tmp_path, "").name == "r"
    assert check(tmp_path, "", "optimizer.lr=1").name == "r"
    assert check(tmp_path, "name: mine").name == "mine"


def test_the_resolved_recipe_can_be_run_again(tmp_path: Path) -> None:
    from ruamel.yaml import YAML

    first = check(tmp_path, "train: {ema: 0.9, duration: 2.5 epochs}").resolved()
    YAML().dump(first, tmp_path / "again.yaml")
    assert load_recipe(tmp_path / "again.yaml").resolved() == first


def test_only_what_changes_the_computation_makes_a_run_another_one(tmp_path: Path) -> None:
    old = check(tmp_path, "").resolved()
    assert (
        differences(
            old, check(tmp_path, "", "train.duration=99 epochs", "track=[wandb]", "data.workers=3", "checkpoint.keep=9")
        )
        == []
    )
    assert differences(old, check(tmp_path, "", "optimizer.lr=1", "data.augment=[]")) == [
        "data.augment",
        "optimizer.lr",
    ]
    assert differences(old, check(tmp_path, "", "train.duration=9 epochs")) == ["train.duration (shorter than before)"]
    del old["train"]["clip_norm"], old["model"]["weights"]  # written by a version that didn't know these keys
    assert differences(old, check(tmp_path, "")) == []
    assert differences(old, check(tmp_path, "", "train.clip_norm=1.0")) == ["train.clip_norm"]


def test_an_alias_bomb_is_refused_quickly(tmp_path: Path) -> None:
    bomb = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefg", "bcdefgh", strict=True)
    )
    assert any("more than 20000 values" in line for line in problems(tmp_path, bomb))


@pytest.mark.parametrize(
    "text", ["train: " + "[" * 100_000, "train: " + "{a: " * 20_000, "train: " + "- " * 5000, "? " * 2000]
)
def test_deep_nesting_is_refused_quickly(tmp_path: Path, text: str) -> None:
    start = time.process_time()
    assert problems(tmp_path, text)
    assert time.process_time() - start < 10


def test_an_alias_that_holds_itself_is_refused(tmp_path: Path) -> None:
    assert any("nested too deeply" in line for line in problems(tmp_path, "train: &a [*a]"))


def test_a_plugin_that_failed_once_is_not_taken_for_a_loaded_one(tmp_path: Path) -> None:
    (tmp_path / "half.py").write_text("from trainer.components import nothing\n")
    for _ in range(2):
        assert any(
            "plugins[0]: can't be imported: cannot import name 'nothing'" in line
            for line in problems(tmp_path, "plugins: [half.py]")
        )


def test_a_plugin_file_beside_the_recipe_adds_components(tmp_path: Path) -> None:
    (tmp_path / "my_loss.py").write_text(
        "from trainer.components import loss\nfrom trainer.losses.cross_entropy import CrossEntropy\n\n\n"
        "@loss(interface='dense')\nclass Mine(CrossEntropy):\n    pass\n"
    )
    recipe = check(tmp_path, "plugins: [my_loss.py]\nloss: mine")
    assert type(recipe.build("loss", num_classes=4, ignore_index=255, statistics={})).__name__ == "Mine"


def test_task_model_and_loss_fit_where_all_three_have_an_interface_in_common(tmp_path: Path) -> None:
    (tmp_path / "several.py").write_text(
        "from trainer.components import loss, task\nfrom trainer.losses.cross_entropy import CrossEntropy\n"
        "from trainer.tasks.segmentation import Segmentation\n\n\n"
        "@loss(interface=('labels', 'dense'))\nclass Both(CrossEntropy):\n    pass\n\n\n"
        "@loss(interface='labels')\nclass OnlyLabels(CrossEntropy):\n    pass\n\n\n"
        "@task(interface=('dense', 'labels'), fields=('image', 'mask'))\nclass Either(Segmentation):\n    pass\n"
    )
    plugins = "plugins: [several.py]\n"
    check(tmp_path, f"{plugins}loss: both")
    check(tmp_path, f"{plugins}loss: both\ntask: either")
    (mistake,) = problems(tmp_path, f"{plugins}loss: onlylabels")
    assert mistake.startswith("r.yaml:3:1: loss: loss onlylabels doesn't fit task segmentation; choose one of both, ")
    # Each of them fits the task, but not the other.
    (mistake,) = problems(tmp_path, f"{plugins}loss: onlylabels\ntask: either")
    assert mistake.startswith("r.yaml:3:1: loss: loss onlylabels doesn't fit task either; choose one of both, ")


def test_a_check_reads_only_the_parts_of_a_recipe_that_it_is_registered_for(tmp_path: Path) -> None:
    """The others may be missing, as they have mistakes of their own."""
    recipe = check(tmp_path, "")
    for needs, check_parts in (*CHECKS, *ALONE.checks(), *TASK_CHECKS, *batch_checks(2)):
        part_of_it = copy.copy(recipe)
        for part in {*SCHEMAS, "source"} - {*needs}:
            delattr(part_of_it, part)
        assert list(check_parts(part_of_it)) == []


SETS = """from trainer.components import dataset
from trainer.data.sets.shapes import shapes

built = []


@dataset(fields=("image", "mask"))
def breakable_shapes(*, broken: bool = False):
    built.append(broken)
    if broken:
        raise ValueError("this set is broken")
    return shapes()
"""


def test_a_data_set_is_built_once_and_one_that_cannot_be_is_one_mistake(tmp_path: Path) -> None:
    (tmp_path / "my_set.py").write_text(SETS)
    recipe = check(tmp_path, "plugins: [my_set.py]\ndata: {name: breakable_shapes}")
    assert recipe.source.name == "shapes"
    assert sys.modules["trainer_plugin_my_set"].built == [False]
    text = "plugins: [my_set.py]\ndata: {name: breakable_shapes, broken: true}\nmodel: {train_only: [haed]}"
    text += "\nevaluate: {best: x}"
    assert problems(tmp_path, text) == ["r.yaml:3:1: data: this set is broken"]
