"""Trains a recipe.

    accelerate launch trainer/run.py recipes/quickstart.yaml [--resume auto|never|PATH] [key.path=value …]

Exit codes: 0 finished, or stopped on a signal and resumable; 2 invalid input; 3 training failed.
"""

from __future__ import annotations

import os
import sys

# Launchers put this file's folder first, where `import trainer` finds nothing and `data`, `recipe` … would shadow
# other modules.
if sys.path and os.path.realpath(sys.path[0] or ".") == os.path.dirname(os.path.realpath(__file__)):
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))

from trainer.signals import STOP, Stopped

# Before all other imports: until then a signal kills, or is lost if a launcher ignores it.
if __name__ == "__main__":
    STOP.install(noted=os.environ.get("TRAINER_ATTEMPT", "") + ".stop")

import argparse

from trainer.errors import exit_code


def train(recipe_path: str, resume: str, overrides: list[str]) -> None:
    """Loads the recipe, builds the Trainer and trains."""
    from trainer.distributed.accelerator import leave_processes
    from trainer.distributed.launch import Launch
    from trainer.recipe.load import load_recipe
    from trainer.tasks.checks import TASK_CHECKS, batch_checks

    launch = Launch.read()
    recipe = load_recipe(recipe_path, overrides, [*launch.checks(), *TASK_CHECKS, *batch_checks(launch.processes)])

    from trainer.trainer import Trainer  # only now: it imports accelerate and datasets

    failed = True
    try:
        Trainer(recipe, resume).fit()
        failed = False
    except Stopped:
        failed = False
        if os.environ.get("RANK", "0") == "0":
            print(
                f"stopped on {STOP.signal_name or 'a signal'} before training began; rerun to start",
                file=sys.stderr,
                flush=True,
            )
    finally:
        leave_processes(failed)


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="trainer/run.py", description="Trains a recipe.")
    parser.add_argument("recipe", help="a YAML file, e.g. recipes/quickstart.yaml")
    parser.add_argument(
        "--resume",
        default="auto",
        metavar="auto|never|PATH",
        help="resume from the newest checkpoint if there is one (default), start from scratch, or resume from a given "
        "checkpoint folder",
    )
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="e.g. optimizer.lr=1e-3")
    options = parser.parse_intermixed_args(arguments)
    return exit_code(train, options.recipe, options.resume, options.overrides)


if __name__ == "__main__":
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # a lost rank is reported in one line, not in pages of C++
    sys.exit(main())
