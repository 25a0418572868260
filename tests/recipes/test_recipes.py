"""Every recipe of the repository trains for a few steps, on generated data in the place of its data set."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.processes import run_processes, train
from trainer.distributed.launch import Launch
from trainer.recipe.load import load_recipe
from trainer.tasks.checks import TASK_CHECKS

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))
STAND_IN = Path(__file__).resolve().parents[1] / "stand_in.py"
# What a test changes: less of everything, no download; all other settings of the recipe are tried.
SMALLER = (
    "name=small",
    "data.batch_size=4",
    "data.workers=0",
    "train.duration=2 steps",
    "train.threads=1",
    "evaluate.every=2 steps",
    "evaluate.pictures=2",
    "track=[]",
)


def test_there_are_recipes() -> None:
    assert ROOT / "recipes" / "quickstart.yaml" in RECIPES


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: str(path.relative_to(ROOT / "recipes")))
def test_recipe_is_valid_and_its_header_states_cost_and_result(recipe: Path) -> None:
    loaded = load_recipe(recipe, (), [*Launch(processes=1).checks(), *TASK_CHECKS])
    assert loaded.evaluate.best
    header = recipe.read_text(encoding="utf-8").split("\n\n")[0]
    assert header.startswith("#") and "Result:" in header and "Cost:" in header


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: str(path.relative_to(ROOT / "recipes")))
def test_recipe_trains_on_generated_data(recipe: Path, tmp_path: Path) -> None:
    settings = load_recipe(recipe)
    smaller = list(SMALLER)
    if hasattr(settings.model, "min_size"):  # to which images would be enlarged
        smaller += ["model.min_size=64", "model.max_size=96"]
    with_objects = "boxes" in settings.components["task"].fields
    stand_in = (
        ("plugins=[tests.scenes]", "data.name=scenes")
        if with_objects
        else (f"plugins=[{STAND_IN}]", "data.name=stand_in")
    )
    if settings.model.weights != "none":
        smaller.append("model.weights=none")
    if getattr(settings.task, "exclude", []):  # classes that the generated data lack
        smaller.append("task.exclude=[flower]")
    run_processes(1, train, recipe, (*smaller, *stand_in))
    run = tmp_path / "runs" / "small"
    assert json.loads((run / "summary.json").read_text())["status"] == "finished"
    assert (run / "checkpoints" / "last" / "model.safetensors").exists()
    assert list((run / "pictures").glob("validation_*.png"))
