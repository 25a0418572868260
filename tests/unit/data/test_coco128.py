from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.unit.data.objects import by_image, picture, stored
from trainer.components import catalogue
from trainer.data.card import Card
from trainer.data.prepare import archives_dir, data_dir, prepare
from trainer.data.sets.coco128 import CLASSES
from trainer.errors import UserError


def pack(folder: Path, name: str, files: Mapping[str, bytes]) -> Path:
    with zipfile.ZipFile(folder / f"{name}.zip", "w") as archive:
        for path, data in files.items():
            archive.writestr(f"{name}/{path}", data)
    return folder


def prepared(name: str, archives: Path | None) -> Card:
    return prepare(catalogue("dataset")[name].build({}), data_dir(), archives, lambda line: None)


def grey() -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.arange(96, dtype=np.uint8).reshape(8, 12)).save(file, "JPEG")
    return file.getvalue()


def test_all_of_coco128_trains_and_validates_as_its_description_says(tmp_path: Path) -> None:
    files = {f"images/train2017/{i}.jpg": picture(i) for i in range(3)} | {
        "images/train2017/3.jpg": grey(),
        "README.txt": b"read me",
        "LICENSE": b"MIT",
    }
    labels = {
        "labels/train2017/0.txt": b"45 0.5 0.5 0.5 0.5\n79 0.5 0.5 1.000001 1\n",
        "labels/train2017/3.txt": b"0 0.25 0.25 0.5 0.5",
    }
    card = prepared("coco128", pack(tmp_path, "coco128", files | labels))
    assert by_image("coco128", "train") == by_image("coco128", "validation")
    found = {
        name: [(each["label"], each["box"]) for each in objects]
        for name, objects in by_image("coco128", "train").items()
    }
    assert found == {"0": [(45, [3, 2, 9, 6]), (79, [0, 0, 12, 8])], "1": [], "2": [], "3": [(0, [0, 0, 6, 4])]}
    assert "all 128 images train and validate" in " ".join(card.notes)
    # Which the stream decodes to RGB.
    assert Image.open(io.BytesIO(stored("coco128", "train")[3]["image"]["bytes"])).mode == "L"


def test_coco8_has_its_own_split(tmp_path: Path) -> None:
    files = {f"images/{split}/{i}.jpg": picture(i) for i, split in enumerate(("train", "train", "val"))}
    labels = {f"labels/{split}/{i}.txt": b"0 0.5 0.5 0.5 0.5" for i, split in enumerate(("train", "train", "val"))}
    prepared("coco8", pack(tmp_path, "coco8", labels | files))
    assert [sorted(by_image("coco8", split)) for split in ("train", "validation")] == [["0", "1"], ["2"]]


def test_a_damaged_label_file_is_named(tmp_path: Path) -> None:
    files = {"images/train/0.jpg": picture(0), "images/val/1.jpg": picture(1), "labels/val/1.txt": b"0 0.5 0.5\n"}
    with pytest.raises(
        UserError,
        match=r"coco8/labels/val/1\.txt:1: a line must be .*; replace \S+coco8\.zip with the official archive",
    ):
        prepared("coco8", pack(tmp_path, "coco8", files))


def test_the_classes_are_those_of_coco() -> None:
    assert len(CLASSES) == len({*CLASSES}) == 80
    assert [CLASSES[i] for i in (0, 9, 11, 60, 79)] == [
        "person",
        "traffic light",
        "stop sign",
        "dining table",
        "toothbrush",
    ]


@pytest.mark.realdata
@pytest.mark.skipif(
    not os.environ.get("TRAINER_ARCHIVES"), reason="TRAINER_ARCHIVES names no folder with coco128.zip and coco8.zip"
)
def test_the_archives_hold_the_boxes_that_are_known_of_them() -> None:
    card = prepared("coco128", archives_dir())
    found = by_image("coco128", "train")
    assert len(found) == 128 and sum(map(bool, found.values())) == 126 and sum(map(len, found.values())) == 929
    assert sum(card.statistics["class_objects"]) == 929 and np.count_nonzero(card.statistics["class_objects"]) == 71
    assert found == by_image("coco128", "validation") and "000000000086" in found
    small = prepared("coco8", archives_dir())
    assert [split.rows for split in small.splits.values()] == [4, 4]
    assert by_image("coco8", "train") | by_image("coco8", "validation") == {
        name: found[name] for name in sorted(found)[:8]
    }
