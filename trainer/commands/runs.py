"""`trainer runs`: all runs, compared or removed. Nothing here waits for torch, and no metrics are read."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from trainer.errors import UserError
from trainer.metrics.best import lower_is_better
from trainer.recipe.file import nearest, short
from trainer.recipe.recipe import differing
from trainer.reporting.table import cut, fitted_table, has_color, table, terminal_width
from trainer.runs.folder import RunFolder, find_run, runs_dir
from trainer.runs.removal import check_removable, remove_run
from trainer.runs.standing import RunInfo, Standing, run_infos, standing_of

HELP = "list all runs, compare some, or remove some"
HEADINGS = ("name", "status", "task", "best", "step", "duration", "size", "age", "")  # the last: why
# Left out, in this order, where the terminal is too narrow.
OPTIONAL = ("size", "duration", "task", "step", "age", "best")
NOTED = ("failed", "damaged")  # only these say more than their status
COLORS = {"finished": 32, "running": 36, "stopped": 33, "interrupted": 33, "failed": 31, "damaged": 31}


def _by_best(info: RunInfo) -> tuple[Any, ...]:
    best = info.standing.best
    if best is None:
        return (1,)
    return (0, best["metric"], best["value"] if lower_is_better(best["metric"]) else -best["value"])


SORT: dict[str, Callable[[RunInfo], Any]] = {
    "age": lambda info: -info.modified,
    "name": lambda info: info.standing.name,
    "status": lambda info: info.standing.status,
    "task": lambda info: (info.task is None, info.task),
    "best": _by_best,
    "step": lambda info: -(info.standing.step or 0),
    "duration": lambda info: -(info.standing.seconds or 0),
    "size": lambda info: -info.size,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of this verb."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = (
        "Runs are the folders in $TRAINER_RUNS (default: runs). Their status:\n"
        "  running      a process is training it\n"
        "  finished     it has trained for as long as its recipe says\n"
        "  stopped      it was stopped by a signal; the command that started it resumes it\n"
        "  interrupted  its process was killed; the command that started it resumes it\n"
        "  failed       the note says why\n"
        "  not started  nothing was computed yet\n"
        "  damaged      a file in its folder can't be read; the note says which\n"
        "Size counts all its files on disk; age is the time since the last of them was written. `trainer status RUN`\n"
        "says what to do next."
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--compare",
        nargs="+",
        metavar="RUN",
        help="print the figures of two or more runs (names, or folders) side by side, and the recipe keys in which "
        "they differ",
    )
    what.add_argument(
        "--remove", nargs="+", metavar="NAME", help="remove runs, after asking; never one that a process is training"
    )
    parser.add_argument(
        "--sort",
        choices=SORT,
        metavar="KEY",
        help=f"order of the list: {', '.join(SORT)} (default: age, the newest first); numbers the largest first, and "
        "the best value first",
    )
    parser.add_argument("--yes", action="store_true", help="with --remove: don't ask")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def run(options: argparse.Namespace) -> None:
    """Lists, compares or removes.

    Raises:
        UserError: no such run, options that don't go together, or a run that can't be removed.
    """
    if options.yes and not options.remove:
        raise UserError("--yes goes with --remove")
    if options.sort and (options.compare or options.remove):
        raise UserError("--sort is for the list of all runs, without --compare and --remove")
    if options.json and options.remove:
        raise UserError("--json goes with the list of all runs, or with --compare")
    if options.remove:
        _remove(options.remove, options.yes)
    elif options.compare:
        _compare(options.compare, options.json)
    else:
        _list(options.sort or "age", options.json)


# ---------------------------------------------------------------- the list


def _infos() -> list[RunInfo]:
    try:
        return run_infos(runs_dir())
    except OSError as error:
        raise UserError(f"{runs_dir()} can't be read: {error.strerror or error}") from error


def _list(sort: str, as_json: bool) -> None:
    infos, now = sorted(_infos(), key=SORT[sort]), time.time()
    if as_json:
        print(json.dumps([_facts(info, now) for info in infos], indent=2))
        return
    if not infos:
        print(f"no runs in {runs_dir()}; $TRAINER_RUNS names another folder")
        return
    lines = fitted_table([HEADINGS, *(_row(info, now) for info in infos)], OPTIONAL, terminal_width())
    if has_color():
        start = lines[0].find("status")  # -1 where the lines are cut before it
        lines[1:] = [_colored(line, start, info) for line, info in zip(lines[1:], infos, strict=True)]
    print("\n".join(lines))


def _facts(info: RunInfo, now: float) -> dict[str, Any]:
    standing = asdict(info.standing)
    return standing | {
        "task": info.task,
        "bytes": info.size,
        "modified": info.modified,
        "age_seconds": max(0.0, now - info.modified),
        "folder": str(runs_dir() / info.standing.name),
    }


def _row(info: RunInfo, now: float) -> list[str]:
    standing = info.standing
    step = "" if standing.step is None else f"{standing.step}" + f"/{standing.total_steps}" * bool(standing.total_steps)
    duration = "" if standing.seconds is None else span_text(standing.seconds)
    note = standing.note if standing.status in NOTED else ""
    return [
        *(standing.name, standing.status, info.task or "", standing.best_text(), step, duration),
        *(size_text(info.size), span_text(now - info.modified), note),
    ]


def _colored(line: str, start: int, info: RunInfo) -> str:
    status = info.standing.status
    end = start + len(status)
    if start < 0 or status not in COLORS or line[start:end] != status:
        return line
    return f"{line[:start]}\x1b[{COLORS[status]}m{status}\x1b[0m{line[end:]}"


def span_text(seconds: float) -> str:
    """A time in two units at most, e.g. `48 s`, `12 min`, `3 h 20 min`, `5 d`."""
    minutes = int(seconds / 60)
    if minutes < 1:
        return f"{max(0, seconds):.0f} s"
    if minutes < 60:
        return f"{minutes} min"
    hours = minutes // 60
    return f"{hours} h {minutes % 60} min" if hours < 24 else f"{hours // 24} d"


def size_text(size: float) -> str:
    """Bytes as `512 B`, `3.4 MiB`, `120 MiB`."""
    unit = "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if size < 1000:
            break
        size, unit = size / 1024, larger
    return f"{size:.0f} {unit}" if unit == "B" or size >= 100 else f"{size:.1f} {unit}"


# ---------------------------------------------------------------- --compare


def _compare(names: list[str], as_json: bool) -> None:
    """Figures of runs side by side, then the keys in which their recipes differ."""
    if len(names) < 2:
        raise UserError(f"--compare {names[0]}: name two or more runs")
    folders = [RunFolder(find_run(name)) for name in names]
    standings = [standing_of(folder.path) for folder in folders]
    for standing in standings:
        if standing.status == "damaged":
            raise UserError(f"{standing.name} can't be compared: {standing.note}")
    summaries = [folder.read_summary() for folder in folders]
    recipes = differing([folder.read_recipe() for folder in folders])
    metrics = list(dict.fromkeys(name for summary in summaries for name in summary.get("best", {})))
    if as_json:
        figures = [
            _figures(standing, summary) | {"best": summary.get("best", {})}
            for standing, summary in zip(standings, summaries, strict=True)
        ]
        print(json.dumps({"runs": figures, "recipes": recipes}, indent=2))
        return
    heads = [standing.name for standing in standings]
    rows = [[key, *map(_cell, values)] for key, values in _transposed(standings, summaries).items()]
    for metric in metrics:
        if "/" not in metric:  # not those of single classes
            rows.append([f"best {metric}", *(_best_cell(summary.get("best", {}).get(metric)) for summary in summaries)])
    width = terminal_width()
    print("\n".join(cut(line, width) for line in table([["", *heads], *rows])))
    if any("/" in metric for metric in metrics):
        print("(metrics of single classes: --json)")
    print()
    if recipes:
        rows = [[key, *map(_cell, values)] for key, values in recipes.items()]
        print("\n".join(cut(line, width) for line in table([["recipes differ in", *heads], *rows])))
    else:
        print("the recipes are the same")


def _figures(standing: Standing, summary: dict[str, Any]) -> dict[str, Any]:
    return {
        "name": standing.name,
        "status": standing.status,
        "step": standing.step,
        "seconds": standing.seconds,
        "samples_per_second": summary.get("samples_per_second"),
    }


def _transposed(standings: list[Standing], summaries: list[dict[str, Any]]) -> dict[str, list[Any]]:
    figures = [_figures(*each) for each in zip(standings, summaries, strict=True)]
    heads = {"status": "status", "step": "steps", "seconds": "seconds", "samples_per_second": "samples/s"}
    return {head: [each[key] for each in figures] for key, head in heads.items()}


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.6g}"
    return short(value if isinstance(value, str) else json.dumps(value), 40).strip("'")


def _best_cell(best: Any) -> str:
    return "-" if best is None else f"{best['value']:.4f} (step {best['step']})"


# ---------------------------------------------------------------- --remove


def _remove(names: list[str], yes: bool) -> None:
    """Removes runs, all of which exist and are free; asks before."""
    parent, known = runs_dir(), {info.standing.name: info for info in _infos()}
    chosen: dict[str, Path] = {}
    for name in dict.fromkeys(names):
        if name not in known:
            hint = nearest(name, known)
            hint = hint if hint.startswith("did") else "`trainer runs` lists all"
            raise UserError(f"no run {name!r} in {parent}; {hint}; nothing was removed")
        chosen[name] = parent / name
        check_removable(chosen[name])
    infos, now = [known[name] for name in chosen], time.time()
    if not yes:
        if not sys.stdin.isatty():
            raise UserError(f"--remove {' '.join(chosen)}: no terminal to ask on; --yes removes without asking")
        print("\n".join(table([HEADINGS, *(_row(info, now) for info in infos)])))
        if not _confirmed(f"remove {'this run' if len(infos) == 1 else f'these {len(infos)} runs'} for good? [y/N] "):
            print("nothing was removed")
            return
    for name, folder in chosen.items():
        remove_run(folder)
        print(f"removed {name} ({size_text(known[name].size)})")


def _confirmed(question: str) -> bool:
    try:
        return input(question).strip().lower() in ("y", "yes")
    except EOFError:
        print()
        return False
