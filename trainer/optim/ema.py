"""Exponential moving average of the weights (Polyak & Juditsky, 1992), used for evaluation."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn


class Ema:
    """A second model whose weights follow the first one's.

    All processes have the same weights after a step, so each updates its own copy and the copies stay equal.

    Args:
        model: the model to follow.
        decay: share of the average that each step t keeps; in the first steps (1 + t) / (10 + t), which is smaller.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay
        averages, sources = self.model.state_dict(keep_vars=True), model.state_dict(keep_vars=True)
        floating = [key for key, value in sources.items() if value.is_floating_point()]
        self._averages: list[Tensor] = [averages[key].detach() for key in floating]
        self._sources: list[Tensor] = [sources[key].detach() for key in floating]
        counters = [key for key, value in sources.items() if not value.is_floating_point()]
        self._counters: list[Tensor] = [averages[key] for key in counters]
        self._source_counters: list[Tensor] = [sources[key] for key in counters]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Moves the average towards the weights after optimizer step number `step` (from 1)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self._averages, self._sources, 1 - decay)
        if self._counters:
            torch._foreach_copy_(self._counters, self._source_counters)
