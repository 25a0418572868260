from __future__ import annotations

import argparse
import dataclasses
import errno
import io
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from filelock import FileLock
from PIL import Image

from tests.unit.data.test_cifar_batches import official
from trainer.commands import main
from trainer.commands import prepare as command
from trainer.data import parquet
from trainer.data.archives import Member
from trainer.data.card import Card
from trainer.data.images import encode_png, read_indices
from trainer.data.prepare import archives_dir, data_dir, ensure_prepared, prepare
from trainer.data.sets import cifar10
from trainer.data.source import Archive, DataInfo, Instance, Role, Row, Source
from trainer.errors import UserError
from trainer.signals import STOP, Stopped

SEGMENTATION: dict[str, Role] = {"image": "image", "mask": "mask"}


def picture(i: int, format: str = "PNG", size: tuple[int, int] = (6, 4), **options: Any) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(i).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, format, **options)
    return file.getvalue()


def mask(i: int, size: tuple[int, int] = (6, 4)) -> bytes:
    return encode_png(np.full((size[1], size[0]), i % 2, np.uint8))


def rows(train: int = 20, validation: int = 3) -> Iterator[tuple[str, Row]]:
    for i in range(train + validation):
        yield "train" if i < train else "validation", {"image": picture(i), "mask": mask(i)}


def source(make: Callable[[], Iterator[tuple[str, Row]]] = rows, columns: Mapping[str, Role] = SEGMENTATION) -> Source:
    return Source("toy", DataInfo(("no", "yes"), 255), columns, lambda archives: make(), notes=("Split by hand.",))


def one(row: Row, columns: Mapping[str, Role] = SEGMENTATION) -> Source:
    return source(lambda: iter([("train", row), ("validation", row)]), columns)


def read(folder: Path, split: str = "train") -> list[Row]:
    card = Card.load(folder)
    return [row for path in card.files(folder, split) for row in pq.read_table(path).to_pylist()]


def prepared_row(tmp_path: Path, row: Row, columns: Mapping[str, Role] = SEGMENTATION) -> Row:
    prepare(one(row, columns), tmp_path, None)
    return read(tmp_path / "toy")[0]


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


def test_a_photograph_that_says_it_is_rotated_is_stored_upright(tmp_path: Path) -> None:
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
        match=r"set/deep\.png: this image can't be decoded \(it has mode I;16, not 8 bits a channel\); replace the "
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
    wrong = {"can't be decoded": picture(1), "holds the labels 7": encode_png(np.full((4, 6), 7, np.uint8))}
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


def test_a_split_without_samples_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no validation samples"):
        prepare(source(lambda: rows(3, 0)), tmp_path, None)


def test_a_set_of_any_kind_may_have_a_test_split(tmp_path: Path) -> None:
    def three() -> Iterator[tuple[str, Row]]:
        yield from rows()
        yield "test", {"image": picture(99), "mask": mask(1)}

    card = prepare(dataclasses.replace(source(three), splits=("train", "validation", "test")), tmp_path, None)
    assert {split: written.rows for split, written in card.splits.items()} == {"train": 20, "validation": 3, "test": 1}
    assert read(tmp_path / "toy", "test")[0]["image"]["bytes"] == picture(99)
    assert card.statistics == prepare(source(), tmp_path / "other", None).statistics
    with pytest.raises(UserError, match="no test samples"):
        prepare(dataclasses.replace(source(), splits=("train", "validation", "test")), tmp_path / "third", None)


# ---------------------------------------------------------------- row groups and files


@pytest.mark.parametrize("count", [3, 8, 20, 511, 512, 700])
def test_row_groups_are_small_many_and_even(tmp_path: Path, count: int) -> None:
    def labels() -> Iterator[tuple[str, Row]]:
        for i in range(count):
            yield "train", {"label": i}
        yield "validation", {"label": 0}

    groups = prepare(source(labels, {"label": "label"}), tmp_path, None).row_groups("train")
    assert sum(groups) == count
    assert len(groups) >= min(8, count)
    assert max(groups) <= 64
    assert max(groups[-8:]) - min(groups[-8:]) <= 1
    assert [row["label"] for row in read(tmp_path / "toy")] == list(range(count))


