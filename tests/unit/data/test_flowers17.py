from __future__ import annotations

import io
import tarfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from trainer.data.images import read_indices
from trainer.data.prepare import prepare
from trainer.data.sets.flowers17 import choose_validation, flowers17, group_duplicates
from trainer.data.source import Row
from trainer.errors import UserError

SIZE = (48, 32)
NUMBERS = [*range(1, 21), *range(81, 91), *range(1211, 1221)]


def photograph(seed: int, quality: int = 90) -> bytes:
    """A smooth random JPEG; the same seed in another quality is the same photograph re-encoded."""
    coarse = np.random.default_rng(seed).integers(0, 256, (16, 24, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(coarse).resize(SIZE, Image.Resampling.BICUBIC).save(file, "JPEG", quality=quality)
    return file.getvalue()


def trimap(size: tuple[int, int] = SIZE) -> bytes:
    """A palette PNG with the indices 0 to 5 in columns, whose colours are no indices."""
    image = Image.fromarray(
        (np.arange(size[0] * size[1]) % size[0] // 8 % 6).astype(np.uint8).reshape(size[1], size[0])
    )
    image.putpalette([255 - i for i in range(256) for _ in range(3)])
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def pack(path: Path, files: Mapping[str, bytes]) -> None:
    with tarfile.open(path, "w:gz") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


@pytest.fixture
def images() -> dict[str, bytes]:
    """All photographs, among them two without trimap and one twice, re-encoded."""
    files = {f"jpg/image_{number:04d}.jpg": photograph(number) for number in (*NUMBERS, 500, 501)}
    files["jpg/image_0007.jpg"] = photograph(3, quality=60)
    return {"jpg/files.txt": b"a listing"} | files


@pytest.fixture
def trimaps() -> dict[str, bytes]:
    return {f"trimaps/image_{number:04d}.png": trimap() for number in NUMBERS} | {"trimaps/imlist.mat": b"not read"}


def rows(folder: Path, images: Mapping[str, bytes], trimaps: Mapping[str, bytes]) -> list[tuple[str, Row]]:
    pack(folder / "17flowers.tgz", images)
    pack(folder / "trimaps.tgz", trimaps)
    source = flowers17()
    return list(source.rows({archive.name: folder / archive.name for archive in source.archives}))


def number(row: Row) -> int:
    return int(Path(row["image"].name).stem[-4:])


def test_trimaps_say_which_images_count(tmp_path: Path, images: dict[str, bytes], trimaps: dict[str, bytes]) -> None:
    found = rows(tmp_path, images, trimaps)
    assert sorted(number(row) for _, row in found) == NUMBERS
    assert all(row["image"].data == images[row["image"].name] for _, row in found)


def test_where_a_list_is_packed_it_says_which_images_count(
    tmp_path: Path, images: dict[str, bytes], trimaps: dict[str, bytes]
) -> None:
    found = rows(tmp_path, images, trimaps | {"trimaps/imlist.txt": b"1\n2\n3\n81\n82"})
    assert sorted(number(row) for _, row in found) == [1, 2, 3, 81, 82]


def test_flower_is_1_scenery_0_and_the_rest_ignored(
    tmp_path: Path, images: dict[str, bytes], trimaps: dict[str, bytes]
) -> None:
    mask = read_indices(rows(tmp_path, images, trimaps)[0][1]["mask"].data)
    assert mask.shape == (SIZE[1], SIZE[0])
    assert mask[0, ::8].tolist() == [255, 1, 0, 0, 0, 255]


def test_each_species_is_split_80_to_20_the_same_way_every_time(
    tmp_path: Path, images: dict[str, bytes], trimaps: dict[str, bytes]
) -> None:
    found = rows(tmp_path, images, trimaps)
    validation = [number(row) for split, row in found if split == "validation"]
    assert [sum((n - 1) // 80 == species for n in validation) for species in (0, 1, 15)] == [4, 2, 2]
    assert [(split, number(row)) for split, row in rows(tmp_path, images, trimaps)] == [
        (split, number(row)) for split, row in found
    ]


def test_the_split_does_not_change_between_versions() -> None:
    assert sorted(choose_validation([[n] for n in range(1, 41)])) == [1, 4, 9, 20, 22, 28, 30, 31]


def test_the_same_photograph_is_on_one_side(
    tmp_path: Path, images: dict[str, bytes], trimaps: dict[str, bytes]
) -> None:
    split = {number(row): side for side, row in rows(tmp_path, images, trimaps)}
    assert split[3] == split[7]


def test_known_duplicates_are_grouped_however_their_pixels_differ() -> None:
    numbers = (1213, 1214, 1226, 1245, 1248)
    hashes = dict(zip(numbers, np.random.default_rng(0).random((5, 256)) < 0.5, strict=True))
    assert group_duplicates(hashes) == [[1213], [1214, 1245], [1226, 1248]]


def test_a_group_too_large_for_the_validation_share_is_trained_on() -> None:
    assert choose_validation([[1, 2, 3], [4, 5, 6], [7, 8, 9], [10]]) == {10}


def test_groups_of_duplicates_are_found_and_never_divided() -> None:
    base = np.random.default_rng(0).random((100, 256)) < 0.5
    hashes = dict(enumerate(base, start=1))
    hashes[50] = hashes[10].copy()
    hashes[50][:20] ^= True  # re-encoded
    hashes[60] = hashes[50].copy()
    hashes[60][20:40] ^= True  # near the second, not the first: one group all the same
    groups = group_duplicates(hashes)
    assert [group for group in groups if len(group) > 1] == [[10, 50, 60]]
    assert sorted(n for group in groups for n in group) == sorted(hashes)
    chosen = choose_validation(groups)
    assert len(chosen & {10, 50, 60}) in (0, 3)
    assert len(chosen) == 20


def test_an_image_missing_from_the_archive_is_an_error(
    tmp_path: Path, images: dict[str, bytes], trimaps: dict[str, bytes]
) -> None:
    del images["jpg/image_0002.jpg"]
    with pytest.raises(UserError, match=r"17flowers\.tgz lacks images that have a trimap: \[2\]"):
        rows(tmp_path, images, trimaps)


def test_a_listed_image_without_trimap_is_an_error(
    tmp_path: Path, images: dict[str, bytes], trimaps: dict[str, bytes]
) -> None:
    with pytest.raises(UserError, match=r"imlist\.txt lists image 500, which has no trimap"):
        rows(tmp_path, images, trimaps | {"trimaps/imlist.txt": b"1 500"})


@pytest.mark.parametrize("name", ["jpg/image_0002.jpg", "trimaps/image_0002.png"])
def test_a_damaged_member_is_an_error_that_names_it(
    tmp_path: Path, images: dict[str, bytes], trimaps: dict[str, bytes], name: str
) -> None:
    for files in (images, trimaps):
        if name in files:
            files[name] = files[name][:40]
    with pytest.raises(UserError, match=name):
        rows(tmp_path, images, trimaps)


def test_a_trimap_of_another_size_is_an_error_that_names_the_image(
    tmp_path: Path, images: dict[str, bytes], trimaps: dict[str, bytes]
) -> None:
    rows(tmp_path, images, trimaps | {"trimaps/image_0002.png": trimap((40, 30))})
    with pytest.raises(UserError, match=r"image_0002.*sizes differ: image 48 x 32, mask 40 x 30"):
        prepare(flowers17(), tmp_path / "data", tmp_path)


def test_prepared_rows_hold_masks_of_their_images_size(
    tmp_path: Path, images: dict[str, bytes], trimaps: dict[str, bytes]
) -> None:
    rows(tmp_path, images, trimaps)
    card = prepare(flowers17(), tmp_path / "data", tmp_path)
    assert sum(split.rows for split in card.splits.values()) == len(NUMBERS)
    assert card.archives.keys() == {"17flowers.tgz", "trimaps.tgz"}
    assert "80 %" in " ".join(card.notes)
