from __future__ import annotations

import pytest

from trainer.metrics.best import Best


def follow(metric: str, values: list[float | None]) -> Best:
    best = Best(metric)
    for step, value in enumerate(values):
        best.add(value, step, best.is_improved_by(value))
    return best


@pytest.mark.parametrize(
    ("metric", "values", "value", "step", "stale"),
    [
        ("loss", [3.0, 2.0, 2.0, 5.0], 2.0, 1, 2),
        ("miou", [0.1, 0.3, 0.2], 0.3, 1, 1),
        ("miou", [None, float("nan"), 0.0], 0.0, 2, 0),
        ("loss", [None, float("inf")], None, None, 2),
        ("loss", [], None, None, 0),
    ],
)
def test_the_best_is_the_first_of_equals_and_what_has_no_value_never_is(
    metric: str, values: list[float | None], value: float | None, step: int | None, stale: int
) -> None:
    best = follow(metric, values)
    assert (best.value, best.step, best.stale) == (value, step, stale)


def test_a_checkpoint_holds_all_of_it() -> None:
    best, again = follow("loss", [3.0, 2.0, 4.0]), Best("loss")
    again.restore(best.state())
    assert again == best
