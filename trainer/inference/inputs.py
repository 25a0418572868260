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
from PIL import Image, ImageOps
from torch import Tensor

from trainer.errors import UserError

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
"""Of the files that a folder is searched for."""


class UnreadableImage(UserError):
    """An image that can't be decoded; the message says why."""


def find_images(inputs: Iterable[str | Path]) -> list[Path]:
    """The image files that files, folders (and what is below them) and patterns such as `photos/*.jpg` name.

    Returns:
        Each file once, those of a folder or pattern sorted by name.

    Raises:
        UserError: an input names nothing.
    """
    files: dict[Path, None] = {}
    for given in inputs:
        path = Path(given)
        if path.is_dir():
            matches = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
            problem = f"{given}: no images in this folder ({', '.join(SUFFIXES)})"
        elif path.is_file():
            matches, problem = [path], ""
        else:
            matches = [Path(match) for match in sorted(glob.glob(str(given), recursive=True)) if os.path.isfile(match)]
            problem = f"{given}: no such file, folder or pattern that matches a file"
        if not matches:
            raise UserError(problem)
        files |= dict.fromkeys(matches)
    return list(files)


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
    except OSError as error:
        raise UnreadableImage(error.strerror or str(error).replace(str(source), "the file")) from error
    except (ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UnreadableImage(str(error)) from error


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
