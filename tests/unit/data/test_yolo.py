"""Images and YOLO label files of one's own become a set that recipes name, without a line of code."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from tests.unit.data.objects import by_image, command_line, picture, save
from trainer.commands import main
from trainer.components import catalogue
from trainer.data.card import Card
from trainer.data.prepare import data_dir, ensure_prepared


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """12 images of 12 x 8, in folders below; the first has two objects, the second an empty file, the third none,
    the others one.
    """
    folder = tmp_path / "mine"
    for i in range(12):
        save(folder / f"photos/town {i % 3}/{i:02d}.jpg", picture(i))
        if i != 2:
            save(folder / f"texts/town {i % 3}/{i:02d}.txt", "" if i == 1 else f"{i % 2} 0.5 0.5 0.25 0.{i + 10}\n")
    save(folder / "texts/town 0/00.txt", "\ufeff0 0.5 0.5 0.5 0.5\r\n\r\n1 0.25 0.25 0.5 0.25 0.5 0.75 0.3 0.5\r\n")
    save(folder / "texts/classes.txt", "not labels")
    save(folder / "classes.txt", "car\nvan\n")
    return folder


def options(folder: Path, **changed: Any) -> list[str]:
    given = {
        "name": "mine",
        "images": folder / "photos",
        "labels": folder / "texts",
        "classes": folder / "classes.txt",
    } | changed
    return ["prepare", "yolo", *command_line(given)]


def objects() -> dict[str, list[dict[str, Any]]]:
    return by_image("mine", "train") | by_image("mine", "validation")


def refused(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    """The message of a command that ends with 2 and leaves nothing."""
    assert main(arguments) == 2
    assert not data_dir().exists() or not [path for path in data_dir().iterdir() if path.is_dir()]
    return capsys.readouterr().err


def test_rows_of_shares_become_boxes_in_pixels(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(options(files, validation=0.1)) == 0
    found = objects()
    assert sorted(found) == [f"{i:02d}" for i in range(12)] and len(by_image("mine", "validation")) in range(2, 9)
    # The second is a polygon.
    assert [(each["label"], each["box"]) for each in found["00"]] == [(0, [3, 2, 9, 6]), (1, [3, 2, 6, 6])]
    assert found["01"] == found["02"] == []
    (one,) = found["07"]
    assert one["label"] == 1 and one["box"] == pytest.approx([4.5, 4 - 4 * 0.17, 7.5, 4 + 4 * 0.17])
    card = Card.load(data_dir() / "mine")
    assert card.columns == {"image": "image", "objects": "boxes"} and card.classes == ("car", "van")
    said = capsys.readouterr().out
    assert "12 rows" in said and "training objects, of 2 of 2 classes" in said and "Split: 10% validate" in said


def test_the_card_has_the_command_that_prepares_it_again(files: Path) -> None:
    assert main(options(files, validation=0.1, invalid="drop")) == 0
    card = Card.load(data_dir() / "mine")
    (data_dir() / "mine").rename(data_dir().parent / "away")
    assert main(["prepare", *shlex.split(card.command)]) == 0
    assert Card.load(data_dir() / "mine") == card


def test_it_is_prepared_again_only_when_files_or_options_change(
    files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(options(files, validation=0.1)) == 0
    capsys.readouterr()
    assert main(options(files, validation=0.1)) == 0
    assert "preparing" not in capsys.readouterr().out
    save(files / "texts/town 2/02.txt", "0 0.5 0.5 0.5 0.5")
    assert main(options(files, validation=0.1)) == 0
    assert (
        "must be prepared again: the name, size or time of a file has changed" in capsys.readouterr().out
        and len(objects()["02"]) == 1
    )
    assert main(options(files, validation=0.1, invalid="drop")) == 0
    assert (
        f"{data_dir() / 'mine'} must be prepared again: --invalid was refuse and is now drop\n"
        in capsys.readouterr().out
    )


def test_a_folder_can_validate(files: Path) -> None:
    save(files / "held out/photos/a.png", picture(50, "PNG"))
    save(files / "held out/texts/a.txt", "1 0.5 0.5 1 1")
    assert main(options(files, validation=files / "held out")) == 0
    assert len(by_image("mine", "train")) == 12 and by_image("mine", "validation")["a"][0]["box"] == [0, 0, 12, 8]


def test_so_can_sibling_folders_if_images_and_labels_share_a_name(files: Path) -> None:
    for split in ("train", "val", "test"):
        save(files / f"images/{split}/{split}.jpg", picture(len(split)))
        save(files / f"labels/{split}/{split}.txt", "1 0.5 0.5 1 1")
    assert main(options(files, images=files / "images/train", labels=files / "labels/train", validation="val")) == 0
    assert list(by_image("mine", "train")) == ["train"] and list(by_image("mine", "validation")) == ["val"]
    card = Card.load(data_dir() / "mine")
    assert card.command.endswith("--validation val --invalid refuse") and card.notes == ("Split: val validates.",)


def test_images_and_labels_that_validate_or_test_can_lie_anywhere(
    files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = {}
    for i, split in enumerate(("validation", "test"), start=50):
        save(files / f"{split} photos/{split}.jpg", picture(i))
        save(files / f"of {split}/{split}.txt", "1 0.5 0.5 1 1")
        given |= {f"{split}_images": files / f"{split} photos", f"{split}_labels": files / f"of {split}"}
    assert main(options(files, **given)) == 0
    found = [by_image("mine", split) for split in ("train", "validation", "test")]
    assert len(found[0]) == 12 and list(found[1]) == ["validation"] and found[2]["test"][0]["box"] == [0, 0, 12, 8]
    assert "14 rows, 12 train, 1 validation, 1 test" in capsys.readouterr().out
    card = Card.load(data_dir() / "mine")
    (data_dir() / "mine").rename(data_dir().parent / "away")
    assert main(["prepare", *shlex.split(card.command)]) == 0
    assert Card.load(data_dir() / "mine") == card


def test_an_image_on_both_sides_of_the_split_is_refused_by_name(
    files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(files / "images/train/a.jpg", picture(1))
    save(files / "labels/train/a.txt", "1 0.5 0.5 1 1")
    said = refused(
        capsys, options(files, images=files / "images/train", labels=files / "labels/train", validation="train")
    )
    file = f"{files}/images/train/a.jpg"
    assert "1 images are in more than one split" in said and said.endswith(f"\n  {file} (train), {file} (validation)\n")


LINE = "texts/town 0/00.txt:1: a line must be `class x y width height` or `class x1 y1 x2 y2 x3 y3 …`"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("0 0.5 0.5 0.5", f"{LINE} (it has 4 words)"),
        ("0 0.5 0.5 0.5 0.5 0.9", f"{LINE} (it has 6 words)"),
        ("car 0.5 0.5 0.5 0.5", f"{LINE} (invalid literal for int() with base 10: 'car')"),
        ("0 0.5 x 0.5 0.5", f"{LINE} (could not convert string to float: 'x')"),
        ("\n0 0.5 0.5 0.5 0.5\n1", "texts/town 0/00.txt:3: a line must be"),
        (
            "0 0.5 0.5 0.5 0.5\n2 0.5 0.5 0.5 0.5",
            "photos/town 0/00.jpg, object 2: its label 2 is no class; classes are 0 to 1; correct or remove it, or "
            "drop invalid objects with `--invalid drop`",
        ),
        ("0 0.5 0.5 0 0.5", "photos/town 0/00.jpg, object 1: its box (6, 2, 6, 6) has no area"),
        (
            "0 0.9 0.5 0.5 0.5",
            "photos/town 0/00.jpg, object 1: its box (7.8, 2, 13.8, 6) is not within the image, 12 x 8",
        ),
        ("0 nan 0.5 0.5 0.5", "photos/town 0/00.jpg, object 1: its box (nan, 2, nan, 6) isn't finite"),
    ],
)
def test_invalid_labels_are_named(files: Path, content: str, expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    save(files / "texts/town 0/00.txt", content)
    assert expected in refused(capsys, options(files))


def test_invalid_objects_are_dropped_on_demand(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(files / "texts/town 0/00.txt", "0 0.5 0.5 0 0.5\n1 0.5 0.5 0.5 0.5\n7 0.5 0.5 0.5 0.5")
    assert main(options(files, validation=0.1, invalid="drop")) == 0
    assert [each["label"] for each in objects()["00"]] == [1]
    assert (
        "2 invalid objects are left out: photos/town 0/00.jpg, object 1: its box (6, 2, 6, 6) has no area; "
        "photos" in capsys.readouterr().out
    )


def test_labels_without_an_image_and_damaged_images_are_named(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (files / "photos/town 0/03.jpg").rename(files / "photos/town 0/04.jpg")
    assert re.search(r"1 files have no match:\n  \S+/texts/town 0/03.txt has no image", refused(capsys, options(files)))
    (files / "texts/town 0/03.txt").unlink()
    save(files / "photos/town 0/00.jpg", "words")
    assert "photos/town 0/00.jpg: this image can't be decoded" in refused(capsys, options(files))


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        (
            {"labels": None},
            "missing --labels; usage: trainer prepare yolo --name NAME --images DIR --labels DIR --classes FILE "
            "[--validation SHARE|DIR ",
        ),
        ({"labels": "nowhere"}, "nowhere is not a folder; it should contain label files (.txt)"),
        ({"validation_labels": "texts"}, "--validation-labels requires --validation-images"),
        ({"masks": "masks"}, "--masks is an option of `trainer prepare folder`, not of yolo"),
        ({"name": "coco128"}, "--name coco128: the catalogue has a data set of this name"),
    ],
    ids=str,
)
def test_an_invalid_option_is_a_mistake(
    files: Path, changed: dict[str, Any], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert expected in refused(capsys, options(files, **changed))


def test_a_recipe_reads_the_set_and_one_without_objects_is_a_mistake(files: Path) -> None:
    component = catalogue("dataset")["yolo"]
    with pytest.raises(
        ValueError, match="`trainer prepare yolo --name mine --images DIR --labels DIR --classes FILE` to prepare it"
    ):
        component.schema(set="mine")
    assert main(options(files, validation=0.1)) == 0
    source = component.build({"set": "mine"})
    assert component.schema(set="mine") and ensure_prepared(source, data_dir(), None) == Card.load(data_dir() / "mine")
    assert component.fields == ("image", "boxes") and source.columns["objects"] == "boxes"
    with pytest.raises(ValueError, match=r"mine has no mask: it was made by `trainer prepare yolo --name mine"):
        catalogue("dataset")["folder"].schema(set="mine")
