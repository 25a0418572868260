"""The `trainer` command: each module of this folder is a verb, with `HELP`, `add_arguments` and `run`, and optionally
`parse`, if `parse_intermixed_args` can't parse its command line.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import pkgutil
import sys
from pathlib import Path

from trainer.errors import exit_code
from trainer.recipe.file import nearest
from trainer.signals import STOP, Stopped


def _help(verb: str) -> str:
    """The `HELP` of a verb, read without importing its module: `trainer --help` must not wait for torch."""
    source = Path(__file__).with_name(f"{verb}.py").read_text(encoding="utf-8")
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == "HELP":
            return str(ast.literal_eval(node.value))
    return ""


def main(arguments: list[str] | None = None) -> int:
    """Runs `trainer VERB …`; returns the exit code."""
    if arguments is None:  # run from a shell
        STOP.install()
        arguments = sys.argv[1:]
    verbs = sorted(info.name for info in pkgutil.iter_modules(__path__))
    if not arguments or arguments[0] not in verbs:
        is_help = arguments[:1] in (["-h"], ["--help"])
        output = sys.stdout if is_help else sys.stderr
        if arguments and not is_help:
            print(f"error: unknown command {arguments[0]!r}; {nearest(arguments[0], verbs)}\n", file=sys.stderr)
        print("usage: trainer COMMAND …    (for details: trainer COMMAND --help)\n", file=output)
        for verb in verbs:
            print(f"  {verb:10} {_help(verb)}", file=output)
        print("\nTo train: accelerate launch trainer/run.py RECIPE", file=output)
        return 0 if is_help else 2
    verb, *rest = arguments
    module = importlib.import_module(f"{__name__}.{verb}")
    parser = argparse.ArgumentParser(prog=f"trainer {verb}", description=module.HELP)
    module.add_arguments(parser)
    parse = getattr(module, "parse", argparse.ArgumentParser.parse_intermixed_args)
    try:
        with STOP.at_once():
            return exit_code(lambda: module.run(parse(parser, rest)))
    except Stopped:
        print(f"stopped on {STOP.signal_name}; no partial results are kept", file=sys.stderr)
        return 130
