"""Options of the commands that make a set from the user's own files: `trainer prepare folder`, `yolo` and `coco`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

VALIDATION = "0.2"


@dataclass(frozen=True)
class Option:
    """A command-line option, in the terms of argparse."""

    metavar: str
    help: str
    type: Callable[[str], Any] = str
    required: bool = False
    default: Any = None
    choices: tuple[str, ...] | None = None


@dataclass(frozen=True)
class FilesCommand:
    """`trainer prepare KIND`.

    Attributes:
        kind: name of the data set in the catalogue.
        summary: the files it reads.
        options: by the name of the parameter each one sets.
        alternatives: usage of the optional options.
        example: a complete command.
        recipe: the section of a recipe that uses the set.
    """

    kind: str
    summary: str
    options: Mapping[str, Option]
    alternatives: str
    example: str
    recipe: str

    @property
    def required(self) -> str:
        """The required arguments of `trainer prepare`."""
        options = [f"{flag(name)} {option.metavar}" for name, option in self.options.items() if option.required]
        return " ".join([self.kind, *options])

    @property
    def usage(self) -> str:
        """All arguments of `trainer prepare`."""
        return f"{self.required} {self.alternatives}"


def flag(name: str) -> str:
    """The spelling of an option on the command line."""
    return f"--{name.replace('_', '-')}"


NAME = Option("NAME", "name of the set, by which recipes refer to it", required=True)
IMAGES = Option("DIR", "folder of images, including subfolders", Path, required=True)
CLASSES = Option("FILE", "text file with one class name per line, in the order of their index", Path, required=True)
INVALID = Option(
    "refuse|drop",
    "how to handle invalid objects: refuse the set, or drop the objects (default: refuse)",
    default="refuse",
    choices=("refuse", "drop"),
)


def split_options(companion: str) -> dict[str, Option]:
    """Options for validation and test if each image has a file of the same name; `companion` is e.g. `masks`."""
    return {
        "validation": Option(
            "SHARE|DIR",
            f"share of the images for validation (default: {VALIDATION}); or a folder with two subfolders named like "
            f"those of --images and --{companion}; if these have the same name, the name of the folders next to them",
        ),
        "validation_images": Option("DIR", "validation images, instead of --validation", Path),
        f"validation_{companion}": Option("DIR", f"{companion} of --validation-images", Path),
        "test": Option("DIR", "a third split, which training never reads; like --validation, but never a share"),
        "test_images": Option("DIR", "images of the test split, instead of --test", Path),
        f"test_{companion}": Option("DIR", f"{companion} of --test-images", Path),
    }