def test_large_rows_make_small_row_groups_and_files_of_bounded_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = len(picture(0))
    monkeypatch.setattr(parquet, "GROUP_BYTES", 2 * size)
    monkeypatch.setattr(parquet, "FILE_BYTES", 8 * size)
    card = prepare(source(lambda: rows(40)), tmp_path, None)
    assert max(card.row_groups("train")) <= 2
    assert len(card.splits["train"].files) > 3
    for shard, path in zip(card.splits["train"].files, card.files(tmp_path / "toy", "train"), strict=True):
        metadata = pq.read_metadata(path)
        assert [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)] == list(shard.row_groups)
    assert [row["image"]["bytes"] for row in read(tmp_path / "toy")] == [row["image"] for _, row in rows(40)][:40]


def test_the_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    first, second = (prepare(source(), tmp_path / name, None) for name in "ab")
    assert first == second
    assert first.fingerprint == second.fingerprint


# ---------------------------------------------------------------- class frequencies


def masks(*values: list[int]) -> Callable[[], Iterator[tuple[str, Row]]]:
    """Training samples whose masks have one row each, the last one for validation."""

    def make() -> Iterator[tuple[str, Row]]:
        for i, row in enumerate(values):
            size = (len(row), 1)
            yield (
                "train" if i + 1 < len(values) else "validation",
                {"image": picture(i, size=size), "mask": encode_png(np.array([row], np.uint8))},
            )

    return make


def test_the_card_counts_the_pixels_of_each_class_in_training_but_for_ignored_ones(tmp_path: Path) -> None:
    card = prepare(source(masks([0, 0, 1, 255], [0, 255, 255, 255], [1, 1, 1, 1])), tmp_path, None)
    assert card.statistics == {"class_pixels": [3, 1]}
    assert Card.load(tmp_path / "toy").info.statistics == {"class_pixels": [3, 1]}


def test_counts_stand_beside_what_the_set_measures(tmp_path: Path) -> None:
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
        match=r"set/m\.png: this mask holds the labels 2; classes are 0 to 1, and 255 is ignored; replace the archive",
    ):
        prepare(source(make), tmp_path, None)
    unignored = dataclasses.replace(source(masks([0, 255], [0, 0])), info=DataInfo(("no", "yes")))
    with pytest.raises(
        UserError,
        match="toy, train sample 0: this mask holds the labels 255; classes are 0 to 1, and none is ignored; replace",
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
        f"if {hinted} marks pixels that don't count, pass --ignore {hinted}; otherwise correct it"
        if hinted
        else "correct it"
    )
    assert str(raised.value).endswith(f"classes are 0 to 1, and none is ignored; {advice}")
    with pytest.raises(UserError, match="classes are 0 to 1, and 9 is ignored; correct it"):
        prepare(dataclasses.replace(described, info=DataInfo(("no", "yes"), 9)), tmp_path, None)


def test_a_card_without_counts_is_made_again_which_is_said_in_one_line(tmp_path: Path) -> None:
    card = prepare(source(), tmp_path, None)
    tree = json.loads((tmp_path / "toy/card.json").read_text())
    del tree["statistics"], tree["command"], tree["version"]  # as it was written before there were any
    (tmp_path / "toy/card.json").write_text(json.dumps(tree))
    said: list[str] = []
    assert ensure_prepared(source(), tmp_path, None, said.append) == card
    assert said == [
        f"{tmp_path / 'toy'} is prepared again: its card has no class frequencies",
        f"preparing toy in {tmp_path / 'toy'}",
    ]


def test_a_set_of_files_in_another_version_is_made_again(tmp_path: Path) -> None:
    prepare(dataclasses.replace(source(), version="1"), tmp_path, None)
    said: list[str] = []
    card = ensure_prepared(dataclasses.replace(source(), version="2"), tmp_path, None, said.append)
    assert (
        card.version == "2"
        and said[0] == f"{tmp_path / 'toy'} is prepared again: the name, size or time of a file has changed"
    )
    assert ensure_prepared(dataclasses.replace(source(refuse), version="2"), tmp_path, None) == card


