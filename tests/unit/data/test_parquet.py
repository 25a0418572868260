from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.unit.data.toy import picture, read, rows, source
from trainer.data import parquet
from trainer.data.prepare import prepare
from trainer.data.source import Row


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


def test_reading_a_prepared_set_sends_nothing_over_the_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    card = prepare(source(lambda: rows(10)), tmp_path, None)
    requests: list[object] = []
    monkeypatch.setattr("datasets.config.HF_UPDATE_DOWNLOAD_COUNTS", True)  # its default
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("datasets.load.get_session", lambda: requests.append("a request"))
    files = zip(card.files(tmp_path / "toy", "train"), card.splits["train"].files, strict=True)
    groups = parquet.RowGroups({path: shard.row_groups for path, shard in files}, keep=2)
    assert groups.row(0, 0)["image"]["bytes"]
    assert not requests
