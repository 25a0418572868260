"""Damaged PNG files are found before they reach a decoder that they would crash."""

from __future__ import annotations

import io
import random

import numpy as np
import pytest
from PIL import Image

from trainer.data.images import check_png, encode_png, read_indices

PIXELS = np.random.default_rng(0).integers(0, 256, (20, 24, 3), dtype=np.uint8)
WHOLE = encode_png(PIXELS)


def test_an_intact_file_and_other_formats_pass() -> None:
    jpeg = io.BytesIO()
    Image.fromarray(PIXELS).save(jpeg, "JPEG")
    for data in (WHOLE, WHOLE + b"what some programs write behind the end", jpeg.getvalue(), b""):
        check_png(data)


def test_any_flipped_bit_behind_the_signature_and_any_cut_is_noticed() -> None:
    draw = random.Random(0)
    for _ in range(300):
        flipped = bytearray(WHOLE)
        flipped[draw.randrange(8, len(WHOLE))] ^= 1 << draw.randrange(8)
        for damaged in (bytes(flipped), WHOLE[: draw.randrange(8, len(WHOLE))]):
            with pytest.raises(ValueError, match="a checksum of the PNG is wrong, or its end is missing"):
                check_png(damaged)


def test_indices_survive_encoding() -> None:
    indices = np.arange(256, dtype=np.uint8).reshape(16, 16)
    assert np.array_equal(read_indices(encode_png(indices)), indices)
