from __future__ import annotations

import dataclasses
import io
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.unit.data.toy import SEGMENTATION, mask, masks, one, picture, prepared_row, read, rows, source
from trainer.data.archives import Member
from trainer.data.card import Card
from trainer.data.images import encode_png
from trainer.data.prepare import prepare
from trainer.data.source import DataInfo, Instance, Role, Row
from trainer.errors import UserError

# ---------------------------------------------------------------- rows


@pytest.mark.parametrize("format", ["JPEG", "PNG"])
def test_images_keep_their_bytes_and_their_name(tmp_path: Path, format: str) -> None:
    image = picture(1, format)
    row = prepared_row(tmp_path, {"image": Member("set/a.img", image), "mask": mask(1)})
    assert row["image"] == {"bytes": image, "path": "set/a.img"}
    assert (row["height"], row["width"]) == (4, 6)


def test_all_rows_arrive_in_order(tmp_path: Path) -> None:
    card = prepare(source(), tmp_path, None)
    assert {split: written.rows for split, written in card.splits.items()} == {"train": 20, "validation": 3}
    found = [row["image"]["bytes"] for split in ("train", "validation") for row in read(tmp_path / "toy", split)]
    assert found == [row["image"] for _, row in rows()]


def test_the_files_carry_the_features_that_datasets_reads(tmp_path: Path) -> None:
    from datasets import Features, Value
    from datasets import Image as ImageFeature

    columns: dict[str, Role] = {"image": "image", "mask": "mask", "label": "label"}
    prepare(one({"image": picture(1), "mask": mask(1), "label": 7}, columns), tmp_path, None)
    schema = pq.read_schema(tmp_path / "toy" / "train" / "00000.parquet")
    expected = {
        "image": ImageFeature(mode="RGB"),
        "mask": ImageFeature(mode="L"),
        "label": Value("int64"),
        "height": Value("int64"),
        "width": Value("int64"),
    }
    assert Features.from_arrow_schema(schema) == Features(expected)
    assert read(tmp_path / "toy")[0]["label"] == 7


def test_a_photograph_marked_as_rotated_is_stored_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees to see it upright
    row = prepared_row(tmp_path, {"image": picture(1, "PNG", exif=exif), "mask": mask(1, (4, 6))})
    stored = Image.open(io.BytesIO(row["image"]["bytes"]))
    assert (row["height"], row["width"]) == (6, 4)
    assert stored.getexif().get(0x0112) is None
    before = np.asarray(Image.open(io.BytesIO(picture(1))))
    assert np.array_equal(np.asarray(stored), np.rot90(before, -1))


def test_formats_that_the_stream_does_not_decode_become_png(tmp_path: Path) -> None:
    row = prepared_row(tmp_path, {"image": picture(1, "BMP"), "mask": mask(1)})
    stored = Image.open(io.BytesIO(row["image"]["bytes"]))
    assert stored.format == "PNG"
    assert np.array_equal(np.asarray(stored), np.asarray(Image.open(io.BytesIO(picture(1)))))


def test_a_palette_mask_keeps_its_indices_not_its_colours(tmp_path: Path) -> None:
    indices = np.array([[0, 1, 2], [3, 1, 255]], np.uint8)
    palette = Image.fromarray(indices).copy()
    palette.putpalette([200 - i % 100 for i in range(768)])
    file = io.BytesIO()
    palette.save(file, "PNG")
    four = dataclasses.replace(
        one({"image": picture(1, size=(3, 2)), "mask": file.getvalue()}), info=DataInfo(("a", "b", "c", "d"), 255)
    )
    prepare(four, tmp_path, None)
    stored = Image.open(io.BytesIO(read(tmp_path / "toy")[0]["mask"]["bytes"]))
    assert stored.mode == "L"
    assert np.array_equal(np.asarray(stored), indices)


