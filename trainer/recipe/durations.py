"""Durations in recipes: `500 steps`, `2 epochs`, `10%` (of the training duration), `30 minutes`."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Annotated, Any

from pydantic import PlainSerializer, PlainValidator

_PATTERN = re.compile(r"\s*(\d{1,15}(?:\.\d{1,15})?)\s*(steps?|epochs?|minutes?|%)\s*")


@dataclass(frozen=True)
class Span:
    """An amount of training: `value` (exact) of `unit` (`steps`, `epochs`, `minutes` or `%`)."""

    value: Fraction
    unit: str

    @classmethod
    def parse(cls, text: Any) -> Span:
        """Reads `500 steps`, `1 epoch`, `2.5 epochs`, `10%`, `30 minutes`; raises ValueError."""
        match = _PATTERN.fullmatch(text) if isinstance(text, str) else None
        if isinstance(text, Span):
            return text
        if not match:
            raise ValueError("must be a number and a unit: '500 steps', '2 epochs', '10%' or '30 minutes'")
        value, unit = Fraction(match[1]), match[2] if match[2] == "%" else match[2].rstrip("s") + "s"
        if unit == "steps" and value.denominator != 1:
            raise ValueError("the number of steps must be an integer")
        return cls(value, unit)

    def __str__(self) -> str:
        number = str(self.value) if self.value.denominator == 1 else repr(float(self.value))
        return (
            f"{number}%"
            if self.unit == "%"
            else f"{number} {self.unit.removesuffix('s') if self.value == 1 else self.unit}"
        )


def _positive(text: Any) -> Span:
    span = Span.parse(text)
    if span.value <= 0:
        raise ValueError("must be greater than 0")
    return span


_as_text = PlainSerializer(str, return_type=str)

Duration = Annotated[Span, PlainValidator(_positive), _as_text]
"""The type of a setting that is a duration greater than 0."""

DurationOrZero = Annotated[Span, PlainValidator(Span.parse), _as_text]
"""The type of a setting that is a duration of 0 or more."""


@dataclass(frozen=True)
class Clock:
    """Converts between durations and steps; stateless, a pure function of step and seconds.

    Args:
        duration: of the training.
        batch_size: samples in one optimizer step, over all processes.
        dataset_size: samples in an epoch.
    """

    duration: Span
    batch_size: int
    dataset_size: int

    def elapsed(self, span: Span, step: int, seconds: float) -> Fraction:
        """How many times `span` has elapsed after `step` steps and `seconds` seconds of training."""
        match span.unit:
            case "steps":
                return Fraction(step) / span.value
            case "epochs":
                return Fraction(step * self.batch_size, self.dataset_size) / span.value
            case "minutes":
                return Fraction(seconds) / 60 / span.value
            case _:
                return self.elapsed(self.duration, step, seconds) * 100 / span.value

    def due(self, span: Span, step: int, seconds: float, seconds_before: float) -> bool:
        """Whether step number `step` (from 1), the last one done, completed another `span`."""
        before = self.elapsed(span, step - 1, seconds_before)
        return math.floor(self.elapsed(span, step, seconds)) > math.floor(before)

    def finished(self, step: int, seconds: float) -> bool:
        """Whether the training duration has passed."""
        return self.elapsed(self.duration, step, seconds) >= 1

    @property
    def total_steps(self) -> int | None:
        """Optimizer steps of the training; None if the duration is in minutes.

        If the batch size doesn't divide the epoch, it ends inside a batch; the step that completes it counts.
        """
        if self.duration.unit == "minutes":
            return None
        return math.ceil(1 / self.elapsed(self.duration, 1, 0.0))

    def progress(self, step: int, seconds: float) -> float:
        """The share of the training completed in the middle of step `step` (from 0), for schedules."""
        if self.total_steps is None:
            return float(min(Fraction(1), self.elapsed(self.duration, step, seconds)))
        return min(1.0, (step + 0.5) / self.total_steps)

    def share(self, span: Span) -> float:
        """`span` as a share of the training duration, e.g. of a warm-up.

        Raises:
            ValueError: one is in minutes and the other in steps or epochs.
        """
        if span.unit == "%" or span.value == 0:
            return float(span.value / 100)
        if (span.unit == "minutes") != (self.duration.unit == "minutes"):
            raise ValueError(
                f"can't compare {span} with a training of {self.duration}: use minutes for both, or % here"
            )
        return float(self.elapsed(self.duration, 1, 60.0) / self.elapsed(span, 1, 60.0))
