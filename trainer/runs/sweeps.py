"""The runs of a sweep: one for each combination of values, each named after its values."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trainer.errors import UserError


def variants_of(sweep: list[str]) -> list[list[str]]:
    """Overrides of each run of a sweep: `["a=1,2", "b=3,4"]` as `[["a=1", "b=3"], ["a=1", "b=4"], …]`; commas in
    brackets don't separate values.

    Raises:
        UserError: not of the form key=a,b,c.
    """
    axes = []
    for axis in sweep:
        key, equals, values = axis.partition("=")
        found = re.findall(r"(?:\[[^]]*\]|\{[^}]*\}|[^,])+", values)
        if not key or not equals or not found or key == "name":
            raise UserError(f"{axis}: must be key=a,b,c, e.g. optimizer.lr=1e-3,1e-2; runs are named after it")
        axes.append([f"{key}={value}" for value in found])
    return [list(choice) for choice in itertools.product(*axes)] if axes else []


def variant_name(name: str, variant: list[str]) -> str:
    """The name of a sweep's run, from its overrides, e.g. `quickstart-lr=1e-3`."""
    for override in variant:
        key, _, value = override.partition("=")
        name += f"-{key.rpartition('.')[2]}={value}"
    return re.sub(r"[^\w.+=,-]+", "_", name)


def varying(runs: Sequence[Sequence[str]]) -> list[list[str]]:
    """The overrides of several runs without those that all have in common, and without their names."""
    return [
        [
            override
            for override in run
            if not override.startswith("name=") and any(override not in other for other in runs)
        ]
        for run in runs
    ]


def plot_sweep(variants: Sequence[Sequence[str]], folders: Sequence[Path], file: Path) -> bool:
    """Plots the best validation value of each metric over the first key, a line for each combination of the others.

    Args:
        variants: the overrides of each run.
        folders: of these runs; those without an evaluation are skipped.
        file: the PNG to write.

    Returns:
        Whether there was anything to plot.
    """
    from matplotlib.figure import Figure  # without pyplot there is no global state and no display

    # Metric -> other keys -> values of the first key, bests.
    panels: dict[str, dict[str, tuple[list[str], list[float]]]] = {}
    for variant, folder in zip(variants, folders, strict=True):
        summary = folder / "summary.json"
        best = json.loads(summary.read_text(encoding="utf-8")).get("best", {}) if summary.exists() else {}
        for metric, found in best.items():
            if "/" not in metric:  # not those of single classes
                where, values = panels.setdefault(metric, {}).setdefault(" ".join(variant[1:]), ([], []))
                where.append(variant[0].partition("=")[2] if variant else folder.name)
                values.append(found["value"])
    if not panels:
        return False
    figure = Figure(figsize=(7, 3 * len(panels)), dpi=110, layout="constrained")
    axes: Any = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for each, (metric, lines) in zip(axes, panels.items(), strict=True):
        for label, points in lines.items():
            each.plot(*points, marker="o", label=label)
        each.set_ylabel(f"best validation {metric}")
        each.grid(color="0.9")
        each.spines[["top", "right"]].set_visible(False)
        if len(lines) > 1:
            each.legend(frameon=False, fontsize="small")
    axes[-1].set_xlabel(next((variant[0].partition("=")[0] for variant in variants if variant), "run"))
    figure.savefig(file, format="png")
    return True
