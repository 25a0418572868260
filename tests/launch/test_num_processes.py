"""How many processes a machine gets: one for each GPU that is visible, rounded down to a power of two,
which divides usual batch sizes.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Eight GPUs, and a PyTorch that counts those that are visible.
NVIDIA_SMI = "#!/bin/sh\nseq 8 | sed 's/^/GPU /'\n"
TORCH = """
import os
class cuda:
    def device_count():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        return 8 if visible is None else len([each for each in visible.split(",") if each])
"""
VISIBLE = [(None, 8), ("0,1", 2), ("0,1,2", 2), ("5", 1), ("", 1), ("0,1,2,3,4,5,6", 4)]


def machine(folder: Path, monkeypatch: pytest.MonkeyPatch, gpus: bool = True, visible: str | None = None) -> None:
    """The programs that the scripts call, in front of the real ones."""
    programs, modules = folder / "programs", folder / "modules"
    programs.mkdir()
    modules.mkdir()
    (modules / "torch.py").write_text(TORCH, encoding="utf-8")
    files = {
        "python": f'#!/bin/sh\nPYTHONPATH={modules} exec {sys.executable} "$@"\n',
        "trainer": "#!/bin/sh\n[ -e launched.txt ] || exit 75\n",
    }
    files |= {"accelerate": '#!/bin/sh\necho "$@" >launched.txt\nexit 1\n'} | (
        {"nvidia-smi": NVIDIA_SMI} if gpus else {}
    )
    for name, text in files.items():
        (programs / name).write_text(text, encoding="utf-8")
        (programs / name).chmod(0o755)
    if gpus:
        path = f"{programs}:{os.environ['PATH']}"
    else:  # nothing but what the scripts need: this machine may have GPUs
        for name in ("sh", "bash", "env", "dirname", "mktemp", "rm", "cat", "python3"):
            os.symlink(shutil.which(name) or name, programs / name)
        path = str(programs)
    monkeypatch.setenv("PATH", path)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)


def count() -> int:
    return int(
        subprocess.run([ROOT / "launch" / "num_processes.sh"], capture_output=True, text=True, check=True).stdout
    )


@pytest.mark.parametrize(("visible", "expected"), VISIBLE)
def test_visible_gpus_are_counted_and_rounded_down_to_a_power_of_two(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, visible: str | None, expected: int
) -> None:
    machine(tmp_path, monkeypatch, visible=visible)
    assert count() == expected


def test_a_machine_without_gpus_gets_one_process_and_imports_no_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(tmp_path, monkeypatch, gpus=False)
    (tmp_path / "modules" / "torch.py").write_text("raise SystemExit(9)", encoding="utf-8")
    assert count() == 1


def test_local_sh_and_make_start_as_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(tmp_path, monkeypatch, visible="1,2,3")
    home = tmp_path / "home"
    shutil.copytree(ROOT / "launch", home / "launch")
    (home / ".venv").mkdir()
    (home / ".venv" / "bin").symlink_to(tmp_path / "programs")
    (home / ".venv" / ".installed").touch()
    monkeypatch.chdir(home)
    subprocess.run(["launch/local.sh", "r.yaml"], capture_output=True, timeout=60)
    assert "--num_processes 2 " in (home / "launched.txt").read_text()
    shutil.copy(ROOT / "Makefile", home)
    printed = subprocess.run(
        ["make", "--dry-run", "--assume-old=setup", "train"], capture_output=True, text=True, timeout=60
    )
    assert "--num_processes 2 " in printed.stdout, printed
