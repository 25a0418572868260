"""`trainer prepare DATASET`: from official archives, files or the Hub to Parquet files."""

from __future__ import annotations

import argparse
import inspect
import time
from collections.abc import Callable
from pathlib import Path

from trainer.components import catalogue
from trainer.data.card import Card
from trainer.data.files import VALIDATION, flag
from trainer.data.prepare import archives_dir, data_dir, ensure_prepared
from trainer.data.sets import coco, folder, yolo
from trainer.data.source import Source
from trainer.errors import UserError
from trainer.recipe.file import COMMAND_LINE, Reader, RecipeError, nearest
from trainer.recipe.load import Validator
from trainer.recipe.recipe import build

SHOWN = 10  # classes of objects, those with most of them
HELP = "turn a data set's official archives, or files of your own, into Parquet files"
# What makes each set of files; its parameters are the options of the command.
OF_FILES: dict[str, tuple[Callable[..., Source], str]] = {
    "folder": (folder.from_files, folder.USAGE),
    "yolo": (yolo.from_yolo, yolo.USAGE),
    "coco": (coco.from_coco, coco.USAGE),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    parser.add_argument(
        "dataset",
        metavar="DATASET",
        help=f"name of the data set, as in a recipe's data.name; or one of {', '.join(OF_FILES)}",
    )
    parser.add_argument(
        "settings",
        nargs="*",
        metavar="key=value",
        help="the data set's own keys, as in a recipe's data, e.g. category=ship",
    )
    parser.add_argument(
        "--archives",
        type=Path,
        metavar="DIR",
        help="folder with the archives (default: $TRAINER_ARCHIVES); what it lacks is downloaded",
    )
    parser.add_argument("--verify", action="store_true", help="recompute the checksums of what is prepared")
    usages = "; ".join(f"trainer prepare {usage}" for _, usage in OF_FILES.values())
    files = parser.add_argument_group(
        "files of your own",
        f"{usages}. A recipe says data: {{name: folder, set: NAME, …}}, and likewise for yolo and coco",
    )
    files.add_argument("--name", help="of the set")
    files.add_argument("--images", type=Path, metavar="DIR", help="images, in this folder and below")
    files.add_argument("--masks", type=Path, metavar="DIR", help="folder: index or palette PNG of the same names")
    files.add_argument(
        "--labels",
        type=Path,
        metavar="DIR",
        help="yolo: text files of the same names; an image without one has no objects",
    )
    files.add_argument("--annotations", type=Path, metavar="FILE", help="coco: a COCO file of instances (JSON)")
    files.add_argument(
        "--classes",
        type=Path,
        metavar="FILE",
        help="text file: the name of a class in each line, in the order of their index",
    )
    files.add_argument(
        "--ignore", type=int, metavar="LABEL", help="folder: the label that counts nowhere (default: none)"
    )
    files.add_argument(
        "--validation",
        metavar="SHARE | DIR | FILE",
        help=f"share of the images that validate (default: {VALIDATION}); folder, yolo: or a folder with two called "
        "like those of --images and of "
        "--masks or --labels (where these are called alike, the name of the folders beside them); coco: or a COCO "
        "file of those that do",
    )
    files.add_argument(
        "--validation-images",
        type=Path,
        metavar="DIR",
        help="images that validate; coco: those that the file of --validation lists",
    )
    files.add_argument("--validation-masks", type=Path, metavar="DIR", help="folder: the masks of --validation-images")
    files.add_argument(
        "--validation-labels", type=Path, metavar="DIR", help="yolo: the text files of --validation-images"
    )
    files.add_argument(
        "--test",
        metavar="DIR | FILE",
        help="a third split, which no training reads; otherwise like --validation, but never a share",
    )
    files.add_argument(
        "--test-images",
        type=Path,
        metavar="DIR",
        help="images of the test split; coco: those that the file of --test lists",
    )
    files.add_argument("--test-masks", type=Path, metavar="DIR", help="folder: the masks of --test-images")
    files.add_argument("--test-labels", type=Path, metavar="DIR", help="yolo: the text files of --test-images")
    files.add_argument(
        "--invalid", choices=("refuse", "drop"), help="yolo, coco: what becomes of an invalid object (default: refuse)"
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
    print(
        f"{card.name}: {sum(counts.values())} rows, " + ", ".join(f"{rows} {split}" for split, rows in counts.items())
    )
    print(describe_classes(card))
    print("\n".join([*card.notes, f"in {folder} ({time.monotonic() - start:.1f} s)"]))
    return 0


def describe_classes(card: Card) -> str:
    """The classes, and how much of each there is to train on."""
    objects = card.statistics.get("class_objects")
    if objects is not None:
        found = sorted(
            ((count, name) for count, name in zip(objects, card.classes, strict=True) if count),
            key=lambda each: -each[0],
        )
        listed = ", ".join([f"{name} {count}" for count, name in found[:SHOWN]] + ["…"] * (len(found) > SHOWN))
        return f"{sum(objects)} training objects, of {len(found)} of {len(objects)} classes: {listed or 'none'}"
    pixels = card.statistics.get("class_pixels", [])
    shares = [f" {count / max(1, sum(pixels)):.2%}" for count in pixels] or [""] * len(card.classes)
    classes = ", ".join(name + share for name, share in zip(card.classes, shares, strict=True))
    ignored = "" if card.ignore_index is None else f" (ignored: {card.ignore_index})"
    return f"classes{', of the training pixels' * bool(pixels)}: {classes}{ignored}"


def _source(args: argparse.Namespace) -> Source:
    """The data set that the command line describes."""
    datasets = catalogue("dataset")
    if args.dataset not in datasets:
        raise UserError(f"unknown data set {args.dataset!r}; {nearest(args.dataset, datasets)}")
    options = {kind: inspect.signature(make).parameters for kind, (make, _) in OF_FILES.items()}
    given = {
        option: value
        for of_kind in options.values()
        for option in of_kind
        if (value := getattr(args, option)) is not None
    }
    own = dict(options.get(args.dataset, {}))
    for option in given:
        if option not in own:
            owners = " or ".join(f"`trainer prepare {kind}`" for kind, of_kind in options.items() if option in of_kind)
            raise UserError(f"{flag(option)} belongs to {owners}, not to {args.dataset}")
    if own:
        make, usage = OF_FILES[args.dataset]
        lacking = [
            flag(option)
            for option, parameter in own.items()
            if parameter.default is parameter.empty and option not in given
        ]
        if lacking:
            raise UserError(
                f"{', '.join(lacking)} {'is' if len(lacking) == 1 else 'are'} missing: trainer prepare {usage}"
            )
        if args.settings:
            raise UserError(f"{args.settings[0]} is no option: trainer prepare {usage}")
        return make(**given)
    component = datasets[args.dataset]
    reader = Reader({})
    settings = Validator(reader, Path(COMMAND_LINE)).section(component.schema, reader.overrides(args.settings)[0], ())
    if settings is None or reader.problems:
        raise RecipeError(reader.problems)
    try:
        source: Source = build(component, settings)
    except ValueError as error:
        raise UserError(f"{args.dataset}: {error}") from error
    return source
