"""Guarantees 1 to 4, on real processes."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path

import pytest

from tests.processes import lines, run_processes, train, write_recipe

VALIDATION = 13  # rows of tests/tiny.py


def sha256(run: Path, name: str = "model") -> str:
    newest = max((run / "checkpoints").glob("step_*"))
    return hashlib.sha256((newest / f"{name}.safetensors").read_bytes()).hexdigest()


@pytest.mark.slow
def test_any_number_of_processes_and_workers_sees_the_same_samples_and_losses(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    runs = {}
    for world_size, workers in ((1, 0), (1, 3), (2, 0), (2, 1), (4, 0), (4, 3)):
        name = f"p{world_size}w{workers}"
        cache = "auto" if workers else "off"  # both kinds of reading
        run_processes(world_size, train, recipe, (f"name={name}", f"data.workers={workers}", f"data.cache={cache}"))
        runs[name] = lines(tmp_path / "runs" / name)
    reference = runs.pop("p1w0")
    assert len({line["data_fingerprint"] for line in reference if line["split"] == "train"}) == 20
    for name, found in runs.items():
        assert [line.get("data_fingerprint") for line in found] == [
            line.get("data_fingerprint") for line in reference
        ], name
        for line, expected in zip(found, reference, strict=True):
            assert math.isclose(line["loss"], expected["loss"], rel_tol=1e-9), (name, line, expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    "loss",
    [
        "dice",
        "{name: focal, class_weights: inverse_frequency}",
        "{name: cross_entropy, class_weights: inverse_frequency}",
    ],
    ids=["dice", "focal", "weighted-cross-entropy"],
)
def test_losses_of_overlaps_and_of_weighted_pixels_are_the_same_on_any_number_of_processes(
    tmp_path: Path, loss: str
) -> None:
    recipe = write_recipe(tmp_path)
    for world_size in (1, 2, 4):
        run_processes(world_size, train, recipe, (f"name=p{world_size}", f"loss={loss}", "train.duration=8 steps"))
    one, two, four = (lines(tmp_path / "runs" / f"p{n}") for n in (1, 2, 4))
    assert [line["split"] for line in one].count("train") == 8
    for other in (two, four):
        for line, expected in zip(other, one, strict=True):
            assert math.isclose(line["loss"], expected["loss"], rel_tol=1e-9), (line, expected)


@pytest.mark.slow
def test_single_precision_losses_agree_over_the_first_steps(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    for world_size in (1, 2, 4):
        run_processes(world_size, train, recipe, (f"name=p{world_size}", "train.precision=fp32"))
    one, two, four = (lines(tmp_path / "runs" / f"p{n}") for n in (1, 2, 4))
    for other in (two, four):
        first = [
            (a["loss"], b["loss"]) for a, b in zip(one, other, strict=True) if a["split"] == "train" and a["step"] <= 10
        ]
        assert len(first) == 10 and all(math.isclose(a, b, rel_tol=1e-5) for a, b in first)
        assert math.isclose(one[-1]["loss"], other[-1]["loss"], rel_tol=0.01)


EXTRAS = ("train.accumulate=2", "train.ema=0.9", "train.clip_norm=1.0")


@pytest.mark.parametrize(
    ("options", "world_size"),
    [((), 1), ((), 2), (EXTRAS, 1), (EXTRAS, 2), (EXTRAS, 4)],
    ids=["plain-1", "plain-2", "accumulate-ema-clip-1", "accumulate-ema-clip-2", "accumulate-ema-clip-4"],
)
@pytest.mark.slow
def test_a_run_interrupted_twice_ends_bit_for_bit_like_an_uninterrupted_one(
    tmp_path: Path, world_size: int, options: tuple[str, ...]
) -> None:
    recipe = write_recipe(tmp_path)
    options = (*options, "train.precision=fp32", "train.log_every=3 steps")
    run_processes(world_size, train, recipe, ("name=uninterrupted", *options))
    run_processes(world_size, train, recipe, ("name=cut", *options), 9)
    run_processes(world_size, train, recipe, ("name=cut", *options), 16)
    assert max((tmp_path / "runs" / "cut" / "checkpoints").glob("step_*")).name == "step_00000016"
    run_processes(world_size, train, recipe, ("name=cut", *options))
    uninterrupted, cut = tmp_path / "runs" / "uninterrupted", tmp_path / "runs" / "cut"
    assert sha256(cut) == sha256(uninterrupted)
    assert lines(cut) == lines(uninterrupted)
    if EXTRAS[0] in options:
        assert sha256(cut, "ema") == sha256(uninterrupted, "ema") != sha256(uninterrupted)


def test_the_last_steps_differ_if_one_sample_was_augmented_differently(tmp_path: Path) -> None:
    """The comparison above would notice: another seed gives other weights and another fingerprint."""
    recipe = write_recipe(tmp_path)
    for seed in (0, 1):
        run_processes(1, train, recipe, (f"name=s{seed}", f"train.seed={seed}", "train.duration=2 steps"))
    assert sha256(tmp_path / "runs" / "s0") != sha256(tmp_path / "runs" / "s1")
    assert (
        lines(tmp_path / "runs" / "s0")[0]["data_fingerprint"] != lines(tmp_path / "runs" / "s1")[0]["data_fingerprint"]
    )


def _count_evaluated(recipe: Path, out: Path) -> None:
    from trainer.recipe.load import load_recipe
    from trainer.trainer import Trainer

    trainer = Trainer(load_recipe(recipe, ("evaluate.batch_size=64",)))
    trainer.build()
    seen = [int(i) for batch in trainer.data.validation_batches for i in batch["sample_id"]]
    (out / f"rank{trainer.rank}").write_text(" ".join(map(str, seen)))
    trainer.watchdog.close()
    trainer.accelerator.end_training()


@pytest.mark.parametrize("world_size", [1, 2, 4, 15])
def test_every_validation_sample_is_evaluated_once_even_with_empty_shares(tmp_path: Path, world_size: int) -> None:
    """15 processes share 13 samples: two have none."""
    if world_size == 15:
        from trainer.data.order import Shard

        shares = [list(Shard(VALIDATION, 4, rank, world_size)) for rank in range(world_size)]
        assert sorted(i for share in shares for batch in share for i in batch) == list(range(VALIDATION))
        assert [] in shares
        return
    run_processes(world_size, _count_evaluated, write_recipe(tmp_path), tmp_path)
    seen = [int(i) for rank in range(world_size) for i in (tmp_path / f"rank{rank}").read_text().split()]
    assert seen == list(range(VALIDATION))


def test_a_process_without_validation_samples_gets_the_metrics_of_all(tmp_path: Path) -> None:
    """Four processes share three validation samples."""
    recipe = write_recipe(tmp_path)
    stand_in = Path(__file__).resolve().parents[1] / "stand_in.py"
    data = (f"plugins=[{stand_in}]", "data.name=stand_in", "data.batch_size=4", "train.duration=2 steps")
    for world_size in (1, 4):
        run_processes(world_size, train, recipe, (*data, f"name=p{world_size}"))
    one, four = (lines(tmp_path / "runs" / f"p{n}", "validation") for n in (1, 4))
    assert one[-1].keys() == four[-1].keys()
    for key in ("loss", "miou", "pixel_accuracy"):
        assert math.isclose(four[-1][key], one[-1][key], rel_tol=1e-9), key
