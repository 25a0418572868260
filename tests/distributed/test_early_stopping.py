"""A watched metric that stops improving lowers the learning rate and ends the training,
at the same step for every process and every history.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.processes import lines, run_processes, train, weights, write_recipe

# Trained too fast on purpose: most evaluations bring nothing better.
OPTIONS = (
    *(
        "train.duration=200 steps",
        "evaluate.every=1 steps",
        "evaluate.best=loss",
        "evaluate.stop_after=5",
        "optimizer.lr=3e-2",
    ),
    *("schedule={name: plateau, factor: 0.5, patience: 1}", "checkpoint.every=3 steps"),
)


def follow(run: Path) -> tuple[int, set[float]]:
    """The last step, and all learning rates that there were."""
    found = lines(run, "train")
    return found[-1]["step"], {line["learning_rate"] for line in found}


@pytest.mark.slow
def test_training_ends_when_nothing_gets_better_and_an_interrupted_one_ends_there_too(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    run_processes(2, train, recipe, ("name=uninterrupted", *OPTIONS))
    last, rates = follow(tmp_path / "runs" / "uninterrupted")
    values = [line["loss"] for line in lines(tmp_path / "runs" / "uninterrupted", "validation")]
    assert 6 < last < 200 and len(values) == last
    assert values.index(min(values)) == last - 6  # the fifth without a better one is the last
    assert {3e-2, 1.5e-2, 0.75e-2} <= rates

    for stop in (last - 4, last - 1):
        run_processes(2, train, recipe, ("name=parts", *OPTIONS), stop)
    run_processes(2, train, recipe, ("name=parts", *OPTIONS))
    assert lines(tmp_path / "runs" / "parts") == lines(tmp_path / "runs" / "uninterrupted")
    assert weights(tmp_path / "runs" / "parts") == weights(tmp_path / "runs" / "uninterrupted")

    run_processes(2, train, recipe, ("name=parts", *OPTIONS))  # is finished, and stays so
    assert follow(tmp_path / "runs" / "parts")[0] == last
    longer = tuple(option for option in OPTIONS if "stop_after" not in option)
    run_processes(2, train, recipe, ("name=parts", *longer), last + 3)  # without the limit it goes on
    assert follow(tmp_path / "runs" / "parts")[0] == last + 3
