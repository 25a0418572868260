from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from trainer.data.card import Card, DataFile, Split, sha256
from trainer.data.source import DataInfo
from trainer.errors import UserError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A set with two train files and one validation file."""
    folder = tmp_path / "toy"
    splits = {}
    for split, contents in {"train": (b"one" * 20, b"two" * 20), "validation": (b"three" * 20,)}.items():
        (folder / split).mkdir(parents=True)
        shards = []
        for i, content in enumerate(contents):
            path = folder / split / f"{i:05d}.parquet"
            path.write_bytes(content)
            shards.append(DataFile(f"{split}/{path.name}", sha256(path), len(content), (16, 4)))
        splits[split] = Split(20 * len(shards), tuple(shards))
    Card(
        "toy", ("no", "yes"), 255, {"image": "image", "mask": "mask"}, splits, {"a.tgz": "00"}, ("split by hand",)
    ).save(folder)
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


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '{"format": 1}', '{"format": 1, "name": 3}', "\xff", "[" * 100_000]
)
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
    with pytest.raises(UserError, match="no prepared data set; run `trainer prepare toy`"):
        Card.load(tmp_path / "toy")


def test_advice_has_the_command_if_it_is_known(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no prepared data set; run `trainer prepare toy size=3` to prepare it"):
        Card.load(tmp_path / "nothing", "toy size=3")
    replace(Card.load(folder), command="toy size=4").save(folder)
    (folder / "train/00001.parquet").write_bytes(b"tWo" * 20)
    with pytest.raises(
        UserError,
        match=r"changed since it was prepared; delete .*toy, then run `trainer prepare toy size=4` to prepare it again",
    ):
        Card.load(folder).verify(folder)
    (folder / "train/00001.parquet").unlink()
    with pytest.raises(UserError, match=r"is missing; run `trainer prepare toy size=4` to prepare it again"):
        Card.load(folder, "toy size=3")


@pytest.mark.parametrize("how", ["missing", "cut"])
def test_loading_notices_a_file_that_is_missing_or_cut(folder: Path, how: str) -> None:
    path = folder / "train/00001.parquet"
    path.unlink() if how == "missing" else path.write_bytes(b"tw")
    with pytest.raises(UserError, match=r"00001\.parquet"):
        Card.load(folder)


def test_verifying_names_the_changed_file(folder: Path) -> None:
    (folder / "train/00001.parquet").write_bytes(b"tWo" * 20)
    with pytest.raises(UserError, match=r"train/00001\.parquet has changed"):
        Card.load(folder).verify(folder)


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files whose checksums are computed."""
    names: list[str] = []

    def counting(path: Path) -> str:
        names.append(path.name)
        return sha256(path)

    monkeypatch.setattr("trainer.data.card.sha256", counting)
    return names


def test_only_files_that_look_changed_are_read_again(folder: Path, read: list[str]) -> None:
    card = Card.load(folder)
    card.verify(folder)
    card.verify(folder, everything=False)
    assert read == ["00000.parquet", "00001.parquet", "00000.parquet"]
    path = folder / "train/00001.parquet"
    os.utime(path, ns=(0, 0))  # a copy has another time
    card.verify(folder, everything=False)
    card.verify(folder, everything=False)
    assert read[3:] == ["00001.parquet"]
    path.write_bytes(b"tWo" * 20)
    with pytest.raises(UserError, match=r"train/00001\.parquet has changed"):
        card.verify(folder, everything=False)
    with pytest.raises(UserError, match=r"train/00001\.parquet has changed"):
        card.verify(folder, everything=False)  # not forgotten


@pytest.mark.parametrize("text", ["", "{", "[]", '{"train/00000.parquet": 3}', "\xff"])
def test_a_damaged_note_of_what_was_verified_counts_as_none(folder: Path, read: list[str], text: str) -> None:
    card = Card.load(folder)
    (folder / "verified.json").write_bytes(text.encode("latin-1"))
    card.verify(folder, everything=False)
    assert len(read) == 3
    card.verify(folder, everything=False)
    assert len(read) == 3