def test_images_of_16_bits_are_stored_with_8_or_refused_but_never_cut_off(tmp_path: Path) -> None:
    """What Pillow shows of 16 bits of colour is their upper 8; of 16 bits of grey it would show white from 256 on."""
    header = b"\0\0\0\x06\0\0\0\x04\x10\x02\0\0\0"  # 6 x 4, 16 bits, RGB
    lines = b"".join(b"\0" + np.full((6, 3), 0x8001, ">u2").tobytes() for _ in range(4))
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(lines)), (b"IEND", b""))
    deep = b"\x89PNG\r\n\x1a\n" + b"".join(
        len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big") for kind, data in chunks
    )
    row = prepared_row(tmp_path, {"image": deep, "mask": mask(1)})
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(row["image"]["bytes"]))), np.full((4, 6, 3), 0x80))
    assert row["image"]["bytes"][24] == 8
    grey = io.BytesIO()
    Image.fromarray(np.full((4, 6), 4000, np.uint16)).save(grey, "PNG")
    with pytest.raises(
        UserError,
        match=r"set/deep\.png: this image can't be decoded \(it has mode I;16, not 8 bits per channel\); replace the "
        r"archive",
    ):
        prepare(one({"image": Member("set/deep.png", grey.getvalue()), "mask": mask(1)}), tmp_path / "other", None)


@pytest.mark.parametrize("column", ["image", "mask"])
def test_postscript_is_a_program_and_not_run(tmp_path: Path, column: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *_: pytest.fail("it was run"))
    program = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 6 4\n%%EndComments\nshowpage\n"
    with pytest.raises(UserError, match=rf"this {column} can't be decoded \(a PostScript file is a program\)"):
        prepare(one({"image": picture(1), "mask": mask(1)} | {column: program}), tmp_path, None)


def test_a_coloured_mask_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"set/m\.png: this mask can't be decoded \(.*mode RGB"):
        prepare(one({"image": picture(1), "mask": Member("set/m.png", picture(1))}), tmp_path, None)


