"""Options of the commands that make a set of files of the user's own: `trainer prepare folder`, `yolo` and `coco`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

VALIDATION = "0.2"


@dataclass(frozen=True)
class Option:
    """An option, as argparse describes one."""

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
        summary: of what it makes a set.
        options: by the name of the parameter that each one is.
        alternatives: how the options that aren't required go together.
        example: a command.
        recipe: the section of a recipe that names the set.
    """

    kind: str
    summary: str
    options: Mapping[str, Option]
    alternatives: str
    example: str
    recipe: str

    @property
    def required(self) -> str:
        """What must follow `trainer prepare`."""
        given = [f"{flag(name)} {option.metavar}" for name, option in self.options.items() if option.required]
        return " ".join([self.kind, *given])

    @property
    def usage(self) -> str:
        """What may follow `trainer prepare`."""
        return f"{self.required} {self.alternatives}"


def flag(name: str) -> str:
    """How the command line spells an option."""
    return f"--{name.replace('_', '-')}"


NAME = Option("NAME", "the set's name, by which recipes refer to it", required=True)
IMAGES = Option("DIR", "images, in this folder and below", Path, required=True)
CLASSES = Option(
    "FILE", "text file with the name of a class in each line, in the order of their index", Path, required=True
)
INVALID = Option(
    "refuse|drop",
    "what to do about an invalid object: refuse the set, or leave the object out (default: refuse)",
    default="refuse",
    choices=("refuse", "drop"),
)


def split_options(companion: str) -> dict[str, Option]:
    """Options for validation and test where each image has a file of the same name; `companion` is `masks`, say."""
    return {
        "validation": Option(
            "SHARE|DIR",
            f"share of the images that validate (default: {VALIDATION}); or a folder that holds two named like those "
            f"of --images and --{companion}; where these two have the same name, the name of the folders beside them",
        ),
        "validation_images": Option("DIR", "images that validate, instead of --validation", Path),
        f"validation_{companion}": Option("DIR", f"{companion} of --validation-images", Path),
        "test": Option("DIR", "a third split, which no training reads; like --validation, but never a share"),
        "test_images": Option("DIR", "images of the test split, instead of --test", Path),
        f"test_{companion}": Option("DIR", f"{companion} of --test-images", Path),
    }
