"""Assigns the user's own files to the training, validation and test splits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

from trainer.data.files import File, refuse
from trainer.data.options import VALIDATION, flag
from trainer.errors import UserError

Labels = TypeVar("Labels")


class LabelledImage(NamedTuple, Generic[Labels]):
    """An image and its labels. Until a share is drawn for validation, `split` is `train` for all candidates."""

    split: str
    image: File
    labels: Labels


def share_of(value: str, split: str = "validation") -> float | None:
    """The share given as `--validation`, or None if the value names a folder or a file, as that of `--test` must.

    Raises:
        UserError: the share is invalid.
    """
    try:
        share = float(value)
    except ValueError:
        return None
    if split != "validation":
        raise UserError(
            f"--{split} {value}: only the validation split can be a share; give the files of the {split} split"
        )
    if not 0 < share < 1:
        raise UserError(f"--validation {value}: a share must be between 0 and 1, e.g. {VALIDATION}")
    return share


def split_folders(options: Mapping[str, Any], *kinds: str) -> tuple[dict[str, Any], dict[str, list[Path]]]:
    """The folders of each split, one for each of `kinds`, e.g. `images` and `masks`, from the options of the command.

    The options named like `kinds` give the training folders. Those of another split are given by `validation_images`,
    `validation_masks` and so on, or by `validation` alone: a folder whose subfolders are named like the training
    folders or, if these share one name, the name of the folders next to them, e.g. `val` next to `images/train` and
    `labels/train`. By default, validation is a share of the training images.

    Returns:
        The options, independent of the current folder, and the folders of each split.

    Raises:
        UserError: options are mutually exclusive, or one lacks its companion.
    """
    options = dict(options)
    folders = {"train": [options[kind] for kind in kinds]}
    for split in ("validation", "test"):
        value, own = options[split], {flag(f"{split}_{kind}"): options[f"{split}_{kind}"] for kind in kinds}
        given = [option for option, folder in own.items() if folder]
        if given and value is not None:
            raise UserError(f"--{split} {value} and {given[0]} are mutually exclusive; give only one of them")
        if given and len(given) < len(own):
            raise UserError(f"{given[0]} requires {next(option for option in own if option not in given)}")
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


def refuse_leaks(samples: Sequence[LabelledImage[Any]]) -> None:
    """Raises `UserError` if byte-identical images are in different splits.

    Reads only files whose size occurs in several splits.
    """
    by_size: dict[int, list[LabelledImage[Any]]] = {}
    for sample in samples:
        by_size.setdefault(sample.image.path.stat().st_size, []).append(sample)
    by_digest: dict[str, dict[str, File]] = {}
    for same_size in by_size.values():
        if len({sample.split for sample in same_size}) > 1:
            for sample in same_size:
                by_digest.setdefault(sample.image.digest(), {}).setdefault(sample.split, sample.image)
    leaks = [
        ", ".join(f"{file.path} ({split})" for split, file in by_split.items())
        for by_split in by_digest.values()
        if len(by_split) > 1
    ]
    refuse(
        f"{len(leaks)} images are in more than one split, so metrics would be measured on training images; keep each "
        "in one split only:",
        leaks,
    )
