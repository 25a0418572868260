"""`trainer sweep`: one run for each combination of values, here or on SLURM; then a table and a plot."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.commands.status import code_of, run_name
from trainer.errors import UserError
from trainer.reporting.table import table
from trainer.runs.folder import runs_dir
from trainer.runs.standing import standing_of
from trainer.runs.sweeps import plot_sweep, variant_name, variants_of

if TYPE_CHECKING:  # imported where it is used: `trainer --help` must not wait for torch
    from trainer.recipe.recipe import Recipe

HELP = "train one run for each combination of values, skipping finished runs"
ROOT = Path(__file__).resolve().parents[2]
STOP_TIMEOUT_S = 30  # enough for a run to save a checkpoint


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of this verb."""
    parser.add_argument("recipe", metavar="RECIPE", type=Path, help="a recipe file")
    parser.add_argument(
        "overrides", nargs="+", metavar="key=a,b,c | key=value", help="values to try, and overrides for all runs"
    )
    parser.add_argument("--processes", type=int, default=1, metavar="P", help="processes per run (default: 1)")
    parser.add_argument(
        "--parallel",
        type=int,
        metavar="N",
        help="number of runs at a time (default: as many as the GPUs allow, else one)",
    )
    parser.add_argument("--slurm", action="store_true", help="submit the runs to SLURM (see `trainer submit`)")


def run(options: argparse.Namespace) -> int:
    """Trains the unfinished runs, and prints the status of all; returns the exit code of `trainer status`.

    Raises:
        UserError: the recipe of a run is invalid; then none is trained.
    """
    axes = [
        override
        for override in options.overrides
        if not override.startswith("name=") and len(variants_of([override])) > 1
    ]
    shared = [override for override in options.overrides if override not in axes]
    if not axes:
        raise UserError("nothing to sweep: give a key several values, e.g. optimizer.lr=1e-3,1e-2")
    if options.slurm:
        return _submit(options, axes, shared)
    variants = variants_of(axes)
    name = run_name(options.recipe, shared)
    names = [variant_name(name, variant) for variant in variants]
    runs = [[*shared, *variant, f"name={each}"] for each, variant in zip(names, variants, strict=True)]
    recipes = [_checked(options, overrides) for overrides in runs]
    commands = {
        each: _command(options, overrides)
        for each, overrides, recipe in zip(names, runs, recipes, strict=True)
        if not _is_finished(recipe)
    }
    for each in names:
        if each not in commands:
            print(f"{each}: already finished", flush=True)
    _train(commands, _slots(options))
    standings = [standing_of(runs_dir() / each) for each in names]
    print("\n".join(table([standing.row() for standing in standings])))
    plot = runs_dir() / f"{name}-sweep.png"
    if plot_sweep(variants, [runs_dir() / each for each in names], plot):
        print(f"see {plot}")
    return code_of(standings)


def _submit(options: argparse.Namespace, axes: list[str], shared: list[str]) -> int:
    from trainer.commands import main

    sweeps = [argument for axis in axes for argument in ("--sweep", axis)]
    parallel = ["--parallel", str(options.parallel)] if options.parallel else []
    return main(["submit", str(options.recipe), *shared, *sweeps, "--processes", str(options.processes), *parallel])


def _checked(options: argparse.Namespace, overrides: list[str]) -> Recipe:
    """The recipe of a run."""
    from trainer.distributed.launch import Launch
    from trainer.recipe.load import load_recipe
    from trainer.tasks.checks import TASK_CHECKS, batch_checks

    checks = [*Launch(processes=options.processes).checks(), *TASK_CHECKS, *batch_checks(options.processes)]
    return load_recipe(options.recipe, overrides, checks)


def _is_finished(recipe: Recipe) -> bool:
    """Whether the run of this recipe is finished. If its folder holds another recipe's run, training will report it."""
    from trainer.runs.folder import RunFolder

    folder = runs_dir() / recipe.name
    return standing_of(folder).status == "finished" and RunFolder(folder).read_recipe() == recipe.resolved()


def _command(options: argparse.Namespace, overrides: list[str]) -> list[str]:
    script = [str(ROOT / "trainer" / "run.py"), str(options.recipe), *overrides]
    if options.processes == 1:
        return [sys.executable, *script]
    launcher = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        str(ROOT / "accelerate_config.yaml"),
    ]
    return [*launcher, "--num_processes", str(options.processes), *script]


def _slots(options: argparse.Namespace) -> list[dict[str, str]]:
    """For each of the runs at a time, the environment variables that assign its devices."""
    import torch

    groups = torch.cuda.device_count() // options.processes
    count = options.parallel or max(1, groups)
    if not groups:
        return [{}] * count
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = visible.split(",") if visible else [str(index) for index in range(torch.cuda.device_count())]
    first = [slot % groups * options.processes for slot in range(count)]
    return [{"CUDA_VISIBLE_DEVICES": ",".join(devices[start : start + options.processes])} for start in first]


def _train(commands: dict[str, list[str]], slots: list[dict[str, str]]) -> None:
    """Runs the commands, one per slot at a time. A failed one doesn't stop the others; a stop signal stops them all."""
    waiting = dict(commands)
    free, running = list(slots), dict[str, tuple[subprocess.Popen[bytes], dict[str, str]]]()
    runs_dir().mkdir(parents=True, exist_ok=True)
    try:
        while waiting or running:
            while waiting and free:
                name, slot = next(iter(waiting)), free.pop()
                with (runs_dir() / f"{name}.log").open("ab") as log:
                    # In its own process group, so that Ctrl-C reaches it once: through the signal below.
                    process = subprocess.Popen(
                        waiting.pop(name), stdout=log, stderr=log, env=os.environ | slot, start_new_session=True
                    )
                running[name] = process, slot
                print(f"{name}: training ({len(waiting)} waiting); log in {log.name}", flush=True)
            time.sleep(0.2)
            for name, (process, slot) in list(running.items()):
                if process.poll() is not None:
                    del running[name]
                    free.append(slot)
                    print(f"{name}: {standing_of(runs_dir() / name).status}", flush=True)
    finally:
        for process, _ in running.values():
            process.send_signal(signal.SIGTERM)
        for process, _ in running.values():
            try:
                process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
