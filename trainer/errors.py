"""The two ways in which a run fails; commands turn them into exit codes."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

LONGEST_LINE = 500


class UserError(Exception):
    """An error in the user's input: one message with what is wrong, where, and what to do. Exit code 2."""

    label = "error: "
    on_one_rank = False  # other ranks don't have this error, so the rank that has it prints it


class TrainingFailed(Exception):
    """Training can't continue: a non-finite loss, more unreadable samples than the recipe tolerates. Exit code 3."""

    label = "training failed: "
    on_one_rank = False


def one_line(error: BaseException) -> str:
    """An error in one line: the message alone where it is written for users."""
    name = "" if isinstance(error, UserError | TrainingFailed) else f"{type(error).__name__}: "
    return " ".join(f"{name}{error}".split())[:LONGEST_LINE]


def exit_code(run: Callable[..., Any], *arguments: Any) -> int:
    """Calls `run`; prints the message of a user error (2) or a failed training (3), on rank 0 only.

    Returns what `run` returns, where that is a number: `trainer status` has its own exit codes.
    """
    try:
        code = run(*arguments)
    except (UserError, TrainingFailed) as error:
        rank = os.environ.get("RANK", "0")
        if rank == "0" or error.on_one_rank:
            where = "" if rank == "0" else f"rank {rank}: "
            print(f"{where}{error.label}{error}", file=sys.stderr, flush=True)
        return 2 if isinstance(error, UserError) else 3
    return code if isinstance(code, int) else 0