# ---------------------------------------------------------------- once, whole, by one process


def refuse() -> Iterator[tuple[str, Row]]:
    raise AssertionError("the set was prepared a second time")


def test_a_prepared_set_is_returned_as_it_is(tmp_path: Path) -> None:
    card = prepare(source(), tmp_path, None)
    assert prepare(source(refuse), tmp_path, None) == card
    assert ensure_prepared(source(refuse), tmp_path, None) == card
    assert card == Card.load(tmp_path / "toy")
    assert card.notes == ("Split by hand.",)


def test_a_ready_set_needs_no_writable_folder(tmp_path: Path) -> None:
    card = ensure_prepared(source(), tmp_path, None)
    (tmp_path / ".toy.lock").unlink()
    assert ensure_prepared(source(refuse), tmp_path, None) == card
    assert not (tmp_path / ".toy.lock").exists()


def damage_card(folder: Path) -> None:
    (folder / "card.json").write_text("{")


def cut_file(folder: Path) -> None:
    (folder / "train" / "00000.parquet").write_bytes(b"PAR1")


@pytest.mark.parametrize("damage", [damage_card, cut_file])
def test_a_damaged_set_is_prepared_again(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    card = prepare(source(), tmp_path, None)
    damage(tmp_path / "toy")
    said: list[str] = []
    assert prepare(source(), tmp_path, None, said.append) == card
    card.verify(tmp_path / "toy")
    assert str(tmp_path / "toy") in said[0]
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["toy"]


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"info": DataInfo(("no", "maybe"), 255)}, "class 1 was yes and is now maybe"),
        ({"info": DataInfo(("no", "yes", "maybe"), 255)}, "class 2 was absent and is now maybe"),
        ({"info": DataInfo(("no", "yes"))}, "the ignored label was 255 and is now absent"),
        ({"columns": SEGMENTATION | {"other": "mask"}}, "column other was absent and is now mask"),
        ({"splits": ("train", "validation", "test")}, "split test was absent and is now present"),
        (
            {"version": "2", "command": "toy --ignore 3 --invalid drop"},
            "--invalid was refuse and is now drop, --ignore was absent and is now 3",
        ),
        (
            {"info": DataInfo(tuple("abcdefgh"), 255)},
            "class 0 was no and is now a, class 1 was yes and is now b, "
            + "class 2 was absent and is now c, class 3 was absent and is now d, class 4 was absent and is now e, …",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_set_that_is_described_otherwise_is_prepared_again_and_the_command_says_what_changed(
    tmp_path: Path, changed: dict[str, Any], reason: str
) -> None:
    def three() -> Iterator[tuple[str, Row]]:
        for split, row in (*rows(), ("test", {"image": picture(99), "mask": mask(0)})):
            if split in after.splits:
                yield split, row | {"other": mask(0)}

    before = dataclasses.replace(source(), version="1", command="toy --invalid refuse")
    after = dataclasses.replace(source(three), **{"version": "1", "command": "toy --invalid refuse"} | changed)
    prepare(before, tmp_path, None)
    said: list[str] = []
    card = ensure_prepared(after, tmp_path, None, said.append)
    assert said == [f"{tmp_path / 'toy'} is prepared again: {reason}", f"preparing toy in {tmp_path / 'toy'}"]
    assert (card.info, card.columns, tuple(card.splits), card.version) == (
        after.info,
        after.columns,
        after.splits,
        after.version,
    )


def test_a_set_that_another_kind_of_command_made_of_files_is_left_alone(tmp_path: Path) -> None:
    card = prepare(dataclasses.replace(source(), version="1", command="yolo --name toy"), tmp_path, None)
    for other in (
        {"version": "1", "command": "coco --name toy"},
        {"version": "", "command": ""},
        {"version": "", "command": "cifar10 category=ship"},
    ):
        with pytest.raises(UserError) as raised:
            ensure_prepared(dataclasses.replace(source(refuse), **other), tmp_path, None)
        assert str(raised.value) == (
            f"{tmp_path / 'toy'} was made by `trainer prepare yolo --name toy`, which `trainer prepare "
            f"{other['command'] or 'toy'}` would replace; "
            f"choose another name, or delete {tmp_path / 'toy'}"
        )
    assert Card.load(tmp_path / "toy") == card


def test_a_catalogue_set_that_an_earlier_version_made_without_noting_the_command_is_prepared_again(
    tmp_path: Path,
) -> None:
    prepare(source(masks([0, 1], [1, 1])), tmp_path, None)
    again = dataclasses.replace(source(), info=DataInfo(("no", "yes", "maybe"), 255), command="cifar10 category=ship")
    assert ensure_prepared(again, tmp_path, None).command == "cifar10 category=ship"


def test_a_folder_that_is_not_ours_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "toy").mkdir()
    (tmp_path / "toy" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="isn't a prepared data set; move it away"):
        prepare(source(), tmp_path, None)
    assert (tmp_path / "toy" / "thesis.txt").read_text() == "mine"


