"""Promises of the learning curves."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from trainer.curves import draw_curves, save_sheet

TRAIN = [{"step": step, "epoch": step / 10, "split": "train", "loss": 1 / step, "learning_rate": 1e-3} for step in range(1, 30)]
VALIDATION = [{"step": step, "epoch": step / 10, "split": "validation", "loss": 2 / step, "miou": step / 30} for step in (10, 20)]


def size(file: Path) -> tuple[int, int]:
    with Image.open(file) as image:
        darkest, brightest = image.convert("L").getextrema()
        assert darkest < 64 < 250 < brightest, "the picture is blank"
        return image.height, image.width


def test_metrics_get_a_row_of_their_own_below_the_losses(tmp_path: Path) -> None:
    draw_curves(TRAIN, tmp_path / "losses.png")
    draw_curves(TRAIN + VALIDATION, tmp_path / "both.png")
    one, two = size(tmp_path / "losses.png"), size(tmp_path / "both.png")
    assert two == (2 * one[0], one[1])


def test_curves_depend_on_nothing_but_the_lines(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        draw_curves(TRAIN + VALIDATION, tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    worse = [line | {"miou": 0.1} if "miou" in line else line for line in VALIDATION]
    draw_curves(TRAIN + worse, tmp_path / "c.png")
    assert (tmp_path / "c.png").read_bytes() != (tmp_path / "a.png").read_bytes()


def test_a_loss_that_was_not_finite_leaves_a_gap_instead_of_an_error(tmp_path: Path) -> None:
    draw_curves([*TRAIN, {"step": 30, "epoch": 3.0, "split": "train", "loss": None}], tmp_path / "gap.png")
    draw_curves([], tmp_path / "empty.png")
    assert size(tmp_path / "gap.png") == size(tmp_path / "empty.png")


def test_drawing_leaves_pyplot_alone(tmp_path: Path) -> None:
    import sys

    before = "matplotlib.pyplot" in sys.modules
    draw_curves(TRAIN, tmp_path / "a.png")
    assert ("matplotlib.pyplot" in sys.modules) == before


def test_samples_of_several_sizes_are_drawn_one_below_the_other(tmp_path: Path) -> None:
    save_sheet([torch.full((3, 4, 6), 10, dtype=torch.uint8), torch.full((3, 2, 9), 20, dtype=torch.uint8)], tmp_path / "s.png")
    sheet = np.asarray(Image.open(tmp_path / "s.png"))
    assert sheet.shape == (6 * 32, 9 * 32, 3)  # small ones are enlarged
    assert sheet[0, 6 * 32 - 1, 0] == 10 and sheet[0, 6 * 32, 0] == 0 and sheet[-1, -1, 0] == 20
