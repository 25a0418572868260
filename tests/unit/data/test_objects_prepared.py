"""Boxes and instances are checked against their image before they are stored."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from PIL import Image

from tests.unit.data.objects import SIZE, picture, stored
from trainer.commands.prepare import describe_classes
from trainer.data.archives import Member
from trainer.data.images import image_size
from trainer.data.object_checks import run_lengths
from trainer.data.prepare import data_dir, prepare
from trainer.data.source import DataInfo, Instance, Role, Row, Source
from trainer.detection.rle import encode_masks
from trainer.errors import UserError

MASK = np.zeros((SIZE[1], SIZE[0]), bool)
MASK[2:5, 3:9] = True
BOX = (3.0, 2.0, 9.0, 5.0)


def counts(mask: np.ndarray) -> bytes:
    return encode_masks(torch.from_numpy(mask[None]))[0]


GOOD = Instance(BOX, 1, counts(MASK))


def source(train: list[Instance], role: Role = "instances", invalid: Any = "refuse") -> Source:
    def rows(archives: Mapping[str, Path]) -> Iterator[tuple[str, Row]]:
        for split, objects in (("train", train), ("validation", [GOOD])):
            yield split, {"objects": objects, "image": Member(f"photos/{split}.jpg", picture(1))}

    # The image comes last, as it may.
    return Source(
        "toy",
        DataInfo(("cat", "dog", "cow")),
        {"objects": role, "image": "image"},
        rows,
        remedy="correct it",
        invalid=invalid,
        notes=("Split by hand.",),
    )


def prepared(*objects: Instance, **options: Any) -> list[dict[str, Any]]:
    """The training objects as they are stored."""
    prepare(source([*objects], **options), data_dir(), None)
    (row,) = stored("toy", "train")
    return row["objects"]


def test_objects_are_stored_as_structs_next_to_their_images_size() -> None:
    crowd = Instance((0.5, 0, 12, 8), 2, counts(~MASK), crowd=True)
    objects = prepared(GOOD, crowd)
    assert objects == [
        {"box": [3, 2, 9, 5], "label": 1, "mask": GOOD.mask, "crowd": False},
        {"box": [0.5, 0, 12, 8], "label": 2, "mask": crowd.mask, "crowd": True},
    ]
    (row,) = stored("toy", "train")
    assert (row["height"], row["width"]) == (SIZE[1], SIZE[0])


def test_the_files_carry_the_features_that_datasets_reads() -> None:
    from datasets import Features, List, Value

    prepared(GOOD)
    features = Features.from_arrow_schema(pq.read_schema(data_dir() / "toy/train/00000.parquet"))
    of_object = {
        "box": List(Value("float64"), length=4),
        "label": Value("int64"),
        "mask": Value("binary"),
        "crowd": Value("bool"),
    }
    assert features["objects"] == List(of_object)


def test_an_image_may_have_no_objects() -> None:
    assert prepared() == []


def test_the_card_counts_the_objects_of_each_class_in_training_but_for_crowds() -> None:
    objects = [GOOD, GOOD, GOOD._replace(label=2), GOOD._replace(label=0, crowd=True)]
    card = prepare(source(objects), data_dir(), None)
    assert card.statistics == {"class_objects": [0, 2, 1]}
    assert describe_classes(card) == "3 training objects, of 2 of 3 classes: dog 2, cow 1"


def test_of_many_classes_the_command_lists_the_biggest() -> None:
    many = DataInfo(tuple(f"c{i}" for i in range(12)))
    objects = [GOOD._replace(label=label) for label in range(12) for _ in range(label)]
    card = prepare(dataclasses.replace(source(objects), info=many), data_dir(), None)
    assert (
        describe_classes(card)
        == "66 training objects, of 11 of 12 classes: c11 11, c10 10, c9 9, c8 8, c7 7, c6 6, c5 5, c4 4, c3 3, c2 2, …"
    )


def test_a_box_that_sticks_out_by_rounding_is_cut_off() -> None:
    (found,) = prepared(Instance((-1, -0.5, 13, 8.9), 0), role="boxes")
    assert found["box"] == [0, 0, 12, 8]


INVALID = {
    "its label 3 is no class; classes are 0 to 2": GOOD._replace(label=3),
    "its label -1 is no class": GOOD._replace(label=-1),
    "its box (nan, 2, 9, 5) isn't finite": GOOD._replace(box=(float("nan"), 2, 9, 5)),
    "its box (3, 2, inf, 5) isn't finite": GOOD._replace(box=(3, 2, float("inf"), 5)),
    "its box (3, 2, 3, 5) has no area": GOOD._replace(box=(3, 2, 3, 5)),
    "its box (3, 5, 9, 2) has no area": GOOD._replace(box=(3, 5, 9, 2)),
    "its box (3, 2, 13.1, 5) is not within the image, 12 x 8": GOOD._replace(box=(3, 2, 13.1, 5)),
    "its box (-0.9, 2, -0.1, 5) is not within the image": GOOD._replace(box=(-0.9, 2, -0.1, 5)),
    "its mask is damaged, or there is none": GOOD._replace(mask=b""),
    "its mask is damaged": GOOD._replace(mask=GOOD.mask[:-1] + b"\xff"),
    "its mask is not one of 12 x 8 pixels": GOOD._replace(mask=counts(MASK[:, 1:])),
    "its mask has no pixels": GOOD._replace(mask=counts(MASK & False)),
}


@pytest.mark.parametrize(("problem", "bad"), [(problem, bad) for problem, bad in INVALID.items()], ids=INVALID)
def test_an_invalid_object_is_named_and_nothing_half_written_stays(problem: str, bad: Instance) -> None:
    with pytest.raises(UserError) as raised:
        prepared(GOOD, bad)
    assert str(raised.value).startswith(f"photos/train.jpg, object 2: {problem}") and str(raised.value).endswith(
        "; correct it"
    )
    assert not [path for path in data_dir().iterdir() if path.is_dir()]


def test_if_the_set_asks_for_it_such_objects_are_left_out_and_the_card_lists_them() -> None:
    card = prepare(source([*INVALID.values(), GOOD], invalid="drop"), data_dir(), None)
    (row,) = stored("toy", "train")
    assert [each["box"] for each in row["objects"]] == [[*BOX]]
    assert card.statistics == {"class_objects": [0, 1, 0]}
    assert card.notes[0] == "Split by hand."
    assert card.notes[1].startswith(
        "12 invalid objects are left out: photos/train.jpg, object 1: its label 3 is no class; "
    )
    assert "object 5: " in card.notes[1] and card.notes[1].endswith("; …")


@given(arrays(bool, array_shapes(min_dims=2, max_dims=2, max_side=40)))
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_runs_of_a_mask_are_those_that_pycocotools_wrote(mask: np.ndarray) -> None:
    runs = run_lengths(counts(mask))
    pixels = np.repeat(np.arange(len(runs)) % 2, runs)
    assert np.array_equal(pixels.reshape(mask.shape[::-1]).T, mask)


@given(st.binary(max_size=12))
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_bytes_a_mask_has_its_runs_are_numbers_or_a_mistake(data: bytes) -> None:
    try:
        assert all(isinstance(run, int) for run in run_lengths(data))
    except ValueError as error:
        assert "damaged" in str(error)


def test_the_size_of_a_photograph_is_that_of_its_upright_form() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    assert image_size(picture(1, exif=exif)) == (SIZE[1], SIZE[0])
    file = io.BytesIO()
    Image.new("L", SIZE).save(file, "PNG")
    assert image_size(file.getvalue()) == SIZE
