"""Learning-rate schedules: a factor on `optimizer.lr` as a pure function of the training progress.

A schedule has no state, so it resumes exactly and is the same for any number of processes. Each factory gets `share`,
which converts a recipe's duration to a share of the training, and returns `progress in [0, 1] -> factor`. `plateau`
also depends on the evaluations so far, which the Trainer records in `best`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from pydantic import NonNegativeInt, PositiveFloat

from trainer.components import Fraction, InnerFraction, schedule
from trainer.errors import UserError
from trainer.metrics.best import Best
from trainer.recipe.durations import Clock, DurationOrZero, Span

if TYPE_CHECKING:  # at run time recipes import this module
    from trainer.recipe.recipe import Recipe

Schedule = Callable[[float], float]

Share = Callable[[Span], float]

NONE = Span.parse("0%")


def build_schedule(recipe: Recipe, clock: Clock, best: Best) -> Schedule:
    """The schedule of a recipe; the caller keeps `best` up to date.

    Raises:
        UserError: a warm-up is longer than the training. Steps and epochs can be compared only here, where the size of
            the data set is known.
    """
    for key, value in recipe.schedule:
        if isinstance(value, Span) and clock.share(value) > 1:
            raise UserError(f"schedule.{key}: {value} is longer than the training ({clock.total_steps} steps)")
    built: Schedule = recipe.build("schedule", share=clock.share, best=best)
    return built


def _after_warmup(warmup: float, decay: Schedule) -> Schedule:
    """Linear from 0 to 1 during `warmup`, then `decay` over what remains."""
    return lambda progress: (
        progress / warmup if progress < warmup else decay((progress - warmup) / max(1 - warmup, 1e-12))
    )


@schedule()
def constant(share: Share, /, *, warmup: DurationOrZero = NONE) -> Schedule:
    """`optimizer.lr` throughout, after the warm-up.

    Args:
        share: converts a duration to a share of the training.
        warmup: how long the learning rate rises linearly from 0.
    """
    return _after_warmup(share(warmup), lambda _: 1.0)


@schedule()
def cosine(share: Share, /, *, warmup: DurationOrZero = NONE, final: Fraction = 0.0) -> Schedule:
    """Half a cosine from 1 down to `final` (Loshchilov & Hutter, 2017, without restarts).

    Args:
        share: converts a duration to a share of the training.
        warmup: how long the learning rate rises linearly from 0.
        final: factor on `optimizer.lr` at the end.
    """
    return _after_warmup(share(warmup), lambda p: final + (1 - final) * (1 + math.cos(math.pi * p)) / 2)


@schedule()
def polynomial(share: Share, /, *, warmup: DurationOrZero = NONE, power: PositiveFloat = 0.9) -> Schedule:
    """(1 - progress) ** power, as in DeepLab (Chen et al., 2017).

    Args:
        share: converts a duration to a share of the training.
        warmup: how long the learning rate rises linearly from 0.
        power: the exponent.
    """
    return _after_warmup(share(warmup), lambda p: (1 - p) ** power)


@schedule()
def plateau(
    share: Share,
    best: Best,
    /,
    *,
    factor: InnerFraction = 0.1,
    patience: NonNegativeInt = 5,
    warmup: DurationOrZero = NONE,
) -> Schedule:
    """Multiplies by `factor` after every `patience` + 1 evaluations in a row that didn't improve `evaluate.best`.

    Args:
        share: converts a duration to a share of the training.
        best: the evaluations so far.
        factor: multiplies the learning rate.
        patience: evaluations in a row without a better value that are tolerated.
        warmup: how long the learning rate rises linearly from 0.
    """
    return _after_warmup(share(warmup), lambda _: float(factor ** best.plateaus(patience)))


@schedule()
def one_cycle(
    share: Share, /, *, warmup: DurationOrZero = Span.parse("30%"), start: Fraction = 0.04, final: Fraction = 1e-6
) -> Schedule:
    """Half a cosine up from `start` to `optimizer.lr`, half a cosine down to `final` (Smith & Topin, 2018).

    Args:
        share: converts a duration to a share of the training.
        warmup: how long the learning rate rises.
        start: factor on `optimizer.lr` at the start.
        final: factor on `optimizer.lr` at the end.
    """
    peak = share(warmup)

    def between(a: float, b: float, p: float) -> float:
        return b + (a - b) * (1 + math.cos(math.pi * p)) / 2

    return lambda progress: (
        between(start, 1.0, progress / peak)
        if progress < peak
        else between(1.0, final, (progress - peak) / max(1 - peak, 1e-12))
    )
