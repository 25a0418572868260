"""Weights & Biases."""

from __future__ import annotations

import json
import netrc
import os
import sys
import threading
import uuid
from collections.abc import Callable, Sequence
from hashlib import sha256
from pathlib import Path
from queue import SimpleQueue
from shutil import copyfile
from typing import Any, Literal
from urllib.parse import urlsplit

from trainer.components import tracker
from trainer.reporting.trackers.tracker import one_line, scalars
from trainer.runs.durable import atomic_write
from trainer.runs.folder import Line, RunFolder

INIT_TIMEOUT_S = 10  # for a server that doesn't respond, after which the run is kept offline

UPLOAD_TIMEOUT_S = 7  # for what is still unsent at the end; it stays on disk

FINISH_TIMEOUT_S = 30  # the two above, and the start of an offline run in between

STOP_TIMEOUT_S = 8  # a launcher kills 30 s after the signal that stops a run

DEFAULT_PROJECT = "trainer"

OFFLINE = ("offline", "dryrun")  # values of WANDB_MODE


class WandbRun:
    """The W&B run that mirrors a run folder, for training and for `trainer sync`.

    Line n of `metrics.jsonl` is row n there, with `step` as the x-axis. Rows can only be appended, and those that the
    server has are not sent again, so a line that is logged twice, after resuming or by another `trainer sync`, changes
    nothing.

    Args:
        folder: the run folder; it holds the run's id, in `tracking.json`.
        run_name: the run's display name.
        config: the resolved recipe.
        project: W&B project.
        entity: user or team; None is the default of the API key.
        tags: labels to filter runs by.

    Attributes:
        num_rows: how many rows the server had when the run was opened; 0 offline.
    """

    def __init__(
        self, folder: Path, run_name: str, config: dict[str, Any], project: str, entity: str | None, tags: Sequence[str]
    ) -> None:
        # wandb's own error reports would delay the end by 20 s where a server accepts them and never responds.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        self._folder = RunFolder(folder)
        self._about: dict[str, Any] = {
            "id": _run_id(folder),
            "name": run_name,
            "config": config,
            "project": project,
            "entity": entity,
            "tags": list(tags),
        }
        self.num_rows = 0

    def open(self, online: bool, files: Path, finish_timeout: float, **settings: Any) -> None:
        """Creates the run, or resumes it.

        Args:
            online: whether to use a server; offline everything is kept in `files`.
            files: where W&B creates its `wandb/`.
            finish_timeout: seconds that the upload may take in `close`.
            settings: further ones of `wandb.Settings`.

        Raises:
            wandb.Error: the server can't be reached or refuses.
        """
        import wandb

        wandb.setup(wandb.Settings(silent=True))
        self._run = wandb.init(
            mode="online" if online else "offline",
            dir=str(files),
            resume="allow",
            reinit="create_new",  # leaves alone a run that the calling program may have open
            # Neither console output nor code nor the git remote (its address may hold a token) leaves the machine.
            settings=wandb.Settings(
                console="off",
                save_code=False,
                disable_code=True,
                disable_git=True,
                x_save_requirements=False,
                init_timeout=INIT_TIMEOUT_S,
                finish_timeout=finish_timeout,
                finish_timeout_raises=True,
                **settings,
            ),
            **self._about,
        )
        self._run.define_metric("*", step_metric="step")
        self.num_rows = self._run.starting_step

    def log(self, line: Line, row: int) -> None:
        """Sends a line of `metrics.jsonl` as row number `row`, unless the server has that row."""
        if row >= self.num_rows:
            self._run.log({**scalars(line), "step": line["step"]}, step=row)

    def pictures(self, files: Sequence[Path], row: int) -> None:
        """Sends images with the row that was logged last. For a row that the server has, only the files are sent,
        which may be missing there.
        """
        import wandb

        if row >= self.num_rows:
            self._run.log({"pictures": [wandb.Image(str(file), caption=file.stem) for file in files]}, step=row)
            return
        for file in files:
            # The name that W&B gives it.
            copy = Path(
                self._run.dir, "media", "images", f"pictures_{row}_{sha256(file.read_bytes()).hexdigest()[:20]}.png"
            )
            copy.parent.mkdir(parents=True, exist_ok=True)
            copyfile(file, copy)
            self._run.save(str(copy), base_path=self._run.dir, policy="now")

    def replay(self, lines: Sequence[Line]) -> None:
        """Sends all lines of `metrics.jsonl`, with their pictures."""
        for row, line in enumerate(lines):
            self.log(line, row)
            if line["split"] == "validation" and (files := self._folder.pictures_of(line["step"])):
                self.pictures(files, row)

    def close(self, summary: dict[str, Any]) -> None:
        """Sends `summary.json` and the curves, and waits for the upload.

        Raises:
            TimeoutError: the server didn't accept everything in time.
        """
        import wandb

        status = summary.get("status", "running")
        self._run.summary.update(
            {key: value for key, value in summary.items() if key not in ("best", "final", "error")}
        )
        for name, best in summary.get("best", {}).items():
            self._run.summary.update({f"best/{name}": best["value"], f"best/{name}_step": best["step"]})
        if (curves := self._folder.pictures / "curves.png").exists():
            self._run.summary["curves"] = wandb.Image(str(curves))
        self._run.finish(exit_code=0 if status in ("finished", "stopped") else 1)


