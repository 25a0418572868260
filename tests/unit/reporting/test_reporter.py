"""What people read during a run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.processes import write_recipe
from trainer.recipe.load import load_recipe
from trainer.reporting.reporter import Reporter
from trainer.runs.folder import RunFolder

FACTS = {"step": 9, "seconds": 1.0}
ADVICE = "everything is a flower: lower optimizer.lr"


def reported(
    folder: Path, capsys: pytest.CaptureFixture[str], *advice: str | None, status: str | None = None
) -> list[str]:
    """Lines printed for a run with one evaluation for each advice, that ends with this status, or continues."""
    (folder / "runs" / "run").mkdir(parents=True)
    reporter = Reporter(
        RunFolder(folder / "runs" / "run"), load_recipe(write_recipe(folder), ["track=[]"]), enabled=True
    )
    reporter.begin(0, None, torch.device("cpu"), {})
    for step, each in enumerate(advice):
        reporter.validation({"step": step, "epoch": 0.0, "split": "validation", "miou": 0.2}, ["miou"], False, each)
    if status == "finished":
        reporter.finished(None, FACTS)
    if status == "stopped":
        reporter.stopped("auto", FACTS)
    return capsys.readouterr().err.splitlines()


@pytest.mark.parametrize(
    ("advice", "after"),
    [([ADVICE] * 5, 2), ([None, ADVICE, ADVICE, None, ADVICE, ADVICE], 3), ([ADVICE, None, ADVICE, ADVICE], 4)],
)
def test_advice_is_reported_once_when_two_evaluations_in_a_row_call_for_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], advice: list[str | None], after: int
) -> None:
    lines = reported(tmp_path, capsys, *advice, status="finished")
    assert [number for number, line in enumerate(lines) if ADVICE in line] == [after]


def test_advice_that_a_single_evaluation_calls_for_is_noise_unless_the_run_ends_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert not any(
        ADVICE in line for line in reported(tmp_path / "a", capsys, ADVICE, None, ADVICE, None, status="finished")
    )
    assert not any(ADVICE in line for line in reported(tmp_path / "b", capsys, ADVICE))
    assert not any(ADVICE in line for line in reported(tmp_path / "c", capsys, ADVICE, status="stopped"))
    lines = reported(tmp_path / "d", capsys, None, ADVICE, status="finished")
    assert [ADVICE in line for line in lines] == [False, False, True, False], "before the last line"
