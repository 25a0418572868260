from __future__ import annotations

import dataclasses
import errno
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from tests.unit.data.toy import SEGMENTATION, mask, masks, picture, read, rows, source
from trainer.data import parquet
from trainer.data.card import Card
from trainer.data.prepare import archives_dir, data_dir, ensure_prepared, prepare
from trainer.data.source import Archive, DataInfo, Row, Source
from trainer.errors import UserError
from trainer.signals import STOP, Stopped


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


def test_the_notes_on_a_card_are_what_the_set_states_and_no_docstring(tmp_path: Path) -> None:
    def documented(archives: Mapping[str, Path]) -> Iterator[tuple[str, Row]]:
        """For programmers."""
        return rows()

    stated = dataclasses.replace(source(), rows=documented, notes=("Split by hand.", "Drawn by lot."))
    assert prepare(stated, tmp_path, None).notes == ("Split by hand.", "Drawn by lot.")
    assert prepare(dataclasses.replace(stated, notes=()), tmp_path / "other", None).notes == ()


def test_a_set_whose_card_has_no_counts_is_prepared_again_which_is_logged_in_one_line(tmp_path: Path) -> None:
    card = prepare(source(), tmp_path, None)
    tree = json.loads((tmp_path / "toy/card.json").read_text())
    del tree["statistics"], tree["command"], tree["version"]  # as it was written before there were any
    (tmp_path / "toy/card.json").write_text(json.dumps(tree))
    said: list[str] = []
    assert ensure_prepared(source(), tmp_path, None, said.append) == card
    assert said == [
        f"{tmp_path / 'toy'} must be prepared again: its card has no class frequencies",
        f"preparing toy in {tmp_path / 'toy'}",
    ]


def test_a_set_of_files_in_another_version_is_prepared_again(tmp_path: Path) -> None:
    prepare(dataclasses.replace(source(), version="1"), tmp_path, None)
    said: list[str] = []
    card = ensure_prepared(dataclasses.replace(source(), version="2"), tmp_path, None, said.append)
    assert (
        card.version == "2"
        and said[0] == f"{tmp_path / 'toy'} must be prepared again: the name, size or time of a file has changed"
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
def test_a_set_whose_description_changed_is_prepared_again_and_the_command_logs_what_changed(
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
    assert said == [f"{tmp_path / 'toy'} must be prepared again: {reason}", f"preparing toy in {tmp_path / 'toy'}"]
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
            f"{tmp_path / 'toy'} was made by `trainer prepare yolo --name toy` and would be replaced by "
            f"`trainer prepare {other['command'] or 'toy'}`; "
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
    with pytest.raises(UserError, match="isn't a prepared data set; move it elsewhere"):
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


def test_of_two_processes_one_prepares_and_the_other_logs_that_it_waits(tmp_path: Path) -> None:
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
        match=rf"toy can't be written to {disk}: No space left on device \([0-4] MiB free\); free space, or set "
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
            match=r"00000\.parquet has changed since it was prepared; delete .*toy, then run `trainer prepare toy`",
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
        match=rf"toy can't be written to {tmp_path}: No space left on device \(\d+ MiB free\); free space, or set "
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
