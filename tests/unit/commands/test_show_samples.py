"""`trainer check RECIPE --show-samples out.png`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.processes import RECIPE, write_recipe
from trainer.commands import check, main
from trainer.data.prepare import data_dir, ensure_prepared
from trainer.recipe.load import load_recipe


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A recipe whose set is prepared."""
    file = write_recipe(tmp_path, RECIPE)
    ensure_prepared(load_recipe(file).source, data_dir(), None, lambda line: None)
    return file


def shown(recipe: Path, out: Path, *overrides: str) -> np.ndarray:
    assert main(["check", str(recipe), "--show-samples", str(out), *overrides]) == 0
    return np.asarray(Image.open(out).convert("RGB"))


def test_the_picture_shows_samples_their_masks_and_what_the_recipe_makes_of_them(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = []
    paint = check._painted

    def painted(image: object, mask: object, num_classes: int) -> object:
        drawn.append((image.shape, mask))
        return paint(image, mask, num_classes)

    monkeypatch.setattr(check, "_painted", painted)
    picture = shown(recipe, recipe.with_suffix(".png"))
    assert picture.shape[0] > 400 and len(np.unique(picture.reshape(-1, 3), axis=0)) > 100
    assert len(drawn) == 4 * (1 + 4)
    for first in range(0, len(drawn), 5):  # a sample: as it is, and cut to 16 x 16 in four epochs
        assert [tuple(shape[1:]) for shape, _ in drawn[first : first + 5]] == [(24, 24)] + 4 * [(16, 16)]
        assert len({mask.numpy().tobytes() for _, mask in drawn[first + 1 : first + 5]}) > 1


def test_it_is_the_same_picture_every_time_and_another_for_another_seed(recipe: Path, tmp_path: Path) -> None:
    first, again, other = (
        shown(recipe, tmp_path / f"{i}.png", *overrides) for i, overrides in enumerate([(), (), ("train.seed=1",)])
    )
    assert np.array_equal(first, again) and not np.array_equal(first, other)


def test_no_cache_of_the_whole_set_is_made_for_it(recipe: Path, tmp_path: Path) -> None:
    shown(recipe, tmp_path / "out.png")
    assert not (data_dir() / "tiny" / "cache").exists()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("out.jpg", "give a .png file and only one recipe"),
        ("missing/out.png", "can't be written: No such file"),
        ("folder.png", "can't be written"),
    ],
)
def test_a_file_that_cannot_be_it_is_refused(
    recipe: Path, tmp_path: Path, name: str, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "folder.png").mkdir()
    assert main(["check", str(recipe), "--show-samples", str(tmp_path / name)]) == 2
    error = capsys.readouterr().err
    assert f"--show-samples {tmp_path / name}" in error and expected in error


def test_samples_of_several_recipes_are_refused(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", str(recipe), str(recipe), "--show-samples", str(tmp_path / "out.png")]) == 2
    assert "one recipe" in capsys.readouterr().err


def test_a_set_that_is_not_prepared_is_refused_with_the_command_that_does(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = Path(__file__).parents[3] / "recipes" / "quickstart.yaml"
    assert main(["check", str(recipe), "--show-samples", str(tmp_path / "out.png")]) == 2
    assert "shapes contains no prepared data set; run `trainer prepare shapes` to prepare it" in capsys.readouterr().err
