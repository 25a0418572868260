"""A data set in Parquet on the Hugging Face Hub, read once and stored in the format used for training.

data: {name: hub, path: owner/set, image: image, mask: annotation, classes: [road, sky], batch_size: 16}

Address, token, cache and offline mode are those of huggingface_hub: HF_ENDPOINT, HF_TOKEN, HF_HOME, HF_HUB_OFFLINE.
"""

from __future__ import annotations

import hashlib
import json
import re
import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import AfterValidator, Field

from trainer.components import InnerFraction, dataset
from trainer.data.archives import Member
from trainer.data.card import Card
from trainer.data.images import encode_png
from trainer.data.prepare import data_dir
from trainer.data.source import DataInfo, Row, Source, in_validation
from trainer.errors import UserError
from trainer.recipe.file import nearest

Names = Annotated[list[str], Field(min_length=2, max_length=256)]
Label = Annotated[int, Field(ge=0, le=255)]


def _owner_and_name(path: str) -> str:
    """OWNER/NAME."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", path):
        raise ValueError("must be OWNER/NAME of a repository, e.g. zhoubolei/scene_parse_150")
    return path


@dataset(fields=("image", "mask"))
def hub(
    *,
    path: Annotated[str, AfterValidator(_owner_and_name)],
    image: str,
    mask: str,
    classes: Names | None = None,
    ignore_index: Label | None = None,
    config: str | None = None,
    revision: str = "main",
    train: str = "train",
    validation: str | InnerFraction = "validation",
) -> Source:
    """Two columns of the repository `path`: encoded images, and masks, which may also be lists of lists of labels.

    By default, `classes` are the names in the features of the column `mask`. `validation` is the name of a split, or a
    share of `train`. A branch such as `main` is resolved to a commit only when the set is prepared.

    Args:
        path: owner and name of the repository.
        image: the column of encoded images.
        mask: the column of masks.
        classes: their names, in the order of their index; by default those that the column `mask` names.
        ignore_index: the label of pixels that count nowhere.
        config: configuration of the repository, where it has several.
        revision: branch, tag or commit.
        train: the split to train on.
        validation: the split to validate on, or a share of `train`.
    """
    keys: dict[str, Any] = {
        "path": path,
        "image": image,
        "mask": mask,
        "classes": classes,
        "ignore_index": ignore_index,
    }
    keys |= {"config": config, "revision": revision, "train": train, "validation": validation}
    name = f"hub--{path.replace('/', '--')}--{hashlib.sha256(json.dumps(keys).encode()).hexdigest()[:8]}"
    words = [
        f"{key}={value if isinstance(value, str) else json.dumps(value)}"
        for key, value in keys.items()
        if value is not None
    ]
    repository = _Repository(path, config, revision)
    share = validation if isinstance(validation, float) else 0.0

    def rows(archives: Mapping[str, Path]) -> Iterator[tuple[str, Row]]:
        for split, theirs in {"train": train, **({} if share else {"validation": str(validation)})}.items():
            for index, (picture, labels) in enumerate(repository.read(theirs, image, mask)):
                place = f"{path}, {theirs} row {index}, column"
                row = {"image": _encoded(f"{place} {image}", picture), "mask": _encoded(f"{place} {mask}", labels)}
                yield "validation" if in_validation(row["image"].data, share) else split, row

    return Source(
        name,
        DataInfo(
            tuple(classes) if classes else _known_classes(name) or repository.class_names(train, mask), ignore_index
        ),
        {"image": "image", "mask": "mask"},
        rows,
        statistics=lambda paths: {"revision": repository.commit},
        command=shlex.join(["hub", *words]),
        remedy="choose other columns, or another revision",
        notes=(f"Read from {path} on the Hugging Face Hub; its commit is `revision` of the card's statistics.",),
        ignore_option="ignore_index={}",
    )


def _known_classes(name: str) -> tuple[str, ...]:
    """The classes on the set's card, so that a prepared set needs no network."""
    with suppress(UserError):
        return Card.load(data_dir() / name).classes
    return ()


@dataclass
class _Repository:
    """A repository, at the commit of `revision` at the time of the first access."""

    path: str
    config: str | None
    revision: str

    @cached_property
    def _builder(self) -> Any:
        import datasets

        datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # errors are reported below
        with self._errors_reported():
            # hf:// prevents reading a local folder of that name.
            builder = datasets.load_dataset_builder(f"hf://datasets/{self.path}", self.config, revision=self.revision)
        if builder.name != "parquet":  # `datasets` reads other formats too, and some can run code
            raise UserError(
                f"{self.path} is in the format {builder.name}, not Parquet; many sets have a copy in Parquet: "
                "revision=refs/convert/parquet"
            )
        return builder

    @property
    def commit(self) -> str:
        """SHA of the commit, in hex."""
        return str(self._builder.hash)

    def class_names(self, split: str, column: str) -> tuple[str, ...]:
        """The class names in the features of a column."""
        feature = self._stream(split, column).features[column]
        while hasattr(feature, "feature"):  # of the elements of a list
            feature = feature.feature
        if not hasattr(feature, "names"):
            raise UserError(
                f"{self.path}: the features of column {column} have no class names; list them, e.g. "
                "data.classes=[road, sky]"
            )
        return tuple(feature.names)

    def read(self, split: str, *columns: str) -> Iterator[list[Any]]:
        """The cells of these columns, undecoded, row by row."""
        stream = self._stream(split, *columns).select_columns(list(columns)).decode(False)
        with self._errors_reported():
            for row in stream:
                yield [row[column] for column in columns]

    def _stream(self, split: str, *columns: str) -> Any:
        builder = self._builder
        with self._errors_reported():
            stream = builder.as_streaming_dataset(split=split)
        for column in columns:
            if column not in stream.features:
                raise UserError(f"{self.path} has no column {column!r}; {nearest(column, stream.features)}")
        return stream

    @contextmanager
    def _errors_reported(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # errors of datasets, huggingface_hub, httpx and Arrow have no common base
            reason = str(error).partition("\n")[0].rstrip(".")
            raise UserError(
                f"{self.path} can't be read from the Hugging Face Hub: {reason}; check HF_ENDPOINT, HF_TOKEN and "
                "HF_HUB_OFFLINE"
            ) from error


def _encoded(place: str, cell: Any) -> Member:
    """The encoded image in a cell; encodes a list of lists of labels."""
    data = cell["bytes"] if isinstance(cell, dict) else cell
    if not isinstance(data, bytes):
        try:
            labels = np.asarray(data)
            if labels.ndim != 2 or labels.dtype.kind not in "iu" or labels.min() < 0 or labels.max() > 255:
                raise ValueError
        except ValueError:  # numpy raises it if rows differ in length
            raise UserError(
                f"{place}: neither an encoded image nor a list of lists of labels from 0 to 255; choose another column"
            ) from None
        data = encode_png(labels.astype(np.uint8))
    return Member(place, data)