def in_child(body: Callable[[], None]) -> int | None:
    """Runs `body` in a forked process; returns its exit code."""
    child = multiprocessing.get_context("fork").Process(target=body)
    child.start()
    child.join()
    return child.exitcode


def test_a_killed_prepare_leaves_no_set_and_the_next_one_cleans_up(tmp_path: Path) -> None:
    def killed() -> Iterator[tuple[str, Row]]:
        yield from rows()
        os.kill(os.getpid(), signal.SIGKILL)

    assert in_child(lambda: prepare(source(killed), tmp_path, None) and None) == -signal.SIGKILL
    assert (tmp_path / ".toy.partial" / "train").exists()  # it died in the middle
    assert not (tmp_path / "toy").exists()
    assert prepare(source(), tmp_path, None).splits["train"].rows == 20
    assert sorted(path.name for path in tmp_path.iterdir()) == [".toy.lock", "toy"]


def test_an_interrupted_prepare_leaves_nothing(tmp_path: Path) -> None:
    def interrupted() -> Iterator[tuple[str, Row]]:
        yield from rows()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(source(interrupted), tmp_path, None)
    assert [path.name for path in tmp_path.iterdir()] == [".toy.lock"]


def test_of_two_processes_one_prepares_and_the_other_says_that_it_waits(tmp_path: Path) -> None:
    started, waits = threading.Event(), threading.Event()

    def slow() -> Iterator[tuple[str, Row]]:
        started.set()
        assert waits.wait(60)
        yield from rows()

    def say(line: str) -> None:
        assert "waiting for another process" in line
        waits.set()

    first = threading.Thread(target=prepare, args=(source(slow), tmp_path, None))
    first.start()
    assert started.wait(60)
    card = prepare(source(refuse), tmp_path, None, say)
    first.join()
    assert card.splits["train"].rows == 20


def asked_after(rows_before: int) -> Callable[[], Iterator[tuple[str, Row]]]:
    """Rows, among which a stop is asked for."""

    def make() -> Iterator[tuple[str, Row]]:
        for number, row in enumerate(rows()):
            if number == rows_before:
                STOP.signal_name = "SIGTERM"
            assert number <= rows_before, "it went on"
            yield row

    return make


@pytest.fixture
def stop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(STOP, "signal_name", None)


@pytest.mark.usefixtures("stop")
def test_a_stop_that_is_asked_for_while_preparing_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        prepare(source(asked_after(7)), tmp_path, None)
    assert [path.name for path in tmp_path.iterdir()] == [".toy.lock"]


@pytest.mark.usefixtures("stop")
def test_a_stop_is_noticed_while_checksums_are_compared(tmp_path: Path) -> None:
    ensure_prepared(source(), tmp_path, None)
    (tmp_path / "toy" / "verified.json").unlink()
    STOP.signal_name = "SIGTERM"
    with pytest.raises(Stopped):
        ensure_prepared(source(), tmp_path, None)


@pytest.mark.usefixtures("stop")
def test_a_stop_is_noticed_while_another_process_prepares(tmp_path: Path) -> None:
    def say(line: str) -> None:
        assert "waiting for another process" in line
        STOP.signal_name = "SIGTERM"

    with FileLock(tmp_path / ".toy.lock"), pytest.raises(Stopped):
        prepare(source(), tmp_path, None, say)


