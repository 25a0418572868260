from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from trainer.data.images import read_indices
from trainer.data.prepare import archives_dir, prepare
from trainer.data.sets.stanford_background import CLASSES, stanford_background
from trainer.data.source import Row, in_validation
from trainer.errors import UserError

SIZE = (12, 8)
NUMBERS = [f"{number:07d}" for number in range(47, 87)]


def photograph(seed: int, size: tuple[int, int] = SIZE) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "JPEG")
    return file.getvalue()


def labels(seed: int) -> np.ndarray:
    """-1 to 7, as the label files have them."""
    return np.random.default_rng(seed).integers(-1, 8, (SIZE[1], SIZE[0]))


def text(values: np.ndarray) -> bytes:
    return "".join(" ".join(map(str, row)) + "\n" for row in values).encode()


def pack(folder: Path, files: Mapping[str, bytes]) -> dict[str, Path]:
    path = folder / "iccv09Data.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(f"iccv09Data/{name}")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return {path.name: path}


@pytest.fixture
def files() -> dict[str, bytes]:
    """The archive's files: two images are byte-equal, and some are not read."""
    images = {f"images/{number}.jpg": photograph(int(number)) for number in NUMBERS}
    images["images/0000080.jpg"] = images["images/0000050.jpg"]
    others = {
        "horizons.txt": b"0000047 12 8 4\n",
        "labels/0000047.layers.txt": b"0 1\n",
        "labels/0000047.surfaces.txt": b"0 1\n",
    }
    return {**{f"labels/{number}.regions.txt": text(labels(int(number))) for number in NUMBERS}, **images, **others}


def rows(folder: Path, files: Mapping[str, bytes]) -> list[tuple[str, Row]]:
    return list(stanford_background().rows(pack(folder, files)))


def splits(found: list[tuple[str, Row]]) -> dict[str, str]:
    return {Path(row["image"].name).stem: split for split, row in found}


def test_every_image_has_its_labels_and_unknown_pixels_are_the_ninth_class(
    tmp_path: Path, files: dict[str, bytes]
) -> None:
    found = rows(tmp_path, files)
    assert sorted(splits(found)) == NUMBERS
    for _, row in found:
        number = Path(row["image"].name).stem
        assert row["image"].data == files[f"images/{number}.jpg"]
        expected = np.where(labels(int(number)) == -1, CLASSES.index("misc"), labels(int(number)))
        assert np.array_equal(read_indices(row["mask"].data), expected)


def test_an_image_stays_where_it_is_whatever_others_there_are(tmp_path: Path, files: dict[str, bytes]) -> None:
    whole = splits(rows(tmp_path, files))
    drawn = [52, 56, 57, 62, 68, 71, 72, 73, 75, 76, 77, 85]
    assert sorted(number for number, split in whole.items() if split == "validation") == [
        f"{number:07d}" for number in drawn
    ]
    some = {name: data for name, data in files.items() if not any(number in name for number in NUMBERS[10:30])}
    assert splits(rows(tmp_path, some)).items() <= whole.items()


def test_a_fifth_of_many_images_validates() -> None:
    numbers = [f"{number:07d}" for number in range(2000)]
    assert 0.18 < sum(in_validation(number.encode(), 0.2) for number in numbers) / 2000 < 0.22


def test_byte_equal_images_are_on_one_side(tmp_path: Path, files: dict[str, bytes]) -> None:
    for number in NUMBERS[10:]:  # all the same photograph
        files[f"images/{number}.jpg"] = files["images/0000050.jpg"]
    found = splits(rows(tmp_path, files))
    assert len({found[number] for number in ("0000050", *NUMBERS[10:])}) == 1


def test_neighbours_in_the_archive_are_none_in_the_set(tmp_path: Path, files: dict[str, bytes]) -> None:
    order = list(splits(rows(tmp_path, files)))
    assert order != sorted(order) and order == list(splits(rows(tmp_path, files)))


@pytest.mark.parametrize("absent", ["images/0000060.jpg", "labels/0000060.regions.txt"])
def test_an_image_without_labels_or_labels_without_image_are_an_error(
    tmp_path: Path, files: dict[str, bytes], absent: str
) -> None:
    del files[absent]
    with pytest.raises(
        UserError,
        match=r"iccv09Data\.tar\.gz contains images without labels, or labels without images: \['0000060'\]; replace",
    ):
        rows(tmp_path, files)


@pytest.mark.parametrize(
    "damaged",
    [b"0 1 x\n", b"0 1 2\n0 1\n", b"0 1 8\n", b"0 -2 1\n", b"\xff\xfe"],
    ids=["word", "ragged", "8", "-2", "binary"],
)
def test_labels_that_are_none_are_an_error_that_names_the_file(
    tmp_path: Path, files: dict[str, bytes], damaged: bytes
) -> None:
    files["labels/0000060.regions.txt"] = damaged
    with pytest.raises(UserError, match=r"labels/0000060\.regions\.txt can't be read as labels"):
        rows(tmp_path, files)


def test_labels_of_another_size_are_an_error_that_names_them(tmp_path: Path, files: dict[str, bytes]) -> None:
    files["labels/0000060.regions.txt"] = text(labels(60)[:-1])
    pack(tmp_path, files)
    with pytest.raises(UserError, match=r"0000060\.regions\.txt: sizes differ: image 12 x 8, mask 12 x 7"):
        prepare(stanford_background(), tmp_path / "data", tmp_path)


def test_the_card_counts_the_pixels_of_each_class_in_the_training_split(
    tmp_path: Path, files: dict[str, bytes]
) -> None:
    split = splits(rows(tmp_path, files))
    card = prepare(stanford_background(), tmp_path / "data", tmp_path)
    masks = [
        np.where(labels(int(number)) == -1, 8, labels(int(number))) for number in NUMBERS if split[number] == "train"
    ]
    assert card.statistics["class_pixels"] == np.bincount(np.concatenate(masks).ravel(), minlength=9).tolist()
    assert card.classes[8] == "misc" and card.ignore_index is None


@pytest.mark.realdata
@pytest.mark.skipif(
    not os.environ.get("TRAINER_ARCHIVES"), reason="TRAINER_ARCHIVES names no folder with iccv09Data.tar.gz"
)
def test_the_real_archive_has_the_pixels_that_are_known_of_it(tmp_path: Path) -> None:
    folder = archives_dir()
    assert folder
    found = list(stanford_background().rows({"iccv09Data.tar.gz": folder / "iccv09Data.tar.gz"}))
    split = splits(found)
    assert 0.15 < list(split.values()).count("validation") / len(split) < 0.25
    assert split["6000257"] == split["6000348"]
    if len(split) == 594:  # of the official 715
        pixels = sum(np.bincount(read_indices(row["mask"].data).ravel(), minlength=9) for _, row in found)
        assert pixels.tolist() == [7213385, 6385109, 9181413, 3663591, 2157237, 9480240, 668596, 5895505, 9324]
