"""A checkpoint is intact and verified, or it isn't there."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from trainer.runs import state as states_module
from trainer.runs.checkpoint import Counters, InvalidCheckpoint, verify
from trainer.runs.state import Checkpoint, load_optimizer, optimizer_tensors, snapshot
from trainer.runs.store import CheckpointStore


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
    folder = CheckpointStore(tmp_path).save(make(7, 0.1), keep=3, best=True)
    loaded = Checkpoint.load(folder)
    assert loaded.step == 7 and loaded.counters["best"] == 0.25
    assert torch.equal(loaded.model["layer.weight"], torch.full((3, 4), 0.1)) and loaded.ema is not None
    assert {p.name for p in folder.iterdir()} == {
        "model.safetensors",
        "ema.safetensors",
        "optimizer.safetensors",
        "trainer.json",
        "manifest.json",
    }
    assert (tmp_path / "last").resolve() == folder


def test_the_best_outlives_its_own_folder(tmp_path: Path) -> None:
    CheckpointStore(tmp_path).save(make(1, 1.0), keep=2, best=True)
    inode = (tmp_path / "step_00000001" / "model.safetensors").stat().st_ino
    for step in (2, 3, 4):
        CheckpointStore(tmp_path).save(make(step), keep=2, best=False)
    assert CheckpointStore(tmp_path).steps() == [3, 4]
    best = tmp_path / "best"
    assert (best / "model.safetensors").stat().st_ino == inode  # a link, not a copy
    verify(best)
    assert Checkpoint.load(best).step == 1
    CheckpointStore(tmp_path).save(make(5), keep=2, best=True)
    assert Checkpoint.load(best).step == 5 and len(list((tmp_path / ".best").iterdir())) == 1


def test_a_kill_between_saving_and_pointing_to_the_best_is_made_good(tmp_path: Path) -> None:
    CheckpointStore(tmp_path).save(make(1), keep=2, best=True)
    CheckpointStore(tmp_path).save(make(2), keep=2, best=False)  # it was the best, but the link wasn't moved
    CheckpointStore(tmp_path).link_best(2)
    assert Checkpoint.load(tmp_path / "best").step == 2
    CheckpointStore(tmp_path).link_best(2)
    CheckpointStore(tmp_path).link_best(None)
    assert Checkpoint.load(tmp_path / "best").step == 2


def test_keeping_more_than_there_are_removes_none(tmp_path: Path) -> None:
    for step in range(1, 6):
        CheckpointStore(tmp_path).save(make(step), keep=9, best=False)
    assert CheckpointStore(tmp_path).steps() == [1, 2, 3, 4, 5]


def test_a_failed_save_leaves_the_older_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    CheckpointStore(tmp_path).save(make(1), keep=2, best=True)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(states_module, "save_file", full)
    with pytest.raises(OSError):
        CheckpointStore(tmp_path).save(make(2), keep=2, best=True)
    assert CheckpointStore(tmp_path).newest_intact() == (1, []) and not list(tmp_path.glob(".writing-*"))


def test_leftovers_of_a_killed_save_are_ignored_and_removed(tmp_path: Path) -> None:
    CheckpointStore(tmp_path).save(make(1), keep=2, best=False)
    (tmp_path / ".writing-step_00000002").mkdir()
    (tmp_path / ".writing-step_00000002" / "model.safetensors").write_bytes(b"half")
    assert CheckpointStore(tmp_path).newest_intact() == (1, [])
    CheckpointStore(tmp_path).save(make(2), keep=2, best=False)
    assert not list(tmp_path.glob(".writing-*"))


@given(data=st.data())
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_flipped_byte_or_truncation_is_detected_and_the_one_before_is_used(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    root = tmp_path_factory.mktemp("c")
    CheckpointStore(root).save(make(1), keep=2, best=False)
    newest = CheckpointStore(root).save(make(2), keep=2, best=False)
    file = data.draw(st.sampled_from(sorted(newest.iterdir())))
    content = bytearray(file.read_bytes())
    at = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        content[at] ^= data.draw(st.integers(1, 255))
    else:
        del content[at:]
    file.write_bytes(content)
    step, problems = CheckpointStore(root).newest_intact()
    if file.name == "manifest.json" and step == 2:  # white space or another spelling of the same JSON
        assert json.loads(content)["files"].keys() and problems == []
    else:
        assert step == 1 and len(problems) == 1 and "step_00000002 is not intact" in problems[0]


def test_a_manifest_that_names_other_folders_reads_nothing_there(tmp_path: Path) -> None:
    folder = CheckpointStore(tmp_path).save(make(1), keep=2, best=False)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["../../etc/passwd"] = {"bytes": 1, "sha256": ""}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InvalidCheckpoint, match="missing"):
        verify(folder)


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
    weights, state = snapshot(model), optimizer_tensors(optimizer, names)
    step(model, optimizer, 9)
    again, restored, its_names = build()
    again.load_state_dict(weights)
    load_optimizer(restored, state, its_names)
    step(again, restored, 9)
    for key, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key


class OnGpu(torch.Tensor):
    """A tensor on the CPU that claims to be on a GPU."""

    is_cuda = True  # type: ignore[assignment]


class Transfers(TorchDispatchMode):
    """Plays the GPU's part: pinned memory, copies that nobody waits for; counts the blocks of pinned memory,
    the copies and the waits.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.blocks = self.copies = self.waits = self.blocking = 0
        monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: self)

    def synchronize(self) -> None:
        self.waits += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        self.blocks += bool(kwargs.pop("pin_memory", False))
        name = func.overloadpacket.__name__
        self.copies += name == "copy_"
        self.blocking += name == "_to_copy" or (
            name == "copy_" and not (args[2] if len(args) > 2 else kwargs.get("non_blocking"))
        )
        return func(*args, **kwargs)


