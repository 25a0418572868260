"""`trainer prepare DATASET`: converts official archives, files or Hub data sets to Parquet files."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from trainer.components import catalogue
from trainer.data.card import Card
from trainer.data.options import FilesCommand, flag
from trainer.data.prepare import archives_dir, data_dir, ensure_prepared
from trainer.data.sets import coco, folder, yolo
from trainer.data.source import Source
from trainer.errors import UserError
from trainer.recipe.file import COMMAND_LINE, Reader, RecipeError, nearest
from trainer.recipe.load import Validator
from trainer.recipe.recipe import build

SHOWN = 10  # the classes with most objects that are listed
HELP = "convert a data set's official archives, or your own files, to Parquet files"
OF_FILES: dict[str, tuple[FilesCommand, Callable[..., Source]]] = {
    "folder": (folder.COMMAND, folder.from_files),
    "yolo": (yolo.COMMAND, yolo.from_yolo),
    "coco": (coco.COMMAND, coco.from_coco),
}
SWITCHES = ("-h", "--help", "--verify")  # the options that take no value


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds a parser for each data set."""
    built_in = {name: component for name, component in catalogue("dataset").items() if name not in OF_FILES}
    parser.usage = "trainer prepare DATASET …"
    parser.epilog = (
        f"Built-in data sets: {', '.join(built_in)}. "
        "`trainer prepare DATASET --help` lists the options or keys of each."
    )
    parsers = parser.add_subparsers(
        dest="dataset", metavar="DATASET", required=True, prog="trainer prepare", title="your own files"
    )
    for kind, (command, _) in OF_FILES.items():
        of_files = parsers.add_parser(
            kind,
            help=command.summary,
            usage=f"trainer prepare {command.usage} [--verify]",
            description=f"Makes a data set from your own files: {command.summary}.",
            epilog=f"Example:\n  {command.example}\nThen in a recipe:\n  {command.recipe}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        for name, option in command.options.items():
            of_files.add_argument(
                flag(name),
                metavar=option.metavar,
                help=option.help,
                type=option.type,
                default=option.default,
                choices=option.choices,
            )
        # Hidden: it reads no archives, but scripts may pass the folder in every call.
        _add_common(of_files, argparse.SUPPRESS)
    for name, component in built_in.items():
        keys = ", ".join(component.schema.model_fields)
        named = parsers.add_parser(
            name,
            usage=f"trainer prepare {name} {'[key=value …] ' if keys else ''}[--archives DIR] [--verify]",
            description=f"Prepares the built-in data set {name}.",
            epilog=f"Keys, as in the data section of a recipe: {keys}." if keys else None,
        )
        _add_common(named, "folder of the archives (default: $TRAINER_ARCHIVES); missing archives are downloaded")


def _add_common(parser: argparse.ArgumentParser, archives: str) -> None:
    parser.add_argument("--archives", type=Path, metavar="DIR", help=archives)
    parser.add_argument("--verify", action="store_true", help="verify the checksums of the prepared files")


def parse(parser: argparse.ArgumentParser, words: Sequence[str]) -> argparse.Namespace:
    """Parses a command line with options and keys in any order, also before the name of the data set.

    Raises:
        UserError: no such data set, or it doesn't have one of the options.
    """
    words, known = _name_first(words), catalogue("dataset")
    if words and not words[0].startswith("-") and words[0] not in known:
        raise UserError(f"unknown data set {words[0]!r}; {nearest(words[0], known)}")
    args, settings = parser.parse_known_args(words)
    for word in settings:
        if word.startswith("-"):
            raise UserError(_unknown_option(args.dataset, word.partition("=")[0]))
    args.settings = settings
    return args


def _name_first(words: Sequence[str]) -> list[str]:
    """Moves the first word that is neither an option nor its value to the front, where a subparser expects it."""
    previous = ""
    for index, word in enumerate(words):
        takes_value = (
            previous.startswith("-") and "=" not in previous and not any(s.startswith(previous) for s in SWITCHES)
        )
        if not word.startswith("-") and not takes_value:
            return [word, *words[:index], *words[index + 1 :]]
        previous = word
    return [*words]


def _unknown_option(dataset: str, option: str) -> str:
    """The message for an option that a data set doesn't have."""
    owners = [kind for kind, (command, _) in OF_FILES.items() if option in map(flag, command.options)]
    if owners:
        return (
            f"{option} is an option of {' or '.join(f'`trainer prepare {kind}`' for kind in owners)}, not of {dataset}"
        )
    own = OF_FILES[dataset][0].options if dataset in OF_FILES else ("archives",)
    return f"`trainer prepare {dataset}` has no option {option}; {nearest(option, [*map(flag, own), '--verify'])}"


def run(args: argparse.Namespace) -> int:
    """Prepares the data set if necessary, and prints its contents.

    Raises:
        UserError: a key or an option is invalid; see also `trainer.data.prepare.prepare`.
    """
    source = _source(args)
    prepared = data_dir() / source.name
    start = time.monotonic()
    card = ensure_prepared(source, data_dir(), args.archives or archives_dir())
    if args.verify:
        card.verify(prepared)
        print("all checksums match")
    rows = sum(split.rows for split in card.splits.values())
    print(", ".join([f"{card.name}: {rows} rows", *(f"{split.rows} {name}" for name, split in card.splits.items())]))
    print(describe_classes(card))
    print("\n".join([*card.notes, f"in {prepared} ({time.monotonic() - start:.1f} s)"]))
    return 0


def describe_classes(card: Card) -> str:
    """The classes, with the number of objects or the share of pixels of each in the training set."""
    objects = card.statistics.get("class_objects")
    if objects is not None:
        present = [(name, number) for name, number in zip(card.classes, objects, strict=True) if number]
        present.sort(key=lambda item: -item[1])
        listed = ", ".join([f"{name} {number}" for name, number in present[:SHOWN]] + ["…"] * (len(present) > SHOWN))
        return f"{sum(objects)} training objects, of {len(present)} of {len(objects)} classes: {listed or 'none'}"
    pixels = card.statistics.get("class_pixels", [])
    shares = [f" {count / max(1, sum(pixels)):.2%}" for count in pixels] or [""] * len(card.classes)
    classes = ", ".join(name + share for name, share in zip(card.classes, shares, strict=True))
    ignored = "" if card.ignore_index is None else f" (ignored: {card.ignore_index})"
    return f"classes{', of the training pixels' * bool(pixels)}: {classes}{ignored}"


def _source(args: argparse.Namespace) -> Source:
    """The data set that the command line describes."""
    if args.dataset in OF_FILES:
        return _source_of_files(args, *OF_FILES[args.dataset])
    component, reader = catalogue("dataset")[args.dataset], Reader({})
    settings = Validator(reader, Path(COMMAND_LINE)).section(component.schema, reader.overrides(args.settings)[0], ())
    if settings is None or reader.problems:
        raise RecipeError(reader.problems)
    try:
        source: Source = build(component, settings)
    except ValueError as error:
        raise UserError(f"{args.dataset}: {error}") from error
    return source


def _source_of_files(args: argparse.Namespace, command: FilesCommand, make: Callable[..., Source]) -> Source:
    given = {name: getattr(args, name) for name in command.options}
    missing = [flag(name) for name, option in command.options.items() if option.required and given[name] is None]
    if missing:
        raise UserError(f"missing {', '.join(missing)}; usage: trainer prepare {command.usage}")
    if args.settings:
        raise UserError(f"unexpected argument {args.settings[0]!r}; usage: trainer prepare {command.usage}")
    return make(**given)
