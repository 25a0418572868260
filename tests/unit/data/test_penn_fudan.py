from __future__ import annotations

import os
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from tests.unit.data.objects import SIZE, by_image, picture, stored
from trainer.components import catalogue
from trainer.data.archives import members
from trainer.data.card import Card
from trainer.data.images import encode_png
from trainer.data.object_checks import run_lengths
from trainer.data.prepare import archives_dir, data_dir, prepare
from trainer.errors import UserError

NAMES = [f"FudanPed{i:05d}" for i in range(1, 61)]


def indices() -> np.ndarray:
    """Two pedestrians; the second is in two parts."""
    mask = np.zeros((SIZE[1], SIZE[0]), np.uint8)
    mask[1:5, 2:4] = 1
    mask[0, 8] = mask[7, 11] = 2
    return mask


@pytest.fixture
def files() -> dict[str, bytes]:
    """60 images; the last has nobody on it."""
    images = {f"PNGImages/{name}.png": picture(i, "PNG") for i, name in enumerate(NAMES)}
    masks = {f"PedMasks/{name}_mask.png": encode_png(indices() * (name != NAMES[-1])) for name in NAMES}
    return images | masks | {"readme.txt": b"read me", "Annotation/FudanPed00001.txt": b"not read"}


def prepared(folder: Path, files: Mapping[str, bytes]) -> Card:
    with zipfile.ZipFile(folder / "PennFudanPed.zip", "w") as archive:
        for name, data in files.items():
            archive.writestr(f"PennFudanPed/{name}", data)
    return prepare(catalogue("dataset")["penn_fudan"].build({}), data_dir(), folder, lambda line: None)


def test_every_value_of_a_mask_is_a_pedestrian_in_the_box_that_just_holds_it(
    tmp_path: Path, files: dict[str, bytes]
) -> None:
    card = prepared(tmp_path, files)
    found = by_image("penn_fudan", "train") | by_image("penn_fudan", "validation")
    assert sorted(found) == NAMES and found[NAMES[-1]] == []
    assert [(each["box"], each["label"]) for each in found[NAMES[0]]] == [([2, 1, 4, 5], 0), ([8, 0, 12, 8], 0)]
    for value, each in enumerate(found[NAMES[0]], start=1):
        runs = run_lengths(each["mask"])
        assert np.array_equal(np.repeat(np.arange(len(runs)) % 2, runs).reshape(SIZE).T, indices() == value)
    assert card.classes == ("pedestrian",) and card.columns["objects"] == "instances"


def test_the_split_is_fixed_and_50_validate(tmp_path: Path, files: dict[str, bytes]) -> None:
    prepared(tmp_path, files)
    assert sorted(by_image("penn_fudan", "train")) == [
        f"FudanPed{i:05d}" for i in (5, 9, 14, 15, 21, 32, 35, 38, 41, 45)
    ]


def test_what_is_missing_or_damaged_is_named(tmp_path: Path, files: dict[str, bytes]) -> None:
    mask = files.pop(f"PedMasks/{NAMES[7]}_mask.png")
    with pytest.raises(
        UserError,
        match=r"PennFudanPed\.zip contains images without masks, or masks without images: \['FudanPed00008'\]; replace",
    ):
        prepared(tmp_path, files)
    with pytest.raises(UserError, match=r"PedMasks/FudanPed00008_mask\.png can't be read as a mask"):
        prepared(tmp_path, files | {f"PedMasks/{NAMES[7]}_mask.png": mask[:40]})
    with pytest.raises(
        UserError, match=r"PNGImages/FudanPed00008\.png, object 1: its mask is not one of 12 x 8 pixels"
    ):
        prepared(tmp_path, files | {f"PedMasks/{NAMES[7]}_mask.png": encode_png(indices()[1:])})


@pytest.mark.realdata
@pytest.mark.skipif(
    not os.environ.get("TRAINER_ARCHIVES"), reason="TRAINER_ARCHIVES names no folder with PennFudanPed.zip"
)
def test_the_archive_holds_as_many_pedestrians_as_its_annotations_say() -> None:
    archives = archives_dir()
    assert archives is not None
    card = prepare(catalogue("dataset")["penn_fudan"].build({}), data_dir(), archives, lambda line: None)
    assert {split: written.rows for split, written in card.splits.items()} == {"train": 120, "validation": 50}
    found = by_image("penn_fudan", "train") | by_image("penn_fudan", "validation")
    assert len(found) == 170 and sum(map(len, found.values())) == 423
    assert all(row["objects"] for row in stored("penn_fudan", "validation"))
    shifts = []
    for name, text in members(archives / "PennFudanPed.zip", (".txt",)):
        if "/Annotation/" in name:
            boxes = re.findall(r"\((\d+), (\d+)\) - \((\d+), (\d+)\)", text.decode())
            objects = found[Path(name).stem]
            assert len(boxes) == len(objects)
            shifts += [
                tuple(np.subtract(each["box"], list(map(float, box)))) for each, box in zip(objects, boxes, strict=True)
            ]
    # They count from 1 and name the last pixel of a box. A dozen were drawn otherwise.
    assert shifts.count((-1, -1, 0, 0)) > 0.96 * 423
