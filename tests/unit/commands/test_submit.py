"""What `trainer submit` hands to SLURM."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from trainer.commands import main

RECIPE = """task: segmentation
data: {name: shapes, batch_size: 32}
model: {name: unet}
loss: cross_entropy
optimizer: {name: adamw, lr: 3e-3}
train: {duration: 10 epochs}
"""
# Stands in for SLURM's command: keeps its arguments, answers with a job's number.
SBATCH = '#!/bin/sh\nfor argument; do echo "$argument"; done >>"$0.called"\necho -- >>"$0.called"\necho 77\n'


@pytest.fixture(autouse=True)
def sbatch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "mine.yaml").write_text(RECIPE, encoding="utf-8")
    file = tmp_path / "bin" / "sbatch"
    file.parent.mkdir()
    file.write_text(SBATCH, encoding="utf-8")
    file.chmod(0o755)
    monkeypatch.setenv("PATH", f"{file.parent}:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    return file


def calls(sbatch: Path) -> list[list[str]]:
    """Arguments of each call of sbatch."""
    return [call.splitlines() for call in Path(f"{sbatch}.called").read_text().split("--\n")[:-1]]


def test_the_job_script_is_the_template_with_the_options_set(sbatch: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = [
        "--nodes",
        "2",
        "--gpus",
        "4",
        "--cpus",
        "32",
        "--time",
        "12:00:00",
        "--partition",
        "long",
        "--account",
        "lab",
    ]
    assert main(["submit", "mine.yaml", *options, "train.duration=5 epochs"]) == 0
    script = Path("logs/mine.sbatch").read_text()
    for line in (
        "job-name=mine",
        "nodes=2",
        "gpus-per-node=4",
        "cpus-per-task=32",
        "time=12:00:00",
        "partition=long",
        "account=lab",
    ):
        assert script.count(f"#SBATCH --{line}\n") == 1
    assert script.count("--job-name") == 1 and "array" not in script
    directives, _, rest = script.partition("\nexport ")
    assert (
        "#SBATCH --signal=USR1@120\n" in directives and "#SBATCH" not in rest and rest.endswith('train_on_slurm "$@"\n')
    )
    assert calls(sbatch) == [["--parsable", "logs/mine.sbatch", "mine.yaml", "train.duration=5 epochs"]]
    printed = capsys.readouterr()
    assert (
        script in printed.out
        and "submitted job 77; follow it with: tail -F logs/mine-77.out logs/mine-77-rank0.log" in printed.err
    )


def test_a_dry_run_shows_the_script_and_leaves_nothing_behind(sbatch: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["submit", "mine.yaml", "--processes", "8", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert (
        "export TRAINER_PROCESSES_PER_NODE=8\n" in printed
        and "# sbatch --parsable logs/mine.sbatch mine.yaml\n" in printed
    )
    assert not Path("logs").exists() and not Path(f"{sbatch}.called").exists()


def test_a_mistake_is_found_before_the_job_waits_in_a_queue(sbatch: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["submit", "mine.yaml", "--nodes", "3", "optimizer.lr=-1"]) == 2
    wrong = capsys.readouterr().err
    assert (
        "data.batch_size: must be divisible by 3 processes" in wrong and "optimizer.lr: must be greater than 0" in wrong
    )
    assert main(["submit", "mine.yaml", "--nodes", "3", "--gpus", "3"]) == 2
    assert "must be divisible by 9 processes" in capsys.readouterr().err
    assert main(["submit", "mnie.yaml"]) == 2
    assert "did you mean mine.yaml" in capsys.readouterr().err
    assert not Path(f"{sbatch}.called").exists()


def test_a_sweep_is_an_array_and_a_table_that_waits_for_it(sbatch: Path) -> None:
    sweep = ["--sweep", "optimizer.lr=1e-3,1e-2", "--sweep", "data.resize=[32,32],[64,64]"]
    assert main(["submit", "mine.yaml", "train.seed=1", *sweep, "--parallel", "2", "--partition", "long"]) == 0
    assert Path("logs/mine-sweep-1.txt").read_text().splitlines() == [
        "train.seed=1 name=mine-lr=1e-3-resize=_32,32_ optimizer.lr=1e-3 'data.resize=[32,32]'",
        "train.seed=1 name=mine-lr=1e-3-resize=_64,64_ optimizer.lr=1e-3 'data.resize=[64,64]'",
        "train.seed=1 name=mine-lr=1e-2-resize=_32,32_ optimizer.lr=1e-2 'data.resize=[32,32]'",
        "train.seed=1 name=mine-lr=1e-2-resize=_64,64_ optimizer.lr=1e-2 'data.resize=[64,64]'",
    ]
    assert "#SBATCH --array=0-3%2\n" in Path("logs/mine-sweep-1.sbatch").read_text()
    array, table = calls(sbatch)
    assert array == ["--parsable", "logs/mine-sweep-1.sbatch", "mine.yaml", "logs/mine-sweep-1.txt"]
    assert (
        table[1] == "--dependency=afterany:77" and "--partition=long" in table and table[-1] == "logs/mine-sweep-1.txt"
    )
    assert main(["submit", "mine.yaml", *sweep]) == 0
    assert Path("logs/mine-sweep-2.txt").exists()


@pytest.mark.parametrize("sweep", ["optimizer.lr", "optimizer.lr=", "=1,2", "name=a,b"])
def test_a_sweep_that_is_none_is_a_mistake(sweep: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["submit", "mine.yaml", "--sweep", sweep]) == 2
    assert "must be key=a,b,c" in capsys.readouterr().err


def test_slurms_message_about_a_refused_job_is_shown(sbatch: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sbatch.write_text(
        "#!/bin/sh\necho 'sbatch: error: invalid partition specified: nowhere' >&2\nexit 1\n", encoding="utf-8"
    )
    assert main(["submit", "mine.yaml", "--partition", "nowhere"]) == 2
    assert "SLURM rejected the job: sbatch: error: invalid partition specified: nowhere" in capsys.readouterr().err


def test_without_slurm_the_message_names_what_still_works(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert main(["submit", "mine.yaml"]) == 2
    assert "sbatch not found" in (wrong := capsys.readouterr().err) and "--dry-run prints the job script" in wrong
