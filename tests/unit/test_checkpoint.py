"""A checkpoint is whole and verified, or it isn't there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from trainer import checkpoint as checkpoints
from trainer.checkpoint import Checkpoint, Counters, InvalidCheckpoint


def make(step: int, value: float = 0.0) -> Checkpoint:
    tensors = {"layer.weight": torch.full((3, 4), value), "layer.count": torch.tensor(step)}
    counters: Counters = {
        "step": step,
        "seconds": 1.5,
        "best": 0.25,
        "best_step": step,
        "improvements": [True, False],
        "num_skipped": 0,
        "unreadable": [],
        "evaluation_pending": False,
        "fingerprint": 12345678901234567,
        "means": {"loss": 0.5},
        "scaler": None,
        "world_size": 1,
        "threads": 1,
    }
    return Checkpoint(model=tensors, ema=tensors, optimizer={"layer.weight/step": torch.tensor(1.5)}, counters=counters)


def test_what_is_saved_is_what_is_loaded(tmp_path: Path) -> None:
    folder = checkpoints.save(tmp_path, make(7, 0.1), keep=3, best=True)
    loaded = checkpoints.load(folder)
    assert loaded.step == 7 and loaded.counters["best"] == 0.25
    assert torch.equal(loaded.model["layer.weight"], torch.full((3, 4), 0.1)) and loaded.ema is not None
    assert {p.name for p in folder.iterdir()} == {"model.safetensors", "ema.safetensors", "optimizer.safetensors", "trainer.json", "manifest.json"}
    assert (tmp_path / "last").resolve() == folder


def test_the_best_outlives_its_own_folder(tmp_path: Path) -> None:
    checkpoints.save(tmp_path, make(1, 1.0), keep=2, best=True)
    inode = (tmp_path / "step_00000001" / "model.safetensors").stat().st_ino
    for step in (2, 3, 4):
        checkpoints.save(tmp_path, make(step), keep=2, best=False)
    assert checkpoints.steps(tmp_path) == [3, 4]
    best = tmp_path / "best"
    assert (best / "model.safetensors").stat().st_ino == inode  # a link, not a copy
    checkpoints.verify(best)
    assert checkpoints.load(best).step == 1
    checkpoints.save(tmp_path, make(5), keep=2, best=True)
    assert checkpoints.load(best).step == 5 and len(list((tmp_path / ".best").iterdir())) == 1


def test_a_kill_between_saving_and_pointing_to_the_best_is_made_good(tmp_path: Path) -> None:
    checkpoints.save(tmp_path, make(1), keep=2, best=True)
    checkpoints.save(tmp_path, make(2), keep=2, best=False)  # it was the best, but the link wasn't moved
    checkpoints.restore_best(tmp_path, 2)
    assert checkpoints.load(tmp_path / "best").step == 2
    checkpoints.restore_best(tmp_path, 2)
    checkpoints.restore_best(tmp_path, None)
    assert checkpoints.load(tmp_path / "best").step == 2


def test_keeping_more_than_there_are_removes_none(tmp_path: Path) -> None:
    for step in range(1, 6):
        checkpoints.save(tmp_path, make(step), keep=9, best=False)
    assert checkpoints.steps(tmp_path) == [1, 2, 3, 4, 5]


def test_a_failed_save_leaves_the_older_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints.save(tmp_path, make(1), keep=2, best=True)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints, "save_file", full)
    with pytest.raises(OSError):
        checkpoints.save(tmp_path, make(2), keep=2, best=True)
    assert checkpoints.newest_valid(tmp_path) == (1, []) and not list(tmp_path.glob(".writing-*"))


def test_leftovers_of_a_killed_save_are_ignored_and_removed(tmp_path: Path) -> None:
    checkpoints.save(tmp_path, make(1), keep=2, best=False)
    (tmp_path / ".writing-step_00000002").mkdir()
    (tmp_path / ".writing-step_00000002" / "model.safetensors").write_bytes(b"half")
    assert checkpoints.newest_valid(tmp_path) == (1, [])
    checkpoints.save(tmp_path, make(2), keep=2, best=False)
    assert not list(tmp_path.glob(".writing-*"))


@given(data=st.data())
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_flipped_byte_or_truncation_is_detected_and_the_one_before_is_used(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    root = tmp_path_factory.mktemp("c")
    checkpoints.save(root, make(1), keep=2, best=False)
    newest = checkpoints.save(root, make(2), keep=2, best=False)
    file = data.draw(st.sampled_from(sorted(newest.iterdir())))
    content = bytearray(file.read_bytes())
    at = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        content[at] ^= data.draw(st.integers(1, 255))
    else:
        del content[at:]
    file.write_bytes(content)
    step, complaints = checkpoints.newest_valid(root)
    if file.name == "manifest.json" and step == 2:  # white space or another spelling of the same JSON
        assert json.loads(content)["files"].keys() and complaints == []
    else:
        assert step == 1 and len(complaints) == 1 and "step_00000002 is not intact" in complaints[0]


def test_a_manifest_that_names_other_folders_reads_nothing_there(tmp_path: Path) -> None:
    folder = checkpoints.save(tmp_path, make(1), keep=2, best=False)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["../../etc/passwd"] = {"bytes": 1, "sha256": ""}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InvalidCheckpoint, match="missing"):
        checkpoints.verify(folder)


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
def test_a_restored_optimizer_takes_the_same_steps_in_any_memory_layout(name: str) -> None:
    """Fused kernels walk parameter and state by address: a state in another layout would be mixed up silently."""
    from trainer.components import catalogue

    def build() -> tuple[nn.Module, torch.optim.Optimizer, dict[torch.Tensor, str]]:
        torch.manual_seed(0)
        model = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
        names: dict[torch.Tensor, str] = {parameter: key for key, parameter in model.named_parameters()}
        return model, catalogue("optimizer")[name].build({"lr": 0.1}, parameters=list(names)), names

    def step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
        torch.manual_seed(seed)
        optimizer.zero_grad()
        model(torch.randn(2, 3, 6, 6).to(memory_format=torch.channels_last)).square().sum().backward()
        optimizer.step()

    model, optimizer, names = build()
    for seed in range(3):
        step(model, optimizer, seed)
    weights, state = checkpoints.snapshot(model), checkpoints.optimizer_tensors(optimizer, names)
    step(model, optimizer, 9)
    again, restored, its_names = build()
    again.load_state_dict(weights)
    checkpoints.load_optimizer(restored, state, its_names)
    step(again, restored, 9)
    for key, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key
