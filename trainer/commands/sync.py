"""`trainer sync`: run folders into W&B."""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # imported where it is used: `trainer --help` must not wait for torch
    from trainer.reporting.trackers.wandb import WandbRun
    from trainer.runs.folder import RunFolder

HELP = "send runs to W&B: those that were offline or interrupted, each as one run"
UPLOAD_TIMEOUT_S = 300  # for what a server is slow to take


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of this verb."""
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run folder, or its name below $TRAINER_RUNS")
    parser.add_argument("--project", help="W&B project (default: the recipe's)")
    parser.add_argument("--entity", help="user or team (default: the recipe's)")


def run(options: argparse.Namespace) -> None:
    """Sends every run; one that W&B has already gets nothing twice.

    Raises:
        UserError: no such run, it is in use, there is no API key, or the server doesn't take it.
    """
    from trainer.errors import UserError
    from trainer.reporting.trackers.wandb import OFFLINE, has_key
    from trainer.runs.folder import RunFolder, find_run

    mode = os.environ.get("WANDB_MODE")
    if mode == "disabled":
        raise UserError("WANDB_MODE=disabled: nothing is sent; unset it")
    if mode not in OFFLINE and not has_key():
        raise UserError("no API key for W&B was found: `wandb login` asks for one and keeps it, or set WANDB_API_KEY")
    for folder in [RunFolder(find_run(given)) for given in options.runs]:
        print(f"{folder.path}: {_sync(folder, options.project, options.entity, mode not in OFFLINE)}", flush=True)


def _sync(folder: RunFolder, project: str | None, entity: str | None, online: bool) -> str:
    """Sends a run that nobody is training; returns what there is to say of it."""
    from trainer.errors import UserError
    from trainer.reporting.trackers.wandb import DEFAULT_PROJECT, WandbRun
    from trainer.runs.lock import lock_run

    recipe = folder.read_recipe()
    track: dict[str, Any] = next((entry for entry in recipe["track"] if entry["name"] == "wandb"), {})
    try:
        lock = lock_run(folder.path)
    except UserError:
        raise UserError(f"{folder.path} is being trained; sync it when that has ended") from None
    try:
        mirror = WandbRun(
            folder.path,
            recipe["name"],
            recipe,
            project or track.get("project", DEFAULT_PROJECT),
            entity or track.get("entity"),
            track.get("tags", []),
        )
        return _send(folder, mirror, online)
    finally:
        lock.release()


def _send(folder: RunFolder, mirror: WandbRun, online: bool) -> str:
    import wandb

    from trainer.errors import UserError
    from trainer.reporting.trackers.tracker import one_line

    lines, summary = folder.read_metrics(), folder.read_summary()
    # Load and kind of this machine say nothing about the one that trained.
    settings = {"x_disable_stats": True, "x_disable_meta": True}
    with tempfile.TemporaryDirectory() as scratch:
        files = Path(scratch) if online else folder.path
        try:
            mirror.open(online, files, UPLOAD_TIMEOUT_S, **settings)
            before = mirror.num_rows
            mirror.replay(lines)
            mirror.close(summary)
            if online and before < len(lines):  # wandb says nothing of rows that a server refuses, so have a look
                mirror.open(online, files, UPLOAD_TIMEOUT_S, **settings)
                mirror.close(summary)
                if mirror.num_rows < len(lines):
                    raise UserError(
                        f"{folder.path}: W&B has {mirror.num_rows} of {len(lines)} lines so far; the same command "
                        "sends the others"
                    )
        except (wandb.Error, TimeoutError) as error:
            raise UserError(
                f"{folder.path} could not be sent to W&B: {one_line(error)}; the same command tries again and sends "
                "nothing twice"
            ) from error
        finally:
            wandb.teardown()
    if not online:
        return f"{len(lines)} lines written offline; `wandb sync` sends what is in {folder.path / 'wandb'}"
    if before >= len(lines):
        return f"all {len(lines)} lines were there already, nothing was added"
    return f"sent {len(lines) - before} lines" + (f", {before} were there already" if before else "")
