"""A cached sample is complete or absent, at whatever moment another process reads it or a process is killed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from trainer.data.cache import PixelCache

SIZES = np.array([[4, 6], [3, 5], [4, 6]])


def sample(index: int) -> dict[str, torch.Tensor]:
    height, width = SIZES[index].tolist()
    generator = torch.Generator().manual_seed(index)
    return {
        name: torch.randint(1, 256, (channels, height, width), dtype=torch.uint8, generator=generator)
        for name, channels in (("image", 3), ("mask", 1))
    }


def equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_sample_marked_as_present_has_all_of_its_pixels(tmp_path: Path) -> None:
    writer, reader = (PixelCache(tmp_path, {"image": 3, "mask": 1}, SIZES) for _ in range(2))
    seen: list[bool] = []

    class Watched(np.ndarray):
        def __setitem__(self, place: Any, value: Any) -> None:
            super().__setitem__(place, value)
            seen.append(1 in reader)  # as another process would look, after each write
            assert 1 not in reader or equal(reader.read(1), sample(1))

    writer.pixels, writer.filled = (each.view(Watched) for each in (writer.pixels, writer.filled))  # type: ignore[misc]
    writer.write(1, sample(1))
    assert seen == [*[False] * (len(seen) - 1), True] and len(seen) > 1
    assert 0 not in reader and 2 not in reader


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_samples_of_different_sizes_do_not_overlap(tmp_path: Path, order: tuple[int, ...]) -> None:
    cache = PixelCache(tmp_path, {"image": 3, "mask": 1}, SIZES)
    for index in order:
        cache.write(index, sample(index))
    again = PixelCache(tmp_path, {"image": 3, "mask": 1}, SIZES)
    assert all(index in again and equal(again.read(index), sample(index)) for index in order)


def test_what_is_read_may_be_changed_without_changing_the_cache(tmp_path: Path) -> None:
    """As an augmentation in place would."""
    sizes = SIZES[[0, 2]]
    cache = PixelCache(tmp_path, {"image": 3, "mask": 1}, sizes)
    for index in (0, 1):
        cache.write(index, sample(0))
    for found in (cache.read(0), cache.read(1), cache.read_batch([0, 1])):
        for pixels in found.values():
            pixels.zero_()
    assert equal(cache.read(0), sample(0)) and equal(cache.read(1), sample(0))