@pytest.mark.parametrize("killed", [False, True], ids=["finishes", "is killed"])
def test_a_process_waits_for_one_that_prepares_and_takes_over_if_that_is_killed(tmp_path: Path, killed: bool) -> None:
    fork = multiprocessing.get_context("fork")
    started, waits, go_on = fork.Event(), fork.Event(), fork.Event()
    made = tmp_path / "made"

    def slow() -> Iterator[tuple[str, Row]]:
        with made.open("a") as file:
            file.write("x")
        yield from rows(3, 1)
        if not started.is_set():
            started.set()
            assert go_on.wait(60)
        yield from rows()

    def second() -> None:
        card = prepare(source(slow), tmp_path, None, lambda line: waits.set() if "waiting" in line else None)
        assert card.splits["train"].rows == 23

    first = fork.Process(target=prepare, args=(source(slow), tmp_path, None))
    first.start()
    assert started.wait(60)
    other = fork.Process(target=second)
    other.start()
    assert waits.wait(60)
    first.kill() if killed else go_on.set()
    first.join()
    other.join()
    assert (first.exitcode, other.exitcode) == (-signal.SIGKILL if killed else 0, 0)
    assert made.read_text() == "x" * (1 + killed)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".toy.lock", "made", "toy"]
    Card.load(tmp_path / "toy").verify(tmp_path / "toy")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 4 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    try:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(folder)], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("a small disk can only be mounted by root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_fills_up_is_one_error_and_nothing_half_written_stays(disk: Path) -> None:
    def large() -> Iterator[tuple[str, Row]]:
        for i in range(1000):
            yield "train", {"image": picture(i, size=(100, 100)), "mask": mask(i, (100, 100))}

    with pytest.raises(
        UserError,
        match=rf"toy can't be written to {disk}: No space left on device \([0-4] MiB free\); make room, or set "
        r"TRAINER_DATA",
    ):
        prepare(source(large), disk, None)
    assert [path.name for path in disk.iterdir()] == [".toy.lock"]
    assert shutil.disk_usage(disk).used < 2**16  # no deleted file is held open either


def test_an_archive_that_doesnt_fit_on_the_disk_is_one_error(disk: Path, tmp_path: Path) -> None:
    (tmp_path / "large.tgz").write_bytes(bytes(8 * 2**20))
    archived = dataclasses.replace(source(), archives=(Archive("large.tgz", ((tmp_path / "large.tgz").as_uri(),)),))
    with pytest.raises(UserError, match=r"large\.tgz: .*No space left on device"):
        prepare(archived, disk, None)
    assert not [path for path in disk.rglob("*") if path.is_file() and path.stat().st_size]


def test_a_disk_that_cannot_be_written_serves_a_prepared_set_and_refuses_a_new_one(disk: Path, tmp_path: Path) -> None:
    prepare(source(), disk, None)
    (disk / "toy" / "verified.json").unlink()
    os.utime(disk / "toy/train/00000.parquet", ns=(0, 0))  # copied there
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    said: list[str] = []
    card = ensure_prepared(source(refuse), disk, None, said.append)
    assert card.splits["train"].rows == 20 and said == []
    other = Source("other", DataInfo(("no", "yes"), 255), SEGMENTATION, source().rows)
    with pytest.raises(
        UserError, match=rf"other can't be written to {disk}: Read-only file system .* or set TRAINER_DATA"
    ):
        prepare(other, disk, None)
    assert [path.name for path in disk.iterdir() if "other" in path.name] == []


def test_a_file_that_changed_after_it_was_prepared_is_refused_when_training_starts(tmp_path: Path) -> None:
    ensure_prepared(source(), tmp_path, None)
    path = tmp_path / "toy/train/00000.parquet"
    content = bytearray(path.read_bytes())
    content[1000] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(0, 0))
    for _ in range(2):
        with pytest.raises(
            UserError,
            match=r"train/00000\.parquet has changed since it was prepared; delete .*toy, then `trainer prepare toy`",
        ):
            ensure_prepared(source(refuse), tmp_path, None)


