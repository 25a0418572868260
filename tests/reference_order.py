"""The order of the samples and their fingerprint once more, in plain Python, as the documentation describes them:
shares nothing with `trainer`.

an epoch permutes the row groups; `window` consecutive ones are permuted together; batch k holds positions k·B … k·B + B
- 1
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

# What a seed is for: later versions must not change these numbers, or resumed runs change.
ROW_GROUPS, WINDOW, AUGMENT = 2, 3, 4
_64_BITS = 2**64 - 1


def scramble(value: int) -> int:
    """SplitMix64 (Steele, Lea & Flood, 2014)."""
    value = (value + 0x9E3779B97F4A7C15) & _64_BITS
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & _64_BITS
    value = (value ^ value >> 27) * 0x94D049BB133111EB & _64_BITS
    return value ^ value >> 31


def seed_of(*key: int) -> int:
    """A seed of 63 bits from integers."""
    state = 0
    for part in key:
        state = scramble(state ^ part)
    return state >> 1


def shuffled(size: int, *key: int) -> list[int]:
    """range(size) by its hashed values."""
    return sorted(range(size), key=lambda index: scramble(index + seed_of(*key) & _64_BITS))


def epoch_of(row_groups: Sequence[int], seed: int, window: int, epoch: int) -> list[int]:
    """The sample ids of an epoch, in their order."""
    ids = [list(range(sum(row_groups[:group]), sum(row_groups[: group + 1]))) for group in range(len(row_groups))]
    groups = shuffled(len(row_groups), seed, ROW_GROUPS, epoch)
    found: list[int] = []
    for number, first in enumerate(range(0, len(groups), window)):
        together = [sample for group in groups[first : first + window] for sample in ids[group]]
        found += [together[index] for index in shuffled(len(together), seed, WINDOW, epoch, number)]
    return found


def stream_of(row_groups: Sequence[int], seed: int, window: int, positions: int) -> list[tuple[int, int]]:
    """Epoch and sample id at each of the first positions."""
    epochs = range(-(-positions // sum(row_groups)))
    return [(epoch, sample) for epoch in epochs for sample in epoch_of(row_groups, seed, window, epoch)][:positions]


def fingerprints(samples: Sequence[tuple[int, int]], batch_size: int) -> list[str]:
    """`data_fingerprint` after each step: the sum modulo 2^61 of blake2b-8 over the little-endian int64 triples (step,
    epoch, sample id).
    """
    total, found = 0, []
    for position, (epoch, sample) in enumerate(samples):
        triple = b"".join(
            number.to_bytes(8, "little", signed=True) for number in (position // batch_size, epoch, sample)
        )
        total = (total + int.from_bytes(blake2b(triple, digest_size=8).digest(), "little")) % 2**61
        if (position + 1) % batch_size == 0:
            found.append(f"{total:016x}")
    return found
