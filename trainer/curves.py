"""Pictures of a run: learning curves, and sheets of samples."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from trainer.tracking import Line, lower_is_better, metrics_of

MIN_HEIGHT = 128  # pixels of a sample on a sheet
Points = tuple[list[float], list[float]]


def draw_curves(lines: list[Line], file: Path) -> None:
    """Draws the train and validation losses, and below them the validation metrics where there are any.

    Args:
        lines: of `metrics.jsonl`.
        file: the PNG to write.
    """
    from matplotlib.figure import Figure  # without pyplot there is no global state and no display

    train, validation = _series(lines, "train"), _series(lines, "validation")
    losses = sorted({name for name in (*train, *validation) if lower_is_better(name)}, key=lambda name: (name != "loss", name))
    metrics = [name for name in validation if not lower_is_better(name)]
    rows = 2 if metrics else 1
    figure = Figure(figsize=(9, 3.6 * rows), dpi=110, layout="constrained")
    axes = figure.subplots(rows, 1, sharex=True, squeeze=False)[:, 0]
    for index, name in enumerate(losses):
        if name in train:
            axes[0].plot(*train[name], color=f"C{index}", linewidth=1, alpha=0.55, label=f"train {name}")
        if name in validation:
            axes[0].plot(*validation[name], color=f"C{index}", linewidth=2, marker="o", markersize=3.5, label=_with_best(name, validation[name]))
    axes[0].set_ylabel("loss")
    for index, name in enumerate(metrics):
        axes[1].plot(*validation[name], color=f"C{index}", linewidth=2, marker="o", markersize=3.5, label=_with_best(name, validation[name]))
    if metrics:
        axes[1].set_ylabel("validation metrics")
    axes[-1].set_xlabel("epoch")
    for each in axes:
        each.grid(color="0.9")
        each.set_axisbelow(True)
        each.spines[["top", "right"]].set_visible(False)
        if each.lines:
            each.legend(loc="upper left", bbox_to_anchor=(1.01, 1), borderaxespad=0, frameon=False, fontsize="small")
    figure.savefig(file, format="png")


def save_sheet(rows: Sequence[Tensor], file: Path) -> None:
    """Writes pictures uint8 (3, H, W), which may differ in size, one below the other; small ones enlarged."""
    scale = max(1, MIN_HEIGHT // max(row.shape[1] for row in rows))
    rows = [row.repeat_interleave(scale, 1).repeat_interleave(scale, 2) for row in rows]
    width = max(row.shape[2] for row in rows)
    sheet = torch.cat([functional.pad(row.cpu(), (0, width - row.shape[2])) for row in rows], dim=1)
    Image.fromarray(sheet.permute(1, 2, 0).numpy()).save(file)


def _series(lines: list[Line], split: str) -> dict[str, Points]:
    """For each metric of a split its epochs and its values."""
    series: dict[str, Points] = {}
    for line in lines:
        if line["split"] == split:
            for name, value in metrics_of(line).items():
                epochs, values = series.setdefault(name, ([], []))
                epochs.append(line["epoch"])
                values.append(value)
    return series


def _with_best(name: str, points: Points) -> str:
    best = min(points[1]) if lower_is_better(name) else max(points[1])
    return f"validation {name} (best {best:.3g})"
