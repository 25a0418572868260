"""The Order is a pure function of seed and position, and every sample comes once an epoch."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.reference_order import AUGMENT, fingerprints, seed_of, stream_of
from trainer.data.order import Order, Shard, Slices, fingerprint, read_amplification

GROUPS = [5, 7, 3, 8, 1, 6, 4]
EXPECTED = (  # two epochs; ids 0 to 4 are the first group, 5 to 11 the second, …
    [
        31,
        12,
        32,
        14,
        33,
        13,
        30,
        11,
        23,
        9,
        8,
        7,
        6,
        10,
        5,
        15,
        17,
        2,
        20,
        3,
        21,
        22,
        1,
        4,
        16,
        19,
        0,
        18,
        29,
        25,
        26,
        27,
        28,
        24,
    ],
    [
        29,
        24,
        32,
        28,
        31,
        25,
        33,
        30,
        26,
        27,
        3,
        1,
        2,
        19,
        16,
        20,
        18,
        4,
        0,
        22,
        17,
        15,
        21,
        23,
        9,
        11,
        5,
        6,
        7,
        8,
        10,
        14,
        13,
        12,
    ],
)


@given(
    groups=st.lists(st.integers(1, 9), min_size=1, max_size=12),
    seed=st.integers(0, 2**63 - 1),
    window=st.integers(1, 5),
)
@settings(max_examples=50, deadline=None)
def test_every_sample_comes_once_an_epoch(groups: list[int], seed: int, window: int) -> None:
    order = Order(groups, seed, window)
    for epoch in (0, 1, 7):
        found = [order.sample(epoch * order.size + i) for i in range(order.size)]
        assert {e for e, _ in found} == {epoch}
        assert sorted(i for _, i in found) == list(range(sum(groups)))


def test_a_position_needs_no_history() -> None:
    straight = Order(GROUPS, 3, 2)
    expected = [straight.sample(p) for p in range(200)]
    for position in (199, 0, 120, 34, 33):
        assert Order(GROUPS, 3, 2).sample(position) == expected[position]


def test_the_order_of_this_version_is_that_of_every_later_one() -> None:
    """Runs of an older version must resume exactly: if this fails, resumed runs change."""
    order = Order(GROUPS, 0, 2)
    assert [order.sample(p) for p in range(2 * order.size)] == [
        (epoch, sample) for epoch in (0, 1) for sample in EXPECTED[epoch]
    ]
    assert [order.augment_seed(p) for p in (0, 1, 34, 35)] == [
        4366509968824118491,
        7379858761954957158,
        7587638746617312212,
        335215587748196101,
    ]


@given(
    groups=st.lists(st.integers(1, 6), min_size=1, max_size=8), seed=st.integers(0, 2**63 - 1), window=st.integers(1, 4)
)
@settings(max_examples=30, deadline=None)
def test_the_order_is_that_of_another_implementation(groups: list[int], seed: int, window: int) -> None:
    order, expected = Order(groups, seed, window), stream_of(groups, seed, window, 3 * sum(groups))
    assert [order.sample(p) for p in range(len(expected))] == expected
    assert [order.augment_seed(p) for p in range(len(expected))] == [
        seed_of(seed, AUGMENT, p) for p in range(len(expected))
    ]


def test_the_fingerprint_is_what_the_documentation_says_in_any_order_of_the_samples() -> None:
    samples = stream_of(GROUPS, 0, 2, 80)
    total = 0
    for step, expected in enumerate(fingerprints(samples, 8)):
        batch = samples[8 * step : 8 * step + 8]
        total += sum(fingerprint(step, *map(list, zip(*part, strict=True))) for part in (batch[5:], batch[:5]))
        assert f"{total % 2**61:016x}" == expected


def test_epochs_and_seeds_differ() -> None:
    order = Order(GROUPS, 0, 2)
    first, second = ([order.sample(e * order.size + i)[1] for i in range(order.size)] for e in (0, 1))
    other = [Order(GROUPS, 1, 2).sample(i)[1] for i in range(order.size)]
    assert first != second != other != first


def test_a_window_holds_only_its_row_groups() -> None:
    """What bounds the memory and the reading of a resume."""
    order = Order([4] * 12, 0, 3)
    for start in range(0, order.size, 12):
        assert len({order.group(order.sample(p)[1])[0] for p in range(start, start + 12)}) == 3


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_micro_batches_hold_the_same_positions_for_any_number_of_processes(world_size: int, accumulate: int) -> None:
    iterators = [iter(Slices(8, accumulate, rank, world_size, first_step=5)) for rank in range(world_size)]
    for micro in range(6):
        together = [p for iterator in iterators for p in next(iterator)]
        size = 8 // accumulate
        assert together == list(range(40 + micro * size, 40 + (micro + 1) * size))


@given(size=st.integers(0, 40), batch_size=st.integers(1, 9), world_size=st.integers(1, 7))
@settings(max_examples=100, deadline=None)
def test_shards_hold_every_sample_once(size: int, batch_size: int, world_size: int) -> None:
    shards = [Shard(size, batch_size, rank, world_size) for rank in range(world_size)]
    assert [i for shard in shards for batch in shard for i in batch] == list(range(size))
    assert all(len(list(shard)) == len(shard) for shard in shards)


def test_read_amplification_is_one_for_one_reader_and_grows_with_readers() -> None:
    order = Order([4] * 30, 0, 4)
    assert read_amplification(order, 8, 1, 1, 0) == 1.0
    assert 1.5 < read_amplification(order, 8, 1, 2, 0) <= 2.0
    assert read_amplification(order, 8, 1, 2, 3) > 2.5