@tracker()
class Wandb:
    """Weights & Biases: one run, however often training is interrupted.

    All communication is in a thread, so training never waits for a server. W&B's own files are in `wandb/` in the run
    folder.

    Args:
        folder: the run folder.
        run_name: the run's display name.
        config: the resolved recipe.
        mode: `auto` is online where an API key is found, else offline; so is `online`, since nothing ever prompts for a
            key. WANDB_MODE takes precedence.
        project: W&B project.
        entity: user or team; None is the default of the API key.
        tags: labels to filter runs by.
    """

    def __init__(
        self,
        folder: Path,
        run_name: str,
        config: dict[str, Any],
        /,
        *,
        mode: Literal["auto", "online", "offline", "disabled"] = "auto",
        project: str = DEFAULT_PROJECT,
        entity: str | None = None,
        tags: Sequence[str] = (),
    ) -> None:
        requested_mode = os.environ.get("WANDB_MODE") or mode
        self._thread: threading.Thread | None = None
        self._queue: SimpleQueue[Callable[[WandbRun], None] | None] = SimpleQueue()
        self._error: Exception | None = None
        self._timed_out = False
        self._lines_before = RunFolder(folder).read_metrics()
        self._row = len(self._lines_before) - 1  # of the last line
        if requested_mode == "disabled":
            return
        # Imported here and not by the thread, where it would slow down the first steps, and where a loader worker that
        # is forked in the middle of an import would wait for its lock forever. Every `wandb.init` imports the second.
        import wandb
        import wandb.sdk.launch  # noqa: F401

        offline = requested_mode in OFFLINE
        self._online = not offline and has_key()
        self._folder = folder
        self._how_to_send = f"to send it later: trainer sync {folder}"
        if not self._online and not offline:
            print(f"wandb: no API key found, this run is kept offline; {self._how_to_send}", flush=True)
        self._run = WandbRun(folder, run_name, config, project, entity, tags)
        self._thread = threading.Thread(target=self._work, name="wandb", daemon=True)
        self._thread.start()

    def log(self, line: Line) -> None:
        """Queues the numbers; raises the error of earlier ones."""
        self._row += 1
        row = self._row
        self._put(lambda run: run.log(line, row))

    def pictures(self, files: Sequence[Path], step: int) -> None:
        """Queues image files, which must still exist when they are sent."""
        row = self._row
        self._put(lambda run: run.pictures(files, row))

    def finish(self, summary: dict[str, Any]) -> None:
        """Sends what is queued and the summary; waits for a bounded time, since the run folder has everything."""
        if self._thread is None:
            return
        self._put(lambda run: run.close(summary))
        self._queue.put(None)
        self._thread.join(FINISH_TIMEOUT_S if summary["status"] == "finished" else STOP_TIMEOUT_S)
        if self._thread.is_alive():
            self._timed_out = True
        if self._timed_out or isinstance(self._error, TimeoutError):
            raise TimeoutError(f"the server didn't accept everything in time; {self._how_to_send}")
        if self._error:
            raise self._error

    def _put(self, action: Callable[[WandbRun], None]) -> None:
        if self._error:
            raise self._error
        if self._thread:
            self._queue.put(action)

    def _work(self) -> None:
        try:
            self._open()
            while action := self._queue.get():
                action(self._run)
        except Exception as error:
            self._error = error

    def _open(self) -> None:
        import wandb

        if self._online:
            try:
                self._run.open(True, self._folder, UPLOAD_TIMEOUT_S)
            except Exception as error:
                if self._timed_out:
                    raise
                print(f"wandb: {one_line(error)}; kept offline, {self._how_to_send}", file=sys.stderr, flush=True)
            else:
                # What an interrupted run had logged and not yet sent; now, since rows can only be appended.
                self._run.replay(self._lines_before)
                return
            wandb.teardown()  # the service of the failed attempt holds the id
        self._run.open(False, self._folder, UPLOAD_TIMEOUT_S)


def _run_id(folder: Path) -> str:
    """The id of this run in W&B: created once, then kept in the run folder."""
    file = folder / "tracking.json"
    if not file.exists():
        atomic_write(file, json.dumps({"wandb": {"id": uuid.uuid4().hex[:12]}}) + "\n")
    return str(json.loads(file.read_text(encoding="utf-8"))["wandb"]["id"])


def has_key() -> bool:
    """Whether W&B finds an API key without a prompt: in WANDB_API_KEY, or for its server's host in a netrc file."""
    server = os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai"
    if os.environ.get("WANDB_API_KEY"):
        return True
    candidates = (
        [Path(os.environ["NETRC"])] if os.environ.get("NETRC") else [Path.home() / ".netrc", Path.home() / "_netrc"]
    )
    for file in candidates:
        try:
            entry = netrc.netrc(file.expanduser()).authenticators(urlsplit(server).netloc)
        except FileNotFoundError:
            continue
        except (OSError, netrc.NetrcParseError):
            return False
        return bool(entry and entry[2])
    return False
