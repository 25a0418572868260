"""Images and a COCO file of one's own become a set that recipes name, without a line of code."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.unit.data.objects import SIZE, by_image, command_line, picture, save
from trainer.commands import main
from trainer.components import catalogue
from trainer.data.card import Card
from trainer.data.object_checks import run_lengths
from trainer.data.prepare import data_dir
from trainer.detection.rle import encode_masks

SQUARE = [3, 2, 9, 2, 9, 5, 3, 5]  # corners of the pixels 3 to 8, 2 to 4
MASK = np.zeros((SIZE[1], SIZE[0]), bool)
MASK[2:5, 3:9] = True
RUNS = [26, 3, 5, 3, 5, 3, 5, 3, 5, 3, 5, 3, 27]  # of MASK, down its columns
COMPRESSED = encode_masks(torch.from_numpy(MASK[None]))[0].decode()


def annotation(image: int, **changed: Any) -> dict[str, Any]:
    return {
        "id": image,
        "image_id": image,
        "category_id": 7,
        "bbox": [3, 2, 6, 3],
        "segmentation": [SQUARE],
        "area": 18,
        "iscrowd": 0,
    } | changed


def content(images: range = range(12)) -> dict[str, Any]:
    """An annotation for each image but the third; category ids are neither dense nor sorted."""
    return {
        "info": {"year": 2026},
        "images": [
            {"id": i, "file_name": f"{i:02d}.jpg", "width": SIZE[0], "height": SIZE[1], "license": 1} for i in images
        ],
        "annotations": [annotation(i) for i in images if i != 2],
        "categories": [{"id": 90, "name": "cell", "supercategory": "thing"}, {"id": 7, "name": "crack"}],
    }


@pytest.fixture
def files(tmp_path: Path) -> Path:
    folder = tmp_path / "mine"
    for i in range(12):
        save(folder / f"photos/{'a' if i < 6 else 'b'}/{i:02d}.jpg", picture(i))
    save(folder / "photos/not listed.jpg", picture(50))
    return folder


def prepare(folder: Path, found: dict[str, Any], **changed: Any) -> int:
    save(folder / "instances.json", json.dumps(found))
    given = {
        "name": "mine",
        "images": folder / "photos",
        "annotations": folder / "instances.json",
        "validation": 0.1,
    } | changed
    return main(["prepare", "coco", *command_line(given)])


def objects() -> dict[str, list[dict[str, Any]]]:
    return by_image("mine", "train") | by_image("mine", "validation")


def pixels(mask: bytes) -> np.ndarray:
    runs = run_lengths(mask)
    return np.repeat(np.arange(len(runs)) % 2, runs).reshape(SIZE).T.astype(bool)


def test_polygons_and_both_kinds_ofrun_lengths_become_masks(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = content()
    found["annotations"][0]["segmentation"] = {"size": [8, 12], "counts": RUNS}
    found["annotations"][1] |= {
        "segmentation": {"size": [8, 12], "counts": COMPRESSED},
        "iscrowd": 1,
        "category_id": 90,
    }
    found["annotations"][2]["segmentation"] = [[3, 2, 6, 2, 6, 5, 3, 5], [6, 2, 9, 2, 9, 5, 6, 5]]
    found["annotations"].append(annotation(0, bbox=[0, 0, 12, 8]))
    assert prepare(files, found) == 0
    stored = objects()
    assert sorted(stored) == [f"{i:02d}" for i in range(12)] and stored["02"] == []
    assert [each["box"] for each in stored["00"]] == [[3, 2, 9, 5], [0, 0, 12, 8]]
    assert all(np.array_equal(pixels(each["mask"]), MASK) for found_ in stored.values() for each in found_)
    assert [(each["label"], each["crowd"]) for name in ("01", "03") for each in stored[name]] == [(0, True), (1, False)]
    card = Card.load(data_dir() / "mine")
    assert card.columns == {"image": "image", "objects": "instances"} and card.classes == ("cell", "crack")
    assert "12 rows" in capsys.readouterr().out


@pytest.mark.parametrize("segmentation", [None, []], ids=str)
def test_if_an_annotation_has_no_mask_the_set_has_boxes_only_and_reports_it(
    files: Path, segmentation: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    found = content()
    found["annotations"][4]["segmentation"] = segmentation
    assert prepare(files, found) == 0
    card = Card.load(data_dir() / "mine")
    assert card.columns["objects"] == "boxes" and not any(
        each["mask"] for found_ in objects().values() for each in found_
    )
    assert (
        "Boxes only: 1 of 11 annotations have no segmentation." in card.notes
        and card.notes[1] in capsys.readouterr().out
    )
    assert catalogue("dataset")["coco"].build({"set": "mine"}).columns["objects"] == "boxes"


def test_another_file_can_validate(files: Path) -> None:
    save(files / "held out.json", json.dumps(content(range(9, 12))))
    assert prepare(files, content(range(9)), validation=files / "held out.json") == 0
    assert sorted(by_image("mine", "validation")) == ["09", "10", "11"] and len(by_image("mine", "train")) == 9
    card = Card.load(data_dir() / "mine")
    (data_dir() / "mine").rename(data_dir().parent / "away")
    assert main(["prepare", *shlex.split(card.command)]) == 0
    assert Card.load(data_dir() / "mine") == card


@pytest.mark.parametrize("elsewhere", [False, True], ids=["in one folder", "in folders of their own"])
def test_each_split_has_its_file_and_may_have_its_folder(files: Path, elsewhere: bool) -> None:
    given = {}
    for split, listed in {"validation": range(9, 11), "test": range(11, 12)}.items():
        save(files / f"{split}.json", json.dumps(content(listed)))
        given[split] = files / f"{split}.json"
        if elsewhere:
            for i in listed:
                save(files / f"{split} photos/{i:02d}.jpg", (files / f"photos/b/{i:02d}.jpg").read_bytes())
                (files / f"photos/b/{i:02d}.jpg").unlink()
            given[f"{split}_images"] = files / f"{split} photos"
    assert prepare(files, content(range(9)), **given) == 0
    assert [sorted(by_image("mine", split)) for split in ("train", "validation", "test")] == [
        [f"{i:02d}" for i in range(9)],
        ["09", "10"],
        ["11"],
    ]
    card = Card.load(data_dir() / "mine")
    (data_dir() / "mine").rename(data_dir().parent / "away")
    assert main(["prepare", *shlex.split(card.command)]) == 0
    assert Card.load(data_dir() / "mine") == card


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        (
            {"validation_images": "photos"},
            "--validation-images photos requires the COCO file of its images: --validation FILE",
        ),
        ({"test_images": "photos"}, "--test-images photos requires the COCO file of its images: --test FILE"),
        ({"test": "0.1"}, "--test 0.1: only the validation split can be a share; give the files of the test split"),
        ({"test": "nothing.json"}, "nothing.json can't be read: No such file"),
        ({"test_masks": "masks"}, "--test-masks is an option of `trainer prepare folder`, not of coco"),
    ],
    ids=str,
)
def test_options_that_contradict_or_need_one_another_are_a_mistake(
    files: Path, changed: dict[str, Any], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert prepare(files, content(), **changed) == 2
    assert expected in capsys.readouterr().err and not (data_dir() / "mine").exists()


def test_a_file_that_lists_no_images_is_a_mistake(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(files / "held out.json", json.dumps(content(range(0))))
    for split in ("validation", "test"):
        assert prepare(files, content(), **{split: files / "held out.json"}) == 2
        assert "held out.json lists no images" in capsys.readouterr().err


def test_all_files_have_the_same_categories(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = content(range(11, 12))
    other["categories"].reverse()
    save(files / "test.json", json.dumps(other))
    assert prepare(files, content(range(11)), test=files / "test.json") == 2
    assert "instances.json and " in (said := capsys.readouterr().err) and "test.json list different categories" in said


@pytest.mark.parametrize("listed", [range(12), range(11, 13)], ids=["the same file", "one image of two"])
def test_an_image_on_both_sides_of_the_split_is_refused_by_name(
    files: Path, listed: range, capsys: pytest.CaptureFixture[str]
) -> None:
    save(files / "photos/12.jpg", picture(12))
    save(files / "held out.json", json.dumps(content(listed)))
    assert prepare(files, content(), validation=files / "held out.json") == 2
    image, said = f"{files}/photos/{'a/00' if 0 in listed else 'b/11'}.jpg", capsys.readouterr().err
    assert (
        f"{12 if 0 in listed else 1} images are in more than one split" in said
        and f"\n  {image} (train), {image} (validation)\n" in said
    )
    assert not (data_dir() / "mine").exists()


def test_a_set_of_another_kind_is_not_replaced(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for i in range(12):
        save(files / f"texts/{'a' if i < 6 else 'b'}/{i:02d}.txt", "0 0.5 0.5 0.5 0.5")
    save(files / "classes.txt", "cell\n")
    yolo = {
        "name": "mine",
        "images": files / "photos",
        "labels": files / "texts",
        "classes": files / "classes.txt",
        "validation": 0.1,
    }
    assert main(["prepare", "yolo", *command_line(yolo)]) == 0
    card = Card.load(data_dir() / "mine")
    assert prepare(files, content()) == 2
    said, folder = capsys.readouterr().err, data_dir() / "mine"
    assert said.startswith(f"error: {folder} was made by `trainer prepare yolo --name mine --images ")
    assert "would be replaced by `trainer prepare coco --name mine --images " in said and said.endswith(
        f"; choose another name, or delete {folder}\n"
    )
    assert Card.load(folder) == card


def test_files_are_found_by_the_end_of_their_path(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(files / "photos/b/00.jpg", picture(60))
    assert prepare(files, content()) == 2
    assert (
        "exactly once; 1 are missing or ambiguous:\n  00.jpg matches photos/a/00.jpg and photos/b/00.jpg"
        in capsys.readouterr().err
    )
    found = content()
    found["images"][0]["file_name"] = "b\\00.jpg"
    assert prepare(files, found) == 0
    found["images"][1]["file_name"] = "../photos/a/01.jpg"
    assert prepare(files, found) == 2
    assert "../photos/a/01.jpg is missing" in capsys.readouterr().err


BAD: dict[str, dict[str, Any]] = {
    "00.jpg, object 1: its box (3, 2, 3, 5) has no area; correct or remove it": {"bbox": [3, 2, 0, 3]},
    "00.jpg, object 1: its box (3, 2, 9, 20) is not within the image, 12 x 8": {"bbox": [3, 2, 6, 18]},
    "00.jpg, object 1: its box (nan, 2, nan, 5) isn't finite": {"bbox": [float("nan"), 2, 6, 3]},
    "00.jpg, object 1: its label -1 is no class; classes are 0 to 1": {"category_id": 8},
    "00.jpg, object 1: its mask is damaged, or there is none": {"segmentation": [[3, 2, 9, 5]]},
    "00.jpg, object 1: its mask is damaged, or": {"segmentation": {"size": [12, 8], "counts": RUNS}},
    "00.jpg, object 1: its mask is damaged, or there": {"segmentation": {"size": [8, 12], "counts": "é"}},
    "00.jpg, object 1: its mask is not one of 12 x 8 pixels": {"segmentation": {"size": [8, 12], "counts": RUNS[:-1]}},
    "00.jpg, object 1: its mask has no pixels": {"segmentation": {"size": [8, 12], "counts": [96]}},
}


@pytest.mark.parametrize(("expected", "changed"), BAD.items(), ids=BAD)
def test_an_invalid_object_is_refused_or_dropped(
    files: Path, expected: str, changed: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    found = content()
    found["annotations"][0] |= changed
    assert prepare(files, found) == 2
    assert expected in capsys.readouterr().err and not (data_dir() / "mine").exists()
    assert prepare(files, found, invalid="drop") == 0
    assert objects()["00"] == [] and "1 invalid objects are left out" in capsys.readouterr().out


def test_a_polygon_far_outside_costs_no_memory(files: Path) -> None:
    found = content()
    found["annotations"][0]["segmentation"] = [[3, 2, 1e300, 2, 1e300, 5, 3, 5]]
    assert prepare(files, found) == 0
    assert pixels(objects()["00"][0]["mask"])[2:5, 3:].all()


def no_categories(found: dict[str, Any]) -> None:
    found["categories"] = []


def two_of_a_name(found: dict[str, Any]) -> None:
    found["categories"][0]["name"] = "crack"


def two_of_an_id(found: dict[str, Any]) -> None:
    found["images"][0]["id"] = 1


def unlisted(found: dict[str, Any]) -> None:
    found["annotations"][3]["image_id"] = 99


def no_images(found: dict[str, Any]) -> None:
    del found["images"]


def three_numbers(found: dict[str, Any]) -> None:
    found["annotations"][3]["bbox"] = [1, 2, 3]


def another_size(found: dict[str, Any]) -> None:
    found["images"][0]["width"] = 13


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (no_categories, "lists no categories"),
        (two_of_a_name, "instances.json: two categories have the same name"),
        (two_of_an_id, "instances.json: two images have the same id"),
        (unlisted, "instances.json: annotations.3.image_id: no image has the id 99"),
        (no_images, "instances.json is not a COCO instance file: images: Field required"),
        (three_numbers, "instances.json is not a COCO instance file: annotations.3.bbox.3: Field required"),
        (another_size, "photos/a/00.jpg is 12 x 8, but listed as 13 x 8"),
    ],
)
def test_an_invalid_file_is_a_mistake(
    files: Path, damage: Any, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    found = content()
    damage(found)
    assert prepare(files, found) == 2
    assert expected in capsys.readouterr().err and not (data_dir() / "mine").exists()


def test_both_files_have_the_same_categories(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = content(range(9, 12))
    other["categories"].reverse()
    save(files / "held out.json", json.dumps(other))
    assert prepare(files, content(range(9)), validation=files / "held out.json") == 2
    assert "list different categories" in capsys.readouterr().err
    save(files / "held out.json", "{")
    assert prepare(files, content(range(9)), validation=files / "held out.json") == 2
    assert "held out.json is not a COCO instance file: : Invalid JSON" in capsys.readouterr().err


def test_without_pycocotools_masks_are_refused_with_the_remedy(
    files: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pycocotools", None)
    assert prepare(files, content()) == 2
    assert "pip install 'recipe-trainer[detection]'" in capsys.readouterr().err
