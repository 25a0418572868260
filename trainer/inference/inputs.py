"""Images to predict on: from files, Pillow images, arrays and tensors."""

from __future__ import annotations

import glob
import io
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from trainer.errors import UserError, one_line

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
"""Of the files that a folder is searched for."""


class UnreadableImage(UserError):
    """An image that can't be decoded; the message says why."""


def find_images(inputs: Iterable[str | Path], without: Path | None = None) -> dict[Path, Path]:
    """The image files that files, folders (and what is below them) and patterns such as `photos/*.jpg` name.

    Args:
        inputs: see above. Hidden files of folders are left out.
        without: a folder whose files are left out.

    Returns:
        Each file once, those of a folder or pattern sorted by name; and what to call its results: its path within the
        folder or the pattern's folder, without suffix. Where several folders are given, it begins with the name of
        the folder.

    Raises:
        UserError: an input names nothing, or two files would have results of the same name.
    """
    given, excluded = [os.path.expanduser(each) for each in inputs], without and without.resolve()
    several = sum(map(os.path.isdir, given)) > 1
    names: dict[Path, Path] = {}
    for each in given:
        root, matches, problem = _matches(each)
        files = [file for file in matches if excluded is None or excluded not in file.resolve().parents]
        if not files:
            raise UserError(problem if not matches else f"{each}: all of its images are results in {without}")
        prefix = Path(root.resolve().name) if several and Path(each).is_dir() else Path()
        for file in files:
            names.setdefault(Path(os.path.abspath(file)), prefix / file.relative_to(root).with_suffix(""))
    owners: dict[Path, Path] = {}
    for file, name in names.items():
        if name in owners:
            raise UserError(
                f"{owners[name]} and {file} would both have results named {name}: give their common folder, which "
                "keeps the folders in it apart, or predict on them one by one into different folders"
            )
        owners[name] = file
    return names


def _matches(given: str) -> tuple[Path, list[Path], str]:
    """The folder that names are relative to, the image files, and what is wrong if there are none."""
    path = Path(given)
    if path.is_dir():
        inside = (file.relative_to(path) for file in path.rglob("*") if file.suffix.lower() in SUFFIXES)
        shown = sorted(file for file in inside if not any(part.startswith(".") for part in file.parts))
        files = [path / file for file in shown if (path / file).is_file()]
        return path, files, f"{given}: no images in this folder ({', '.join(SUFFIXES)})"
    if path.is_file():
        return path.parent, [path], ""
    files = [Path(match) for match in sorted(glob.glob(given, recursive=True)) if os.path.isfile(match)]
    root = next(folder for folder in path.parents if not glob.has_magic(str(folder)))
    return root, files, f"{given}: no such file, folder or pattern that matches a file"


def read_image(source: str | Path | bytes | Image.Image | np.ndarray | Tensor) -> Tensor:
    """One image as RGB, uint8 (3, H, W) on the CPU, upright as its EXIF data says.

    Args:
        source: a file, its bytes, a Pillow image, an array uint8 (H, W), (H, W, 3) or (H, W, 4), or a tensor uint8
            (H, W), (1, H, W) or (3, H, W). Transparency is laid over white.

    Raises:
        UnreadableImage: it can't be decoded, or isn't of these shapes and types.
    """
    if isinstance(source, Tensor):
        return _from_tensor(source)
    if isinstance(source, np.ndarray):
        return _from_array(source)
    if isinstance(source, Image.Image):
        return _from_pillow(source)
    try:
        data = source if isinstance(source, bytes) else Path(source).read_bytes()
        with Image.open(io.BytesIO(data)) as image:
            if image.format == "EPS":
                raise UnreadableImage("a PostScript file is a program")
            return _from_pillow(image)
    except UnreadableImage:
        raise
    except UnidentifiedImageError as error:
        raise UnreadableImage("not an image of a known format") from error
    except OSError as error:
        raise UnreadableImage(error.strerror or str(error)) from error
    except Exception as error:  # Pillow's decoders raise all kinds of errors over damaged files
        raise UnreadableImage(one_line(error)) from error


def _from_pillow(image: Image.Image) -> Tensor:
    if image.mode.startswith(("I", "F")):
        raise UnreadableImage(f"it has mode {image.mode}, not 8 bits a channel")
    upright: Any = ImageOps.exif_transpose(image)
    if upright.mode in ("RGBA", "LA", "PA") or "transparency" in upright.info:
        upright = upright.convert("RGBA")
        upright = Image.alpha_composite(Image.new("RGBA", upright.size, "white"), upright)
    return torch.from_numpy(np.array(upright.convert("RGB"))).permute(2, 0, 1).contiguous()


def _from_array(array: np.ndarray) -> Tensor:
    if array.dtype != np.uint8 or not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (1, 3, 4))):
        raise UnreadableImage(f"an array must be uint8 (H, W), (H, W, 3) or (H, W, 4), not {array.dtype} {array.shape}")
    return _from_pillow(Image.fromarray(array[..., 0] if array.ndim == 3 and array.shape[2] == 1 else array))


def _from_tensor(tensor: Tensor) -> Tensor:
    image = tensor[None] if tensor.dim() == 2 else tensor
    if image.dtype != torch.uint8 or image.dim() != 3 or image.shape[0] not in (1, 3):
        shape = tuple(tensor.shape)
        raise UnreadableImage(f"a tensor must be uint8 (3, H, W) or (1, H, W), not {tensor.dtype} {shape}")
    return image.expand(3, -1, -1).cpu().contiguous()
