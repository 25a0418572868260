"""Samples that are no images need no edit in the package: `tests/plugins/vectors.py` is all there is of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pyarrow.parquet import ParquetFile

from tests.plugins.vectors import TRAIN, VALIDATION, sample, vectors
from tests.processes import lines, run_processes, train, weights, write_recipe
from trainer.commands import main
from trainer.data.arrays import shape_of
from trainer.data.build import Data
from trainer.data.card import Card
from trainer.data.images import encode_png
from trainer.data.prepare import data_dir, prepare
from trainer.data.reader import Reader
from trainer.data.source import DataInfo, Row, Source
from trainer.data.stream import ValidationSamples
from trainer.errors import UserError
from trainer.recipe.load import load_recipe

RECIPE = """
plugins: [tests.plugins.vectors]
task: vectors
data: {name: vectors, batch_size: 8, window: 3, workers: 0}
model: {name: perceptron, width: 8}
loss: mean_log_loss
optimizer: {name: adamw, lr: 3e-2}
train: {duration: 4 epochs, precision: fp64, threads: 1, log_every: 1 steps}
evaluate: {every: 1 epoch, best: accuracy, batch_size: 4}
checkpoint: {every: 5 steps}
"""


def test_arrays_are_stored_as_lists_of_one_length_and_without_height_and_width() -> None:
    card = prepare(vectors(), data_dir(), None, lambda line: None)
    assert card == Card.load(data_dir() / "vectors")
    assert {name: split.rows for name, split in card.splits.items()} == {"train": TRAIN, "validation": VALIDATION}
    schema = ParquetFile(card.files(data_dir() / "vectors", "train")[0]).schema_arrow
    assert {field.name: str(field.type) for field in schema} == {
        "numbers": "fixed_size_list<element: float>[6]",
        "label": "int64",
    }


@pytest.mark.parametrize("workers", [0, 2])
def test_a_batch_holds_the_arrays_of_its_samples_in_their_shape(tmp_path: Path, workers: int) -> None:
    prepare(vectors(), data_dir(), None, lambda line: None)
    recipe = load_recipe(write_recipe(tmp_path, RECIPE), (f"data.workers={workers}",))
    data = Data(recipe, 0, 1, torch.device("cpu"))
    seen = [(batch, 0) for batch in islice(data.train_batches(0), 10)]
    seen += [(batch, TRAIN) for batch in data.validation_batches] + [(data.validation_batch([3, 0]), TRAIN)]
    for batch, first in seen:
        assert batch.keys() == {"numbers", "label", "sample_id", "epoch"}
        expected = [sample(first + index) for index in batch["sample_id"].tolist()]
        assert batch["numbers"].dtype == torch.float32
        assert np.array_equal(batch["numbers"].numpy(), np.stack([numbers for numbers, _ in expected]))
        assert batch["label"].tolist() == [label for _, label in expected]
    assert data.train.uniform and len(data.validation.spread(5)) == 5


def test_they_train_and_evaluate_and_an_interrupted_run_ends_with_the_same_bits(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, RECIPE)
    run_processes(2, train, recipe, ("name=uninterrupted",))
    for stop_after in (11, None):
        run_processes(2, train, recipe, ("name=parts",), stop_after)
    runs = [tmp_path / "runs" / name for name in ("uninterrupted", "parts")]
    assert lines(runs[0]) == lines(runs[1]) and weights(runs[0]) == weights(runs[1])
    last = lines(runs[0], "validation")[-1]
    assert last["step"] == 30 and last["accuracy"] > 0.9


def test_check_reports_what_they_are_trained_on_and_refuses_what_only_images_have(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare(vectors(), data_dir(), None, lambda line: None)
    recipe = str(write_recipe(tmp_path, RECIPE))
    assert main(["check", recipe]) == 0
    assert "ok; vectors: train 60, validation 13 rows; 30 steps" in capsys.readouterr().err
    assert main(["check", recipe, "data.resize=[8,8]", "data.augment=[horizontal_flip]"]) == 2
    error = capsys.readouterr().err
    assert "data.resize: samples of vectors aren't images: remove this key" in error
    assert "data.augment: samples of vectors aren't images: remove this key" in error
    assert main(["check", recipe, "--show-samples", str(tmp_path / "out.png")]) == 2
    assert "the samples of vectors have no `image`" in capsys.readouterr().err
    assert main(["summary", recipe]) == 2
    assert "vectors has no images, but `trainer summary` counts per image" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("value", "what"),
    [
        ([1.0, 2.0], r"numbers has shape \(2,\) instead of \(2, 3\)"),
        ([[1.0, 2.0, 3.0], [4.0, 5.0, float("nan")]], "numbers contains nan or infinity"),
        (np.full((2, 3), 1e39), "numbers contains nan or infinity"),
        ([["a"] * 3] * 2, "numbers is not an array of numbers"),
        (None, r"numbers has shape \(\) instead of \(2, 3\)"),
    ],
)
def test_numbers_that_arent_such_an_array_are_refused_and_named(value: Any, what: str) -> None:
    def rows(archives: Mapping[str, Path]) -> Iterator[tuple[str, Row]]:
        yield "train", {"numbers": np.zeros((2, 3)), "label": 0}
        yield "train", {"numbers": value, "label": 0}

    with pytest.raises(UserError, match=rf"vectors, train sample 1: {what}.*; replace the archive that contains it"):
        prepare(replace(vectors(), rows=rows), data_dir(), None, lambda line: None)
    assert not (data_dir() / "vectors").exists()


def test_a_sample_may_have_an_image_and_an_array(tmp_path: Path) -> None:
    def rows(archives: Mapping[str, Path]) -> Iterator[tuple[str, Row]]:
        for index in range(4):
            image = encode_png(np.full((5, 6, 3), index, np.uint8))
            yield "train" if index < 2 else "validation", {"image": image, "position": [index, -index]}

    source = Source("both", DataInfo(("a",)), {"image": "image", "position": "array[2]"}, rows)
    card = prepare(source, tmp_path, None, lambda line: None)
    batch = ValidationSamples(Reader(tmp_path / "both", card, "validation")).batch([1, 0])
    assert batch["position"].tolist() == [[3, -3], [2, -2]]
    assert batch["image"].flatten(1).amax(1).tolist() == [3, 2]


def test_an_array_states_its_shape() -> None:
    assert shape_of("array[4]") == (4,) and shape_of("array[3,8]") == (3, 8)
    assert [shape_of(role) for role in ("image", "label", "array", "array[]", "array[a]")] == [None] * 5
