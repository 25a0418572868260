"""Which files of the user's own train, validate and test."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

from trainer.data.files import File, refuse
from trainer.data.options import VALIDATION, flag
from trainer.errors import UserError

Labels = TypeVar("Labels")


class Sample(NamedTuple, Generic[Labels]):
    """An image and what belongs to it; `split` is `train` also for one that a share may yet draw to validate."""

    split: str
    image: File
    labels: Labels


def share_of(value: str, split: str = "validation") -> float | None:
    """The share that `--validation` says, or None where it names a folder or a file, as `--test` always does.

    Raises:
        UserError: the share is invalid.
    """
    try:
        share = float(value)
    except ValueError:
        return None
    if split != "validation":
        raise UserError(
            f"--{split} {value}: only the validation split can be a share; name the files of the {split} split"
        )
    if not 0 < share < 1:
        raise UserError(f"--validation {value}: a share is between 0 and 1, e.g. {VALIDATION}")
    return share


def split_folders(options: Mapping[str, Any], *kinds: str) -> tuple[dict[str, Any], dict[str, list[Path]]]:
    """The folders of each split, as options of the command give them, each of which holds one of `kinds`, e.g. `images`
    and `masks`.

    Options of these names give the training split. Another split is given by `validation_images`, `validation_masks`
    and so on, or by `validation` alone: the folder whose subfolders are called like those that train; or, where these
    are called alike, the name of the folders beside them, e.g. `val` beside `images/train` and `labels/train`. Where
    nothing says what validates, it is a share.

    Returns:
        The options, so that they mean the same wherever the command is called, and the folders, by split.

    Raises:
        UserError: options exclude each other, or one lacks its companion.
    """
    options = dict(options)
    folders = {"train": [options[kind] for kind in kinds]}
    for split in ("validation", "test"):
        value, own = options[split], {flag(f"{split}_{kind}"): options[f"{split}_{kind}"] for kind in kinds}
        given = [option for option, folder in own.items() if folder]
        if given and value is not None:
            raise UserError(f"--{split} {value} and {given[0]} exclude each other; give one of them")
        if given and len(given) < len(own):
            raise UserError(f"{given[0]} needs {next(option for option in own if option not in given)} beside it")
        if given:
            folders[split] = [*own.values()]
        elif value is not None and share_of(value, split) is None:
            options[split], folders[split] = _folders_named(value, folders["train"])
        elif split == "validation" and value is None:
            options[split] = VALIDATION
    return options, folders


def _folders_named(value: str, train: Sequence[Path]) -> tuple[str, list[Path]]:
    resolved = [folder.resolve() for folder in train]
    if len({folder.name for folder in resolved}) < len(resolved):
        return value, [folder.parent / value for folder in resolved]
    return str(Path(value).resolve()), [Path(value, folder.name) for folder in resolved]


def refuse_leaks(samples: Sequence[Sample[Any]]) -> None:
    """Raises `UserError` where an image is in more than one split, byte for byte;
    reads only files whose size occurs in another split too.
    """
    by_size: dict[int, list[Sample[Any]]] = {}
    for sample in samples:
        by_size.setdefault(sample.image.path.stat().st_size, []).append(sample)
    by_digest: dict[str, dict[str, File]] = {}
    for alike in by_size.values():
        if len({sample.split for sample in alike}) > 1:
            for sample in alike:
                by_digest.setdefault(sample.image.digest(), {}).setdefault(sample.split, sample.image)
    leaks = [
        ", ".join(f"{file.path} ({split})" for split, file in by_split.items())
        for by_split in by_digest.values()
        if len(by_split) > 1
    ]
    refuse(
        f"{len(leaks)} images are in more than one split, so metrics would be measured on images used in training; "
        "leave each in one split only:",
        leaks,
    )
