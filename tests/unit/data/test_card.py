from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from trainer.data.card import Card, Shard, Split, sha256
from trainer.data.source import DataInfo
from trainer.errors import UserError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A set with two train files and one validation file."""
    folder = tmp_path / "toy"
    splits = {}
    for split, contents in {"train": (b"one", b"two"), "validation": (b"three",)}.items():
        (folder / split).mkdir(parents=True)
        shards = []
        for i, content in enumerate(contents):
            path = folder / split / f"{i:05d}.parquet"
            path.write_bytes(content)
            shards.append(Shard(f"{split}/{path.name}", sha256(path), len(content), (16, 4)))
        splits[split] = Split(20 * len(shards), tuple(shards))
    Card("toy", ("no", "yes"), 255, {"image": "image", "mask": "mask"}, splits, {"a.tgz": "00"}, ("split by hand",)).save(folder)
    return folder


def test_a_card_tells_what_the_set_holds(folder: Path) -> None:
    card = Card.load(folder)
    assert card.info == DataInfo(("no", "yes"), 255)
    assert card.row_groups("train") == [16, 4, 16, 4]
    assert card.files(folder, "train") == [folder / "train/00000.parquet", folder / "train/00001.parquet"]
    card.verify(folder)


def test_the_file_has_the_documented_layout(folder: Path) -> None:
    tree = json.loads((folder / "card.json").read_text())
    assert tree["format"] == 1
    assert tree["columns"] == {"image": "image", "mask": "mask"}
    assert tree["splits"]["validation"]["files"][0].keys() == {"name", "sha256", "bytes", "row_groups"}


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"format": 1}', '{"format": 1, "name": 3}', "\xff", "[" * 100_000])
def test_a_damaged_card_is_an_error_that_says_what_to_do(folder: Path, text: str) -> None:
    (folder / "card.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=r"card\.json .*`trainer prepare toy`"):
        Card.load(folder)


def test_a_card_of_another_format_is_an_error(folder: Path) -> None:
    tree = json.loads((folder / "card.json").read_text()) | {"format": 2}
    (folder / "card.json").write_text(json.dumps(tree))
    with pytest.raises(UserError, match="format 2"):
        Card.load(folder)


def test_a_folder_without_card_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no prepared data set; `trainer prepare toy`"):
        Card.load(tmp_path / "toy")


@pytest.mark.parametrize("how", ["missing", "cut"])
def test_loading_notices_a_file_that_is_missing_or_cut(folder: Path, how: str) -> None:
    path = folder / "train/00001.parquet"
    path.unlink() if how == "missing" else path.write_bytes(b"tw")
    with pytest.raises(UserError, match=r"00001\.parquet"):
        Card.load(folder)


def test_verifying_names_the_changed_file(folder: Path) -> None:
    (folder / "train/00001.parquet").write_bytes(b"tWo")
    with pytest.raises(UserError, match=r"train/00001\.parquet has changed"):
        Card.load(folder).verify(folder)


def test_the_fingerprint_follows_the_content_and_nothing_else(folder: Path) -> None:
    card = Card.load(folder)
    assert card.fingerprint == Card.load(folder).fingerprint
    assert card.fingerprint == replace(card, notes=()).fingerprint
    changed = replace(card.splits["train"].files[0], sha256="0")
    assert card.fingerprint != replace(card, splits=card.splits | {"train": Split(20, (changed,))}).fingerprint
    assert card.fingerprint != replace(card, classes=("yes", "no")).fingerprint
