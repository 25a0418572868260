"""Encodes, decodes and checks images and masks."""

from __future__ import annotations

import io
import zlib

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, ImageOps

SIGNATURE = b"\x89PNG\r\n\x1a\n"


def check_png(data: bytes) -> None:
    """Compares the checksum of every chunk of a PNG, at some GB per second; other formats pass.

    Raises:
        ValueError: a checksum is wrong, or the end is missing.
    """
    if not data.startswith(SIGNATURE):
        return
    view, start, kind = memoryview(data), len(SIGNATURE), b""
    while kind != b"IEND":  # a chunk: length, kind, content, CRC-32 of kind and content
        end = start + 8 + int.from_bytes(view[start : start + 4], "big")
        kind = bytes(view[start + 4 : start + 8])
        if end + 4 > len(data) or zlib.crc32(view[start + 4 : end]) != int.from_bytes(view[end : end + 4], "big"):
            raise ValueError("a checksum of the PNG is wrong, or its end is missing")
        start = end + 4


DEPTH_BYTE = 24  # offset in a PNG of its bits per channel


# ---------------------------------------------------------------- rows


def encode_png(pixels: np.ndarray) -> bytes:
    """Encodes uint8 (H, W, 3) as an RGB PNG, uint8 (H, W) as a one-channel PNG with these values."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def _open(data: bytes) -> Image.Image:
    """Opens an image of any format that Pillow reads, except PostScript, which Pillow would run in Ghostscript."""
    image = Image.open(io.BytesIO(data))
    if image.format == "EPS":
        raise ValueError("a PostScript file is a program")
    return image


def read_indices(data: bytes) -> np.ndarray:
    """Decodes a one-channel image to its indices, uint8 (H, W); those of a palette image, not its colours.

    Raises:
        ValueError: the image has several channels, or more than 8 bits.
    """
    with _open(data) as image:
        if image.mode not in ("P", "L", "1"):
            raise ValueError(f"a mask has one channel of 8 bits, this image has mode {image.mode}")
        return np.asarray(image).astype(np.uint8)


def image_size(data: bytes) -> tuple[int, int]:
    """Width and height of an image once it is stored, upright; decodes only its header."""
    check_png(data)
    with _open(data) as image:
        on_its_side = image.getexif().get(ExifTags.Base.Orientation, 1) in range(5, 9)
        return image.size[::-1] if on_its_side else image.size


def checked_image(data: bytes) -> tuple[bytes, tuple[int, int]]:
    """Decodes an image fully; returns its bytes, re-encoded as PNG if it must be rotated or isn't an 8-bit JPEG or PNG,
    and (width, height).
    """
    with _open(data) as image:
        image.load()
        if image.mode.startswith(("I", "F")):
            raise ValueError(f"it has mode {image.mode}, not 8 bits per channel")  # Pillow would clip at 255
        rotated = image.getexif().get(ExifTags.Base.Orientation, 1) in range(2, 9)
        deep = image.format == "PNG" and data[DEPTH_BYTE] == 16
        # MPO: a camera's JPEG followed by a second picture.
        if image.format in ("JPEG", "MPO", "PNG") and not rotated and not deep:
            return data, image.size
        upright = ImageOps.exif_transpose(image).convert("RGB")
        return encode_png(np.asarray(upright)), upright.size


def checked_mask(data: bytes) -> tuple[bytes, npt.NDArray[np.uint8]]:
    """Decodes a mask fully; returns it as a one-channel PNG, and its indices (H, W)."""
    indices = read_indices(data)
    with _open(data) as image:
        ready = image.format == "PNG" and image.mode == "L"
    return data if ready else encode_png(indices), indices
