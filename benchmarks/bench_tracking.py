"""Step times with W&B off and with a W&B that doesn't work: the ratios should be 1.

    make bench

A tiny model that logs every step, so that tracking's share is as large as it can be. A step's time is from its end to
the end of the next one, with all that the loop does in between. All sides train at the same time, each in its own
process, so that other load on the machine changes their times, but hardly their ratios. A second side without W&B shows
the noise in these.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import socket
import statistics
import sys
import tempfile
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import wandb.sdk.launch  # noqa: F401 - here, not in every process

from tests.processes import train, write_recipe
from tests.wandb_server import WandbServer
from trainer.reporting.trackers import wandb as trackers
from trainer.trainer import Trainer

WARM_UP = 20  # steps
START_S = 2  # how long to wait for a server at the start; the default would be longer than the training
OVERRIDES = ("train.precision=fp32", "evaluate.every=100%", "checkpoint.every=100%", "model.width=16")


def train_side(recipe: Path, steps: int, url: str) -> None:
    """Trains with W&B at `url`, or without; writes the seconds between the ends of the steps beside the recipe."""
    torch.set_num_threads(1)  # a forked process hangs in OpenMP otherwise
    os.environ["WANDB_BASE_URL"] = url
    trackers.INIT_TIMEOUT_S = START_S
    ends: list[float] = []
    step = Trainer.train_step

    def timed(self: Trainer) -> None:
        step(self)
        ends.append(time.perf_counter())

    Trainer.train_step = timed  # type: ignore[method-assign]
    track = "[wandb]" if url else "[]"
    with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        train(recipe, (*OVERRIDES, f"train.duration={steps} steps", f"track={track}"), resume="never")
    recipe.with_suffix(".json").write_text(
        json.dumps([after - before for before, after in zip(ends[WARM_UP:], ends[WARM_UP + 1 :], strict=False)])
    )


def train_sides(folder: Path, sides: dict[str, str], steps: int) -> dict[str, list[float]]:
    """The seconds of the steps of each side, all trained at the same time."""
    recipes = {side: write_recipe(folder, name=side.replace(" ", "-")) for side in sides}
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=train_side, args=(recipes[side], steps, url)) for side, url in sides.items()]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return {side: json.loads(recipe.with_suffix(".json").read_text()) for side, recipe in recipes.items()}


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--steps", type=int, default=300)
    options = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as scratch,
        WandbServer(500) as failing,
        WandbServer(None) as silent,
        socket.socket() as closed,
    ):
        closed.bind(("127.0.0.1", 0))  # bound, so that nobody else listens there, but not listening
        sides = {
            "off": "",
            "off, once more": "",
            "closed port": f"http://127.0.0.1:{closed.getsockname()[1]}",
            "responds 500": failing.url,
            "never responds": silent.url,
        }
        os.environ |= {"TRAINER_DATA": f"{scratch}/data", "TRAINER_RUNS": f"{scratch}/runs", "HOME": scratch}
        os.environ |= {"WANDB_MODE": "online", "WANDB_API_KEY": "0" * 40}
        train_sides(Path(scratch), {"off": ""}, 2 * WARM_UP)  # prepares the data
        turns = [train_sides(Path(scratch), sides, options.steps) for _ in range(options.turns)]
    found = {side: [seconds for turn in turns for seconds in turn[side]] for side in sides}
    print(f"{'W&B':16}{'median, ms':>12}{'ratio':>8}{'mean, ms':>12}{'ratio':>8}")
    for side, seconds in found.items():
        columns = ((of(seconds), of(seconds) / of(found["off"])) for of in (statistics.median, statistics.mean))
        print(f"{side:16}" + "".join(f"{value * 1e3:12.1f}{ratio:8.2f}" for value, ratio in columns))


if __name__ == "__main__":
    main()