@pytest.mark.parametrize("format", ["JPEG", "PNG"])
def test_a_damaged_image_is_an_error_that_names_it_and_nothing_is_left(tmp_path: Path, format: str) -> None:
    whole = picture(1, format, size=(64, 64))
    with pytest.raises(UserError, match=r"set/a\.img: this image can't be decoded"):
        prepare(
            one({"image": Member("set/a.img", whole[: len(whole) // 2]), "mask": mask(1, (64, 64))}), tmp_path, None
        )
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


def test_a_mask_of_another_size_is_an_error_that_names_the_image(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a\.png: sizes differ: image 6 x 4, mask 5 x 4"):
        prepare(one({"image": Member("a.png", picture(1)), "mask": mask(1, (5, 4))}), tmp_path, None)


def test_where_sizes_differ_every_file_of_the_sample_is_named(tmp_path: Path) -> None:
    row = {"image": Member("a.png", picture(1)), "mask": Member("m.png", mask(1, (5, 4))), "other": mask(1)}
    row |= {"last": Member("l.png", mask(1))}
    with pytest.raises(UserError, match=r"^a\.png, m\.png, l\.png: sizes differ: image 6 x 4, mask 5 x 4, other 6 x 4"):
        prepare(one(row, SEGMENTATION | {"other": "mask", "last": "mask"}), tmp_path, None)


def test_a_mask_without_a_file_is_not_reported_as_the_file_of_its_image(tmp_path: Path) -> None:
    wrong = {"can't be decoded": picture(1), "contains the labels 7": encode_png(np.full((4, 6), 7, np.uint8))}
    for problem, data in wrong.items():
        with pytest.raises(UserError, match=rf"^toy, train sample 0: this mask {problem}"):
            prepare(one({"image": Member("a.png", picture(1)), "mask": data}), tmp_path, None)


def test_an_invalid_object_is_reported_as_one_of_its_image_whatever_other_columns_there_are(tmp_path: Path) -> None:
    row = {"image": Member("a.png", picture(1)), "mask": Member("m.png", mask(1))}
    row |= {"objects": [Instance((0, 0, 2, 2), 9)]}
    with pytest.raises(UserError, match=r"^a\.png, object 1: its label 9 is no class"):
        prepare(one(row, SEGMENTATION | {"objects": "boxes"}), tmp_path, None)


def test_a_set_may_have_masks_and_objects_each_with_counts_of_its_own(tmp_path: Path) -> None:
    row = {"image": picture(1), "mask": mask(1), "objects": [Instance((0, 0, 2, 2), 0)]}
    card = prepare(one(row, SEGMENTATION | {"objects": "boxes"}), tmp_path, None)
    assert card.statistics == {"class_pixels": [0, 24], "class_objects": [1, 0]}


# ---------------------------------------------------------------- class frequencies


def test_the_card_counts_the_pixels_of_each_class_in_training_but_for_ignored_ones(tmp_path: Path) -> None:
    card = prepare(source(masks([0, 0, 1, 255], [0, 255, 255, 255], [1, 1, 1, 1])), tmp_path, None)
    assert card.statistics == {"class_pixels": [3, 1]}
    assert Card.load(tmp_path / "toy").info.statistics == {"class_pixels": [3, 1]}


def test_counts_are_stored_next_to_what_the_set_measures(tmp_path: Path) -> None:
    measured = dataclasses.replace(source(masks([0, 1], [1, 1])), statistics=lambda paths: {"mean": 0.5})
    assert prepare(measured, tmp_path, None).statistics == {"mean": 0.5, "class_pixels": [1, 1]}


def test_a_set_without_masks_has_no_counts(tmp_path: Path) -> None:
    labelled = source(lambda: iter([(split, {"label": 1}) for split in ("train", "validation")]), {"label": "label"})
    assert prepare(labelled, tmp_path, None).statistics == {}
    assert prepare(labelled, tmp_path, None) == Card.load(tmp_path / "toy")


@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_label_that_is_no_class_is_an_error_that_names_the_file(tmp_path: Path, split: str) -> None:
    def make() -> Iterator[tuple[str, Row]]:
        yield from rows()
        yield split, {"image": picture(1), "mask": Member("set/m.png", encode_png(np.full((4, 6), 2, np.uint8)))}

    with pytest.raises(
        UserError,
        match=r"set/m\.png: this mask contains the labels 2; classes are 0 to 1, and 255 is ignored; replace the ",
    ):
        prepare(source(make), tmp_path, None)
    unignored = dataclasses.replace(source(masks([0, 255], [0, 0])), info=DataInfo(("no", "yes")))
    with pytest.raises(
        UserError,
        match="train sample 0: this mask contains the labels 255; classes are 0 to 1, and none is ignored; replace",
    ):
        prepare(unignored, tmp_path, None)


@pytest.mark.parametrize(
    ("found", "hinted"), [([0, 7], 7), ([0, 1, 255], 255), ([7, 255], 255), ([7, 8], None)], ids=str
)
def test_the_message_about_a_label_that_is_no_class_says_how_to_ignore_it(
    tmp_path: Path, found: list[int], hinted: int | None
) -> None:
    described = dataclasses.replace(
        source(masks(found, [0] * len(found))), ignore_option="--ignore {}", remedy="correct it"
    )
    with pytest.raises(UserError) as raised:
        prepare(dataclasses.replace(described, info=DataInfo(("no", "yes"))), tmp_path, None)
    advice = (
        f"if {hinted} marks pixels to ignore, pass --ignore {hinted}; otherwise correct it" if hinted else "correct it"
    )
    assert str(raised.value).endswith(f"classes are 0 to 1, and none is ignored; {advice}")
    with pytest.raises(UserError, match="classes are 0 to 1, and 9 is ignored; correct it"):
        prepare(dataclasses.replace(described, info=DataInfo(("no", "yes"), 9)), tmp_path, None)
