"""Image and mask files of one's own become a set that recipes name, without a line of code."""

from __future__ import annotations

import io
import itertools
import json
import os
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.processes import run_processes, train, write_recipe
from tests.unit.data.objects import command_line
from trainer.commands import main
from trainer.data.card import Card
from trainer.data.images import read_indices
from trainer.data.prepare import data_dir, ensure_prepared
from trainer.data.sets.folder import from_files
from trainer.recipe.file import RecipeError
from trainer.recipe.load import load_recipe
from trainer.tasks.checks import TASK_CHECKS

CLASSES = ["road", "sky", "pavement"]
SIZE = (12, 8)


def pixels(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (SIZE[1], SIZE[0], 3), dtype=np.uint8)


def labels(seed: int) -> np.ndarray:
    found = np.random.default_rng(seed).integers(0, 3, (SIZE[1], SIZE[0]), dtype=np.uint8)
    found[0] = 255
    return found


def save(file: Path, array: np.ndarray, **options: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(file, **options)


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """24 pairs, in folders below, of several formats; half of the masks are palette images."""
    folder = tmp_path / "mine"
    for i in range(24):
        suffix = ("jpg", "PNG", "bmp", "webp")[i % 4]
        save(folder / f"photos/town {i % 3}/{i:02d}.{suffix}", pixels(i))
        mask = Image.fromarray(labels(i))
        if i % 2:
            mask.putpalette([(7 * j) % 256 for j in range(768)])
        (folder / f"masks/town {i % 3}").mkdir(parents=True, exist_ok=True)
        mask.save(folder / f"masks/town {i % 3}/{i:02d}.png")
    (folder / "photos/readme.txt").write_text("not read")
    (folder / "photos/.hidden.jpg").write_text("not read")
    (folder / "classes.txt").write_text("\n".join(CLASSES) + "\n")
    return folder


def options(folder: Path, name: str = "mine", **changed: Any) -> list[str]:
    given = {
        "name": name,
        "images": folder / "photos",
        "masks": folder / "masks",
        "classes": folder / "classes.txt",
        "ignore": 255,
    } | changed
    return ["prepare", "folder", *command_line(given)]


def prepared(name: str = "mine") -> Card:
    return Card.load(data_dir() / name)


def rows(split: str, name: str = "mine") -> dict[str, dict[str, Any]]:
    """Stored rows by the name of their image's file."""
    stored = [row for file in prepared(name).files(data_dir() / name, split) for row in pq.read_table(file).to_pylist()]
    return {Path(row["image"]["path"]).stem: row for row in stored}


def refused(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    """The message of a command that ends with 2."""
    capsys.readouterr()
    assert main(arguments) == 2
    return capsys.readouterr().err


def nothing_half_written() -> bool:
    return not data_dir().exists() or not [path for path in data_dir().iterdir() if path.is_dir()]


# ---------------------------------------------------------------- what is prepared


def test_every_pair_is_stored_and_counted(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(options(files)) == 0
    card, stored = prepared(), rows("train") | rows("validation")
    assert list(rows("train")) != sorted(rows("train"))  # neighbours in a folder are none in the set
    assert sorted(stored) == [f"{i:02d}" for i in range(24)]
    for name, row in stored.items():
        assert np.array_equal(read_indices(row["mask"]["bytes"]), labels(int(name)))
        if row["image"]["path"].endswith(("PNG", "bmp")):
            assert np.array_equal(np.asarray(Image.open(io.BytesIO(row["image"]["bytes"]))), pixels(int(name)))
    assert stored["00"]["mask"]["path"] == "masks/town 0/00.png"
    counts = np.bincount(np.concatenate([labels(int(name)) for name in rows("train")]).ravel(), minlength=256)[:3]
    assert card.statistics["class_pixels"] == counts.tolist()
    said = capsys.readouterr().out
    for expected in (
        "24 rows",
        f"{len(rows('validation'))} validation",
        f"road {counts[0] / counts.sum():.2%}",
        "ignored: 255",
    ):
        assert expected in said


def test_the_share_that_validates_is_drawn_once_and_for_ever(files: Path) -> None:
    assert main(options(files, validation=0.5)) == 0
    before = sorted(rows("validation"))
    assert 6 <= len(before) <= 18
    for i in range(24, 40):
        save(files / f"photos/{i}.png", pixels(i))
        save(files / f"masks/{i}.png", labels(i))
    assert main(options(files, validation=0.5)) == 0
    assert [name for name in sorted(rows("validation")) if int(name) < 24] == before


def test_equal_images_are_on_one_side(files: Path) -> None:
    for i in range(100, 120):
        save(files / f"photos/{i}.png", pixels(0))
        save(files / f"masks/{i}.png", labels(i))
    assert main(options(files, validation=0.5)) == 0
    assert len([name for name in rows("validation") if int(name) >= 100]) in (0, 20)


def test_a_folder_can_validate(files: Path) -> None:
    for i in range(3):
        save(files / f"held out/photos/{i}.png", pixels(90 + i))
        save(files / f"held out/masks/{i}.png", labels(90 + i))
    assert main(options(files, validation=files / "held out")) == 0
    assert len(rows("train")) == 24 and sorted(rows("validation")) == ["0", "1", "2"]


def test_so_can_sibling_folders_if_images_and_masks_share_a_name(files: Path) -> None:
    for i, split in enumerate(("train", "val", "test")):
        save(files / f"images/{split}/{split}.png", pixels(i))
        save(files / f"labels/{split}/{split}.png", labels(i))
    assert main(options(files, images=files / "images/train", masks=files / "labels/train", validation="val")) == 0
    assert list(rows("train")) == ["train"] and list(rows("validation")) == ["val"]


@pytest.fixture
def splits(tmp_path: Path) -> Path:
    """Six folders: train, trainannot, val, valannot, test, testannot, with 5, 3 and 2 images."""
    folder = tmp_path / "CamVid"
    for offset, (split, count) in enumerate({"train": 5, "val": 3, "test": 2}.items()):
        for i in range(count):
            save(folder / f"{split}/{split}{i}.png", pixels(10 * offset + i))
            save(folder / f"{split}annot/{split}{i}.png", labels(10 * offset + i))
    (folder / "classes.txt").write_text("\n".join(CLASSES) + "\n")
    return folder


def of_splits(folder: Path, **changed: Any) -> list[str]:
    given = {
        "images": folder / "train",
        "masks": folder / "trainannot",
        "validation_images": folder / "val",
        "validation_masks": folder / "valannot",
    }
    return options(folder, **given | changed)


def test_images_and_masks_that_validate_can_lie_anywhere(splits: Path) -> None:
    assert main(of_splits(splits)) == 0
    assert sorted(rows("train")) == [f"train{i}" for i in range(5)] and sorted(rows("validation")) == [
        "val0",
        "val1",
        "val2",
    ]
    card = prepared()
    assert card.splits.keys() == {"train", "validation"} and card.notes == (f"Split: {splits}/val validates.",)


@pytest.mark.parametrize(
    "validation",
    [{}, {"validation_images": None, "validation_masks": None, "validation": 0.5}],
    ids=["folders", "share"],
)
def test_a_test_split_is_prepared_like_the_others_and_changes_nothing_in_them(
    splits: Path, validation: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(of_splits(splits, **validation)) == 0
    without = prepared()
    with_test = {"test_images": splits / "test", "test_masks": splits / "testannot"}
    assert main(of_splits(splits, **validation, **with_test)) == 0
    card = prepared()
    assert {
        split: card.splits[split] for split in without.splits
    } == without.splits and card.statistics == without.statistics
    assert sorted(rows("test")) == ["test0", "test1"] and np.array_equal(
        read_indices(rows("test")["test1"]["mask"]["bytes"]), labels(21)
    )
    assert card.notes == (*without.notes, f"{splits}/test is the test split, which no training reads.")
    assert ", 2 test\n" in capsys.readouterr().out
    (data_dir() / "mine").rename(data_dir().parent / "away")
    assert main(["prepare", *shlex.split(card.command)]) == 0
    assert prepared() == card


def test_a_folder_can_test_as_a_folder_can_validate(files: Path) -> None:
    for i, split in enumerate(("train", "val", "test")):
        save(files / f"images/{split}/{split}.png", pixels(i))
        save(files / f"labels/{split}/{split}.png", labels(i))
    assert (
        main(options(files, images=files / "images/train", masks=files / "labels/train", validation="val", test="test"))
        == 0
    )
    assert [list(rows(split)) for split in ("train", "validation", "test")] == [["train"], ["val"], ["test"]]
    card = prepared()
    (data_dir() / "mine").rename(data_dir().parent / "away")
    assert main(["prepare", *shlex.split(card.command)]) == 0
    assert prepared() == card


@pytest.mark.parametrize("other", ["train", "val"])
def test_an_image_of_the_test_split_is_in_no_other(
    splits: Path, other: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (splits / "test/test1.png").write_bytes((splits / f"{other}/{other}2.png").read_bytes())
    said = refused(capsys, of_splits(splits, test_images=splits / "test", test_masks=splits / "testannot"))
    assert (
        f"{splits}/{other}/{other}2.png ({'validation' if other == 'val' else other}), {splits}/test/test1.png (test)"
        in said
    )
    assert nothing_half_written()


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        (
            {"validation": "val"},
            "--validation val and --validation-images are mutually exclusive; give only one of them",
        ),
        (
            {"validation": "0.3", "validation_images": None},
            "--validation 0.3 and --validation-masks are mutually exclusive; give only one of them",
        ),
        ({"validation_masks": None}, "--validation-images requires --validation-masks"),
        ({"validation_images": None}, "--validation-masks requires --validation-images"),
        ({"test_images": "test"}, "--test-images requires --test-masks"),
        (
            {"test": "x", "test_masks": "test"},
            "--test x and --test-masks are mutually exclusive; give only one of them",
        ),
        ({"test": "0.1"}, "--test 0.1: only the validation split can be a share; give the files of the test split"),
        ({"test": "nowhere"}, "nowhere/train is not a folder; it should contain images"),
        ({"validation_labels": "val"}, "--validation-labels is an option of `trainer prepare yolo`, not of folder"),
    ],
    ids=str,
)
def test_options_that_contradict_or_need_one_another_are_a_mistake(
    splits: Path, changed: dict[str, Any], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert expected in refused(capsys, of_splits(splits, **changed))
    assert nothing_half_written()


@pytest.mark.parametrize("as_copy", [False, True], ids=["the same file", "equal bytes"])
def test_an_image_on_both_sides_of_the_split_is_refused_by_name(
    files: Path, as_copy: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    held_out = files
    if as_copy:
        held_out = files / "held out"
        for i in range(7):
            save(held_out / f"photos/new {i}.png", pixels(90 + i))
            save(held_out / f"masks/new {i}.png", labels(90 + i))
        (held_out / "photos/new 3.png").write_bytes((files / "photos/town 2/05.PNG").read_bytes())
    said = refused(capsys, options(files, validation=held_out))
    if as_copy:
        assert "1 images are in more than one split" in said
        assert f"\n  {files}/photos/town 2/05.PNG (train), {held_out}/photos/new 3.png (validation)\n" in said
    else:
        first = f"{files}/photos/town 0/00.jpg"
        assert (
            "24 images are in more than one split" in said
            and f"\n  {first} (train), {first} (validation)\n" in said
            and said.endswith("\n  …\n")
        )
    assert nothing_half_written()


def test_so_it_is_in_a_set_that_was_prepared_before_anyone_looked(
    files: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as blind:
        digests = itertools.count()
        blind.setattr("trainer.data.files.sha256", lambda path: str(next(digests)))
        assert main(options(files, validation=files)) == 0
    assert "24 images are in more than one split" in refused(capsys, options(files, validation=files))


def test_only_files_of_equal_size_are_read_to_compare_them(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(files / "held out/photos/a.png", pixels(90))
    save(files / "held out/masks/a.png", labels(90))
    with (files / "held out/photos/a.png").open("ab") as file:
        file.write(bytes(10_000))
    monkeypatch.setattr("trainer.data.files.sha256", lambda path: pytest.fail(f"{path} was read"))
    arguments = {"name": "mine", "images": files / "photos", "masks": files / "masks", "classes": files / "classes.txt"}
    assert from_files(**arguments, validation=str(files / "held out")).name == "mine"


def test_it_is_prepared_again_only_when_files_change(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(options(files)) == 0
    capsys.readouterr()
    assert main(options(files)) == 0
    assert "preparing" not in capsys.readouterr().out
    save(files / "masks/town 0/00.png", labels(50))
    assert main(options(files)) == 0
    assert (
        f"{data_dir() / 'mine'} must be prepared again: the name, size or time of a file has changed\n"
        in capsys.readouterr().out
    )
    assert np.array_equal(read_indices((rows("train") | rows("validation"))["00"]["mask"]["bytes"]), labels(50))
    assert main(options(files, validation=0.4)) == 0
    assert (
        f"{data_dir() / 'mine'} must be prepared again: --validation was 0.2 and is now 0.4\n"
        in capsys.readouterr().out
    )


def test_the_card_has_the_command_that_prepares_it_again(files: Path) -> None:
    assert main(options(files, validation=0.5)) == 0
    card = prepared()
    (data_dir() / "mine/card.json").unlink()
    (data_dir() / "mine").rename(data_dir().parent / "away")
    assert main(["prepare", *shlex.split(card.command)]) == 0
    assert prepared() == card


# ---------------------------------------------------------------- what is refused


def missing_mask(folder: Path) -> None:
    (folder / "masks/town 0/00.png").unlink()


def missing_image(folder: Path) -> None:
    (folder / "photos/town 1/01.PNG").unlink()


def two_alike(folder: Path) -> None:
    save(folder / "photos/town 0/00.png", pixels(0))


def another_size(folder: Path) -> None:
    save(folder / "masks/town 0/00.png", labels(0)[:-1])


def unknown_label(folder: Path) -> None:
    save(folder / "masks/town 0/00.png", labels(0) // 2 * 2 + 1)


def coloured_mask(folder: Path) -> None:
    save(folder / "masks/town 0/00.png", pixels(0))


def cut_image(folder: Path) -> None:
    file = folder / "photos/town 1/01.PNG"
    file.write_bytes(file.read_bytes()[:100])


def no_image(folder: Path) -> None:
    (folder / "photos/town 0/00.jpg").write_text("words")


def sixteen_bits(folder: Path) -> None:
    (folder / "photos/town 0/00.jpg").unlink()
    save(folder / "photos/town 0/00.tif", np.full((SIZE[1], SIZE[0]), 4000, np.uint16))


def no_masks(folder: Path) -> None:
    for file in (folder / "masks").rglob("*.png"):
        file.rename(file.with_suffix(".gif"))


def a_program(folder: Path) -> None:
    (folder / "photos/town 0/00.jpg").write_text(
        "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 12 8\n%%EndComments\n(evil) run\n"
    )


def two_names(folder: Path) -> None:
    (folder / "classes.txt").write_text("road\nroad\nsky\n")


def no_name(folder: Path) -> None:
    (folder / "classes.txt").write_text("road\n\nsky\n")


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (missing_mask, "photos/town 0/00.jpg has no mask"),
        (missing_image, "masks/town 1/01.png has no image"),
        (two_alike, "photos/town 0/00.png differ only in their suffix"),
        (another_size, "masks/town 0/00.png: sizes differ: image 12 x 8, mask 12 x 7; correct it"),
        (
            unknown_label,
            "masks/town 0/00.png: this mask contains the labels 3; classes are 0 to 2, and 255 is ignored; correct it",
        ),
        (coloured_mask, "masks/town 0/00.png: this mask can't be decoded (a mask has one channel"),
        (cut_image, "photos/town 1/01.PNG: this image can't be decoded"),
        (no_image, "photos/town 0/00.jpg: this image can't be decoded"),
        (sixteen_bits, "photos/town 0/00.tif: this image can't be decoded (it has mode I;16, not 8 bits per channel)"),
        (no_masks, "masks contains no masks (index or palette PNG)"),
        (a_program, "photos/town 0/00.jpg: this image can't be decoded (a PostScript file is a program)"),
        (two_names, "lines, each with the name of a class, all different"),
        (no_name, "lines, each with the name of a class, all different"),
    ],
)
def test_a_bad_file_is_named_and_nothing_half_written_stays(
    files: Path, damage: Any, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(files)
    assert expected in refused(capsys, options(files))
    assert nothing_half_written()


def test_a_label_that_is_no_class_may_be_one_to_ignore(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(capsys, options(files, ignore=None))
    assert (
        "this mask contains the labels 255; classes are 0 to 2, and none is ignored; if 255 marks pixels to ignore, "
        "pass --ignore 255; otherwise" in said
    )


def test_a_bad_file_leaves_the_set_that_was_there(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(options(files)) == 0
    before = prepared()
    cut_image(files)
    refused(capsys, options(files))
    assert prepared() == before


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"name": "flowers17"}, "--name flowers17: the catalogue has a data set of this name"),
        ({"name": "../mine"}, "--name ../mine: must consist of letters"),
        ({"name": "downloads"}, "--name downloads: must consist of letters, digits and . _ -, and not be downloads"),
        ({"images": "nowhere"}, "nowhere is not a folder; it should contain images"),
        ({"classes": "nothing.txt"}, "--classes nothing.txt can't be read"),
        ({"ignore": 256}, "--ignore 256: labels are 0 to 255"),
        ({"validation": "1.5"}, "--validation 1.5: a share must be between 0 and 1"),
        ({"validation": "0.0001"}, "--validation 0.0001: all or none of 24 images were drawn"),
        ({"validation": "held out"}, "held out/photos is not a folder; it should contain images"),
        (
            {"masks": None},
            "missing --masks; usage: trainer prepare folder --name NAME --images DIR --masks DIR --classes FILE "
            "[--ignore LABEL] [--validation SHARE|DIR ",
        ),
    ],
    ids=str,
)
def test_an_invalid_option_is_a_mistake(
    files: Path, changed: dict[str, Any], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert expected in refused(capsys, options(files, **changed))
    assert nothing_half_written()


# ---------------------------------------------------------------- in a recipe

RECIPE = """
task: segmentation
data: {name: folder, set: mine, batch_size: 4, workers: 0}
model: {name: unet, width: 4, depth: 2}
loss: cross_entropy
optimizer: {name: adamw, lr: 1e-2}
train: {duration: 1 epoch, threads: 1}
evaluate: {best: miou, pictures: 2}
"""


def test_a_recipe_trains_on_it(files: Path, tmp_path: Path) -> None:
    assert main(options(files)) == 0
    run_processes(1, train, write_recipe(tmp_path, RECIPE))
    lines = [json.loads(line) for line in (tmp_path / "runs/run/metrics.jsonl").read_text().splitlines()]
    assert {"iou/road", "iou/sky", "iou/pavement"} <= lines[-1].keys()


def test_where_it_is_not_prepared_a_recipe_that_names_it_is_one_mistake(tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as raised:
        load_recipe(write_recipe(tmp_path, RECIPE), (), TASK_CHECKS)
    (problem,) = raised.value.problems
    assert "run.yaml:3:" in problem.place and problem.path == ("data", "set")
    assert "`trainer prepare folder --name mine --images DIR --masks DIR --classes FILE` to prepare it" in problem.what


def test_a_recipe_never_makes_it_again(files: Path, tmp_path: Path) -> None:
    """Whatever becomes of the files it was made from, and of the classes in the file."""
    assert main(options(files)) == 0
    card = prepared()
    (files / "photos").rename(files / "gone")
    (files / "classes.txt").write_text("a\nb\nc\n")
    recipe = load_recipe(write_recipe(tmp_path, RECIPE), (), TASK_CHECKS)
    assert ensure_prepared(recipe.source, data_dir(), None) == card
    (data_dir() / "mine/train/00000.parquet").unlink()
    with pytest.raises(
        RecipeError,
        match=r"data\.set: .*00000\.parquet is missing; run `trainer prepare folder --name mine --images \S+photos ",
    ):
        load_recipe(write_recipe(tmp_path, RECIPE), (), TASK_CHECKS)


def test_a_path_is_no_set(files: Path, tmp_path: Path) -> None:
    assert main(options(files)) == 0
    with pytest.raises(RecipeError, match=r"data\.set: '\.\./data/mine' is not a valid name of a set"):
        load_recipe(write_recipe(tmp_path, RECIPE), ["data.set=../data/mine"])


def test_times_of_files_count_and_names_of_folders_do_not(files: Path) -> None:
    arguments = {"name": "mine", "masks": files / "masks", "classes": files / "classes.txt"}
    before = from_files(images=files / "photos", **arguments).version
    assert from_files(images=files / "photos" / ".." / "photos", **arguments).version == before
    os.utime(files / "photos/town 0/00.jpg", ns=(0, 0))
    assert from_files(images=files / "photos", **arguments).version != before
