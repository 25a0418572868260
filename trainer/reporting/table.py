"""Aligned columns for terminals."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence

MIN_LAST = 24  # characters of the last column, a remark, before others make room for it


def table(rows: Sequence[Sequence[str]], left: int | None = None) -> list[str]:
    """Lines with aligned columns, without columns that are empty.

    Args:
        rows: cells, as many in each row; at least one row.
        left: how many columns are aligned to the left, by default all; the others are aligned to the right.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    left = len(widths) if left is None else left
    return [
        "  ".join(
            cell.ljust(width) if index < left else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
            if width
        ).rstrip()
        for row in rows
    ]


def fitted_table(rows: Sequence[Sequence[str]], optional: Sequence[str], width: int | None) -> list[str]:
    """A table whose lines have at most `width` characters.

    Args:
        rows: cells; the first row has the headings, the last column may be cut.
        optional: headings of columns that may be left out, in this order, until the others fit.
        width: None for any.
    """
    if width is None:
        return table(rows)
    kept = [list(row) for row in rows]
    for heading in optional:
        *widths, last = [max(map(len, column)) for column in zip(*kept, strict=True)]
        if sum(widths) + min(last, MIN_LAST) + 2 * len(widths) <= width:
            break
        column = kept[0].index(heading)
        for row in kept:
            del row[column]
    return [cut(line, width) for line in table(kept)]


def cut(line: str, width: int | None) -> str:
    """The line, with an ellipsis where it has more than `width` characters."""
    return line if width is None or len(line) <= width else line[: max(0, width - 1)] + "…"


def terminal_width() -> int | None:
    """Characters of a line where the output is a terminal, else None: a file takes lines of any length."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def has_color() -> bool:
    """Whether the output is a terminal that may show colours (https://no-color.org)."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
