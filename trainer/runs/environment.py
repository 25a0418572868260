"""The environment of a run: versions, commit, devices, processes."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

PACKAGES = (
    "torch",
    "torchvision",
    "accelerate",
    "datasets",
    "numpy",
    "pyarrow",
    "pydantic",
    "safetensors",
    "wandb",
    "tensorboard",
)


def environment() -> dict[str, Any]:
    """Versions, commit, devices and processes. No environment variables: they hold secrets."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: installed for name in PACKAGES if (installed := version(name))},
        "cuda": torch.version.cuda if torch.cuda.is_available() else None,
        "git": _git(Path(__file__).resolve().parents[2]),
        "host": platform.node(),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "world_size": torch.distributed.get_world_size() if distributed else 1,
        "threads": torch.get_num_threads(),
    }


def version(package: str) -> str | None:
    """The version of an installed package; None if it isn't installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def _git(root: Path) -> dict[str, Any] | None:
    """Commit of the checkout at `root`, and whether tracked files differ from it; None outside a checkout."""
    if not (root / ".git").exists():  # installed: a repository further up would be another project's
        return None

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(root), *arguments], check=True, capture_output=True, text=True, timeout=10
        ).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.SubprocessError):
        return None
