"""`trainer prepare DATASET`: from official archives to Parquet files."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from trainer.components import catalogue
from trainer.data.prepare import archives_dir, data_dir, ensure_prepared
from trainer.errors import UserError
from trainer.recipe_file import nearest

HELP = "turn a data set's official archives into Parquet files"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    parser.add_argument("dataset", metavar="DATASET", help="name of the data set, as in a recipe's data.name")
    parser.add_argument("--archives", type=Path, metavar="DIR", help="folder with the archives (default: $TRAINER_ARCHIVES); what it lacks is downloaded")
    parser.add_argument("--verify", action="store_true", help="recompute the checksums of what is prepared")


def run(args: argparse.Namespace) -> int:
    """Prepares the set if it isn't yet, and prints what it holds.

    Raises:
        UserError: no such data set, or see `trainer.data.prepare.prepare`.
    """
    datasets = catalogue("dataset")
    if args.dataset not in datasets:
        raise UserError(f"unknown data set {args.dataset!r}; {nearest(args.dataset, datasets)}")
    source = datasets[args.dataset].build({})
    folder = data_dir() / source.name
    start = time.monotonic()
    card = ensure_prepared(source, data_dir(), args.archives or archives_dir())
    if args.verify:
        card.verify(folder)
        print("every file is as it was written")
    counts = {split: written.rows for split, written in card.splits.items()}
    print(f"{card.name}: {sum(counts.values())} rows, " + ", ".join(f"{rows} {split}" for split, rows in counts.items()))
    print(f"classes: {', '.join(card.classes)}" + (f" (ignored: {card.ignore_index})" if card.ignore_index is not None else ""))
    print("\n".join([*card.notes, f"in {folder} ({time.monotonic() - start:.1f} s)"]))
    return 0
