"""What only a GPU can show: `pytest -m gpu`. Each run has its own process: one that has used CUDA must not fork."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.processes import RECIPE, write_recipe
from tests.scenes import RECIPES
from tests.unit.optim.test_guard import INF, NAN, Scaled
from trainer.optim.guard import MAX_OVERFLOWS, Guard
from trainer.runs.state import optimizer_tensors, snapshot

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _gpu() -> None:
    # Not at import: whoever asks CUDA before all tests are collected never sees the GPU that tests/conftest.py hides
    # until then.
    if not torch.cuda.is_available():
        pytest.skip("no GPU is visible: there is none, or it is hidden since other tests run too (-m gpu)")


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(part) for part in command], cwd=ROOT, capture_output=True, text=True, timeout=200)


def train(recipe: Path, *overrides: str) -> Path:
    """Trains in a process; returns the run folder."""
    done = run(sys.executable, "trainer/run.py", recipe, "train.precision=fp32", "schedule=constant", *overrides)
    assert done.returncode == 0, done.stderr
    name = next(part for part in overrides if part.startswith("name=")).removeprefix("name=")
    return recipe.parent / "runs" / name


def weights(run: Path) -> str:
    return hashlib.sha256((run / "checkpoints" / "last" / "model.safetensors").read_bytes()).hexdigest()


@pytest.mark.parametrize(
    "options", [(), ("train.precision=fp16", "train.ema=0.9", "train.accumulate=2"), ("train.precision=bf16",)]
)
def test_resume_is_exact_on_a_gpu_with_deterministic_kernels(tmp_path: Path, options: tuple[str, ...]) -> None:
    recipe = write_recipe(tmp_path)
    options = ("train.deterministic=true", *options)
    uninterrupted = train(recipe, "name=uninterrupted", "train.duration=20 steps", *options)
    for steps in (9, 16, 20):
        cut = train(recipe, "name=cut", f"train.duration={steps} steps", *options)
    assert weights(cut) == weights(uninterrupted)


def test_resuming_logs_whether_the_bits_are_those_of_an_uninterrupted_run(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    for deterministic in ("auto", "true"):
        for steps in (4, 8):
            name, options = (
                f"name={deterministic}",
                (f"train.deterministic={deterministic}", f"train.duration={steps} steps"),
            )
            done = run(sys.executable, "trainer/run.py", recipe, "schedule=constant", name, *options)
            assert done.returncode == 0, done.stderr
        assert ("deterministic kernels are off on this GPU" in done.stderr) == (deterministic == "auto"), done.stderr


@pytest.mark.parametrize("task", RECIPES)
def test_runs_that_look_for_objects_are_equal_to_the_bit_with_deterministic_kernels(tmp_path: Path, task: str) -> None:
    recipe = write_recipe(tmp_path, RECIPES[task])
    options = ("train.deterministic=true", "train.duration=12 steps", "evaluate.pictures=0")
    assert weights(train(recipe, "name=one", *options)) == weights(train(recipe, "name=two", *options))


@pytest.mark.parametrize("precision", ["fp16", "bf16", "tf32", "fp32", "fp64"])
def test_every_precision_learns(tmp_path: Path, precision: str) -> None:
    run = train(write_recipe(tmp_path), "name=run", f"train.precision={precision}", "train.duration=6 epochs")
    assert json.loads((run / "summary.json").read_text())["best"]["miou"]["value"] > 0.7


def test_a_compiled_model_has_the_keys_and_losses_of_an_eager_one(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    eager, compiled = (
        train(recipe, f"name={name}", f"train.compile={name}", "train.duration=5 steps") for name in ("false", "true")
    )
    losses = [
        [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
        for run in (eager, compiled)
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)
    manifests = [
        json.loads((run / "checkpoints" / "last" / "manifest.json").read_text())["files"] for run in (eager, compiled)
    ]
    assert manifests[0]["model.safetensors"]["bytes"] == manifests[1]["model.safetensors"]["bytes"]


@pytest.mark.parametrize("task", RECIPES)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_objects_are_found_measured_and_drawn(tmp_path: Path, task: str, precision: str) -> None:
    run = train(
        write_recipe(tmp_path, RECIPES[task]),
        "name=run",
        f"train.precision={precision}",
        "train.duration=60 steps",
        "evaluate.every=30 steps",
    )
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if line["split"] == "train"]
    assert losses[-1] < losses[0]
    assert any(name.endswith("map_50") for name in lines[-1])
    assert len(list((run / "pictures").glob("validation_*.png"))) == 2


@pytest.mark.parametrize("task", ["segmentation", *RECIPES])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_summary_measures_on_the_gpu(tmp_path: Path, task: str, precision: str) -> None:
    recipe = write_recipe(tmp_path, RECIPES.get(task, RECIPE))
    done = run(
        sys.executable,
        "-m",
        "trainer",
        "summary",
        recipe,
        f"train.precision={precision}",
        "train.ema=0.9",
        "--input-size",
        "64x64",
        "--json",
    )
    assert done.returncode == 0, done.stderr
    costs = json.loads(done.stdout)["training"]
    assert all(cost["peak_bytes"] > cost["optimizer_bytes"] > 0 for cost in costs)


# ------------------------------------------------------------ parts, in this process


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD])
@pytest.mark.parametrize("skip", [True, False])
def test_fp16_steps_are_skipped_and_counted_on_the_device(optimizer: Any, skip: bool) -> None:
    run = Scaled(optimizer, fused=True, skip=skip, device="cuda")
    assert [run.step(*each) for each in [(9.0, INF), (1.0, 0.5), (9.0, NAN), (NAN, 0.5), (1.0, 0.5)]] == [
        False,
        True,
        False,
        False,
        skip,
    ]
    finding = run.guard.look()
    assert (finding.step, finding.what, finding.num_skipped) == (3, "loss is nan", 3)
    assert run.means.take()["loss"] == 1.0


def test_fp16_whose_gradients_are_never_finite_is_noticed_on_the_device() -> None:
    run = Scaled(torch.optim.AdamW, fused=True, skip=False, device="cuda")
    run.step(1.0, 0.5)
    for _ in range(MAX_OVERFLOWS):
        assert not run.step(1.0, INF)
    assert not run.step(1.0, 0.5)
    finding = run.guard.look()
    assert "overflow fp16" in finding.what and finding.num_skipped == MAX_OVERFLOWS


@pytest.mark.parametrize("fails", [True, False])
def test_buffers_are_restored_on_the_device_when_a_step_is_skipped(fails: bool) -> None:
    weight = torch.nn.Parameter(torch.ones(3, device="cuda"))
    optimizer = torch.optim.AdamW([weight], lr=0.1, fused=True)
    buffers = [
        torch.full((index % 5 + 1, 2), float(index), dtype=(torch.float32, torch.float64)[index % 2], device="cuda")
        for index in range(100)
    ]
    kept, guard = [buffer.clone() for buffer in buffers], Guard(optimizer, buffers, skip=True, scaled=False)
    for step, loss in enumerate((1.0, NAN if fails else 1.0)):
        weight.grad = torch.ones_like(weight)
        guard.begin_step()
        for buffer in buffers:
            buffer.mul_(NAN if fails and step else 2.0)
        assert guard.judge(
            step, {"loss": torch.tensor(loss, device="cuda")}, [torch.tensor(loss == loss, device="cuda")]
        )[0]
        optimizer.step()
    assert all(torch.equal(buffer, before * (2 if fails else 4)) for buffer, before in zip(buffers, kept, strict=True))


def test_a_snapshot_is_the_state_to_the_bit_whatever_happens_next() -> None:
    layers = (layer for _ in range(20) for layer in (torch.nn.Conv2d(8, 8, 3, padding=1), torch.nn.BatchNorm2d(8)))
    model = torch.nn.Sequential(*layers).to("cuda", memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    names = {parameter: name for name, parameter in model.named_parameters()}

    def step() -> None:
        model(torch.randn(2, 8, 9, 9, device="cuda")).square().mean().backward()
        optimizer.step()

    step()
    expected = {name: value.cpu().contiguous() for name, value in model.state_dict().items()}
    moments = {name: optimizer.state[parameter]["exp_avg"].cpu().contiguous() for parameter, name in names.items()}
    copied, states = snapshot(model), optimizer_tensors(optimizer, names)
    step()
    torch.cuda.synchronize()
    assert list(copied) == list(expected) and all(
        torch.equal(copied[name], value) and copied[name].is_contiguous() for name, value in expected.items()
    )
    assert all(torch.equal(states[f"{name}/exp_avg"], value) for name, value in moments.items())
