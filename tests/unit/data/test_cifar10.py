from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.unit.data.test_cifar_batches import official
from trainer.components import catalogue
from trainer.data.archives import Member
from trainer.data.images import read_indices
from trainer.data.sets.cifar10 import CLASSES, cifar10, cifar10_horses, nearest_centre
from trainer.data.source import Row, Source
from trainer.errors import UserError

COLOURS = np.array([[250, 10, 10], [10, 250, 10], [10, 10, 250], [200, 200, 200]], np.uint8)


def pictures(seed: int, count: int) -> np.ndarray:
    """Images uint8 (N, 32, 32, 3) of four colours that vary a little."""
    random = np.random.default_rng(seed)
    return COLOURS[random.integers(0, 4, (count, 32, 32))] + random.integers(0, 5, (count, 32, 32, 3), dtype=np.uint8)


def pack(path: Path, files: dict[str, bytes], mode: str) -> None:
    with tarfile.open(path, mode) as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """An official archive of 10 images in each batch: one of each class, in order."""
    names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    flat = [pictures(seed, 10).transpose(0, 3, 1, 2).reshape(10, -1) for seed in range(6)]
    batches = {
        f"cifar-10-batches-py/{name}": official(pixels, list(range(10)))
        for name, pixels in zip(names, flat, strict=True)
    }
    pack(tmp_path / "cifar-10-python.tar.gz", batches | {"cifar-10-batches-py/batches.meta": b"not read"}, "w:gz")
    return tmp_path


def rows(source: Source, folder: Path) -> list[tuple[str, Row]]:
    return list(source.rows({archive.name: folder / archive.name for archive in source.archives}))


def statistics(source: Source, folder: Path) -> dict[str, list[list[float]]]:
    return source.statistics({archive.name: folder / archive.name for archive in source.archives})


@pytest.mark.parametrize("category", ["horse", "ship"])
def test_the_official_archive_gives_the_images_of_one_class_in_its_own_splits(archive: Path, category: str) -> None:
    index = CLASSES.index(category)
    found = rows(cifar10(category=category, num_colours=4), archive)
    assert [split for split, _ in found] == ["train"] * 5 + ["validation"]
    for seed, (_, row) in enumerate(found):
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(row["image"].data))), pictures(seed, 10)[index])


def test_categories_and_numbers_of_colours_are_sets_of_their_own() -> None:
    sources = [
        cifar10(),
        cifar10(category="ship"),
        cifar10(num_colours=8),
        cifar10_horses(),
        cifar10_horses(centres="kmeans", num_colours=8),
    ]
    assert len({source.name for source in sources}) == len(sources)
    assert [source.info.num_classes for source in sources] == [24, 24, 8, 24, 8]
    assert sources[1].command == "cifar10 category=ship num_colours=24"


def test_k_means_finds_the_colours_of_the_training_images_the_same_ones_every_time(archive: Path) -> None:
    centres = np.array(statistics(cifar10(category="cat", num_colours=4), archive)["colour_centres"])
    assert np.abs(np.sort(centres * 256, axis=0) - np.sort(COLOURS.astype(float), axis=0)).max() < 4
    again = np.array(statistics(cifar10(category="cat", num_colours=4), archive)["colour_centres"])
    assert np.array_equal(centres, again)


def test_a_mask_holds_the_nearest_centre_of_each_pixel(archive: Path) -> None:
    source = cifar10(category="cat", num_colours=4)
    centres = np.array(statistics(source, archive)["colour_centres"])
    for seed, (_, row) in enumerate(rows(source, archive)):
        pixels = pictures(seed, 10)[CLASSES.index("cat")]
        distances = np.linalg.norm(pixels[:, :, None] / 256 - centres, axis=-1)
        assert np.array_equal(read_indices(row["mask"]), distances.argmin(axis=-1))


def test_of_two_centres_equally_near_the_first_is_taken() -> None:
    assert nearest_centre(np.full((1, 1, 3), 128, np.uint8), np.array([[0.25] * 3, [0.75] * 3])).tolist() == [[0]]


def test_an_invalid_batch_is_an_error_that_names_it(archive: Path) -> None:
    pack(archive / "cifar-10-python.tar.gz", {"cifar-10-batches-py/data_batch_1": b"half a pickle"}, "w:gz")
    with pytest.raises(
        UserError, match=r"cifar-10-python\.tar\.gz: cifar-10-batches-py/data_batch_1: not a batch of CIFAR-10"
    ):
        rows(cifar10(num_colours=4, category="dog"), archive)


# ---------------------------------------------------------------- the horses as JPEG files


@pytest.fixture
def horses(tmp_path: Path) -> Path:
    """Four training and two test images of four squares each, which JPEG keeps apart; and 24 centres."""
    files = {}
    for i in range(6):
        image = np.roll(COLOURS, i, axis=0).reshape(2, 2, 3).repeat(16, axis=0).repeat(16, axis=1)
        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG")
        files[f"{'train' if i < 4 else 'test'}/horse/{i:04d}.jpg"] = file.getvalue()
    pack(tmp_path / "cifar10_horses.tar", files, "w")
    np.save(tmp_path / "colour_kmeans24_cat7.npy", np.random.default_rng(0).random((24, 3)))
    return tmp_path


def test_the_courses_centres_are_taken_as_they_are(horses: Path) -> None:
    source = cifar10_horses()
    centres = np.load(horses / "colour_kmeans24_cat7.npy")
    assert statistics(source, horses) == {"colour_centres": centres.tolist()}
    found = rows(source, horses)
    assert [split for split, _ in found] == ["train"] * 4 + ["validation"] * 2
    for _, row in found:
        assert isinstance(row["image"], Member)
        pixels = np.asarray(Image.open(io.BytesIO(row["image"].data)))
        assert np.array_equal(read_indices(row["mask"]), nearest_centre(pixels, centres))


def test_horses_can_have_centres_of_their_own(horses: Path) -> None:
    found = statistics(cifar10_horses(centres="kmeans", num_colours=4), horses)["colour_centres"]
    # JPEG moves colours a little.
    assert np.abs(np.sort(np.array(found) * 256, axis=0) - np.sort(COLOURS.astype(float), axis=0)).max() < 12


def test_the_course_has_24_centres_and_no_other_number() -> None:
    with pytest.raises(ValueError, match=r"the course has 24 colour centres, not 16: set data\.centres=kmeans"):
        cifar10_horses(num_colours=16)


def objects() -> bytes:
    file = io.BytesIO()
    np.save(file, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    return file.getvalue()


def saved(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"no array", "can't be read"),
        (objects(), "can't be read: .*allow_pickle=False"),
        (saved(np.full((24, 3), "red")), "can't be read"),
        (saved(np.zeros((24, 4))), r"contains an array of shape \(24, 4\), not \(24, 3\)"),
        (saved(np.full((24, 3), np.nan)), "contains non-finite numbers"),
    ],
    ids=["text", "pickle", "words", "shape", "nan"],
)
def test_an_invalid_file_of_centres_is_an_error_and_runs_nothing(horses: Path, content: bytes, why: str) -> None:
    (horses / "colour_kmeans24_cat7.npy").write_bytes(content)
    with pytest.raises(UserError, match=rf"colour_kmeans24_cat7\.npy {why}.*; replace it, or set data\.centres=kmeans"):
        rows(cifar10_horses(), horses)


def test_both_sets_can_be_named_in_a_recipe() -> None:
    assert {"cifar10", "cifar10_horses"} <= catalogue("dataset").keys()
