"""The `trainer` command: each module of this folder is a verb, with `HELP`, `add_arguments` and `run`."""

from __future__ import annotations

import argparse
import ast
import importlib
import pkgutil
import sys
from pathlib import Path

from trainer.errors import exit_code


def _help(verb: str) -> str:
    """A verb's `HELP`, read without importing it: `trainer --help` must not wait for torch."""
    source = Path(__file__).with_name(f"{verb}.py").read_text(encoding="utf-8")
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == "HELP":
            return str(ast.literal_eval(node.value))
    return ""


def main(arguments: list[str] | None = None) -> int:
    """Runs `trainer VERB …`; returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    verbs = sorted(info.name for info in pkgutil.iter_modules(__path__))
    chosen = next((argument for argument in arguments if not argument.startswith("-")), None)
    parser = argparse.ArgumentParser(prog="trainer", description="Recipe-driven training. To train: accelerate launch trainer/run.py RECIPE")
    commands = parser.add_subparsers(metavar="VERB", required=True)
    for verb in verbs:
        command = commands.add_parser(verb, help=_help(verb), description=_help(verb))
        if verb == chosen:
            module = importlib.import_module(f"{__name__}.{verb}")
            module.add_arguments(command)
            command.set_defaults(run=module.run)
    options = parser.parse_args(arguments)
    return exit_code(options.run, options)
