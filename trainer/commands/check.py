"""`trainer check`: is a recipe right, and what will it do?"""

from __future__ import annotations

import argparse
import io
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # imported where it is used: `trainer --help` must not wait for torch
    from trainer.recipe import Recipe

HELP = "validate recipes and their data; print the resolved recipe"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of this verb."""
    parser.add_argument("recipes", nargs="+", metavar="RECIPE | key.path=value", help="recipe files, and overrides for all of them")
    parser.add_argument("--num_processes", "--num-processes", type=int, help="check the recipe for this many processes (default: the launch file's)")
    parser.add_argument("--config_file", type=Path, default=None, help="the launch file to compare with (default: accelerate_config.yaml)")


def run(options: argparse.Namespace) -> None:
    """Checks every recipe; raises `UserError` with all problems of all of them."""
    from dataclasses import replace

    from ruamel.yaml import YAML

    from trainer.accelerator import LAUNCH_FILE, Launch
    from trainer.errors import UserError
    from trainer.recipe import RecipeError, load_recipe
    from trainer.tasks.build import TASK_CHECKS

    paths = [argument for argument in options.recipes if "=" not in argument]
    overrides = [argument for argument in options.recipes if "=" in argument]
    if not paths:
        raise UserError("name at least one recipe file")
    if options.config_file and not options.config_file.is_file():
        raise UserError(f"--config_file {options.config_file}: no such file")
    launch = Launch.read(file=options.config_file or LAUNCH_FILE)
    launch = replace(launch, processes=options.num_processes or max(launch.processes, launch.file_processes))
    recipes: list[Recipe] = []
    problems = []
    for path in paths:
        try:
            recipes.append(load_recipe(path, overrides, [*launch.checks(), *TASK_CHECKS]))
        except RecipeError as error:
            problems.extend(error.problems)
    if problems:
        raise RecipeError(problems)
    for recipe in recipes:
        text = io.StringIO()
        YAML().dump(recipe.resolved(), text)
        print("---\n" * (len(recipes) > 1) + text.getvalue(), end="")
        print(f"{recipe.path}: ok", _data_line(recipe, launch.processes), sep="; ", file=sys.stderr)


def _data_line(recipe: Recipe, processes: int) -> str:
    """What the recipe's data set holds and what reading it costs, or how to get it."""
    from trainer.accelerator import num_workers
    from trainer.data.card import CARD, Card
    from trainer.data.order import Order, read_amplification
    from trainer.data.prepare import data_dir
    from trainer.durations import Clock

    folder = data_dir() / recipe.build("data").name
    if not (folder / CARD).exists():
        return f"{recipe.data.name} is not prepared yet: training does it, or `trainer prepare {recipe.data.name}`"
    card = Card.load(folder)
    card.verify(folder, everything=False)
    order = Order(card.row_groups("train"), recipe.train.seed, recipe.data.window)
    clock = Clock(recipe.train.duration, recipe.data.batch_size, order.size)
    workers = num_workers(recipe.data.workers, processes)
    amplification = read_amplification(order, recipe.data.batch_size, recipe.train.accumulate, processes, workers)
    rows = ", ".join(f"{split} {held.rows}" for split, held in card.splits.items())
    return (
        f"{card.name}: {rows} rows; {clock.total_steps or 'a number of'} steps; "
        f"the first epoch reads {amplification:.1f} rows for each one used ({processes} processes, {workers} workers)"
    )
