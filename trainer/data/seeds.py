"""Stateless random numbers: every seed is a pure function of what it is for.

No generator state is ever saved or restored, which lets an interrupted run resume bit for bit.
The hash is implemented here, so that a library update can't change the order of the data.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
import numpy.typing as npt

_MASK = 2**64 - 1


class Use(IntEnum):
    """What a seed is for, so that different uses of the same integers get different seeds."""

    INITIALISE = 1
    ROW_GROUPS = 2
    WINDOW = 3
    AUGMENT = 4
    STEP = 5


def _scramble(value: int) -> int:
    """The finaliser of SplitMix64 (Steele, Lea & Flood, 2014): a bijection of 64-bit integers."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def mix(*key: int) -> int:
    """Hashes integers to a seed in [0, 2**63)."""
    state = 0
    for part in key:
        state = _scramble(state ^ (part & _MASK))
    return state >> 1


def permutation(size: int, *key: int) -> npt.NDArray[np.int64]:
    """A permutation of range(size), determined by `key`: the sort order of hashes."""
    values = np.arange(size, dtype=np.uint64) + np.uint64(mix(*key))
    values += np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.argsort(values ^ (values >> np.uint64(31)), kind="stable")
