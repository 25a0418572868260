"""Damaged PNG files, found before they reach libpng.

On a wrong checksum torchvision (0.29) leaves libpng by a jump that ends the process with a segmentation fault: of single flipped
bits 97 in 100 did. Pillow doesn't look at the checksums of the pixels.
"""

from __future__ import annotations

import zlib

SIGNATURE = b"\x89PNG\r\n\x1a\n"


def check_png(data: bytes) -> None:
    """Compares the checksum of every chunk, some GB a second; other formats pass.

    Raises:
        ValueError: one is wrong, or the end is missing.
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
