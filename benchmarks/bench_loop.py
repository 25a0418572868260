"""The framework against `plain_loop.py`, alternating in one run: ratios of time to first step and samples per second.

    make bench

Ratios above 1 favour the framework. Times on a busy machine mean little; ratios of medians over turns do.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PLAIN = [sys.executable, "benchmarks/plain_loop.py", "shapes"]
RUN = [
    sys.executable,
    "trainer/run.py",
    "recipes/quickstart.yaml",
    "--resume",
    "never",
    "track=[]",
    "schedule=cosine",
    "evaluate.pictures=0",
]
RUN += ["data.batch_size=16", "data.augment=[horizontal_flip]", "model.depth=4"]  # what the plain loop does
SAME = ["train.precision=fp32", "train.channels_last=false"]


def run(command: list[str], environment: dict[str, str]) -> tuple[float, float]:
    """Seconds from the start of the process to its first printed step, and the last printed samples per second."""
    started = time.monotonic()
    first = rate = 0.0
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            words = line.split()
            if words[:1] == ["step"] and words[-1] == "samples/s":
                first = first or time.monotonic() - started
                rate = float(words[-2])
    if process.returncode or not first:
        raise SystemExit(f"{' '.join(command)} failed")
    return first, rate


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--steps", type=int, default=100)
    options = parser.parse_args()
    half = options.steps // 2
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "TRAINER_RUNS": folder}
        # The plain loop prints after its first step and at its end; for the framework these are two runs.
        one_step = [*RUN, "train.duration=1 steps", "train.log_every=1 steps"]
        all_steps = [
            *RUN,
            f"train.duration={options.steps} steps",
            f"train.log_every={half} steps",
            "evaluate.every=100%",
            "checkpoint.every=100%",
        ]
        plain = [*PLAIN, f"--steps={options.steps}"]
        sides = {
            "plain loop": (plain, plain),
            "same settings": ([*one_step, *SAME], [*all_steps, *SAME]),
            "defaults": (one_step, all_steps),
        }
        found: dict[str, list[tuple[float, float]]] = {side: [] for side in sides}
        for turn in range(options.turns + 1):
            for side, (to_first_step, to_the_end) in sides.items():
                first, rate = run(to_first_step, environment)
                if to_the_end is not to_first_step:
                    rate = run(to_the_end, environment)[1]
                if turn:  # the first turn fills page cache and pixel cache
                    found[side].append((first, rate))
    medians = {
        side: tuple(statistics.median(values) for values in zip(*turns, strict=True)) for side, turns in found.items()
    }
    plain_first, plain_rate = medians["plain loop"]
    print(f"{'':16}{'first step, s':>15}{'ratio':>8}{'samples/s':>12}{'ratio':>8}")
    for side, (first, rate) in medians.items():
        print(f"{side:16}{first:15.2f}{plain_first / first:8.2f}{rate:12.1f}{rate / plain_rate:8.2f}")


if __name__ == "__main__":
    main()
