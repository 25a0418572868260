"""Image and mask files of your own: `trainer prepare folder` makes a set of them, and recipes name it.

data: {name: folder, set: my_streets, batch_size: 16}
"""

from __future__ import annotations

import hashlib
import json
import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, NamedTuple

from PIL import Image
from pydantic import AfterValidator

from trainer.components import catalogue, dataset
from trainer.data.archives import Member
from trainer.data.card import Card
from trainer.data.prepare import data_dir
from trainer.data.source import DataInfo, Row, Source, in_validation
from trainer.errors import UserError

NAME = re.compile(r"\w[\w.-]{0,63}")
DOWNLOADS = "downloads"  # another folder in $TRAINER_DATA
MAX_LABELS = 256  # a mask has 8 bits
VALIDATION = "0.2"
SHOWN = 5  # files that a message lists

# ---------------------------------------------------------------- in a recipe


def _card(name: str) -> Card:
    if not NAME.fullmatch(name):
        raise UserError(f"{name!r} is no name of a set: it is made of letters, digits and . _ -, and names a folder in {data_dir()}")
    return Card.load(data_dir() / name, f"folder --name {name} --images DIR --masks DIR --classes FILE")


def _prepared(name: str) -> str:
    try:
        _card(name)
    except UserError as error:
        raise ValueError(str(error)) from error
    return name


@dataset(fields=("image", "mask"))
def folder(*, set: Annotated[str, AfterValidator(_prepared)]) -> Source:
    """What `trainer prepare folder --name SET` made, as its card describes it; a recipe can't make it again."""
    card = _card(set)

    def rows(archives: Mapping[str, Path]) -> Iterator[tuple[str, Row]]:
        raise UserError(f"{data_dir() / set} is damaged; {card.again}")

    return Source(set, card.info, card.columns, rows, command=card.command, version=card.version)


# ---------------------------------------------------------------- making it


class _File(NamedTuple):
    path: Path
    name: str  # its path from the folder that was given, that one's name first: what a message says

    def read(self) -> Member:
        try:
            return Member(self.name, self.path.read_bytes())
        except OSError as error:
            raise UserError(f"{self.path} can't be read: {error.strerror}") from error


Pair = tuple[str, _File, _File]
"""Split, image and mask."""


def from_files(name: str, images: Path, masks: Path, classes: Path, ignore: int | None = None, validation: str = VALIDATION) -> Source:
    """The set of the images in a folder and all below it, and of the masks of the same names in another.

    Args:
        name: of the set.
        images: holds images in any format that Pillow reads, e.g. `a/b.jpg`.
        masks: holds an index or palette PNG for each, e.g. `a/b.png`.
        classes: a text file with the name of a class in each line, in the order of their index.
        ignore: the label that counts nowhere, or None.
        validation: the share of the images that validate; or a folder that has them in two, called like `images` and `masks`.

    Raises:
        UserError: one of these can't be so, an image has no mask, or a mask no image.
    """
    if not NAME.fullmatch(name) or name == DOWNLOADS:
        raise UserError(f"--name {name}: a set's name is made of letters, digits and . _ -, and names a folder in {data_dir()}")
    if name in catalogue("dataset"):
        raise UserError(f"--name {name}: there is a data set of that name already; choose another")
    if ignore is not None and not 0 <= ignore < MAX_LABELS:
        raise UserError(f"--ignore {ignore}: labels are 0 to {MAX_LABELS - 1}")
    info = DataInfo(_class_names(classes), ignore)
    share = _share(validation)
    pairs = _pairs("train", images, masks)
    if share is None:
        pairs += _pairs("validation", Path(validation, images.resolve().name), Path(validation, masks.resolve().name))

    def rows(archives: Mapping[str, Path]) -> Iterator[tuple[str, Row]]:
        splits = set()
        for split, image, mask in sorted(pairs, key=_draw):  # mixed, so that neighbours in a file are not alike
            row = {"image": image.read(), "mask": mask.read()}
            if share and in_validation(row["image"].data, share):
                split = "validation"
            splits.add(split)
            yield split, row
        if len(splits) < 2:
            raise UserError(f"--validation {validation}: of {len(pairs)} images all or none were drawn; give another share, or a folder")

    rows.__doc__ = f"Split: {share:.0%} validate, drawn by a hash of the image's bytes." if share else f"Split: {validation} validates."
    options = {"--name": name, "--images": images.resolve(), "--masks": masks.resolve(), "--classes": classes.resolve()}
    options |= {} if ignore is None else {"--ignore": ignore}
    options |= {"--validation": share or Path(validation).resolve()}
    return Source(
        name,
        info,
        {"image": "image", "mask": "mask"},
        rows,
        command=shlex.join(["folder", *(str(word) for option in options.items() for word in option)]),
        version=_version(share, pairs),
        remedy="correct it, or take image and mask away",
    )


