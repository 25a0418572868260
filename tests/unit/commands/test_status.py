"""The state of runs, as `trainer status` reports it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from trainer.commands import main
from trainer.runs.sweeps import varying

RECIPE = "name: {name}\nevaluate: {{best: miou}}\n"


def make_run(runs: Path, name: str, status: str | None, *checkpoints: int) -> Path:
    """A run folder with as little in it as status needs."""
    folder = runs / name
    (folder / "checkpoints").mkdir(parents=True)
    for step in checkpoints:
        (folder / "checkpoints" / f"step_{step:08d}").mkdir()
    (folder / "recipe.yaml").write_text(RECIPE.format(name=name), encoding="utf-8")
    if status:
        best = {"miou": {"value": 0.75, "step": 20}, "loss": {"value": 0.1, "step": 30}}
        (folder / "summary.json").write_text(
            json.dumps({"status": status, "best": best, "seconds": 12.3, "step": 30, "total_steps": 100})
        )
    return folder


@pytest.mark.parametrize(
    ("status", "code", "printed"),
    [
        ("finished", 0, "r  finished  step 30 of 100  miou 0.7500  12 s  see {folder}"),
        ("stopped", 75, "r  stopped  step 30 of 100  miou 0.7500  12 s  rerun to resume from step 30"),
        (
            "failed",
            3,
            "r  failed  step 30 of 100  miou 0.7500  12 s  see its log; fix this and rerun to resume from step 30",
        ),
        ("running", 75, "r  interrupted  step 30 of 100  miou 0.7500  12 s  rerun to resume from step 30"),
        (None, 75, "r  interrupted  step 30  rerun to resume from step 30"),
    ],
)
def test_a_line_reports_the_state_of_a_run_and_what_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], status: str | None, code: int, printed: str
) -> None:
    folder = make_run(tmp_path / "runs", "r", status, 10, 30, 20)
    for run in ("r", str(folder)):
        assert main(["status", run]) == code
        assert capsys.readouterr().out == printed.format(folder=folder) + "\n"


def test_a_failed_run_reports_what_went_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_run(tmp_path / "runs", "r", "failed", 30)
    summary = json.loads((folder / "summary.json").read_text()) | {"error": "data/tiny is damaged"}
    (folder / "summary.json").write_text(json.dumps(summary))
    assert main(["status", "r"]) == 3
    assert capsys.readouterr().out.endswith("12 s  data/tiny is damaged; fix this and rerun to resume from step 30\n")


def test_a_run_that_was_killed_before_its_first_checkpoint_starts_from_the_beginning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(tmp_path / "runs", "r", None)
    assert main(["status", "r"]) == 75
    assert capsys.readouterr().out == "r  interrupted  rerun to start from scratch\n"


def test_a_run_that_a_process_has_is_running_until_that_process_ends(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from trainer.runs.lock import lock_run

    folder = make_run(tmp_path / "runs", "r", "stopped", 30)
    lock = lock_run(folder)
    assert main(["status", "r"]) == 75
    assert "r  running  step 30 of 100" in capsys.readouterr().out
    lock.release()
    assert main(["status", "r"]) == 75
    assert "r  stopped" in capsys.readouterr().out


def test_several_runs_are_an_aligned_table_and_the_worst_gives_the_exit_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, status in (("a", "finished"), ("longer", "stopped"), ("b", "failed")):
        make_run(tmp_path / "runs", name, status, 30)
    assert main(["status", "a", "longer"]) == 75
    first, second = capsys.readouterr().out.splitlines()
    assert first.index("finished") == second.index("stopped") and first.index("see ") == second.index("rerun")
    assert main(["status", "a", "b", "longer"]) == 3


def test_a_recipe_stands_for_its_run_whatever_was_overridden(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(tmp_path / "runs", "named", "finished", 30)
    make_run(tmp_path / "runs", "other", "failed", 30)
    (tmp_path / "parent.yaml").write_text("name: named\nloss: soft_iou\n", encoding="utf-8")
    (tmp_path / "child.yaml").write_text("inherit: parent.yaml\n", encoding="utf-8")
    assert main(["status", str(tmp_path / "child.yaml"), "optimizer.lr=1"]) == 0
    assert main(["status", str(tmp_path / "child.yaml"), "optimizer.lr=1", "name=other"]) == 3
    assert main(["status", str(tmp_path / "child.yaml"), "name=third"]) == 75
    assert capsys.readouterr().out.splitlines()[-1] == "third  not started  no training step done yet"
    assert main(["status", str(tmp_path / "chlid.yaml")]) == 2
    assert "did you mean" in capsys.readouterr().err


def test_an_unknown_run_is_a_mistake_that_names_the_nearest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path / "runs", "quickstart-lr=1e-3", "finished", 30)
    assert main(["status", "quickstart-lr=1e-2"]) == 2
    assert "did you mean 'quickstart-lr=1e-3'?" in capsys.readouterr().err


def test_json_has_everything_for_scripts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path / "runs", "r", "stopped", 20, 30)
    assert main(["status", "r", "--json"]) == 75
    (found,) = json.loads(capsys.readouterr().out)
    assert found == {
        "name": "r",
        "status": "stopped",
        "code": 75,
        "note": "rerun to resume from step 30",
        "step": 30,
        "total_steps": 100,
        "checkpoint": 30,
        "best": {"metric": "miou", "value": 0.75, "step": 20},
        "seconds": 12.3,
    }


def test_a_sweep_is_the_runs_of_a_file_and_slurm_knows_what_was_cancelled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, status in (("a", "finished"), ("c", "stopped")):
        make_run(tmp_path / "runs", name, status, 30)
    sweep = tmp_path / "lr.txt"
    sweep.write_text(
        "# of Monday\nname=a optimizer.lr=1\nname=b 'model={name: unet}'\n\nname=c\nname=d\nname=e\n", encoding="utf-8"
    )
    jobs = [
        "JobId=9 ArrayJobId=9 ArrayTaskId=0-3 JobName=lr JobState=CANCELLED",  # an older array of that name
        "JobId=12 ArrayJobId=12 ArrayTaskId=4-5%2 JobName=lr JobState=PENDING Reason=None",
        "JobId=14 ArrayJobId=12 ArrayTaskId=0-1,2 JobName=lr JobState=CANCELLED Reason=None",
        "JobId=15 ArrayJobId=15 ArrayTaskId=3 JobName=other JobState=CANCELLED",
    ]
    scontrol = tmp_path / "scontrol"
    scontrol.write_text("#!/bin/sh\n" + "".join(f"echo '{job}'\n" for job in jobs), encoding="utf-8")
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert main(["status", "--sweep", str(sweep), "--json"]) == 75
    assert [found["status"] for found in json.loads(capsys.readouterr().out)] == [
        "finished",
        "cancelled",
        "cancelled",
        "cancelled",
        "not started",
    ]


def test_the_runs_of_a_sweep_are_drawn_over_what_differs_between_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(tmp_path / "runs", "a", "finished", 30)
    sweep = tmp_path / "lr.txt"
    sweep.write_text("name=a same=1 lr=1 seed=2\nname=b same=1 lr=2 seed=2\n", encoding="utf-8")
    assert main(["status", "--sweep", str(sweep), "--plot", str(tmp_path / "lr.png")]) == 75
    assert (tmp_path / "lr.png").read_bytes().startswith(b"\x89PNG")
    assert varying([["name=a", "same=1", "lr=1", "seed=2"], ["name=b", "same=1", "lr=2", "seed=2"]]) == [
        ["lr=1"],
        ["lr=2"],
    ]
    for mistake in (
        ["a", "--plot", "x.png"],
        ["--sweep", str(sweep), "--plot", "x.pdf"],
        ["--sweep", str(sweep), "--plot", "/nowhere/x.png"],
    ):
        assert main(["status", *mistake]) == 2
        assert "--plot" in capsys.readouterr().err


def test_a_sweep_line_without_a_name_is_a_mistake(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "lr.txt").write_text("optimizer.lr=1\n", encoding="utf-8")
    assert main(["status", "--sweep", str(tmp_path / "lr.txt")]) == 2
    assert "has no name=…" in capsys.readouterr().err


def test_a_job_script_does_not_wait_for_torch(tmp_path: Path) -> None:
    make_run(tmp_path / "runs", "r", "finished", 30)
    code = (
        "import sys; from trainer.commands import main; code = main(['status', 'r']); sys.exit(99 if 'torch' in "
        "sys.modules else code)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
