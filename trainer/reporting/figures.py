"""Pictures of a run: learning curves, confusion matrices, and sheets of samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from trainer.metrics.best import lower_is_better
from trainer.runs.folder import Line, metrics_of

MAX_LABELLED = 20  # classes of a confusion matrix with numbers in its cells

# Of a sheet, in pixels.
MIN_HEIGHT = 128  # of a sample
GAP = 6
TEXT = 14

Points = tuple[list[float], list[float]]


def draw_curves(lines: list[Line], file: Path) -> None:
    """Draws the train and validation losses and, below them, the validation metrics except those of single classes.

    Args:
        lines: of `metrics.jsonl`.
        file: the PNG to write.
    """
    from matplotlib.figure import Figure  # unlike pyplot, needs no global state and no display

    train, validation = _series(lines, "train"), _series(lines, "validation")
    losses = sorted(
        {name for name in (*train, *validation) if lower_is_better(name)}, key=lambda name: (name != "loss", name)
    )
    metrics = [name for name in validation if not lower_is_better(name) and "/" not in name]
    rows = 2 if metrics else 1
    figure = Figure(figsize=(9, 3.6 * rows), dpi=110, layout="constrained")
    axes = figure.subplots(rows, 1, sharex=True, squeeze=False)[:, 0]
    for index, name in enumerate(losses):
        if name in train:
            axes[0].plot(*train[name], color=f"C{index}", linewidth=1, alpha=0.55, label=f"train {name}")
        if name in validation:
            axes[0].plot(
                *validation[name],
                color=f"C{index}",
                linewidth=2,
                marker="o",
                markersize=3.5,
                label=_with_best(name, validation[name]),
            )
    axes[0].set_ylabel("loss")
    for index, name in enumerate(metrics):
        axes[1].plot(
            *validation[name],
            color=f"C{index}",
            linewidth=2,
            marker="o",
            markersize=3.5,
            label=_with_best(name, validation[name]),
        )
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


def draw_confusion(table: Mapping[str, Sequence[int]], file: Path) -> None:
    """Draws a confusion matrix: rows are the ground truth, columns the prediction, colours the share of the row.

    Args:
        table: for each ground-truth class the counts of its predicted classes, in the same order.
        file: the PNG to write.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, PercentFormatter

    counts = np.array(list(table.values()))
    shares = row_shares(counts)
    side = 2.5 + min(12.0, 0.7 * len(table))
    figure = Figure(figsize=(side, side), dpi=110, layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(len(table)), table, rotation=45, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(table)), table)
    axes.set(xlabel="prediction", ylabel="ground truth", facecolor="0.9")  # the rows of absent classes stay grey
    axes.spines[:].set_visible(False)
    if len(table) > MAX_LABELLED:
        figure.colorbar(image, shrink=0.7, format=PercentFormatter(1), label="share of the ground-truth class")
    else:
        shorten = EngFormatter(places=1, sep="")
        for row, column in zip(*counts.nonzero(), strict=True):
            count, share = counts[row, column], shares[row, column]
            text = f"{share:.1%}\n{shorten(count) if count >= 1000 else count}"
            axes.text(
                column,
                row,
                text,
                ha="center",
                va="center",
                fontsize="x-small",
                color="white" if share > 0.5 else "black",
                in_layout=False,
            )
    figure.savefig(file, format="png")


def draw_precision_recall(table: Mapping[str, Sequence[float]], file: Path) -> None:
    """Draws precision over recall, for each class and as the mean over classes.

    Args:
        table: for each class the precision at recalls evenly spaced from 0 to 1.
        file: the PNG to write.
    """
    from matplotlib.figure import Figure

    curves = np.array(list(table.values()))
    recalls = np.linspace(0, 1, curves.shape[1])
    figure = Figure(figsize=(6, 4.5), dpi=110, layout="constrained")
    axes = figure.subplots()
    few = len(table) <= MAX_LABELLED
    for name, curve in zip(table, curves, strict=True):
        label = f"{name} ({curve.mean():.2f})" if few else None
        axes.plot(recalls, curve, linewidth=1, label=label, color=None if few else "0.8")
    if len(table) > 1:
        axes.plot(
            recalls,
            curves.mean(0),
            color="black",
            linewidth=2,
            label=f"mean of {len(table)} classes ({curves.mean():.2f})",
        )
    axes.set(xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02))
    axes.grid(color="0.9")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), borderaxespad=0, frameon=False, fontsize="small")
    figure.savefig(file, format="png")


def row_shares(counts: np.ndarray) -> np.ndarray:
    """Each count as a share of its row; nan in empty rows."""
    totals = counts.sum(1, keepdims=True)
    shares: np.ndarray = np.divide(counts, totals, out=np.full(counts.shape, np.nan), where=totals > 0)
    return shares


def save_sheet(
    samples: Sequence[Tensor | Sequence[Tensor]],
    file: Path,
    panels: Sequence[str] = (),
    legend: Mapping[str, tuple[int, int, int]] = {},
) -> None:
    """Writes a sheet with a row of panels for each sample; small samples are enlarged by an integer factor.

    Args:
        samples: P panels each, uint8 (3, H, W), of any size.
        file: the PNG to write.
        panels: headings of the P columns.
        legend: colours (RGB, 0 to 255) by meaning, drawn below.
    """
    font = ImageFont.load_default(TEXT)
    scale = max(1, MIN_HEIGHT // max(panel.shape[1] for sample in samples for panel in sample))
    column = GAP + scale * max(panel.shape[2] for sample in samples for panel in sample)
    width = GAP + column * len(samples[0])
    entry = 2 * TEXT + GAP + round(max(map(font.getlength, legend), default=0))  # a square of the colour and its name
    entries_in_line = max(1, (width - GAP) // entry)
    heading, line = (TEXT + GAP if texts else 0 for texts in (panels, legend))
    heights = [GAP + scale * max(panel.shape[1] for panel in sample) for sample in samples]
    sheet = Image.new("RGB", (width, heading + sum(heights) + GAP + line * -(-len(legend) // entries_in_line)), "white")
    draw = ImageDraw.Draw(sheet)
    for index, name in enumerate(panels):
        draw.text((GAP + index * column, GAP // 2), name, "black", font)
    top = heading + GAP
    for sample, height in zip(samples, heights, strict=True):
        for index, panel in enumerate(sample):
            image = Image.fromarray(panel.permute(1, 2, 0).cpu().numpy())
            sheet.paste(
                image.resize((scale * image.width, scale * image.height), Image.Resampling.NEAREST),
                (GAP + index * column, top),
            )
        top += height
    for index, (name, color) in enumerate(legend.items()):
        x, y = GAP + index % entries_in_line * entry, top + index // entries_in_line * line
        draw.rectangle((x, y, x + TEXT, y + TEXT), color, "black")
        draw.text((x + TEXT + GAP, y - 1), name, "black", font)
    sheet.save(file)


def _series(lines: list[Line], split: str) -> dict[str, Points]:
    """The epochs and values of each metric of a split."""
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
