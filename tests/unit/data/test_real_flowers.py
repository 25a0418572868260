"""The official Flowers-17 archives, where they are at hand."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from pyarrow.parquet import ParquetFile
from torchvision.transforms import v2

from trainer.components import catalogue
from trainer.data.card import Card
from trainer.data.prepare import archives_dir, prepare
from trainer.data.reader import Reader
from trainer.data.stream import ValidationSamples

pytestmark = [
    pytest.mark.realdata,
    pytest.mark.skipif(
        not os.environ.get("TRAINER_ARCHIVES"),
        reason="TRAINER_ARCHIVES names no folder with 17flowers.tgz and trimaps.tgz",
    ),
]


def _names(folder: Path, card: Card, split: str) -> list[str]:
    return [
        Path(row["image"]["path"]).stem
        for file in card.files(folder, split)
        for row in ParquetFile(file).read(["image"]).to_pylist()
    ]


def test_the_archives_become_846_rows_with_duplicates_on_one_side(tmp_path: Path) -> None:
    source = catalogue("dataset")["flowers17"].build({})
    card = prepare(source, tmp_path, archives_dir(), lambda line: None)
    folder = tmp_path / "flowers17"
    train, validation = (_names(folder, card, split) for split in ("train", "validation"))
    assert len(train) + len(validation) == len({*train, *validation}) == 846
    assert 0.18 < len(validation) / 846 < 0.22
    for pair in (("image_1214", "image_1245"), ("image_1226", "image_1248")):
        assert set(pair) <= set(train) or set(pair) <= set(validation)

    samples = ValidationSamples(Reader(folder, card, "validation", resize=v2.Resize([64, 64], antialias=True)))
    masks = torch.cat([samples.batch([i])["mask"] for i in range(len(samples))])
    assert set(masks.unique().tolist()) == {0, 1, 255}
    assert 0.2 < (masks == 1).double().mean() < 0.35 and 0.08 < (masks == 255).double().mean() < 0.19