def test_a_copy_of_a_state_on_a_gpu_takes_one_block_of_memory_for_each_dtype_and_one_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = nn.Sequential(*(layer for _ in range(20) for layer in (nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3)))).to(
        memory_format=torch.channels_last
    )
    expected = {key: value.clone(memory_format=torch.contiguous_format) for key, value in model.state_dict().items()}
    monkeypatch.setattr(model, "state_dict", lambda: {key: value.as_subclass(OnGpu) for key, value in expected.items()})
    parameter = next(model.parameters())
    optimizer = torch.optim.AdamW([parameter], fused=True)
    optimizer.state[parameter] = {
        "step": torch.tensor(3.0).as_subclass(OnGpu),
        "exp_avg": parameter.detach().as_subclass(OnGpu),
        "none": None,
        "own": 2,
    }
    with Transfers(monkeypatch) as transfers:
        copied = snapshot(model)
    # Of float32 and int64.
    assert (transfers.blocks, transfers.copies, transfers.waits, transfers.blocking) == (2, len(expected), 1, 0)
    with Transfers(monkeypatch) as transfers:
        states = optimizer_tensors(optimizer, {parameter: "weight"})
    assert (transfers.blocks, transfers.waits) == (1, 1)
    assert {key: float(value.sum()) for key, value in states.items() if value.numel() == 1} == {
        "weight/step": 3.0,
        "weight/own": 2.0,
    }
    assert torch.equal(states["weight/exp_avg"], parameter) and states["weight/exp_avg"].is_contiguous()
    assert list(copied) == list(expected)
    with torch.no_grad():
        for value in expected.values():
            value.fill_(9)  # training continues while the copy is written
    file = (
        CheckpointStore(tmp_path).save(replace(make(1), model=copied, optimizer=states), keep=2, best=False)
        / "model.safetensors"
    )
    assert all(torch.equal(value, copied[key]) for key, value in load_file(file).items()) and not torch.equal(
        copied["0.weight"], expected["0.weight"]
    )


def test_a_copy_of_a_state_on_a_cpu_is_a_copy_of_each_tensor_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(*(nn.BatchNorm2d(3) for _ in range(20)))
    with Transfers(monkeypatch) as transfers:
        copied = snapshot(model)
    assert (transfers.blocks, transfers.copies, transfers.waits, transfers.blocking) == (0, 0, 0, len(copied))
    before = copied["0.weight"].clone()
    with torch.no_grad():
        model[0].weight.add_(1)  # type: ignore[operator]
    assert torch.equal(copied["0.weight"], before)
