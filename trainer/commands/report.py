"""`trainer report`: one HTML page about runs."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "write one self-contained HTML page about runs: curves, metrics, pictures, recipes"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of this verb."""
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders, or names of runs in $TRAINER_RUNS")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.html", help="the page to write")


def run(options: argparse.Namespace) -> None:
    """Writes the page and prints its path.

    Raises:
        UserError: no such run, or the page can't be written.
    """
    from trainer.errors import UserError
    from trainer.reporting.page import report
    from trainer.runs.durable import atomic_write
    from trainer.runs.folder import RunFolder, find_run

    page = report([RunFolder(find_run(given)) for given in options.runs])
    try:
        atomic_write(options.out, page)
    except OSError as error:
        raise UserError(f"--out {options.out}: can't be written: {error.strerror or error}") from error
    print(
        f"{options.out}: {len(options.runs)} runs, {options.out.stat().st_size / 2**20:.1f} MiB; open it in a browser"
    )
