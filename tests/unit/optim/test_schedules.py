from __future__ import annotations

import pytest
import torch

from trainer.components import catalogue
from trainer.metrics.best import Best
from trainer.optim.schedules import Schedule
from trainer.recipe.durations import Clock, Span

CLOCK = Clock(Span.parse("100 steps"), 1, 10)


def build(name: str, best: Best = Best("loss"), **settings: object) -> Schedule:  # noqa: B008
    component = catalogue("schedule")[name]
    return component.build(dict(component.schema(**settings)), share=CLOCK.share, best=best)


@pytest.mark.parametrize("name", ["constant", "cosine", "polynomial", "one_cycle"])
def test_warm_ups_rise_to_the_recipes_rate_and_nothing_exceeds_it(name: str) -> None:
    schedule = build(name, warmup="2 epochs")
    factors = [schedule(CLOCK.progress(step, 0)) for step in range(100)]
    assert factors[0] < 0.1 and factors[0] > 0
    assert factors[:20] == sorted(factors[:20])
    assert max(factors) <= 1.0 and max(factors) > 0.99
    if name != "constant":
        assert factors[20:] == sorted(factors[20:], reverse=True) and factors[-1] < 0.02


def test_cosine_is_that_of_torch_in_the_middle_of_each_step() -> None:
    schedule = build("cosine", final=0.1)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    reference = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 200, eta_min=0.1)
    for step in range(200):
        if step % 2:
            assert schedule(CLOCK.progress(step // 2, 0)) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
        optimizer.step()
        reference.step()


def test_a_training_without_warm_up_starts_at_once() -> None:
    assert build("constant")(0.0) == 1.0 and build("cosine")(0.0) == 1.0


@pytest.mark.parametrize("metric", ["loss", "miou"])
@pytest.mark.parametrize("patience", [0, 1, 3])
def test_plateau_lowers_the_rate_when_torchs_scheduler_does(metric: str, patience: int) -> None:
    best = Best(metric)
    schedule = build("plateau", best, factor=0.5, patience=patience)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    mode = "min" if metric == "loss" else "max"
    reference = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer, mode, factor=0.5, patience=patience, threshold=0.0, eps=0.0
    )
    values = torch.rand(40, generator=torch.Generator().manual_seed(0)).tolist()
    for value in values:
        best.add(value, 0, best.is_improved_by(value))
        reference.step(value)
        assert schedule(0.5) == pytest.approx(optimizer.param_groups[0]["lr"])
    assert schedule(0.5) < 1
