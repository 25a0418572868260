"""The official batches of CIFAR-10 are pickles: what they hold is read, and nothing that a pickle asks for is run."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy as np
import pytest

from trainer.data.cifar_batches import read_batch


def text(value: bytes) -> bytes:
    return b"U" + bytes([len(value)]) + value


def official(pixels: np.ndarray, labels: list[int]) -> bytes:
    """A pickle as Python 2 wrote the official ones: protocol 2, byte strings, numpy's old module names."""
    dtype = (
        b"cnumpy\ndtype\n"
        + text(b"u1")
        + b"K\x00K\x01\x87R(K\x03"
        + text(b"|")
        + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    )
    raw = pixels.tobytes()
    shape = b"M" + len(pixels).to_bytes(2, "little") + b"M\x00\x0c\x86"
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85"
        + text(b"b")
        + b"\x87R(K\x01"
        + shape
        + dtype
    )
    array += b"\x89T" + len(raw).to_bytes(4, "little") + raw + b"tb"
    return (
        b"\x80\x02}("
        + text(b"data")
        + array
        + text(b"labels")
        + b"]("
        + b"".join(b"K" + bytes([label]) for label in labels)
        + b"eu."
    )


def test_an_official_batch_gives_its_images_and_labels() -> None:
    images = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    found, labels = read_batch(official(images.transpose(0, 3, 1, 2).reshape(3, -1), [7, 0, 9]))
    assert np.array_equal(found, images) and labels == [7, 0, 9]


def test_a_batch_that_asks_for_anything_else_runs_nothing(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(tmp_path / "sentinel"),)

    for data in (pickle.dumps(Bomb()), pickle.dumps({b"data": Bomb(), b"labels": [1]}), b"cos\nsystem\n", b"", b"half"):
        with pytest.raises(ValueError, match="not a batch of CIFAR-10"):
            read_batch(data)
    assert not (tmp_path / "sentinel").exists()
