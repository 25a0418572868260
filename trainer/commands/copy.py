"""`trainer copy`: a recipe as the start of one's own."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "write a recipe as the start of your own, with every key that could be set"
SUFFIXES = (".yaml", ".yml")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of this verb."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = (
        "The copy trains what RECIPE trains; it holds what RECIPE inherits. Keys that RECIPE leaves at their default\n"
        "are comments, with a few words on each. For example\n"
        "  trainer copy quickstart mine.yaml\n"
        "  trainer check mine.yaml"
    )
    parser.add_argument("recipe", metavar="RECIPE", help="a recipe file, or a name of `trainer list recipes`")
    parser.add_argument("to", type=Path, metavar="MINE.yaml", help="the file to write; it must not exist")


def run(options: argparse.Namespace) -> None:
    """Writes the file; says what to do with it.

    Raises:
        UserError: there is no such recipe, it has mistakes, or the file exists or can't be written.
    """
    from trainer.errors import UserError
    from trainer.recipe.describe import recipe_files
    from trainer.recipe.file import nearest
    from trainer.recipe.load import load_recipe
    from trainer.recipe.template import template
    from trainer.runs.durable import atomic_write

    to: Path = options.to
    if to.suffix not in SUFFIXES:
        raise UserError(f"{to}: a recipe is a .yaml file; call it {to.with_name((to.name or 'mine') + '.yaml')}")
    if to.exists() or to.is_symlink():
        raise UserError(f"{to} exists; name a new file")
    if not to.parent.is_dir():
        raise UserError(f"{to}: there is no folder {to.parent}; create it first")
    given = Path(options.recipe)
    if not given.exists() and given.suffix not in SUFFIXES:
        known = recipe_files()
        if options.recipe not in known:
            raise UserError(f"no recipe {options.recipe!r}; {nearest(options.recipe, known)}")
        given = known[options.recipe]
    text = template(load_recipe(given))
    try:
        atomic_write(to, text)
    except OSError as error:
        raise UserError(f"{to}: can't be written: {error.strerror or error}") from error
    print(f"{to}: {given} with all its keys; edit it, then `trainer check {to}`")