def _class_names(file: Path) -> tuple[str, ...]:
    try:
        names = tuple(line.strip() for line in file.read_text(encoding="utf-8-sig").rstrip().splitlines())
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--classes {file} can't be read: {error}") from error
    if not 2 <= len(names) <= MAX_LABELS or len(set(names)) < len(names) or "" in names:
        raise UserError(f"--classes {file}: a line for each class, with its name, all different; between 2 and {MAX_LABELS} of them")
    return names


def _share(validation: str) -> float | None:
    """The share that `--validation` says, or None where it names a folder."""
    try:
        share = float(validation)
    except ValueError:
        return None
    if not 0 < share < 1:
        raise UserError(f"--validation {validation}: a share is between 0 and 1, e.g. {VALIDATION}")
    return share


def _pairs(split: str, images: Path, masks: Path) -> list[Pair]:
    Image.init()
    readable = {suffix for suffix, format in Image.registered_extensions().items() if format in Image.OPEN}
    of_images, of_masks = _files(images, "images", readable), _files(masks, "masks (index or palette PNG)", {".png"})
    alone = [f"{of_images[key].path} has no mask {masks / key}.png" for key in of_images.keys() - of_masks.keys()]
    alone += [f"{of_masks[key].path} has no image {images / key}" for key in of_masks.keys() - of_images.keys()]
    if alone:
        listed = [*sorted(alone)[:SHOWN], *(["…"] if len(alone) > SHOWN else [])]
        raise UserError("\n  ".join([f"an image and its mask have the same name, but for its ending; {len(alone)} files are alone:", *listed]))
    return [(split, image, of_masks[key]) for key, image in of_images.items()]


def _files(folder: Path, what: str, suffixes: set[str]) -> dict[str, _File]:
    """The files with one of these suffixes in a folder and all below it, by their path from there without suffix."""
    if not folder.is_dir():
        raise UserError(f"no folder {folder}, which should hold {what}")
    found: dict[str, _File] = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() not in suffixes or path.name.startswith(".") or not path.is_file():
            continue
        inside = path.relative_to(folder)
        key = str(inside.with_suffix(""))
        if key in found:
            raise UserError(f"{found[key].path} and {path} are called alike, so a mask can't be told from the other's; take one away")
        name = (folder.resolve().name / inside).as_posix()
        found[key] = _File(path, name.encode("utf-8", "backslashreplace").decode())  # Parquet holds Unicode only
    if not found:
        raise UserError(f"{folder} holds no {what}")
    return found


def _draw(pair: Pair) -> bytes:
    """A random key that is the same for ever, on any machine and version."""
    return hashlib.sha256(pair[1].name.encode()).digest()


def _version(share: float | None, pairs: list[Pair]) -> str:
    """SHA-256, in hex, over names, sizes and times; over all bytes, to see that nothing changed would take as long as preparing."""
    states = [(split, file.name, file.path.stat().st_size, file.path.stat().st_mtime_ns) for split, *pair in pairs for file in pair]
    return hashlib.sha256(json.dumps([share, states]).encode()).hexdigest()
