"""A new kind of task is a file outside the package: it trains, is evaluated and resumes exactly, and is checked, like
those of the package.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.processes import lines, run_processes, train, weights, write_recipe
from trainer.commands import main
from trainer.losses.cross_entropy import CrossEntropy
from trainer.recipe.load import load_recipe

PLUGINS = Path(__file__).parents[1] / "plugins"
RECIPE = f"""
plugins: [{PLUGINS / "classification.py"}]
task: classification
data: {{name: patterns, batch_size: 12, window: 3, workers: 0, augment: [horizontal_flip]}}
model: small_classifier
loss: cross_entropy
optimizer: {{name: adamw, lr: 1e-2}}
train: {{duration: 16 epochs, precision: fp64, threads: 1, log_every: 10 steps}}
evaluate: {{every: 4 epochs, best: accuracy, batch_size: 4, pictures: 2}}
checkpoint: {{every: 16 steps}}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return write_recipe(tmp_path, RECIPE)


def test_a_classification_task_trains_and_is_evaluated_exactly_on_one_and_two_processes(
    tmp_path: Path, recipe: Path
) -> None:
    for world_size in (1, 2):
        run_processes(world_size, train, recipe, (f"name=p{world_size}",))
    one, two = (lines(tmp_path / "runs" / f"p{world_size}", "validation") for world_size in (1, 2))
    assert one[-1]["accuracy"] > 0.8
    for line, expected in zip(two, one, strict=True):
        assert line["loss"] == pytest.approx(expected["loss"], rel=1e-9)
        assert line["confusion"] == expected["confusion"] and sum(map(sum, line["confusion"].values())) == 13
    pictures = {file.name for file in (tmp_path / "runs" / "p1" / "pictures").glob("*_step_00000080.png")}
    assert pictures == {"confusion_step_00000080.png"}  # the task draws none of its own


def test_a_classification_task_resumes_bit_for_bit(tmp_path: Path, recipe: Path) -> None:
    options = ("train.precision=fp32", "train.duration=8 epochs", "evaluate.pictures=0")
    run_processes(1, train, recipe, ("name=uninterrupted", *options))
    run_processes(1, train, recipe, ("name=cut", *options), 23)
    run_processes(1, train, recipe, ("name=cut", *options))
    uninterrupted, cut = tmp_path / "runs" / "uninterrupted", tmp_path / "runs" / "cut"
    assert weights(cut) == weights(uninterrupted) and lines(cut) == lines(uninterrupted)


def test_check_knows_the_components_of_a_plugin(
    tmp_path: Path, recipe: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRAINER_DATA", str(tmp_path / "data"))
    assert main(["check", str(recipe)]) == 0 and "small_classifier" in capsys.readouterr().out
    assert main(["check", str(recipe), "loss=dice"]) == 2
    assert "loss dice doesn't fit task classification" in capsys.readouterr().err
    assert main(["check", str(recipe), "evaluate.best=miou"]) == 2
    assert "evaluate.best: unknown metric; known: loss, accuracy" in capsys.readouterr().err


def test_the_prediction_for_an_image_is_its_class(recipe: Path) -> None:
    components = load_recipe(recipe, []).components
    model = components["model"].build({}, num_classes=3)
    task = components["task"].build({}, model=model, loss=CrossEntropy(3, None, {}), classes=("a", "b", "c"))
    images = torch.randint(256, (5, 3, 16, 16), dtype=torch.uint8)
    predicted = task.predict(model, {"image": images})
    assert torch.equal(predicted, model(images / 127.5 - 1).argmax(1))
    assert not task.pictures(model, {"image": images})
