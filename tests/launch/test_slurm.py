"""A real SLURM of two nodes: pre-emption, sweeps, a node that doesn't respond. `launch/` as users call it."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import pytest

from tests.faults.conftest import LONG
from tests.launch.slurm import Cluster, start_cluster, wait_for, why_not
from tests.processes import run_processes, train, write_recipe

ROOT = Path(__file__).resolve().parents[2]
TRAINER = Path(sys.executable).with_name("trainer")
pytestmark = [
    pytest.mark.launch,
    pytest.mark.slow,
    pytest.mark.xdist_group("slurm"),
    pytest.mark.timeout(900),
    pytest.mark.skipif(why_not() is not None, reason=f"no SLURM: {why_not()}"),
]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with start_cluster(tmp_path_factory.mktemp("slurm")) as running:
        yield running


@pytest.fixture(autouse=True)
def _submit_from_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs run in the folder they are submitted from; this is not the repository."""
    (tmp_path / "logs").mkdir()
    monkeypatch.setenv("TRAINER_HOME", str(ROOT))
    monkeypatch.setenv("PATH", f"{TRAINER.parent}:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)


def last_step(run: Path) -> int:
    """Of the newest whole line of metrics.jsonl."""
    file = run / "metrics.jsonl"
    whole = (
        [line for line in file.read_text().splitlines(keepends=True) if line.endswith("\n")] if file.exists() else []
    )
    return json.loads(whole[-1])["step"] if whole else 0


def text_of(file: Path) -> str:
    return file.read_text() if file.exists() else ""


@pytest.mark.parametrize("times", [2 if LONG else 1])
def test_a_preempted_job_of_two_nodes_resumes_automatically_and_ends_with_the_same_bits(
    cluster: Cluster, tmp_path: Path, times: int
) -> None:
    recipe, runs = write_recipe(tmp_path), tmp_path / "runs"
    overrides = (
        "train.precision=fp32",
        "train.duration=250 steps",
        "evaluate.every=125 steps",
        "checkpoint.every=25 steps",
    )
    job = cluster.run("sbatch", "--parsable", "--nodes=2", ROOT / "launch" / "slurm.sbatch", recipe, *overrides).strip()
    reached = 0
    for interruption in range(1, times + 1):
        wait_for(lambda: last_step(runs / "run") > reached + 5, f"progress before interruption {interruption}")  # noqa: B023
        cluster.run("scancel", "--signal=USR1", job)
        cluster.hurry(job, interruption)
        reached = last_step(runs / "run")
        assert reached < 250
    wait_for(lambda: cluster.job(job)["JobState"] == "COMPLETED", "the end of the job")
    log = (tmp_path / "logs" / f"trainer-{job}-rank0.log").read_text()
    assert log.count("stopped on SIGUSR1 at step") == log.count("resumed run from step") == times
    output = (tmp_path / "logs" / f"trainer-{job}.out").read_text()
    # The launchers survived the signal, too.
    assert re.search(r"^run  finished  .*miou", output, re.MULTILINE) and "srun ended" not in output

    run_processes(2, train, recipe, (*overrides, "name=uninterrupted"))
    weights = [
        sha256((runs / run / "checkpoints" / "last" / "model.safetensors").read_bytes()).hexdigest()
        for run in ("run", "uninterrupted")
    ]
    assert weights[0] == weights[1]


def test_a_sweep_of_which_a_run_fails_and_one_is_cancelled_ends_with_a_table_that_says_so(
    cluster: Cluster, tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path)
    cluster.run(
        TRAINER,
        "sweep",
        "--slurm",
        recipe,
        "train.duration=4 steps",
        "optimizer.lr=1e-2,1e300,1e-3,1e-4",
        "--parallel",
        "2",
    )
    (sweep,) = Path("logs").glob("*-sweep-1.txt")
    (job,) = {found["ArrayJobId"] for found in cluster.jobs("") if found["JobName"] == sweep.stem}
    cluster.run("scancel", f"{job}_3")
    table = Path("logs/run-sweep-1-table.txt")
    wait_for(lambda: len(text_of(table).splitlines()) == 4, "the table")
    rows = [line.split() for line in table.read_text().splitlines()]
    assert [row[:2] for row in rows] == [
        ["run-lr=1e-2", "finished"],
        ["run-lr=1e300", "failed"],
        ["run-lr=1e-3", "finished"],
        ["run-lr=1e-4", "cancelled"],
    ]
    assert Path("logs/run-sweep-1.png").stat().st_size > 1000
    assert "training failed: " in Path(f"logs/run-sweep-1-{job}_1-rank0.log").read_text()


def test_a_node_that_never_answers_is_named_within_the_limit(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRAINER_PREFLIGHT_TIMEOUT", "1")
    cluster.hang("n2", True)
    job = cluster.run(
        "sbatch", "--parsable", "--nodes=2", ROOT / "launch" / "slurm.sbatch", write_recipe(tmp_path)
    ).strip()
    output = tmp_path / "logs" / f"trainer-{job}.out"
    wait_for(lambda: "error: node n2 (rank 1) did not respond within 1 s" in text_of(output), "the node's name")
    wait_for(lambda: cluster.job(job)["Restarts"] == "1", "another attempt")
    cluster.hang("n2", False)
    cluster.run("scancel", job)
