"""Layers as recipes name them: by the path of a module, which stands for all that is below it."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from torch import nn


def check_layers(model: nn.Module, layers: Sequence[str], key: str) -> None:
    """Makes sure that each of `layers` is a module of `model`; `key` is the recipe's key that lists them.

    Raises:
        ValueError: names the first that is not, and the modules with the most similar names.
    """
    known = [name for name, _ in model.named_modules() if name]
    for layer in layers:
        if layer not in known:
            near = difflib.get_close_matches(layer, known, 3)
            hint = f"did you mean {' or '.join(near)}?" if near else f"its parts are {', '.join(name for name, _ in model.named_children())}"
            raise ValueError(f"{key}: the model has no layer {layer!r}; {hint}")


def is_below(name: str, layers: Sequence[str]) -> bool:
    """Whether the module, parameter or buffer `name` belongs to one of `layers`."""
    return any(name == layer or name.startswith(f"{layer}.") for layer in layers)
