"""The runs of a sweep: one for each combination of values, each with a name that says what makes it special."""

from __future__ import annotations

import itertools
import re

from trainer.errors import UserError


def variants_of(sweep: list[str]) -> list[list[str]]:
    """Overrides of each run of a sweep: `["a=1,2", "b=3,4"]` as `[["a=1", "b=3"], ["a=1", "b=4"], …]`; commas in brackets don't part values.

    Raises:
        UserError: not of the form key=a,b,c.
    """
    axes = []
    for axis in sweep:
        key, equals, values = axis.partition("=")
        found = re.findall(r"(?:\[[^]]*\]|\{[^}]*\}|[^,])+", values)
        if not key or not equals or not found or key == "name":
            raise UserError(f"{axis}: must be key=a,b,c, e.g. optimizer.lr=1e-3,1e-2; runs get their names from it")
        axes.append([f"{key}={value}" for value in found])
    return [list(choice) for choice in itertools.product(*axes)] if axes else []


def variant_name(name: str, variant: list[str]) -> str:
    """The name of a sweep's run, which says what makes it special, e.g. `quickstart-lr=1e-3`."""
    for override in variant:
        key, _, value = override.partition("=")
        name += f"-{key.rpartition('.')[2]}={value}"
    return re.sub(r"[^\w.+=,-]+", "_", name)
