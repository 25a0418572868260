from __future__ import annotations

from fractions import Fraction

import pytest

from trainer.recipe.durations import Clock, Span
from trainer.recipe.settings import TrainSettings


@pytest.mark.parametrize(
    "text", ["500 steps", "1 step", "2 epochs", "1 epoch", "2.5 epochs", "10%", "0.5%", "30 minutes", "1 minute"]
)
def test_durations_read_as_they_are_written(text: str) -> None:
    assert str(Span.parse(text)) == text


@pytest.mark.parametrize("text", ["5", "steps", "-1 steps", "1.5 steps", "1e3 steps", "3 parsecs", "", 7, None, True])
def test_anything_else_is_refused(text: object) -> None:
    with pytest.raises(ValueError):
        Span.parse(text)


def test_zero_is_no_training_duration() -> None:
    with pytest.raises(ValueError, match="greater than 0"):
        TrainSettings(duration="0 steps")


def test_an_epoch_inside_a_batch_is_complete_with_that_batch() -> None:
    clock = Clock(Span.parse("3 epochs"), batch_size=8, dataset_size=52)
    assert clock.total_steps == 20  # 156 / 8 = 19.5
    epoch = Span.parse("1 epoch")
    assert [step for step in range(1, 21) if clock.due(epoch, step, 0, 0)] == [7, 13, 20]
    assert [step for step in range(1, 22) if clock.finished(step, 0)] == [20, 21]


def test_shares_of_the_training() -> None:
    clock = Clock(Span.parse("200 steps"), 10, 100)
    assert [step for step in range(1, 201) if clock.due(Span.parse("25%"), step, 0, 0)] == [50, 100, 150, 200]
    assert clock.share(Span.parse("50 steps")) == 0.25
    assert clock.share(Span.parse("5 epochs")) == 0.25
    assert clock.share(Span.parse("5%")) == 0.05


def test_minutes_follow_the_clock_and_not_the_steps() -> None:
    clock = Clock(Span.parse("2 minutes"), 10, 100)
    assert clock.total_steps is None
    assert not clock.finished(10**6, 119.9) and clock.finished(1, 120.0)
    assert clock.due(Span.parse("1 minute"), 5, 61, 59) and not clock.due(Span.parse("1 minute"), 6, 62, 61)
    assert clock.progress(3, 60.0) == 0.5
    with pytest.raises(ValueError, match="minutes"):
        clock.share(Span.parse("10 steps"))


def test_progress_is_the_middle_of_a_step() -> None:
    clock = Clock(Span.parse("4 steps"), 1, 1)
    assert [clock.progress(step, 0) for step in range(4)] == [0.125, 0.375, 0.625, 0.875]
    assert clock.elapsed(Span.parse("3 steps"), 1, 0) == Fraction(1, 3)
