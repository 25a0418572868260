"""Promises of the trackers: they show what the run folder holds, and never stop or slow training."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.wandb_server import WandbServer
from trainer import components
from trainer.components import catalogue, tracker
from trainer.reporting.trackers import wandb as trackers
from trainer.reporting.trackers.tracker import Mirrors
from trainer.runs.folder import Line, RunFolder

KEY = "0123456789abcdef" * 2 + "01234567"  # valid in form only
CONFIG = {"name": "demo", "optimizer": {"name": "adamw", "lr": 1e-3}}
SUMMARY = {"status": "finished", "seconds": 3.0, "best": {"miou": {"value": 0.9, "step": 20}}, "final": {}}


@pytest.fixture(autouse=True)
def no_account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[WandbServer]:
    """A W&B server to be online with."""
    import wandb

    with WandbServer() as server:
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        monkeypatch.setenv("WANDB_MODE", "online")
        yield server
        wandb.teardown()


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    run = RunFolder(tmp_path / "run")
    run.create()
    return run


def mirrors(folder: RunFolder, *names: str, **settings: Any) -> Mirrors:
    chosen = [catalogue("tracker")[name] for name in names]
    return Mirrors([(each, each.schema(**settings)) for each in chosen], folder.path, "demo", CONFIG)


def train(mirror: Mirrors, folder: RunFolder, steps: range) -> None:
    """Logs like a Trainer."""
    for step in steps:
        line = {
            "step": step,
            "epoch": step / 10,
            "split": "train",
            "loss": 1 / step,
            "data_fingerprint": "0f",
            "accuracy": None,
        }
        folder.log(line)
        mirror.log(line)


def validate(mirror: Mirrors, folder: RunFolder, step: int) -> None:
    line = {"step": step, "epoch": step / 10, "split": "validation", "loss": 0.5, "miou": 0.9}
    folder.log(line)
    mirror.log(line)
    mirror.pictures([draw(folder, step)], step)


def draw(folder: RunFolder, step: int = 0) -> Path:
    file = folder.pictures / f"validation_step_{step:08d}.png"
    Image.new("RGB", (16, 8), "tomato").save(file)
    return file


def records(folder: RunFolder) -> list[Any]:
    """What the offline runs of a folder recorded: a LevelDB log in blocks of 32 KiB,
    each file after a header of 7 bytes.
    """
    import wandb
    from wandb.proto.wandb_internal_pb2 import Record

    wandb.teardown()  # its service writes the last block when it ends
    found = []
    for file in sorted(folder.path.glob("wandb/offline-run-*/*.wandb")):
        data, at, parts = file.read_bytes(), 7, b""
        while at + 7 <= len(data):
            if 32768 - at % 32768 < 7:  # too small for another header
                at += 32768 - at % 32768
                continue
            length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
            parts += data[at + 7 : at + 7 + length]
            at += 7 + length
            if kind in (1, 4):  # complete, or the last part
                found.append(Record.FromString(parts))
                parts = b""
    return found


def history(folder: RunFolder) -> list[dict[str, Any]]:
    rows = [record.history.item for record in records(folder) if record.HasField("history")]
    return [{item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in row} for row in rows]


# ---------------------------------------------------------------- never stops training


class Broken:
    """A tracker whose server goes away."""

    calls = 0

    def __init__(self, folder: Path, run_name: str, config: dict[str, Any], /) -> None:
        pass

    def log(self, line: Line) -> None:
        type(self).calls += 1
        raise ConnectionError("server\nwent away")

    def pictures(self, files: Sequence[Path], step: int) -> None:
        raise AssertionError("is disabled by now")

    def finish(self, summary: dict[str, Any]) -> None:
        raise AssertionError("is disabled by now")


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> type[Broken]:
    catalogue("tracker")
    monkeypatch.setitem(components._registered, "tracker", dict(components._registered["tracker"]))
    monkeypatch.setattr(Broken, "calls", 0)
    return tracker()(Broken)


def test_a_tracker_that_fails_is_named_once_and_disabled(
    folder: RunFolder, broken: type[Broken], capsys: pytest.CaptureFixture[str]
) -> None:
    mirror = mirrors(folder, "broken", "tensorboard")
    train(mirror, folder, range(1, 4))
    mirror.pictures([draw(folder)], 3)
    mirror.finish(SUMMARY)
    assert broken.calls == 1
    assert capsys.readouterr().err == "broken: disabled, training continues: ConnectionError: server went away\n"
    assert len(scalars(folder, "train/loss")) == 3, "the others continue"


def test_a_tracker_that_cannot_start_is_disabled(folder: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    (folder.path / "tensorboard").write_text("in the way")
    mirror = mirrors(folder, "tensorboard")
    mirror.log({"step": 1, "split": "train", "loss": 1.0})
    assert capsys.readouterr().err.startswith("tensorboard: disabled, training continues: ")


def test_nothing_heavy_is_imported_for_a_recipe_check() -> None:
    heavy = {"wandb", "tensorboard", "matplotlib", "datasets", "accelerate"}
    modules = "trainer.reporting.trackers.wandb, trainer.reporting.trackers.tensorboard"
    code = f"import sys, {modules}; sys.exit(' '.join({heavy} & set(sys.modules)))"
    assert (
        subprocess.run(
            [sys.executable, "-c", code], cwd=Path(__file__).resolve().parents[3], capture_output=True, text=True
        ).stderr.strip()
        == ""
    )


# ---------------------------------------------------------------- Weights & Biases


def test_wandb_offline_holds_config_history_pictures_and_summary_under_one_id(
    folder: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    mirror = mirrors(folder, "wandb", tags=["night"])
    train(mirror, folder, range(1, 6))
    validate(mirror, folder, 5)
    mirror.finish(SUMMARY)
    printed = capsys.readouterr()
    assert printed.err == "" and printed.out.count("\n") == 1 and f"trainer sync {folder.path}" in printed.out

    (run,) = [record.run for record in records(folder) if record.HasField("run")][:1]
    assert (run.display_name, run.project, list(run.tags)) == ("demo", "trainer", ["night"])
    assert {item.key: json.loads(item.value_json) for item in run.config.update}["optimizer"] == CONFIG["optimizer"]
    rows = history(folder)
    assert [(row["_step"], row["step"], row["train/loss"]) for row in rows[:5]] == [
        (step - 1, step, 1 / step) for step in range(1, 6)
    ]
    assert [rows[5][key] for key in ("_step", "step", "validation/miou", "pictures/count")] == [5, 5, 0.9, 1]
    assert "train/accuracy" not in rows[0]
    summary = {item.key: json.loads(item.value_json) for record in records(folder) for item in record.summary.update}
    assert (summary["status"], summary["best/miou"], summary["best/miou_step"]) == ("finished", 0.9, 20)
    assert any(record.metric.step_metric == "step" for record in records(folder))

    again = mirrors(folder, "wandb")
    train(again, folder, range(6, 9))
    again.finish(SUMMARY)
    assert {record.run.run_id for record in records(folder) if record.HasField("run")} == {
        json.loads((folder.path / "tracking.json").read_text())["wandb"]["id"]
    }
    assert [row["_step"] for row in history(folder)] == list(range(9)), "a row for each line of metrics.jsonl"


def test_logging_never_waits_for_a_server(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    answered, seen = threading.Event(), []
    monkeypatch.setattr(trackers.WandbRun, "open", lambda *_, **settings: answered.wait())
    monkeypatch.setattr(trackers.WandbRun, "log", lambda self, line, row: seen.append(line["step"]))
    monkeypatch.setattr(trackers.WandbRun, "close", lambda self, summary: None)
    mirror = mirrors(folder, "wandb", mode="offline")
    train(mirror, folder, range(1, 1000))  # would never end
    assert not seen
    answered.set()
    mirror.finish(SUMMARY)
    assert seen == list(range(1, 1000))


def test_an_unreachable_server_delays_nothing_and_the_run_is_kept_offline(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setattr(trackers, "INIT_TIMEOUT_S", 1.5)
    mirror = mirrors(folder, "wandb")
    train(mirror, folder, range(1, 21))
    mirror.finish(SUMMARY)
    assert [row["step"] for row in history(folder)] == list(range(1, 21))
    printed = capsys.readouterr().err
    assert (
        printed.count("\n") == 1
        and printed.startswith("wandb: CommError: ")
        and f"trainer sync {folder.path}" in printed
    )
    assert not [file for file in folder.path.rglob("*") if file.is_file() and KEY.encode() in file.read_bytes()]


def test_a_stop_does_not_wait_for_a_server(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(trackers, "STOP_TIMEOUT_S", 0.1)
    answered = threading.Event()
    monkeypatch.setattr(trackers.Wandb, "_work", lambda self: answered.wait())
    mirror = mirrors(folder, "wandb", mode="offline")
    mirror.finish(SUMMARY | {"status": "stopped"})  # would never end
    answered.set()
    assert "TimeoutError" in capsys.readouterr().err


def test_disabled_by_the_environment_wins_over_the_recipe(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    mirror = mirrors(folder, "wandb", mode="online")
    train(mirror, folder, range(1, 3))
    mirror.finish(SUMMARY)
    assert not (folder.path / "wandb").exists()
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("mode", ["auto", "online"])
def test_without_a_key_nobody_is_asked_for_one(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch, mode: str, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[bool] = []
    monkeypatch.setattr(trackers.Wandb, "_work", lambda self: asked.append(self._online))
    mirrors(folder, "wandb", mode=mode)._trackers["wandb"]._thread.join()
    assert asked == [False]
    assert "no API key" in capsys.readouterr().out


def test_a_key_is_found_in_the_environment_or_in_netrc_for_that_server_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example")
    assert not trackers.has_key()
    home = tmp_path / "home"
    home.mkdir()
    (home / ".netrc").write_text(f"machine elsewhere.example login user password {KEY}\n")
    assert not trackers.has_key()
    (home / ".netrc").write_text(f"machine wandb.example login user password {KEY}\n")
    assert trackers.has_key()
    (home / ".netrc").write_text("machine\n")
    assert not trackers.has_key()
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    assert not trackers.has_key()
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    assert trackers.has_key()


@pytest.mark.parametrize("trouble", ["answers 500", "never answers", "is gone"])
def test_a_server_that_fails_in_mid_run_delays_nothing_and_one_line_explains_how_to_upload_it_later(
    folder: RunFolder,
    server: WandbServer,
    monkeypatch: pytest.MonkeyPatch,
    trouble: str,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(trackers, "UPLOAD_TIMEOUT_S", 0.5)
    mirror = mirrors(folder, "wandb")
    train(mirror, folder, range(1, 6))
    server.wait_until(lambda run: run.lines)  # it streams
    if trouble == "is gone":
        server.close()
    server.status = 500 if trouble == "answers 500" else None
    train(mirror, folder, range(6, 200))
    start = time.perf_counter()
    mirror.finish(SUMMARY)
    assert time.perf_counter() - start < trackers.FINISH_TIMEOUT_S
    assert len(folder.read_metrics()) == 199
    printed = capfd.readouterr().err
    assert printed.count("\n") == 1 and f"trainer sync {folder.path}" in printed


def test_rows_that_a_killed_run_left_unsent_are_sent_when_it_resumes_and_none_is_sent_twice(
    folder: RunFolder, server: WandbServer
) -> None:
    mirror = mirrors(folder, "wandb")
    train(mirror, folder, range(1, 6))
    validate(mirror, folder, 5)
    mirror.finish(SUMMARY | {"status": "stopped"})
    for step in (6, 7):  # written, not sent
        folder.log({"step": step, "epoch": step / 10, "split": "train", "loss": 1 / step})
    again = mirrors(folder, "wandb")
    train(again, folder, range(8, 10))
    again.finish(SUMMARY | {"status": "stopped"})
    folder.truncate_metrics(4)
    back = mirrors(folder, "wandb")
    train(back, folder, range(5, 6))
    validate(back, folder, 5)
    train(back, folder, range(6, 12))
    back.finish(SUMMARY)
    (run,) = server.runs.values()
    assert [(row["_step"], row["step"], row.get("train/loss")) for row in run.history] == [
        (row, line["step"], line["loss"] if line["split"] == "train" else None)
        for row, line in enumerate(folder.read_metrics())
    ]
    (picture,) = run.history[5]["pictures"]["filenames"]
    assert [file for file in run.files if file.endswith(".png")] == [picture]


# ---------------------------------------------------------------- TensorBoard


def accumulator(folder: RunFolder) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(folder.path / "tensorboard"), size_guidance={"scalars": 0, "images": 0}).Reload()


def scalars(folder: RunFolder, name: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in accumulator(folder).Scalars(name)]


def test_tensorboard_shows_scalars_and_pictures(folder: RunFolder) -> None:
    mirror = mirrors(folder, "tensorboard")
    train(mirror, folder, range(1, 4))
    mirror.log({"step": 3, "split": "validation", "miou": 0.5})
    mirror.pictures([draw(folder)], 3)
    mirror.finish(SUMMARY)
    assert scalars(folder, "train/loss") == [(step, pytest.approx(1 / step)) for step in (1, 2, 3)]
    assert scalars(folder, "validation/miou") == [(3, 0.5)]
    (image,) = accumulator(folder).Images("pictures/0")
    assert (image.step, image.width, image.height) == (3, 16, 8)


def test_tensorboard_after_a_resume_shows_each_step_once(folder: RunFolder) -> None:
    mirror = mirrors(folder, "tensorboard")
    train(mirror, folder, range(1, 10))
    mirror.finish(SUMMARY)
    folder.truncate_metrics(5)
    again = mirrors(folder, "tensorboard")
    train(again, folder, range(6, 12))
    again.finish(SUMMARY)
    assert [step for step, _ in scalars(folder, "train/loss")] == list(range(1, 12))
