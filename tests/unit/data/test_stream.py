"""Batches are the same whoever loads them, from Parquet or from the cache,
and images move together with their masks.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from io import BytesIO
from itertools import islice
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from tests.reference_order import AUGMENT, seed_of
from trainer.components import catalogue
from trainer.data.archives import Member
from trainer.data.augment import Mosaic
from trainer.data.card import Card
from trainer.data.collate import collate
from trainer.data.images import encode_png
from trainer.data.loader import Batches
from trainer.data.order import Order, Shard, Slices
from trainer.data.prepare import prepare
from trainer.data.reader import Reader
from trainer.data.source import DataInfo, Row, Source
from trainer.data.stream import TrainingSamples, ValidationSamples
from trainer.errors import TrainingFailed, UserError

COUNT = 30


def _named_rows(archives: Mapping[str, Path]) -> Iterator[tuple[str, Row]]:
    """Of three videos of 10, 20 and 30 frames, as a set may hold them."""
    names = [f"video_{video}/{frame:03d}.png" for video in (2, 0, 1) for frame in range(10 * (video + 1))]
    for index, name in enumerate([*names[1::2], *names[::2]]):
        for number, split in enumerate(("train", "validation")):
            image = Member(name, encode_png(np.full((4, 4, 3), 2 * index + number, np.uint8)))
            yield split, {"image": image, "mask": encode_png(np.zeros((4, 4), np.uint8)), "label": 0}


def _rows(archives: Mapping[str, Path]) -> Iterator[tuple[str, Row]]:
    """Masks are the red channel, so that any movement of one without the other shows."""
    for index in range(COUNT + 5):
        red = np.random.default_rng(index).integers(0, 255, (20, 24), dtype=np.uint8)
        image = np.stack([red, np.full_like(red, index), red // 2], axis=-1)
        yield (
            "train" if index < COUNT else "validation",
            {"image": encode_png(image), "mask": encode_png(red), "label": index},
        )


SOURCE = Source(
    "paired", DataInfo(tuple(map(str, range(255))), 255), {"image": "image", "mask": "mask", "label": "label"}, _rows
)


@pytest.fixture
def prepared(tmp_path: Path) -> tuple[Path, Card]:
    card = prepare(SOURCE, tmp_path, None, lambda line: None)
    return tmp_path / "paired", card


def samples(
    prepared: tuple[Path, Card],
    *,
    transforms: Any = (),
    cache: bool = True,
    resize: Any = None,
    max_unreadable: int = 0,
) -> TrainingSamples:
    resize = v2.Resize(resize, antialias=True) if resize else None
    reader = Reader(*prepared, "train", resize=resize, cache=cache, max_unreadable=max_unreadable)
    return TrainingSamples(reader, Order(prepared[1].row_groups("train"), 5, 2), transforms)


def validation_samples(prepared: tuple[Path, Card], *, cache: bool = True) -> ValidationSamples:
    return ValidationSamples(Reader(*prepared, "validation", cache=cache))


def equal(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


FLIP = (v2.RandomHorizontalFlip(0.5), v2.RandomCrop((16, 16)))


@pytest.mark.parametrize("transforms", [(), FLIP], ids=["plain", "augmented"])
def test_batches_depend_neither_on_workers_nor_on_the_cache_nor_on_where_they_begin(
    prepared: tuple[Path, Card], transforms: Any
) -> None:
    def batches(cache: bool, workers: int, first: int = 0) -> list[dict[str, Any]]:
        slices = Slices(6, 1, 0, 1, first)
        return list(islice(Batches(samples(prepared, transforms=transforms, cache=cache), slices, workers), 12 - first))

    reference = batches(cache=False, workers=0)
    assert reference[0]["image"].dtype == torch.uint8 and reference[0]["image"].shape[1] == 3
    assert {int(e) for batch in reference for e in batch["epoch"]} == {0, 1, 2}
    for found in (batches(True, 0), batches(True, 0), batches(True, 2), batches(False, 2)):
        assert all(equal(a, b) for a, b in zip(found, reference, strict=True))
    assert all(equal(a, b) for a, b in zip(batches(True, 0, first=7), reference[7:], strict=True))


def test_masks_move_with_their_images_and_are_never_interpolated(prepared: tuple[Path, Card]) -> None:
    """The mask is the red channel: after crops and flips it must still be; resizing may only repeat its values."""
    crops = [
        catalogue("augmentation")[name].build(settings, ignore_index=255, resize=None, has_objects=False)
        for name, settings in (("random_crop", {"size": [14, 18]}), ("horizontal_flip", {"p": 0.5}))
    ]
    flipped = set()
    for batch in islice(Batches(samples(prepared, transforms=crops), Slices(6, 1, 0, 1, 0), 0), 10):
        assert torch.equal(batch["image"][:, :1], batch["mask"])
        assert torch.equal(batch["label"], batch["sample_id"])
        flipped |= {batch["mask"].float().mean().item()}
    assert len(flipped) == 10
    resized = catalogue("augmentation")["random_resized_crop"].build(
        {"size": [33, 33], "scale": [0.5, 1.0], "ratio": [0.75, 1.33]}, resize=None
    )
    for batch in islice(Batches(samples(prepared, transforms=[resized]), Slices(6, 1, 0, 1, 0), 0), 5):
        for sample_id, mask in zip(batch["sample_id"].tolist(), batch["mask"], strict=True):
            red = np.random.default_rng(sample_id).integers(0, 255, (20, 24), dtype=np.uint8)
            assert set(mask.unique().tolist()) <= set(red.reshape(-1).tolist())


def test_augmentation_differs_at_every_position_of_every_epoch_and_depends_on_the_position_only(
    prepared: tuple[Path, Card],
) -> None:
    """What an augmentation draws is compared with generators that are seeded here."""

    def drawing(sample: dict[str, Any]) -> dict[str, Any]:
        return sample | {"drawn": torch.rand(2)}

    loaded = samples(prepared, transforms=[drawing])
    for positions in ([0, 1, 2], [COUNT, COUNT + 1, COUNT + 2], [3 * COUNT + 7, 5]):
        generators = [torch.Generator().manual_seed(seed_of(5, AUGMENT, position)) for position in positions]
        assert loaded.batch(positions)["drawn"].tolist() == [
            torch.rand(2, generator=generator).tolist() for generator in generators
        ]


def test_the_global_generator_is_left_alone(prepared: tuple[Path, Card]) -> None:
    """Dropout is seeded by the step; loading a batch must not move its generator."""
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    next(iter(Batches(samples(prepared, transforms=FLIP), Slices(6, 1, 0, 1, 0), 0)))
    assert torch.equal(torch.rand(3), expected)


def test_resize_is_done_once_and_kept(prepared: tuple[Path, Card]) -> None:
    first = samples(prepared, resize=[10, 12])
    a = first.batch([0, 1, 2])
    assert a["image"].shape == (3, 3, 10, 12) and a["mask"].shape == (3, 1, 10, 12)
    first.reader.rows._read = None  # type: ignore[method-assign,assignment]  # Parquet can't be read any more
    assert equal(first.batch([0, 1, 2]), a)


@pytest.mark.parametrize("cache", [True, False])
def test_a_smaller_size_is_smoothed_as_pillow_does_and_masks_keep_their_values(
    prepared: tuple[Path, Card], cache: bool
) -> None:
    batch = samples(prepared, resize=[7, 5], cache=cache).batch(list(range(COUNT)))
    originals = {index: row for index, (_, row) in enumerate(islice(_rows({}), COUNT))}
    for sample_id, image, mask in zip(batch["sample_id"].tolist(), batch["image"], batch["mask"], strict=True):
        with Image.open(BytesIO(originals[sample_id]["image"])) as file:
            expected = np.asarray(file.resize((5, 7), Image.Resampling.BILINEAR)).astype(int)
        assert np.abs(image.permute(1, 2, 0).numpy() - expected).max() <= 1
        with Image.open(BytesIO(originals[sample_id]["mask"])) as file:
            assert set(mask.unique().tolist()) <= set(np.unique(np.asarray(file)).tolist())


def test_partners_of_a_mosaic_come_from_positions_around_the_samples_own(tmp_path: Path) -> None:
    """Wherever that is: there row groups are held in memory, and another order of the data gives other mosaics."""
    count = 320

    def rows(archives: Mapping[str, Path]) -> Iterator[tuple[str, Row]]:
        for index in range(count + 1):
            image = encode_png(np.full((2, 2, 3), [index // 256, index % 256, 0], np.uint8))
            yield "train" if index < count else "validation", {"image": image}

    class Recording(Mosaic):
        def __call__(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
            mixed.append([int(sample["image"][0, 0, 0]) * 256 + int(sample["image"][1, 0, 0]) for sample in samples])
            return samples[0]

    card = prepare(Source("many", DataInfo(("a",)), {"image": "image"}, rows), tmp_path, None, lambda line: None)
    order, mixed = Order(card.row_groups("train"), 0, 1), list[list[int]]()
    reader = Reader(tmp_path / "many", card, "train", window=1)
    loaded = TrainingSamples(reader, order, [Recording([2, 2], 1.0, [1.0, 1.0])])
    positions = [0, 31, 100, 200, 300, count + 60]
    loaded.batch(positions)
    around = [[order.sample(each)[1] for each in range(max(0, position - 32), position + 64)] for position in positions]
    assert [first for first, *_ in mixed] == [order.sample(position)[1] for position in positions]
    assert all(
        len(partners) == 3 and set(partners) <= set(near) for (_, *partners), near in zip(mixed, around, strict=True)
    )
    assert len({tuple(partners) for _, *partners in mixed}) == len(positions)


def test_evaluation_is_in_order_without_augmentation(prepared: tuple[Path, Card]) -> None:
    batches = Batches(validation_samples(prepared), Shard(5, 2, 0, 1), 0)
    for _ in range(2):
        assert [i for batch in batches for i in batch["sample_id"].tolist()] == [0, 1, 2, 3, 4]
    assert next(iter(batches))["image"].shape == (2, 3, 20, 24)


def test_a_full_disk_disables_the_cache_with_a_line(
    prepared: tuple[Path, Card], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("trainer.data.cache._allocate", full)
    assert samples(prepared).reader.pixels.cache is None
    assert "data.cache is disabled" in capsys.readouterr().err


# ---------------------------------------------------------------- samples that can't be read


def damage(prepared: tuple[Path, Card], *sample_ids: int) -> None:
    """Overwrites the ends of training images in their Parquet file, whose row groups stay intact."""
    path = prepared[1].files(prepared[0], "train")[0]
    content = path.read_bytes()
    for sample_id in sample_ids:
        image = next(row for split, row in islice(_rows({}), sample_id, None))["image"]
        assert content.count(image) == 1
        content = content.replace(image, image[:60] + bytes(len(image) - 60))
    path.write_bytes(content)


@pytest.mark.parametrize("transforms", [(), FLIP], ids=["plain", "augmented"])
def test_the_next_readable_sample_takes_the_place_of_an_unreadable_one(
    prepared: tuple[Path, Card], transforms: Any
) -> None:
    damage(prepared, 7, 8, 29)
    stand_ins = {7: 9, 8: 9, 29: 0}

    def batches(cache: bool, workers: int) -> list[dict[str, Any]]:
        return list(
            islice(
                Batches(
                    samples(prepared, max_unreadable=3, cache=cache, transforms=transforms),
                    Slices(6, 1, 0, 1, 0),
                    workers,
                ),
                10,
            )
        )

    reference = batches(False, 0)
    for found in (batches(True, 0), batches(True, 0), batches(False, 2)):
        assert all(equal(a, b) for a, b in zip(found, reference, strict=True))
    for batch in reference:
        meant = batch["sample_id"].tolist()
        assert (
            batch["unreadable"].tolist() == [i for i in meant if i in stand_ins]
            and batch["unreadable"].dtype == torch.int64
        )
        shown = [stand_ins.get(i, i) for i in meant]
        assert batch["label"].tolist() == shown
        assert torch.equal(batch["mask"], batch["image"][:, :1]) or transforms == FLIP
        assert (batch["image"][:, 1].flatten(1).amax(1)).tolist() == shown  # the green channel says which image it is
    assert sorted({i for batch in reference for i in batch["unreadable"].tolist()}) == [7, 8, 29]
    assert sorted(i for batch in reference[:5] for i in batch["sample_id"].tolist()) == list(range(COUNT))


def test_the_cache_never_holds_a_sample_under_the_id_of_an_unreadable_one(prepared: tuple[Path, Card]) -> None:
    damage(prepared, 7)
    loaded = samples(prepared, max_unreadable=1)
    list(islice(Batches(loaded, Slices(6, 1, 0, 1, 0), 0), 5))
    cache = loaded.reader.pixels.cache
    assert [i for i in range(COUNT) if i not in cache] == [7]


@pytest.mark.parametrize("workers", [0, 2])
def test_more_unreadable_samples_than_tolerated_are_listed_whichever_worker_met_them(
    prepared: tuple[Path, Card], workers: int
) -> None:
    damage(prepared, *range(0, 30, 5))
    with pytest.raises(TrainingFailed) as error:
        for _ in islice(Batches(samples(prepared, max_unreadable=3), Slices(2, 1, 0, 1, 0), workers), 15):
            pass
    first, *listed = str(error.value).splitlines()
    assert first == "paired/train: 4 samples can't be read; more than data.max_unreadable=3 tolerates"
    assert len(listed) == 4
    assert all(line.startswith("  sample ") and ": no file name: image can't be decoded: " in line for line in listed)
    assert error.value.on_one_rank


def test_if_no_sample_can_be_read_that_is_an_error_whatever_is_tolerated(prepared: tuple[Path, Card]) -> None:
    loaded = samples(prepared, max_unreadable=10**6, cache=False)
    prepared[1].files(prepared[0], "train")[0].unlink()
    with pytest.raises(TrainingFailed, match="30 samples can't be read"):
        loaded.batch([0])


def test_an_unreadable_validation_sample_is_always_an_error(prepared: tuple[Path, Card]) -> None:
    valid = validation_samples(prepared, cache=False)
    row = dict(valid.reader.rows.row(0, 0), mask={"bytes": b"", "path": "m.png"})
    valid.reader.rows.row = lambda group, index: row  # type: ignore[method-assign]
    with pytest.raises(
        TrainingFailed,
        match=r"^paired/validation: sample 0: m.png: mask can't be decoded: .*; metrics need every sample; delete "
        r".*paired, then",
    ):
        next(iter(Batches(valid, Shard(5, 2, 0, 1), 0)))


def test_an_image_of_another_size_is_unreadable_and_spares_its_neighbours_in_the_cache(
    prepared: tuple[Path, Card],
) -> None:
    loaded = samples(prepared, max_unreadable=1)
    row, whole = loaded.reader.rows.row, loaded.batch([0, 1, 2, 3])
    target = whole["sample_id"].tolist()[1]
    loaded.reader.pixels.cache.filled[target] = 0
    large = {"bytes": encode_png(np.full((40, 48, 3), 9, np.uint8)), "path": None}
    loaded.reader.rows.row = lambda *where: (
        {**row(*where), "image": large} if where == loaded.reader.layout.group(target) else row(*where)
    )  # type: ignore[method-assign]
    batch = loaded.batch([0, 1, 2, 3])
    assert batch["unreadable"].tolist() == [target]
    assert all(torch.equal(batch["image"][i], whole["image"][i]) for i in (0, 2, 3))


@pytest.mark.parametrize("how", ["deleted", "cut", "overwritten", "of other rows"])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_that_is_lost_while_it_is_used_is_one_line_that_names_it(
    prepared: tuple[Path, Card], how: str, workers: int, capfd: pytest.CaptureFixture[str]
) -> None:
    path = prepared[1].files(prepared[0], "train")[0]
    loaded = samples(prepared, cache=False)
    content = path.read_bytes()
    if how == "deleted":
        path.unlink()
    elif how == "of other rows":
        path.write_bytes(prepared[1].files(prepared[0], "validation")[0].read_bytes())
    else:
        path.write_bytes(content[: len(content) // 2] if how == "cut" else bytes(len(content)))
    with pytest.raises(TrainingFailed) as error:
        next(iter(Batches(loaded, Slices(6, 1, 0, 1, 0), workers)))
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    assert capfd.readouterr().err == ""


def test_a_file_that_is_lost_before_its_sizes_are_read_is_one_line_that_names_it(prepared: tuple[Path, Card]) -> None:
    path = prepared[1].files(prepared[0], "train")[0]
    path.write_bytes(bytes(1000))
    with pytest.raises(
        UserError,
        match=r"train/00000\.parquet can't be read: .*; delete .*paired, then run `trainer prepare paired` to prepare ",
    ):
        samples(prepared)


def test_a_damaged_image_is_named(prepared: tuple[Path, Card]) -> None:
    broken = samples(prepared, cache=False)
    row = dict(broken.reader.rows.row(0, 0), image={"bytes": b"\x89PNG nothing", "path": "a.png"})
    broken.reader.rows.row = lambda group, index: row  # type: ignore[method-assign]
    with pytest.raises(
        TrainingFailed,
        match=r"paired/train: sample \d+: a.png: image can't be decoded.*; data.max_unreadable=N tolerates N such "
        r"samples$",
    ):
        broken.batch([0])


def test_images_of_several_sizes_in_a_batch_say_what_to_do() -> None:
    with pytest.raises(UserError, match=r"paired/train: .* differ in size .* set data.resize=\[H,W\]"):
        collate([{"image": torch.zeros(3, 4, 4)}, {"image": torch.zeros(3, 5, 4)}], "paired/train")


def test_an_error_in_a_loader_worker_is_the_same_one_line_error(prepared: tuple[Path, Card]) -> None:
    broken = samples(prepared, cache=False)
    row = dict(broken.reader.rows.row(0, 0), image={"bytes": b"\x89PNG nothing", "path": "a.png"})
    broken.reader.rows.row = lambda group, index: row  # type: ignore[method-assign]
    with pytest.raises(TrainingFailed) as error:
        next(iter(Batches(broken, Slices(6, 1, 0, 1, 0), 1)))
    assert (
        str(error.value).startswith("paired/train: sample ")
        and "\n" not in str(error.value).strip()
        and error.value.on_one_rank
    )


def test_a_signal_to_the_process_group_leaves_the_workers_alive(prepared: tuple[Path, Card]) -> None:
    of_others = multiprocessing.active_children()  # loaders that were not collected yet
    batches = iter(Batches(samples(prepared), Slices(6, 1, 0, 1, 0), 2))
    next(batches)
    children = [child for child in multiprocessing.active_children() if child not in of_others]
    assert len(children) == 2
    for child in children:
        os.kill(child.pid or 0, signal.SIGTERM)
    assert len(list(islice(batches, 10))) == 10
    assert all(child.is_alive() for child in children)


def test_the_cache_leaves_space_on_the_disk(
    prepared: tuple[Path, Card], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("trainer.data.cache.SPARE_BYTES", 2**60)
    assert samples(prepared).reader.pixels.cache is None
    assert "too little space" in capsys.readouterr().err


def test_what_the_model_sees_is_moved_to_its_device_and_ids_stay_on_the_cpu(prepared: tuple[Path, Card]) -> None:
    loaded = samples(prepared, max_unreadable=1)
    batch = next(iter(Batches(loaded, Slices(6, 1, 0, 1, 0), 0, torch.device("meta"))))
    assert {name: str(value.device) for name, value in batch.items()} == {
        **dict.fromkeys(("image", "mask", "label"), "meta"),
        **dict.fromkeys(("sample_id", "epoch", "unreadable"), "cpu"),
    }


def test_samples_can_be_sent_to_workers_that_dont_fork(prepared: tuple[Path, Card]) -> None:
    original = samples(prepared, transforms=FLIP)
    assert equal(ForkingPickler.loads(ForkingPickler.dumps(original)).batch([3, 40]), original.batch([3, 40]))


def test_a_program_that_ends_with_an_error_doesnt_wait_for_its_workers(
    prepared: tuple[Path, Card], tmp_path: Path
) -> None:
    program = f"""
