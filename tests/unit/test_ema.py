from __future__ import annotations

import torch
from torch import nn

from trainer.ema import Ema


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
