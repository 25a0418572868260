"""`trainer prepare DATASET`: from official archives, files or the Hub to Parquet files."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from trainer.components import catalogue
from trainer.data.prepare import archives_dir, data_dir, ensure_prepared
from trainer.data.sets.folder import VALIDATION, from_files
from trainer.data.source import Source
from trainer.errors import UserError
from trainer.recipe import RecipeError, Validator, build
from trainer.recipe_file import COMMAND_LINE, Reader, nearest

HELP = "turn a data set's official archives, or files of your own, into Parquet files"
FILES = {"name": True, "images": True, "masks": True, "classes": True, "ignore": False, "validation": False}  # option of a set of files: is it needed?


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    parser.add_argument("dataset", metavar="DATASET", help="name of the data set, as in a recipe's data.name; or `folder`")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="the data set's own keys, as in a recipe's data, e.g. category=ship")
    parser.add_argument("--archives", type=Path, metavar="DIR", help="folder with the archives (default: $TRAINER_ARCHIVES); what it lacks is downloaded")
    parser.add_argument("--verify", action="store_true", help="recompute the checksums of what is prepared")
    files = parser.add_argument_group("trainer prepare folder", "a set of your own image and mask files; a recipe says data: {name: folder, set: NAME, …}")
    files.add_argument("--name", help="of the set")
    files.add_argument("--images", type=Path, metavar="DIR", help="images, in this folder and below")
    files.add_argument("--masks", type=Path, metavar="DIR", help="index or palette PNG of the same names")
    files.add_argument("--classes", type=Path, metavar="FILE", help="text file: the name of a class in each line, in the order of their index")
    files.add_argument("--ignore", type=int, metavar="LABEL", help="the label that counts nowhere (default: none)")
    files.add_argument(
        "--validation",
        metavar="SHARE | DIR",
        help=f"share of the images that validate, or a folder with two called like those of --images and --masks (default: {VALIDATION})",
    )


def run(args: argparse.Namespace) -> int:
    """Prepares the set if it isn't yet, and prints what it holds.

    Raises:
        UserError: no such data set, or see `trainer.data.prepare.prepare`.
    """
    source = _source(args)
    folder = data_dir() / source.name
    start = time.monotonic()
    card = ensure_prepared(source, data_dir(), args.archives or archives_dir())
    if args.verify:
        card.verify(folder)
        print("every file is as it was written")
    counts = {split: written.rows for split, written in card.splits.items()}
    print(f"{card.name}: {sum(counts.values())} rows, " + ", ".join(f"{rows} {split}" for split, rows in counts.items()))
    pixels = card.statistics.get("class_pixels", [])
    shares = [f" {count / max(1, sum(pixels)):.2%}" for count in pixels] or [""] * len(card.classes)
    classes = ", ".join(name + share for name, share in zip(card.classes, shares, strict=True))
    ignored = "" if card.ignore_index is None else f" (ignored: {card.ignore_index})"
    print(f"classes{', of the training pixels' * bool(pixels)}: {classes}{ignored}")
    print("\n".join([*card.notes, f"in {folder} ({time.monotonic() - start:.1f} s)"]))
    return 0


def _source(args: argparse.Namespace) -> Source:
    """The data set that the command line describes."""
    datasets = catalogue("dataset")
    if args.dataset not in datasets:
        raise UserError(f"unknown data set {args.dataset!r}; {nearest(args.dataset, datasets)}")
    given = {option: value for option in FILES if (value := getattr(args, option)) is not None}
    if args.dataset == "folder":
        if args.settings or not all(option in given for option, needed in FILES.items() if needed):
            raise UserError("trainer prepare folder --name NAME --images DIR --masks DIR --classes FILE [--ignore LABEL] [--validation SHARE|DIR]")
        return from_files(**given)
    if given:
        raise UserError(f"--{next(iter(given))} belongs to `trainer prepare folder`, not to {args.dataset}")
    component = datasets[args.dataset]
    reader = Reader(named=())
    settings = Validator(reader, Path(COMMAND_LINE)).section(component.schema, reader.overrides(args.settings)[0], ())
    if reader.problems:
        raise RecipeError(reader.problems)
    try:
        source: Source = build(component, settings)
    except ValueError as error:
        raise UserError(f"{args.dataset}: {error}") from error
    return source
