"""The user's own files: found, read and named in messages."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from trainer.data.archives import Member
from trainer.data.card import sha256
from trainer.data.images import image_size
from trainer.errors import UserError

SHOWN = 5  # problems listed in a message


class File(NamedTuple):
    """A file, and its name in messages: its path starting with the name of the folder the user gave."""

    path: Path
    name: str

    def read(self) -> Member:
        """Its name and bytes.

        Raises:
            UserError: it can't be read.
        """
        with self._errors_reported():
            return Member(self.name, self.path.read_bytes())

    def digest(self) -> str:
        """SHA-256 of its bytes, in hex, without holding them in memory.

        Raises:
            UserError: it can't be read.
        """
        with self._errors_reported():
            return sha256(self.path)

    @contextmanager
    def _errors_reported(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(f"{self.path} can't be read: {error.strerror}") from error


def class_names(file: Path, at_least: int, at_most: int) -> tuple[str, ...]:
    """The class names in the lines of a text file, in the order of their index.

    Raises:
        UserError: the file can't be read, or has too few, too many, empty or duplicate names.
    """
    try:
        names = tuple(line.strip() for line in file.read_text(encoding="utf-8-sig").rstrip().splitlines())
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--classes {file} can't be read: {error}") from error
    if not at_least <= len(names) <= at_most or len(set(names)) < len(names) or "" in names:
        raise UserError(
            f"--classes {file}: must have {at_least} to {at_most} lines, each with the name of a class, all different"
        )
    return names


def image_files(folder: Path) -> dict[str, File]:
    """The images in a folder and its subfolders, in any format that Pillow reads; see `files_below`."""
    Image.init()
    return files_below(
        folder, "images", {suffix for suffix, format in Image.registered_extensions().items() if format in Image.OPEN}
    )


def files_below(folder: Path, what: str, suffixes: set[str]) -> dict[str, File]:
    """The files with these suffixes in a folder and its subfolders, by their relative path without suffix.

    Raises:
        UserError: the folder doesn't exist or contains no such file, or two files differ only in their suffix.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; it should contain {what}")
    files: dict[str, File] = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() not in suffixes or path.name.startswith(".") or not path.is_file():
            continue
        inside = path.relative_to(folder)
        key = str(inside.with_suffix(""))
        if key in files:
            raise UserError(
                f"{files[key].path} and {path} differ only in their suffix, so their names are ambiguous; remove or "
                "rename one"
            )
        name = (folder.resolve().name / inside).as_posix()
        files[key] = File(path, name.encode("utf-8", "backslashreplace").decode())  # Parquet stores Unicode only
    if not files:
        raise UserError(f"{folder} contains no {what}")
    return files


def refuse(headline: str, problems: Sequence[str]) -> None:
    """Raises `UserError` with the first problems, if there are any."""
    if problems:
        raise UserError("\n  ".join([headline, *sorted(problems)[:SHOWN], *(["…"] if len(problems) > SHOWN else [])]))


def size_of(image: Member, remedy: str) -> tuple[int, int]:
    """Width and height of an image once it is stored.

    Raises:
        UserError: it can't be decoded.
    """
    try:
        return image_size(image.data)
    except Exception as error:  # decoders raise all kinds of errors on damaged data
        raise UserError(f"{image.name}: this image can't be decoded ({error}); {remedy}") from error
