"""Means over optimizer steps, accumulated on the device."""

from __future__ import annotations

import torch
from torch import Tensor

STEPS = "steps"


class Means:
    """Means over the steps since they were last taken; the host does not wait for the device before `take` or
    `state`.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def add(self, values: dict[str, Tensor], counts: Tensor) -> None:
        """Adds the values (scalars) of one step if `counts`, a bool scalar, is true."""
        for name, value in (values | {STEPS: torch.ones_like(counts)}).items():
            summand = torch.where(counts, value.detach().double(), 0)
            self._sums[name] = self._sums[name] + summand if name in self._sums else summand

    def take(self) -> dict[str, float]:
        """The means, nan without steps; they are reset."""
        sums = self.state()
        self._sums = {}
        steps = sums.pop(STEPS, 0.0)
        return {name: value / steps if steps else float("nan") for name, value in sums.items()}

    def state(self) -> dict[str, float]:
        """The sums, for a checkpoint."""
        return {name: float(value) for name, value in self._sums.items()}

    def restore(self, state: dict[str, float], device: torch.device) -> None:
        """Restores what `state` returned."""
        self._sums = {name: torch.tensor(value, dtype=torch.float64, device=device) for name, value in state.items()}
