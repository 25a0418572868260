"""`trainer sync`: uploads run folders to W&B."""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # imported where it is used: `trainer --help` must not wait for torch
    from trainer.reporting.trackers.wandb import WandbRun
    from trainer.runs.folder import RunFolder

HELP = "upload runs to W&B that were offline or interrupted; nothing is sent twice"
UPLOAD_TIMEOUT_S = 300  # for slow servers


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of this verb."""
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders, or names of runs in $TRAINER_RUNS")
    parser.add_argument("--project", help="W&B project (default: the recipe's)")
    parser.add_argument("--entity", help="user or team (default: the recipe's)")


def run(options: argparse.Namespace) -> None:
    """Uploads every run; sends only what W&B doesn't have yet.

    Raises:
        UserError: no such run, it is being trained, there is no API key, or the server rejects it.
    """
    from trainer.errors import UserError
    from trainer.reporting.trackers.wandb import OFFLINE, has_key
    from trainer.runs.folder import RunFolder, find_run

    mode = os.environ.get("WANDB_MODE")
    if mode == "disabled":
        raise UserError("WANDB_MODE=disabled prevents uploads: unset it")
    if mode not in OFFLINE and not has_key():
        raise UserError("no W&B API key found: run `wandb login` or set WANDB_API_KEY")
    for folder in [RunFolder(find_run(given)) for given in options.runs]:
        print(f"{folder.path}: {_sync(folder, options.project, options.entity, mode not in OFFLINE)}", flush=True)


def _sync(folder: RunFolder, project: str | None, entity: str | None, online: bool) -> str:
    """Locks and uploads a run; returns the result as a message."""
    from trainer.errors import UserError
    from trainer.reporting.trackers.wandb import DEFAULT_PROJECT, WandbRun
    from trainer.runs.lock import lock_run

    recipe = folder.read_recipe()
    track: dict[str, Any] = next((entry for entry in recipe["track"] if entry["name"] == "wandb"), {})
    try:
        lock = lock_run(folder.path)
    except UserError:
        raise UserError(f"{folder.path} is being trained; sync it after training has ended") from None
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
    # These would describe this machine, not the one that trained.
    settings = {"x_disable_stats": True, "x_disable_meta": True}
    with tempfile.TemporaryDirectory() as scratch:
        files = Path(scratch) if online else folder.path
        try:
            mirror.open(online, files, UPLOAD_TIMEOUT_S, **settings)
            num_before = mirror.num_rows
            mirror.replay(lines)
            mirror.close(summary)
            if online and num_before < len(lines):  # wandb doesn't report rows that the server rejects, so count them
                mirror.open(online, files, UPLOAD_TIMEOUT_S, **settings)
                mirror.close(summary)
                if mirror.num_rows < len(lines):
                    raise UserError(
                        f"{folder.path}: W&B has {mirror.num_rows} of {len(lines)} lines so far; rerun to send the rest"
                    )
        except (wandb.Error, TimeoutError) as error:
            raise UserError(
                f"{folder.path} could not be uploaded to W&B: {one_line(error)}; rerun to retry, nothing is sent twice"
            ) from error
        finally:
            wandb.teardown()
    if not online:
        return f"{len(lines)} lines written offline to {folder.path / 'wandb'}; upload them with `wandb sync`"
    if num_before >= len(lines):
        return f"nothing to send, W&B already has all {len(lines)} lines"
    return f"sent {len(lines) - num_before} lines" + (f", W&B already had {num_before}" if num_before else "")
