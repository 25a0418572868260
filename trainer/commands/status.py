"""`trainer status`: the status of runs, and what to do next. Job scripts call it, so it doesn't import torch."""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
from dataclasses import asdict
from pathlib import Path

from trainer.errors import UserError
from trainer.recipe.file import Reader, RecipeError
from trainer.reporting.table import table
from trainer.runs.folder import find_run, runs_dir
from trainer.runs.standing import FAILED, TO_BE_RESUMED, Standing, standing_of
from trainer.runs.sweeps import plot_sweep, varying

HELP = "show the status of runs; exit codes: 0 finished, 75 to be resumed, 3 failed"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of this verb."""
    what = (
        "run folders, names of runs in $TRAINER_RUNS, or recipe files with the overrides of the training command, e.g. "
        "name=…"
    )
    parser.add_argument("runs", nargs="*", metavar="RUN | RECIPE | key.path=value", help=what)
    parser.add_argument(
        "--sweep",
        type=Path,
        metavar="FILE",
        help="show all runs of a sweep; each line of the file has the overrides of one run",
    )
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help="plot the best values of the sweep's runs to this PNG file"
    )
    parser.add_argument("--json", action="store_true", help="print a JSON list")


def run(options: argparse.Namespace) -> int:
    """Prints a line for each run; returns the exit code for all of them, see `code_of`.

    Raises:
        UserError: no such run, or the recipe can't be read.
    """
    standings = [standing_of(folder) for folder in _folders(options.runs)]
    if options.sweep:
        standings += sweep_standings(options.sweep)
    if not standings:
        raise UserError("give at least one run, recipe or --sweep FILE")
    if options.plot:
        _plot(options)
    if options.json:
        print(json.dumps([asdict(standing) for standing in standings], indent=2))
    else:
        print("\n".join(table([standing.row() for standing in standings])))
    return code_of(standings)


def _plot(options: argparse.Namespace) -> None:
    if not options.sweep or options.plot.suffix != ".png":
        raise UserError(f"--plot {options.plot}: needs --sweep FILE, and a .png file to write")
    runs = read_sweep(options.sweep)
    try:
        plot_sweep(varying(runs), [runs_dir() / _name_in(options.sweep, overrides) for overrides in runs], options.plot)
    except OSError as error:
        raise UserError(f"--plot {options.plot}: can't be written: {error.strerror}") from error


def code_of(standings: list[Standing]) -> int:
    """The exit code for several runs: 3 if one failed, else 75 if one is to be resumed, else 0."""
    codes = {standing.code for standing in standings}
    return FAILED if FAILED in codes else max(codes)


def sweep_standings(file: Path) -> list[Standing]:
    """The status of a sweep's runs, from their folders and from SLURM, if it still lists the job array named like the
    file.

    Raises:
        UserError: a line doesn't name its run.
    """
    states = _array_states(file.stem)
    standings = []
    for index, overrides in enumerate(read_sweep(file)):
        standing = standing_of(runs_dir() / _name_in(file, overrides))
        # A task that was cancelled while it waited is missing from the array.
        forgotten = bool(states) and index not in states and standing.status == "not started"
        if standing.code == TO_BE_RESUMED and (forgotten or states.get(index) == "CANCELLED"):
            standing.status = "cancelled"
        standings.append(standing)
    return standings


def _name_in(file: Path, overrides: list[str]) -> str:
    """The run that a line of a sweep's file names."""
    reader = Reader({})
    tree, _ = reader.overrides(overrides)
    if reader.problems or "name" not in tree:
        raise UserError(f"{file}: {shlex.join(overrides)!r} has no name=…; each line must name its run")
    return str(tree["name"])


def read_sweep(file: Path) -> list[list[str]]:
    """The overrides of each run of a sweep: one line per run, quoted as for a shell; skips blank lines and comments.

    Raises:
        UserError: the file can't be read.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
        return [shlex.split(line) for line in lines if line.strip() and not line.lstrip().startswith("#")]
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: can't be read: {error}") from error


def _folders(arguments: list[str]) -> list[Path]:
    """The run folders that the arguments name."""
    recipes = [Path(argument) for argument in arguments if argument.endswith((".yaml", ".yml"))]
    if recipes:
        overrides = [argument for argument in arguments if "=" in argument]
        rest = [argument for argument in arguments if "=" not in argument and Path(argument) not in recipes]
        return [runs_dir() / run_name(recipe, overrides) for recipe in recipes] + _folders(rest)
    return [find_run(run) for run in arguments]  # here `=` may be part of a name


def run_name(recipe: Path, overrides: list[str]) -> str:
    """The name of the run that a recipe trains: its `name:`, else the file's."""
    reader = Reader({})
    tree = reader.merge(reader.read(recipe), *reader.overrides(overrides))
    if reader.problems:
        raise RecipeError(reader.problems)
    return str(tree.get("name", recipe.stem))


def _array_states(job_name: str) -> dict[int, str]:
    """The SLURM state of each task of the newest job array with that name, e.g. `CANCELLED`. SLURM forgets a task some
    minutes after its end.
    """
    if not shutil.which("scontrol"):
        return {}
    everything = os.environ | {"SLURM_BITSTR_LEN": "0"}  # otherwise SLURM omits indices of a large array
    done = subprocess.run(["scontrol", "show", "job", "--oneliner"], env=everything, capture_output=True, text=True)
    jobs = [dict(re.findall(r"(\w+)=(\S*)", line)) for line in done.stdout.splitlines()]
    mine = [job for job in jobs if job.get("JobName") == job_name and "ArrayTaskId" in job]
    newest = max((int(job["ArrayJobId"]) for job in mine), default=None)
    return {
        index: job["JobState"]
        for job in mine
        if int(job["ArrayJobId"]) == newest
        for index in _indices(job["ArrayTaskId"])
    }


def _indices(text: str) -> list[int]:
    """`1,4-6%2` as [1, 4, 5, 6]: SLURM shows waiting tasks together."""
    bounds = [[int(bound) for bound in part.split("-")] for part in text.partition("%")[0].split(",")]
    return [index for first, *last in bounds for index in range(first, (last or [first])[0] + 1)]