def test_a_full_disk_is_an_error_that_says_where_and_how_much_is_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: object, rows: list[Row]) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(parquet.SplitWriter, "_write_group", full)
    with pytest.raises(
        UserError,
        match=rf"toy can't be written to {tmp_path}: No space left on device \(\d+ MiB free\); make room, or set "
        r"TRAINER_DATA",
    ):
        prepare(source(), tmp_path, None)
    assert [path.name for path in tmp_path.iterdir()] == [".toy.lock"]


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/data: Not a directory"):
        prepare(source(), tmp_path / "file" / "data", None)


# ---------------------------------------------------------------- surroundings


def test_folders_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRAINER_DATA", "elsewhere")
    monkeypatch.setenv("TRAINER_ARCHIVES", "archives")
    assert (data_dir(), archives_dir()) == (Path("elsewhere"), Path("archives"))
    monkeypatch.delenv("TRAINER_DATA")
    monkeypatch.delenv("TRAINER_ARCHIVES")
    assert (data_dir(), archives_dir()) == (Path("data"), None)


def test_indices_survive_encoding() -> None:
    indices = np.arange(256, dtype=np.uint8).reshape(16, 16)
    assert np.array_equal(read_indices(encode_png(indices)), indices)


def parsed(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.parse(parser, words)


def call(*words: str) -> int:
    return command.run(parsed(*words))


def test_the_command_prepares_tells_and_verifies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TRAINER_DATA", str(tmp_path))
    assert call("shapes") == 0
    out = capsys.readouterr().out
    for expected in ("1651 rows", "1500 train", "151 validation", "circle", str(tmp_path / "shapes")):
        assert expected in out
    path = tmp_path / "shapes" / "train" / "00000.parquet"
    content = bytearray(path.read_bytes())
    content[1000] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"train/00000\.parquet has changed"):
        call("shapes", "--verify")


