"""25 epochs of the colourisation U-Net against `plain_loop.py`, alternating in one run: ratios of seconds, and the
accuracy of each.

    TRAINER_DATA=data python benchmarks/bench_colorization.py

Ratios above 1 favour the framework. The plain loop's seconds are from its first step to its last evaluation; the
framework's from its first step to its end, including evaluations, pictures and checkpoints.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RUN = [sys.executable, "trainer/run.py", "recipes/colorization_unet.yaml", "--resume", "never", "track=[]"]
SAME = ["train.precision=fp32", "train.channels_last=false"]


def plain(epochs: int, seed: int) -> tuple[float, float]:
    """Seconds and accuracy of the plain loop."""
    command = [sys.executable, "benchmarks/plain_loop.py", "cifar10_horses", f"--epochs={epochs}", f"--seed={seed}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    words = done.stdout.splitlines()[-1].split()
    return float(words[-2]), float(words[-3])


def framework(epochs: int, seed: int, *options: str) -> tuple[float, float]:
    """Seconds and accuracy of a run of the recipe."""
    with tempfile.TemporaryDirectory() as folder:
        command = [*RUN, f"train.duration={epochs} epochs", f"train.seed={seed}", "name=bench", *options]
        subprocess.run(command, cwd=ROOT, env={**os.environ, "TRAINER_RUNS": folder}, capture_output=True, check=True)
        summary = json.loads((Path(folder) / "bench" / "summary.json").read_text())
    return summary["seconds"], summary["final"]["accuracy"]["value"]


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=25)
    options = parser.parse_args()
    sides = {
        "plain loop": plain,
        "same settings": lambda epochs, seed: framework(epochs, seed, *SAME),
        "defaults": framework,
    }
    framework(1, 0)  # fills page cache and pixel cache
    turns = [{name: side(options.epochs, turn) for name, side in sides.items()} for turn in range(options.turns)]
    found = {name: [turn[name] for turn in turns] for name in sides}
    seconds = {name: statistics.median(each[0] for each in results) for name, results in found.items()}
    print(f"{'':16}{'seconds':>10}{'ratio':>8}  accuracy")
    for name, results in found.items():
        print(
            f"{name:16}{seconds[name]:10.1f}{seconds['plain loop'] / seconds[name]:8.2f}  "
            f"{', '.join(f'{accuracy:.4f}' for _, accuracy in results)}"
        )


if __name__ == "__main__":
    main()
