from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from trainer.optim.ema import Ema


def test_the_average_follows_the_formula_and_buffers_follow_too() -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.BatchNorm1d(2))
    ema = Ema(model, decay=0.5)
    start = model[0].weight.detach().clone()
    with torch.no_grad():
        model[0].weight += 1
        model[1].num_batches_tracked += 3
    ema.update(1)  # decay min(0.5, 2 / 11)
    torch.testing.assert_close(ema.model[0].weight, start + (1 - 2 / 11))
    assert ema.model[1].num_batches_tracked == 3
    ema.update(100)  # decay 0.5
    torch.testing.assert_close(ema.model[0].weight, start + 1 - (2 / 11) / 2)
    assert not any(parameter.requires_grad for parameter in ema.model.parameters())


def test_what_it_follows_may_be_loaded_later() -> None:
    """A checkpoint is loaded into the model after the average was made."""
    model = nn.Linear(2, 2)
    ema = Ema(model, decay=0.5)
    model.load_state_dict({key: value + 1 for key, value in model.state_dict().items()})
    before = ema.model.weight.clone()
    ema.update(100)
    torch.testing.assert_close(ema.model.weight, (before + model.weight) / 2)


class Calls(TorchDispatchMode):
    """Counts what is asked of the device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("layers", [1, 100])
def test_an_update_takes_two_calls_whatever_the_number_of_tensors(layers: int) -> None:
    model = nn.Sequential(*(nn.BatchNorm2d(3) for _ in range(layers)))
    ema = Ema(model, decay=0.5)
    for module in model:
        module.num_batches_tracked += 7  # type: ignore[operator]
    with Calls() as calls:
        ema.update(1)
    assert calls.count == 2
    assert all(module.num_batches_tracked == 7 for module in ema.model)  # type: ignore[union-attr]
