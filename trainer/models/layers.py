"""Layers as recipes name them: by the path of a module, which includes all modules below it."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from torch import nn

from trainer.errors import UserError


def check_layers(model: nn.Module, layers: Sequence[str], key: str) -> None:
    """Makes sure that each of `layers` is a module of `model`; `key` is the recipe's key that lists them.

    Raises:
        ValueError: names the first that is not, and the modules with the most similar names.
    """
    known = [name for name, _ in model.named_modules() if name]
    for layer in layers:
        if layer not in known:
            near = difflib.get_close_matches(layer, known, 3)
            hint = (
                f"did you mean {' or '.join(near)}?"
                if near
                else f"its parts are {', '.join(name for name, _ in model.named_children())}"
            )
            raise ValueError(f"{key}: the model has no layer {layer!r}; {hint}")


def check_sides(divisor: int, height: int, width: int, whose: str = "these") -> None:
    """Makes sure that a model can halve the sides of its images as often as it needs to.

    Raises:
        UserError: a side isn't divisible by `divisor`.
    """
    if height % divisor or width % divisor:
        raise UserError(
            f"the model takes images whose sides are divisible by {divisor}, and {whose} are {height} x {width}: "
            "resize, pad or crop them to such a size"
        )


def is_below(name: str, layers: Sequence[str]) -> bool:
    """Whether the module, parameter or buffer `name` belongs to one of `layers`."""
    return any(name == layer or name.startswith(f"{layer}.") for layer in layers)
