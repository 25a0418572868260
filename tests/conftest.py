from __future__ import annotations

import os
from pathlib import Path

import pytest

# Forked tests would ask for CUDA, and several ranks for one card: only tests that need a GPU see one, where they run alone.
# Here, since this file is read before any that imports torch.
_VISIBLE = os.environ.get("CUDA_VISIBLE_DEVICES")
os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.hookimpl(trylast=True)  # after -m and -k have chosen
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if items and all(item.get_closest_marker("gpu") for item in items):
        del os.environ["CUDA_VISIBLE_DEVICES"]
        if _VISIBLE is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = _VISIBLE


@pytest.fixture(autouse=True)
def _own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test has its own data and runs, and never talks to W&B."""
    monkeypatch.setenv("TRAINER_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("TRAINER_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
