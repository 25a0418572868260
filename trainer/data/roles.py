"""The roles of columns: how `trainer prepare` checks the values of each role, and how they are stored.

A new role needs a name in `trainer.data.source.Role` and an entry in `RULES`; the role of an array includes its shape.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from trainer.data.archives import Member
from trainer.data.arrays import arrow_type, checked_array, shape_of
from trainer.data.images import check_png, checked_image, checked_mask
from trainer.data.object_checks import checked_objects
from trainer.data.source import Role, Row, Source
from trainer.errors import UserError

MASK = "mask"  # the column of class indices

IGNORED = 255  # the ignored label of most sets that have one

SHOWN = 5  # labels listed in a message

Counts = npt.NDArray[np.int64]

WidthHeight = tuple[int, int]
"""Of images and masks, in pixels."""

Decoded = TypeVar("Decoded")


class Value(NamedTuple):
    """A value of a row before it is checked.

    Attributes:
        source: its data set.
        column: its column.
        role: of the column.
        content: the value from `Source.rows`, without its file name.
        file: its file name; None if it has no file of its own.
        place: names it in messages: its file, the file of its image, or the number of the sample.
        size: of the sample's images and masks; None until these are checked, or if there are none.
    """

    source: Source
    column: str
    role: Role
    content: Any
    file: str | None
    place: str
    size: WidthHeight | None = None


class Checked(NamedTuple):
    """A checked value, or a row of them.

    Attributes:
        stored: the value as Parquet stores it.
        size: of an image or a mask, or of those of the row.
        class_counts: by the name of a statistic, the count of each class, (C,); the card stores their sums over the
            training split.
        dropped: what is wrong with each object left out.
    """

    stored: Any
    size: WidthHeight | None = None
    class_counts: Mapping[str, Counts] = {}
    dropped: Sequence[str] = ()


# ---------------------------------------------------------------- a function for each role


def _check_image(value: Value) -> Checked:
    data, size = _decode(value, checked_image)
    return Checked({"bytes": data, "path": value.file}, size)


def _check_mask(value: Value) -> Checked:
    data, indices = _decode(value, checked_mask)
    counts = {"class_pixels": _count_classes(value, indices)} if value.column == MASK else {}
    return Checked({"bytes": data, "path": value.file}, (indices.shape[1], indices.shape[0]), counts)


def _check_label(value: Value) -> Checked:
    return Checked(value.content)


def _check_array(value: Value) -> Checked:
    try:
        return Checked(checked_array(value.content, shape_of(value.role) or ()))
    except ValueError as error:
        raise UserError(f"{value.place}: {value.column} {error}; {value.source.remedy}") from error


def _check_objects(value: Value) -> Checked:
    assert value.size, "objects belong to an image"
    objects, dropped = checked_objects(value.source, value.content, value.size, value.place, value.role == "instances")
    labels = np.array([each["label"] for each in objects if not each["crowd"]], np.int64)
    counts = np.bincount(labels, minlength=value.source.info.num_classes)
    return Checked(objects, class_counts={"class_objects": counts}, dropped=dropped)


def _decode(value: Value, decode: Callable[[bytes], Decoded]) -> Decoded:
    try:
        check_png(value.content)
        return decode(value.content)
    except Exception as error:  # decoders raise all kinds of errors on damaged data
        raise UserError(
            f"{value.place}: this {value.role} can't be decoded ({error}); {value.source.remedy}"
        ) from error


def _count_classes(mask: Value, indices: npt.NDArray[np.uint8]) -> Counts:
    """Counts the pixels of each class in a mask (H, W): int64 (C,).

    Raises:
        UserError: a label is neither a class nor ignored.
    """
    info, remedy, ignore_option = mask.source.info, mask.source.remedy, mask.source.ignore_option
    counts = np.bincount(indices.ravel(), minlength=256)
    ignored = "none is ignored"
    if info.ignore_index is not None:
        counts[info.ignore_index] = 0
        ignored = f"{info.ignore_index} is ignored"
    unknown = [label for label in np.flatnonzero(counts).tolist() if label >= info.num_classes]
    if unknown:
        if ignore_option and info.ignore_index is None and (len(unknown) == 1 or IGNORED in unknown):
            remedy = (
                f"if {unknown[-1]} marks pixels to ignore, pass {ignore_option.format(unknown[-1])}; otherwise {remedy}"
            )
        labels = ", ".join(map(str, unknown[:SHOWN]))
        raise UserError(
            f"{mask.place}: this mask contains the labels {labels}; classes are 0 to {info.num_classes - 1}, and "
            f"{ignored}; {remedy}"
        )
    return counts[: info.num_classes]


# ---------------------------------------------------------------- all roles


class Rules(NamedTuple):
    """How the values of a role are prepared.

    Attributes:
        check: checks a value; raises `UserError`.
        feature: takes the module `datasets`; returns its feature for the column, which determines the Arrow type.
        sized: whether values have a width and a height, which must be equal within a sample.
    """

    check: Callable[[Value], Checked]
    feature: Callable[[Any], Any]
    sized: bool = False


def _of_objects(datasets: Any) -> Any:
    value = datasets.Value
    box = datasets.List(value("float64"), length=4)
    return datasets.List({"box": box, "label": value("int64"), "mask": value("binary"), "crowd": value("bool")})


RULES: dict[Role, Rules] = {
    "image": Rules(_check_image, lambda datasets: datasets.Image(mode="RGB"), sized=True),
    "mask": Rules(_check_mask, lambda datasets: datasets.Image(mode="L"), sized=True),
    "label": Rules(_check_label, lambda datasets: datasets.Value("int64")),
    "boxes": Rules(_check_objects, _of_objects),
    "instances": Rules(_check_objects, _of_objects),
}


def rules_of(role: Role) -> Rules:
    """How the values of a role are prepared."""
    shape = shape_of(role)
    return Rules(_check_array, lambda datasets: arrow_type(datasets, shape)) if shape else RULES[role]


def has_pixels(columns: Mapping[str, Role]) -> bool:
    """Whether samples with these columns have a width and a height."""
    return any(rules_of(role).sized for role in columns.values())


def arrow_schema(columns: Mapping[str, Role]) -> Any:
    """Arrow schema with the `datasets` feature of each column, and `height` and `width` if samples have a size."""
    import datasets

    features = {column: rules_of(role).feature(datasets) for column, role in columns.items()}
    if has_pixels(columns):
        features |= {"height": datasets.Value("int64"), "width": datasets.Value("int64")}
    return datasets.Features(features).arrow_schema


def check_row(source: Source, row: Row, place: str) -> Checked:
    """Checks all values of a row, those with a size first, since the others may depend on it.

    Args:
        source: the data set.
        row: from `source.rows`.
        place: names the sample in messages if no file does.

    Raises:
        UserError: a value is invalid, or sizes differ; the message names the file.
    """
    values = [_value(source, column, row[column], place) for column in source.columns]
    sized = [value for value in values if rules_of(value.role).sized]
    others = [value for value in values if not rules_of(value.role).sized]
    checked = {value.column: rules_of(value.role).check(value) for value in sized}
    size = _common_size(sized, {column: each.size for column, each in checked.items()}, place)
    image_place = next((value.place for value in sized if value.role == "image"), place)
    for value in others:
        checked[value.column] = rules_of(value.role).check(value._replace(place=value.file or image_place, size=size))
    stored = {column: each.stored for column, each in checked.items()}
    if size:
        stored |= {"height": size[1], "width": size[0]}
    return Checked(
        stored,
        size,
        {statistic: counts for each in checked.values() for statistic, counts in each.class_counts.items()},
        [problem for each in checked.values() for problem in each.dropped],
    )


def _value(source: Source, column: str, content: Any, place: str) -> Value:
    role = source.columns[column]
    if isinstance(content, Member):
        return Value(source, column, role, content.data, content.name, content.name)
    return Value(source, column, role, content, None, place)


def _common_size(values: Sequence[Value], sizes: Mapping[str, WidthHeight | None], place: str) -> WidthHeight | None:
    """The size of all images and masks of a sample."""
    different = {*sizes.values()}
    if len(different) > 1:
        files = ", ".join(value.file for value in values if value.file)
        listed = ", ".join(f"{column} {size[0]} x {size[1]}" for column, size in sizes.items() if size)
        raise UserError(f"{files or place}: sizes differ: {listed}; {values[0].source.remedy}")
    return next(iter(different), None)
