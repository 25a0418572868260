"""What only a GPU can show. Each run is a process of its own: one that has used CUDA must not fork."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.processes import write_recipe
from tests.scenes import RECIPES

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]


def train(recipe: Path, *overrides: str) -> Path:
    """Trains in a process; returns the run folder."""
    command = [sys.executable, "trainer/run.py", str(recipe), "train.precision=fp32", "schedule=constant", *overrides]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    name = next(part for part in overrides if part.startswith("name=")).removeprefix("name=")
    return recipe.parent / "runs" / name


def weights(run: Path) -> str:
    return hashlib.sha256((run / "checkpoints" / "last" / "model.safetensors").read_bytes()).hexdigest()


@pytest.mark.parametrize("options", [(), ("train.precision=fp16", "train.ema=0.9", "train.accumulate=2"), ("train.precision=bf16",)])
def test_resume_is_exact_on_a_gpu_with_deterministic_kernels(tmp_path: Path, options: tuple[str, ...]) -> None:
    recipe = write_recipe(tmp_path)
    options = ("train.deterministic=true", *options)
    whole = train(recipe, "name=whole", "train.duration=20 steps", *options)
    for steps in (9, 16, 20):
        cut = train(recipe, "name=cut", f"train.duration={steps} steps", *options)
    assert weights(cut) == weights(whole)


@pytest.mark.parametrize("precision", ["fp16", "bf16", "fp32", "fp64"])
def test_every_precision_learns(tmp_path: Path, precision: str) -> None:
    run = train(write_recipe(tmp_path), "name=run", f"train.precision={precision}", "train.duration=6 epochs")
    assert json.loads((run / "summary.json").read_text())["best"]["miou"]["value"] > 0.7


def test_a_compiled_model_has_the_keys_and_losses_of_an_eager_one(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    eager, compiled = (train(recipe, f"name={name}", f"train.compile={name}", "train.duration=5 steps") for name in ("false", "true"))
    losses = [[json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()] for run in (eager, compiled)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)
    manifests = [json.loads((run / "checkpoints" / "last" / "manifest.json").read_text())["files"] for run in (eager, compiled)]
    assert manifests[0]["model.safetensors"]["bytes"] == manifests[1]["model.safetensors"]["bytes"]


@pytest.mark.parametrize("task", RECIPES)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_objects_are_found_measured_and_drawn(tmp_path: Path, task: str, precision: str) -> None:
    run = train(write_recipe(tmp_path, RECIPES[task]), "name=run", f"train.precision={precision}", "train.duration=60 steps", "evaluate.every=30 steps")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if line["split"] == "train"]
    assert losses[-1] < losses[0]
    assert any(name.endswith("map_50") for name in lines[-1])
    assert len(list((run / "pictures").glob("validation_*.png"))) == 2