def test_a_note_for_another_card_does_not_count(folder: Path) -> None:
    card = Card.load(folder)
    card.verify(folder)
    changed = replace(card.splits["train"].files[0], sha256="0" * 64)
    with pytest.raises(UserError, match="has changed"):
        replace(card, splits=card.splits | {"train": Split(20, (changed,))}).verify(folder, everything=False)


def test_a_file_that_disappears_while_it_is_verified_is_named(folder: Path) -> None:
    card = Card.load(folder)
    (folder / "train/00001.parquet").unlink()
    with pytest.raises(UserError, match=r"00001\.parquet can't be read: No such file"):
        card.verify(folder)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("name", "../../etc/passwd"),
        ("name", "/etc/passwd"),
        ("row_groups", [16, -4]),
        ("row_groups", []),
        ("row_groups", [10**15]),
    ],
)
def test_a_card_that_names_other_files_or_impossible_rows_is_damaged(folder: Path, key: str, value: object) -> None:
    tree = json.loads((folder / "card.json").read_text())
    tree["splits"]["train"]["files"][0][key] = value
    (folder / "card.json").write_text(json.dumps(tree))
    with pytest.raises(UserError, match=r"card\.json is damaged"):
        Card.load(folder)


def test_a_card_has_two_splits_or_three(folder: Path) -> None:
    card = Card.load(folder)
    (folder / "test").mkdir()
    (folder / "test/00000.parquet").write_bytes(b"four" * 20)
    shard = DataFile("test/00000.parquet", sha256(folder / "test/00000.parquet"), 80, (16, 4))
    third = replace(card, splits=card.splits | {"test": Split(20, (shard,))})
    third.save(folder)
    assert Card.load(folder) == third and third.row_groups("test") == [16, 4]
    third.verify(folder)
    assert third.of_first(3).splits.keys() == {"train", "validation"}
    (folder / "test/00000.parquet").unlink()
    with pytest.raises(UserError, match=r"test/00000\.parquet is missing"):
        Card.load(folder)


@pytest.mark.parametrize(
    "splits", [{"train"}, {"train", "test"}, {"validation", "test"}, {"train", "validation", "val"}], ids=sorted
)
def test_a_card_with_other_splits_is_damaged(folder: Path, splits: set[str]) -> None:
    card = Card.load(folder)
    replace(card, splits={split: card.splits.get(split, Split(0, ())) for split in sorted(splits)}).save(folder)
    with pytest.raises(UserError, match=r"card\.json is damaged"):
        Card.load(folder)


def test_the_fingerprint_follows_the_content_and_nothing_else(folder: Path) -> None:
    card = Card.load(folder)
    assert card.fingerprint == Card.load(folder).fingerprint
    assert card.fingerprint == replace(card, notes=(), command="toy size=3", version="2").fingerprint
    changed = replace(card.splits["train"].files[0], sha256="0")
    assert card.fingerprint != replace(card, splits=card.splits | {"train": Split(20, (changed,))}).fingerprint
    assert card.fingerprint != replace(card, classes=("yes", "no")).fingerprint


def test_the_identity_that_runs_record_is_the_same_in_every_version_and_follows_the_samples(folder: Path) -> None:
    card = Card.load(folder)
    assert card.identity == "377630fe497ebde18a1ddb40c7f7c14d41c783c0263da992976fa659b2ce7e20"
    assert (
        replace(card, notes=(), statistics={"class_pixels": [1, 2]}, command="toy", version="2", archives={}).identity
        == card.identity
    )
    train, validation = card.splits["train"], card.splits["validation"]
    others = [
        replace(card, classes=("yes", "no")),
        replace(card, ignore_index=None),
        replace(card, splits={"train": replace(train, files=train.files[::-1]), "validation": validation}),
        replace(card, splits={"train": train, "validation": train}),
        card.of_first(3),
    ]
    assert len({card.identity, *(other.identity for other in others)}) == 6