def test_the_command_names_the_nearest_data_set() -> None:
    with pytest.raises(UserError, match="unknown data set 'flowers'; did you mean 'flowers17'"):
        call("flowers")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["cifar10", "categry=ship"], "command line: categry: unknown key; did you mean 'category'?"),
        (["cifar10", "category=shipp"], r"command line: category: must be 'airplane', .* or 'truck' \(got 'shipp'\)"),
        (
            ["cifar10", "num_colours=1", "category=3"],
            r"(?s)command line: category: .*command line: num_colours: must be greater than or equal to 2",
        ),
        (["cifar10", "ship"], r"command line: an override is key\.path=value"),
        (["shapes", "batch_size=3"], "command line: batch_size: unknown key; there are none"),
        (["hub", "image=a", "mask=b"], "command line: path: this key is required"),
        (["cifar10_horses", "num_colours=16"], "cifar10_horses: the course has 24 colour centres, not 16"),
        (
            ["shapes", "--name", "mine"],
            "--name belongs to `trainer prepare folder` or `trainer prepare yolo` or `trainer prepare coco`, not to "
            "shapes",
        ),
        (["folder", "set=mine"], "trainer prepare folder --name NAME --images DIR"),
    ],
)
def test_the_command_takes_the_keys_of_the_data_set_and_refuses_others(words: list[str], expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        call(*words)


def test_the_command_prepares_what_its_keys_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    pixels = np.random.default_rng(0).integers(0, 256, (2, 3072), dtype=np.uint8)
    (tmp_path / "archives").mkdir()
    with tarfile.open(tmp_path / "archives/cifar-10-python.tar.gz", "w:gz") as archive:
        for name in names:
            batch = official(pixels, [8, 8])  # ships
            info = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            info.size = len(batch)
            archive.addfile(info, io.BytesIO(batch))
    monkeypatch.setattr(cifar10, "OFFICIAL", dataclasses.replace(cifar10.OFFICIAL, sha256=None))
    assert call("cifar10", "category=ship", "num_colours=3", "--archives", str(tmp_path / "archives")) == 0
    card = Card.load(data_dir() / "cifar10_ship_kmeans3")
    assert card.command == "cifar10 category=ship num_colours=3" and len(card.statistics["colour_centres"]) == 3
    assert sum(card.statistics["class_pixels"]) == 10 * 32 * 32
    assert "colour 2 " in capsys.readouterr().out


@pytest.mark.parametrize(
    "words",
    [
        ("cifar10", "category=ship", "num_colours=3", "--verify", "--archives", "there"),
        ("--archives", "there", "--verify", "cifar10", "category=ship", "num_colours=3"),
        ("--archives=there", "cifar10", "category=ship", "--verify", "num_colours=3"),
        ("--verify", "cifar10", "--archives", "there", "category=ship", "num_colours=3"),
    ],
    ids=" ".join,
)
def test_options_and_keys_stand_in_any_order_before_and_after_the_name(words: tuple[str, ...]) -> None:
    args = parsed(*words)
    assert (args.dataset, args.archives, args.verify) == ("cifar10", Path("there"), True)
    assert args.settings == ["category=ship", "num_colours=3"]


def test_a_folder_that_is_called_like_a_data_set_is_not_taken_for_one() -> None:
    args = parsed("--images", "yolo", "--ignore", "3", "folder", "--masks", "coco", "--name=mine", "--classes", "hub")
    assert args.dataset == "folder" and args.name == "mine" and args.ignore == 3
    assert [args.images, args.masks, args.classes] == [Path("yolo"), Path("coco"), Path("hub")]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--masks", "m", "yolo", "--name", "x"], "--masks belongs to `trainer prepare folder`, not to yolo"),
        (["coco", "--labels=l"], "--labels belongs to `trainer prepare yolo`, not to coco"),
        (["shapes", "--archive", "x", "--images", "i"], "--images belongs to `trainer prepare folder` or `trainer"),
        (["folder", "--imges", "x"], "--imges is no option of `trainer prepare folder`; did you mean '--images'?"),
        (["shapes", "--verfy"], "--verfy is no option of `trainer prepare shapes`; did you mean '--verify'?"),
        (["--archives", "x", "flower17"], "unknown data set 'flower17'; did you mean 'flowers17'?"),
        (["yolo", "--name", "x"], "--images, --labels, --classes are missing: trainer prepare yolo --name NAME "),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_an_option_that_a_data_set_does_not_have_is_a_mistake(
    words: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["prepare", *words]) == 2
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize("words", [[], ["folder", "--ignore", "road"], ["yolo", "--invalid", "keep"]], ids=" ".join)
def test_a_command_line_that_argparse_refuses_is_a_mistake_with_the_usage(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["prepare", *words])
    assert ended.value.code == 2 and capsys.readouterr().err.startswith(
        " ".join(["usage: trainer prepare", *words[:1]])
    )


@pytest.mark.parametrize(
    ("kind", "own", "foreign"),
    [
        ("folder", ["--masks", "--ignore", "--validation-masks", "data: {name: folder"], ["--labels", "--annotations"]),
        ("yolo", ["--labels", "--invalid", "--test-labels", "data: {name: yolo"], ["--masks", "--annotations"]),
        ("coco", ["--annotations", "--invalid", "--test-images", "data: {name: coco"], ["--masks", "--labels"]),
        ("cifar10", ["--archives", "key=value", "category, num_colours"], ["--name", "--images"]),
    ],
)
def test_help_lists_the_options_of_one_data_set_alone_with_an_example(
    kind: str, own: list[str], foreign: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["prepare", kind, "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert ended.value.code == 0 and f"trainer prepare {kind} " in said
    assert all(each in said for each in own) and not any(each in said for each in foreign)


def test_help_does_not_wait_for_torch() -> None:
    script = "import sys\nfrom trainer.commands import main\ntry:\n    main(['prepare', 'folder', '--help'])\n"
    script += "finally:\n    print(sorted({'torch', 'datasets', 'pyarrow'} & {*sys.modules}))"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=Path(__file__).parents[3], check=True
    )
    assert "--masks DIR" in done.stdout and done.stdout.endswith("\n[]\n")


def test_the_package_is_the_command(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "trainer", "prepare", "shape"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[3],
    )
    assert done.returncode == 2 and "unknown data set 'shape'; did you mean 'shapes'?" in done.stderr
