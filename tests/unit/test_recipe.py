"""Every mistake in a recipe is found at once, with its place and what to do."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from trainer.accelerator import Launch
from trainer.recipe import Recipe, RecipeError, differences, load_recipe
from trainer.tasks.build import TASK_CHECKS

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
        ("optimizer: {weigth_decay: 1}", "r.yaml:2:13: optimizer.weigth_decay: unknown key; did you mean 'weight_decay'? (got 1)"),
        ("data: {batch_size: eight}", "r.yaml:2:8: data.batch_size: must be a valid integer (got 'eight')"),
        ("data: {batch_size: 100000000}", "r.yaml:2:8: data.batch_size: must be less than or equal to 1048576 (got 100000000)"),
        ("data: {workers: 100000}", "data.workers: must be 'auto' or less than or equal to 1024 (got 100000)"),
        ("data: {max_unreadable: -1}", "r.yaml:2:8: data.max_unreadable: must be greater than or equal to 0 (got -1)"),
        ("data: {workers: many}", "r.yaml:2:8: data.workers: must be 'auto' or a valid integer (got 'many')"),
        ("optimizer: {lr: -1}", "r.yaml:2:13: optimizer.lr: must be greater than 0 (got -1)"),
        ("optimizer: {lr: .inf}", "r.yaml:2:13: optimizer.lr: must be a finite number (got inf)"),
        ("optimizer: {lr: 1e999}", "r.yaml:2:13: optimizer.lr: must be a finite number (got inf)"),
        ("optimizer: {lr: .nan}", "r.yaml:2:13: optimizer.lr: must be a finite number (got nan)"),
        (f"train: {{seed: {2**63}}}", "r.yaml:2:15: train.seed: too large for a whole number (got '9223372036854775808')"),
        ("train: {seed: !!bool maybe}", "r.yaml:2:15: train.seed: not a plain value (got 'maybe')"),
        ("model: {name: deeplabv3, weights: 'a\0b.safetensors'}", "not valid YAML"),
        ('model: {name: deeplabv3, weights: "a\\0b.safetensors"}', "there is no such file"),
        (f"model: {{name: deeplabv3, weights: {'x' * 300}.safetensors}}", "there is no such file"),
        ("plugins: ['']", "plugins[0]: can't be imported: Empty module name (got '')"),
        ("plugins: [..]", "plugins[0]: can't be imported: "),
        ("optimizer: {lr: true}", "r.yaml:2:13: optimizer.lr: must be a valid number (got True)"),
        ("loss: soft_iuo", "r.yaml:2:1: loss.name: unknown loss; did you mean 'soft_iou'? (got 'soft_iuo')"),
        ("modle: unet", "r.yaml:2:1: modle: unknown key; did you mean 'model'? (got 'unet')"),
        ("loss:", "r.yaml:2:1: loss: this section is required"),
        ("track: wandb", "r.yaml:2:1: track: must be a list; known: tensorboard, wandb (got 'wandb')"),
        ("name: ../up", "r.yaml:2:1: name: a run's name is made of letters, digits and . _ - + = , (it names a folder) (got '../up')"),
        ("data: {augment: [{name: horizontal_flip, p: 3}]}", "r.yaml:2:42: data.augment[0].p: must be less than or equal to 1 (got 3)"),
        ("evaluate: {best: map}", "unknown metric; known: loss, miou, pixel_accuracy, class_accuracy (got map)"),
        ("train: {duration: 3 parsecs}", "a duration is a number and a unit: '500 steps', '2 epochs', '10%' or '30 minutes' (got '3 parsecs')"),
        ("schedule: {name: cosine, warmup: 20 epochs}", "schedule.warmup: is longer than the training (train.duration 10 epochs) (got 20 epochs)"),
        ("schedule: {name: cosine, warmup: 3 minutes}", "give both in minutes, or this one in %"),
        ("model: {train_only: [haed]}", "model.train_only: the model has no layer 'haed'; did you mean head? (got ['haed'])"),
        ("model: {train_only: [pool]}", "model.train_only: these layers have no parameters, so nothing would learn"),
        ("model: {reset_layers: [haed]}", "model.reset_layers: the model has no layer 'haed'; did you mean head?"),
        ("model: {name: deeplabv3, weights: none.safetensors}", "must be coco, none or an existing .safetensors file, and there is no such file"),
        ("loss: {name: soft_iou, channel: 9}", "r.yaml:2:1: loss: "),
        ("model: {weights: coco}", "model.weights: must be none or an existing .safetensors file (got 'coco')"),
        ("train: {freeze: 3}", "train.freeze: this model doesn't number its layers; name those that learn in model.train_only (got 3)"),
        ("data: {resize_mode: letterbox}", "data.resize_mode: needs data.resize, the size to pad to (got letterbox)"),
        ("data: {resize: [64, 64], resize_mode: letterbox}", "data.resize_mode: is for sets of boxes: what it pads with has no class (got letterbox)"),
        ("data: {resize: [64, 64], augment: [horizontal_flip, mosaic]}", "data.augment.1: must be the first augmentation: those after it see the mosaic"),
        ("data: {augment: [mosaic]}", "data.augment.0: mosaic needs a size: set its size=[H,W], or data.resize"),
        ("data: {overfit: 0}", "data.overfit: must be greater than 0 (got 0)"),
        ("train: {seed: 1, seed: 2}", "r.yaml:2:18: train.seed: duplicate key; it stands on line 2 already"),
        ("loss: [unclosed", "r.yaml:3:1: not valid YAML"),
        ("loss: !!python/object/apply:os.system [ls]", "r.yaml:2:7: loss: tags are refused: a recipe holds plain values"),
        ("plugins: [no_such_module]", "plugins[0]: can't be imported: No module named 'no_such_module'"),
    ],
)
def test_a_mistake_is_named_with_its_place_and_what_to_do(tmp_path: Path, text: str, expected: str) -> None:
    found = problems(tmp_path, text)
    assert any(expected in line for line in found), found


def test_all_mistakes_are_reported_at_once_in_the_order_of_the_file(tmp_path: Path) -> None:
    found = problems(tmp_path, "optimizer: {lr: -1, foo: 2}\ndata: {workers: many}\ntrain: {precision: fp8}\nmodle: unet", "loss=nothing")
    assert [line.split(": ")[1] for line in found] == ["optimizer.lr", "optimizer.foo", "data.workers", "train.precision", "modle", "loss.name"]


def test_a_mistake_in_the_parent_is_reported_in_the_parent(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(BASE.replace("unet", "unett"), encoding="utf-8")
    (tmp_path / "r.yaml").write_text("inherit: base.yaml\ntrain: {seed: 1}\n", encoding="utf-8")
    with pytest.raises(RecipeError, match=r"base.yaml:3:9: model.name: unknown model; did you mean 'unet'"):
        load_recipe(tmp_path / "r.yaml")


def test_missing_and_circular_parents(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("inherit: b.yaml\n")
    (tmp_path / "b.yaml").write_text("inherit: a.yaml\n")
    with pytest.raises(RecipeError, match=r"b.yaml:1:1: inherit: recipes inherit in a circle: a.yaml -> b.yaml -> .*a.yaml"):
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
        ("large.yaml", "can't be read: it has more than 128 KiB"),
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
    assert "must be divisible by 4 processes x train.accumulate 16" in problems(tmp_path, "train: {accumulate: 16}", launch=Launch(processes=4))[0]
    assert "must be divisible by train.accumulate (5)" in problems(tmp_path, "train: {accumulate: 5}")[0]


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"ACCELERATE_MIXED_PRECISION": "fp16"}, "says mixed_precision: fp16, the recipe auto"),
        ({"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, "says gradient_accumulation_steps: 4, the recipe 1"),
        ({"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, "says dynamo backend inductor"),
    ],
)
def test_a_launcher_that_contradicts_the_recipe_is_refused(tmp_path: Path, environment: dict[str, str], expected: str) -> None:
    assert expected in problems(tmp_path, "", launch=Launch.read(environment))[0]


def test_the_launch_file_counts_where_no_launcher_was(tmp_path: Path) -> None:
    file = tmp_path / "accelerate_config.yaml"
    file.write_text("mixed_precision: bf16\n")
    assert f"{file} says mixed_precision: bf16" in problems(tmp_path, "", launch=Launch.read({}, file))[0]
    assert check(tmp_path, "train: {precision: bf16}", launch=Launch.read({}, file)).train.precision == "bf16"
    file.write_text("mixed_precision: 'no'\n")
    check(tmp_path, "", launch=Launch.read({}, file))


def test_mappings_merge_deeply_but_a_new_name_replaces(tmp_path: Path) -> None:
    recipe = check(tmp_path, "optimizer: {weight_decay: 0.5}", "train.seed=7", "data.augment=[]")
    assert (recipe.optimizer.lr, recipe.optimizer.weight_decay, recipe.train.seed, recipe.augmentations) == (3e-3, 0.5, 7, [])
    assert "optimizer.lr: this key is required" in problems(tmp_path, "optimizer: {name: sgd}")[0]
    for overrides in (("optimizer.name=sgd", "optimizer.lr=1"), ("optimizer=sgd", "optimizer.lr=1"), ("optimizer={name: sgd, lr: 1}",)):
        assert check(tmp_path, "", *overrides).optimizer.momentum == 0.9


def test_of_two_overrides_of_a_key_the_last_counts(tmp_path: Path) -> None:
    recipe = check(
        tmp_path, "", "optimizer.lr=1", "train={seed: 3, accumulate: 2}", "optimizer.lr=0.5", "train.seed=4", "data.augment=[vertical_flip]", "data.augment=[]"
    )
    assert (recipe.optimizer.lr, recipe.train.seed, recipe.train.accumulate, recipe.augmentations) == (0.5, 4, 2, [])
    assert check(tmp_path, "", "optimizer=sgd", "optimizer.lr=2", "optimizer={lr: 0.25, momentum: 0.5}").optimizer.lr == 0.25
    assert check(tmp_path, "", "loss=dice", "loss={name: soft_iou, channel: 2}").loss.channel == 2


def test_the_name_is_the_files_unless_the_recipe_says_one(tmp_path: Path) -> None:
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
    assert differences(old, check(tmp_path, "", "train.duration=99 epochs", "track=[wandb]", "data.workers=3", "checkpoint.keep=9")) == []
    assert differences(old, check(tmp_path, "", "optimizer.lr=1", "data.augment=[]")) == ["data.augment", "optimizer.lr"]
    assert differences(old, check(tmp_path, "", "train.duration=9 epochs")) == ["train.duration (shorter than before)"]
    del old["train"]["clip_norm"], old["model"]["weights"]  # written by a version that didn't know these keys
    assert differences(old, check(tmp_path, "")) == []
    assert differences(old, check(tmp_path, "", "train.clip_norm=1.0")) == ["train.clip_norm"]


def test_an_alias_bomb_is_refused_quickly(tmp_path: Path) -> None:
    bomb = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefg", "bcdefgh", strict=True))
    assert any("more than 20000 values" in line for line in problems(tmp_path, bomb))


@pytest.mark.parametrize("text", ["train: " + "[" * 100_000, "train: " + "{a: " * 20_000, "train: " + "- " * 5000, "? " * 2000])
def test_deep_nesting_is_refused_quickly(tmp_path: Path, text: str) -> None:
    start = time.process_time()
    assert problems(tmp_path, text)
    assert time.process_time() - start < 10


def test_an_alias_that_holds_itself_is_refused(tmp_path: Path) -> None:
    assert any("nested too deeply" in line for line in problems(tmp_path, "train: &a [*a]"))


def test_a_plugin_that_failed_once_is_not_taken_for_a_whole_one(tmp_path: Path) -> None:
    (tmp_path / "half.py").write_text("from trainer.components import nothing\n")
    for _ in range(2):
        assert any("plugins[0]: can't be imported: cannot import name 'nothing'" in line for line in problems(tmp_path, "plugins: [half.py]"))


def test_a_plugin_file_beside_the_recipe_adds_components(tmp_path: Path) -> None:
    (tmp_path / "my_loss.py").write_text(
        "from trainer.components import loss\nfrom trainer.losses.cross_entropy import CrossEntropy\n\n\n"
        "@loss(interface='dense')\nclass Mine(CrossEntropy):\n    pass\n"
    )
    recipe = check(tmp_path, "plugins: [my_loss.py]\nloss: mine")
    assert type(recipe.build("loss", num_classes=4, ignore_index=255, statistics={})).__name__ == "Mine"
