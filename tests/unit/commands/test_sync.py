"""Promises of `trainer sync`: whatever became of a run, W&B gets each of its lines once, in one run,
and the run folder stays as it is.
"""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.unit.reporting.test_trackers import (
    CONFIG,
    KEY,
    SUMMARY,
    draw,
    folder,
    history,
    mirrors,
    no_account,
    server,
    train,
    validate,
)
from tests.wandb_server import Run, WandbServer
from trainer.commands import main, sync
from trainer.reporting.trackers import wandb as trackers
from trainer.runs.folder import RunFolder
from trainer.runs.lock import lock_run

__all__ = ["folder", "no_account", "server"]  # fixtures

RECIPE = {
    **CONFIG,
    "train": {"duration": "20 steps"},
    "track": [{"name": "wandb", "mode": "auto", "project": "pets", "entity": None, "tags": ["night"]}],
}


@pytest.fixture
def run(folder: RunFolder) -> RunFolder:
    """An offline run of 4 steps and two evaluations, with pictures."""
    folder.write_recipe(RECIPE)
    nobody = mirrors(folder)
    for step in (1, 3):
        train(nobody, folder, range(step, step + 2))
        validate(nobody, folder, step + 1)
    draw(folder).rename(folder.pictures / "curves.png")
    folder.write_summary("finished", seconds=3.0, samples_per_second=9.0, world_size=1)
    return folder


def rows(run: Run) -> list[dict[str, Any]]:
    """What a run's history shows, without what W&B adds."""
    return [
        {key: value for key, value in row.items() if not key.startswith("_") and key != "pictures"}
        for row in run.history
    ]


def lines(folder: RunFolder) -> list[dict[str, Any]]:
    """The same from metrics.jsonl."""
    return [
        {"step": line["step"]}
        | {f"{line['split']}/{key}": line[key] for key in ("epoch", "loss", "miou") if key in line}
        for line in folder.read_metrics()
    ]


def contents(folder: RunFolder) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in folder.path.rglob("*") if file.is_file()}


def test_lines_pictures_recipe_and_summary_arrive_in_one_run_and_a_second_time_changes_nothing(
    run: RunFolder, server: WandbServer, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["sync", str(run.path)]) == 0
    assert capfd.readouterr() == (f"{run.path}: sent 6 lines\n", "")
    ((project, name), sent) = next(iter(server.runs.items()))
    assert (project, name) == ("pets", json.loads((run.path / "tracking.json").read_text())["wandb"]["id"])
    assert rows(sent) == lines(run)
    assert {key: value["value"] for key, value in sent.config.items() if key != "_wandb"} == RECIPE
    assert (sent.about["displayName"], sent.about["tags"], sent.exit_code) == ("demo", ["night"], 0)
    assert (sent.summary["status"], sent.summary["best/miou"]) == ("finished", 0.9)
    assert [row["pictures"]["captions"] for row in sent.history if "pictures" in row] == [
        ["validation_step_00000002"],
        ["validation_step_00000004"],
    ]
    shown = [row["pictures"]["filenames"][0] for row in sent.history if "pictures" in row] + [
        sent.summary["curves"]["path"]
    ]
    before = contents(run)
    lost = sent.files.pop(shown[0])  # an upload that was cut off

    assert main(["sync", str(run.path)]) == 0
    assert capfd.readouterr() == (f"{run.path}: nothing to send, W&B already has all 6 lines\n", "")
    assert list(server.runs.values()) == [sent] and rows(sent) == lines(run)
    assert {file for file in sent.files if file.startswith("media")} == set(shown) and sent.files[shown[0]] == lost
    assert contents(run) == before


CHILD = """
import sys
from pathlib import Path
from tests.unit.reporting.test_trackers import mirrors, train, validate
from trainer.runs.folder import RunFolder

folder = RunFolder(Path(sys.argv[1]))
mirror = mirrors(folder, "wandb", project="pets")
train(mirror, folder, range(1, 7))
validate(mirror, folder, 6)
train(mirror, folder, range(7, 10))
print("trained", flush=True)
sys.stdin.read()
"""