import sys
from pathlib import Path
from trainer.data.card import Card
from trainer.data.order import Order, Slices
from trainer.data.loader import Batches
from trainer.data.reader import Reader
from trainer.data.stream import TrainingSamples
folder = Path({str(prepared[0])!r})
card = Card.load(folder)
samples = TrainingSamples(Reader(folder, card, "train"), Order(card.row_groups("train"), 0, 2))
batches = iter(Batches(samples, Slices(6, 1, 0, 1, 0), 2))
next(batches)
raise SystemExit(3)
"""
    assert subprocess.run([sys.executable, "-c", program], timeout=60).returncode == 3


def test_samples_for_pictures_are_spread_over_the_set_by_file_name(tmp_path: Path) -> None:
    card = prepare(replace(SOURCE, rows=_named_rows), tmp_path, None, lambda line: None)
    validation = validation_samples((tmp_path / "paired", card))
    names = [each["path"] for each in validation.reader.rows.column("image").to_pylist()]
    shown = [names[sample_id] for sample_id in validation.spread(6)]
    assert [name.partition("/")[0] for name in shown] == [
        "video_0",
        "video_1",
        "video_1",
        "video_2",
        "video_2",
        "video_2",
    ]
    assert shown == sorted(names)[5::10]
    assert sorted(validation.spread(60)) == list(range(60)) == sorted(validation.spread(100))
    assert validation.spread(0) == []


def test_samples_without_file_names_are_spread_by_their_ids(prepared: tuple[Path, Card]) -> None:
    assert validation_samples(prepared).spread(2) == [1, 3]
