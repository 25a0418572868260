"""Promises of the pictures of a run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from trainer.reporting.figures import GAP, draw_confusion, draw_curves, row_shares, save_sheet

TRAIN = [
    {"step": step, "epoch": step / 10, "split": "train", "loss": 1 / step, "learning_rate": 1e-3}
    for step in range(1, 30)
]
VALIDATION = [
    {"step": step, "epoch": step / 10, "split": "validation", "loss": 2 / step, "miou": step / 30} for step in (10, 20)
]


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


def test_curves_leave_out_the_metrics_of_single_classes(tmp_path: Path) -> None:
    with_classes = [line | {"iou/flower": 0.5} for line in VALIDATION]
    for name, lines in (("a.png", VALIDATION), ("b.png", with_classes)):
        draw_curves(TRAIN + lines, tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_a_loss_that_was_not_finite_leaves_a_gap_instead_of_an_error(tmp_path: Path) -> None:
    draw_curves([*TRAIN, {"step": 30, "epoch": 3.0, "split": "train", "loss": None}], tmp_path / "gap.png")
    draw_curves([], tmp_path / "empty.png")
    assert size(tmp_path / "gap.png") == size(tmp_path / "empty.png")


def test_drawing_leaves_pyplot_alone(tmp_path: Path) -> None:
    import sys

    before = "matplotlib.pyplot" in sys.modules
    draw_curves(TRAIN, tmp_path / "a.png")
    assert ("matplotlib.pyplot" in sys.modules) == before


def test_a_confusion_matrix_is_coloured_by_the_shares_of_its_rows(tmp_path: Path) -> None:
    counts = np.array([[3, 1, 0], [0, 2000, 0], [0, 0, 0]])
    np.testing.assert_array_equal(row_shares(counts), [[0.75, 0.25, 0], [0, 1, 0], [np.nan] * 3])
    for name, scale in (("a.png", 1), ("b.png", 1), ("c.png", 7)):
        draw_confusion({each: (scale * row).tolist() for each, row in zip("abc", counts, strict=True)}, tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes() != (tmp_path / "c.png").read_bytes()
    with Image.open(tmp_path / "a.png") as picture:
        colors = {color: number for number, color in picture.convert("RGB").getcolors(2**20)}
    white, full, absent = (247, 251, 255), (8, 48, 107), (230, 230, 230)  # nothing, all and a class that isn't there
    assert colors[white] > 2 * colors[full] > 0 and colors[absent] > 2 * colors[full]


def test_a_confusion_matrix_of_many_classes_has_no_figures_in_its_cells(tmp_path: Path) -> None:
    for name, diagonal in (("a.png", 5), ("b.png", 6)):
        draw_confusion(
            {str(row): [diagonal * (row == column) for column in range(30)] for row in range(30)}, tmp_path / name
        )
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert size(tmp_path / "a.png")[0] > 1000


def sheet(*arguments: object) -> np.ndarray:
    save_sheet(*arguments)  # type: ignore[arg-type]
    with Image.open(arguments[1]) as image:  # type: ignore[arg-type]
        return np.asarray(image)


def test_samples_stand_in_rows_and_their_panels_in_columns_small_ones_enlarged(tmp_path: Path) -> None:
    samples = [torch.full((2, 3, 4, 6), 10, dtype=torch.uint8), torch.full((2, 3, 2, 9), 20, dtype=torch.uint8)]
    samples[1][1] = 30
    found = sheet(samples, tmp_path / "s.png")[..., 0]
    assert found.shape == (GAP + 4 * 32 + GAP + 2 * 32 + GAP, GAP + 2 * (9 * 32 + GAP))
    for value, top, left, height, width in ((10, 0, 0, 4, 6), (10, 0, 1, 4, 6), (20, 1, 0, 2, 9), (30, 1, 1, 2, 9)):
        y, x = GAP + top * (4 * 32 + GAP), GAP + left * (9 * 32 + GAP)
        assert (found[y : y + 32 * height, x : x + 32 * width] == value).all()
    assert (found == 10).sum() == 2 * 24 * 32**2 and (found == 20).sum() == (found == 30).sum() == 18 * 32**2


def test_enlarged_samples_have_the_colours_of_the_small_ones_and_no_others(tmp_path: Path) -> None:
    pixels = torch.randint(100, (1, 3, 8, 8), dtype=torch.uint8)
    found = sheet([pixels], tmp_path / "s.png")[GAP:-GAP, GAP:-GAP]
    assert (found[::16, ::16] == pixels[0].permute(1, 2, 0).numpy()).all() and (
        found == found[::16, ::16].repeat(16, 0).repeat(16, 1)
    ).all()


def test_a_sheet_says_what_its_panels_and_colours_are(tmp_path: Path) -> None:
    sample = torch.full((2, 3, 128, 128), 200, dtype=torch.uint8)
    plain = sheet([sample], tmp_path / "plain.png")
    named = sheet([sample], tmp_path / "named.png", ("image", "mask"))
    above = len(named) - len(plain)
    assert above > 0 and (named[above:] == plain).all()
    left, right = named[:above, : plain.shape[1] // 2], named[:above, plain.shape[1] // 2 :]
    assert left.min() < 64 and right.min() < 64 and (left != right).any()
    colors = {f"class {index}": (index, 255 - index, 7) for index in range(9)}
    explained = sheet([sample], tmp_path / "explained.png", ("image", "mask"), colors)
    assert explained.shape[1] == plain.shape[1] and (explained[: len(named)] == named).all()
    below = explained[len(named) :].reshape(-1, 3)
    assert all((below == color).all(1).sum() > 100 for color in colors.values())