def test_a_run_killed_resumed_and_synced_twice_is_one_run_with_each_line_once_and_no_secret(
    folder: RunFolder, server: WandbServer
) -> None:
    folder.write_recipe(RECIPE)
    root = Path(__file__).resolve().parents[3]
    with subprocess.Popen(
        [sys.executable, "-c", CHILD, str(folder.path)],
        cwd=root,
        env=os.environ | {"WANDB_X_FILE_STREAM_TRANSMIT_INTERVAL": "1"},  # its default makes the first rows wait 15 s
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    ) as child:
        assert child.stdout and child.stdout.readline() == b"trained\n"
        server.wait_until(lambda run: run.history)
        os.killpg(child.pid, signal.SIGKILL)
    folder.truncate_metrics(5)
    online = mirrors(folder, "wandb", project="pets")
    train(online, folder, range(6, 7))
    validate(online, folder, 6)
    online.finish(SUMMARY | {"status": "stopped"})
    train(mirrors(folder), folder, range(7, 12))  # without W&B
    for _ in range(2):
        assert main(["sync", str(folder.path)]) == 0
    (sent,) = server.runs.values()
    assert rows(sent) == lines(folder) and len(sent.history) == 12
    assert [row["_step"] for row in sent.history] == list(range(12))
    everything = b"".join([*server.sent, *contents(folder).values()])
    assert KEY.encode() not in everything and base64.b64encode(f"api:{KEY}".encode()) not in everything


def test_what_training_could_not_send_goes_later(
    folder: RunFolder, server: WandbServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trackers, "UPLOAD_TIMEOUT_S", 0.5)
    folder.write_recipe(RECIPE)
    mirror = mirrors(folder, "wandb", project="pets")
    train(mirror, folder, range(1, 4))
    server.wait_until(lambda run: run.lines)
    server.status = 500
    train(mirror, folder, range(4, 20))
    mirror.finish(SUMMARY)
    server.status = 200
    assert main(["sync", str(folder.path)]) == 0
    (sent,) = server.runs.values()
    assert rows(sent) == lines(folder)


def test_a_run_is_found_by_its_name_and_goes_where_the_command_line_says(
    run: RunFolder, server: WandbServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TRAINER_RUNS", str(run.path.parent))
    assert main(["sync", "run", "--project", "zoo", "--entity", "us"]) == 0
    assert [(project, sent.about["entity"]) for (project, _), sent in server.runs.items()] == [("zoo", "us")]
    assert main(["sync", "rum"]) == 2
    assert "did you mean 'run'?" in capsys.readouterr().err


@pytest.mark.parametrize(
    "trouble", ["unreachable", "refuses", "answers 500", "never answers", "stops answering", "loses rows"]
)
def test_a_server_that_does_not_take_a_run_is_one_message_and_the_run_folder_stays_as_it_is(
    run: RunFolder,
    server: WandbServer,
    monkeypatch: pytest.MonkeyPatch,
    trouble: str,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(trackers, "INIT_TIMEOUT_S", 1.5)
    monkeypatch.setattr(sync, "UPLOAD_TIMEOUT_S", 1)
    match trouble:
        case "unreachable":
            server.close()
        case "loses rows":
            server.takes_rows = False
        case "stops answering":
            replay = trackers.WandbRun.replay

            def stop_answering(self: trackers.WandbRun, lines: list[Any]) -> None:
                server.status = None
                replay(self, lines)

            monkeypatch.setattr(trackers.WandbRun, "replay", stop_answering)
        case _:
            server.status = {"refuses": 401, "answers 500": 500, "never answers": None}[trouble]
    before = contents(run)
    assert main(["sync", str(run.path)]) == 2
    out, said = capfd.readouterr()
    assert out == "" and said.startswith(f"error: {run.path}") and said.count("\n") == 1 and "rerun" in said
    after = contents(run)
    assert after.pop(run.path / "tracking.json") and after == before, (
        "but for the id, which has to be known before anything is sent"
    )


def test_a_run_that_is_being_trained_is_left_alone(
    run: RunFolder, server: WandbServer, capsys: pytest.CaptureFixture[str]
) -> None:
    lock = lock_run(run.path)
    assert main(["sync", str(run.path)]) == 2
    assert (
        capsys.readouterr().err == f"error: {run.path} is being trained; sync it after training has ended\n"
        and not server.runs
    )
    lock.release()
    assert main(["sync", str(run.path)]) == 0
    lock_run(run.path).release()


def test_without_a_key_the_message_says_how_to_give_one(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sync", str(run.path)]) == 2
    said = capsys.readouterr().err
    assert "wandb login" in said and "WANDB_API_KEY" in said and not (run.path / "tracking.json").exists()


def test_offline_one_run_is_written_to_the_run_folder(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert main(["sync", str(run.path)]) == 0
    assert f"written offline to {run.path / 'wandb'}; upload them with `wandb sync`" in capsys.readouterr().out
    assert [row["step"] for row in history(run)] == [1, 2, 2, 3, 4, 4]
    assert len(list(run.path.glob("wandb/offline-run-*"))) == 1


def test_disabled_says_that_nothing_is_sent(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert main(["sync", str(run.path)]) == 2
    assert capsys.readouterr().err == "error: WANDB_MODE=disabled prevents uploads: unset it\n"
