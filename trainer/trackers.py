"""Trackers of a recipe: `track: [wandb, tensorboard]`. They mirror the run folder and never stop training.

The Trainer talks to `Mirrors`, which builds the recipe's trackers and switches off one that fails.
Only rank 0 has any. They are built after a resume has taken `metrics.jsonl` back to its checkpoint.
"""

from __future__ import annotations

import json
import math
import netrc
import os
import sys
import threading
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Literal, Protocol
from urllib.parse import urlsplit

import numpy as np
from PIL import Image

from trainer.components import tracker
from trainer.recipe import Choice, build
from trainer.tracking import RunFolder, atomic_write

INIT_TIMEOUT_S = 10  # for a server that doesn't answer, after which the run is kept offline
UPLOAD_TIMEOUT_S = 7  # for what is left to send at the end; what isn't sent stays on disk
FINISH_TIMEOUT_S = 30  # both of these, and the start of an offline run between them
STOP_TIMEOUT_S = 8  # a launcher kills 30 s after the signal that stops a run


class Tracker(Protocol):
    """Somewhere to look at a run."""

    def log(self, metrics: dict[str, Any], step: int, split: str) -> None:
        """Shows the finite numbers of `metrics` as `split/name`."""

    def pictures(self, files: Sequence[Path], step: int) -> None:
        """Shows image files."""

    def finish(self, summary: dict[str, Any]) -> None:
        """Hands over `summary.json` and closes."""


class Mirrors:
    """All trackers of a run behind a guard: one that fails prints a line to stderr and is off from then on.

    Args:
        choices: the recipe's trackers; none on ranks other than 0.
        folder: the run folder.
        run_name: the run's name.
        config: the resolved recipe.
    """

    def __init__(self, choices: Sequence[Choice], folder: Path, run_name: str, config: dict[str, Any]) -> None:
        self._trackers: dict[str, Tracker] = {}
        for component, settings in choices:
            try:
                self._trackers[component.name] = build(component, settings, folder=folder, run_name=run_name, config=config)
            except Exception as error:
                _report(component.name, error)

    def log(self, metrics: dict[str, Any], step: int, split: str) -> None:
        """Shows numbers of one split (`train`, `validation`) at a step."""
        self._each(lambda tracker: tracker.log(metrics, step, split))

    def pictures(self, files: Sequence[Path], step: int) -> None:
        """Shows image files at a step."""
        self._each(lambda tracker: tracker.pictures(files, step))

    def finish(self, summary: dict[str, Any]) -> None:
        """Closes all trackers, within a bounded time."""
        self._each(lambda tracker: tracker.finish(summary))

    def _each(self, call: Callable[[Tracker], None]) -> None:
        for name, each in list(self._trackers.items()):
            try:
                call(each)
            except Exception as error:
                del self._trackers[name]
                _report(name, error)


def _report(name: str, error: Exception) -> None:
    print(f"{name}: switched off, training goes on: {_one_line(error)}", file=sys.stderr, flush=True)


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def _scalars(metrics: dict[str, Any], split: str) -> dict[str, float]:
    return {f"{split}/{name}": value for name, value in metrics.items() if name != "step" and isinstance(value, int | float) and math.isfinite(value)}


# ---------------------------------------------------------------- Weights & Biases


@tracker()
class Wandb:
    """Weights & Biases, one run however often training is interrupted.

    A thread does all the talking, so that training never waits for a server. Its id is kept in the run
    folder (`tracking.json`), its files in `wandb/` there.

    Args:
        folder: the run folder.
        run_name: the run's display name.
        config: the resolved recipe.
        mode: `auto` is online where an API key is found, else offline; so is `online`, since nobody is ever asked for a key. WANDB_MODE wins.
        project: W&B project.
        entity: user or team; None is the key's default.
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
        project: str = "trainer",
        entity: str | None = None,
        tags: Sequence[str] = (),
    ) -> None:
        mode_wanted = os.environ.get("WANDB_MODE") or mode
        self._thread: threading.Thread | None = None
        self._queue: SimpleQueue[Callable[[Any], None] | None] = SimpleQueue()
        self._error: Exception | None = None
        self._given_up = False
        if mode_wanted == "disabled":
            return
        # wandb's reports about itself would hold up the end by 20 s where a server accepts them and never answers.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        # Imported here and not by the thread: a loader worker forked in the middle of an import would wait for its lock for ever.
        import wandb

        self._online = mode_wanted not in ("offline", "dryrun") and _has_key(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai")
        self._how_to_send = f"kept offline; to send it later: wandb sync {folder / 'wandb' / 'offline-run-*'}"
        if not self._online and mode_wanted not in ("offline", "dryrun"):
            print(f"wandb: no API key found, so this run is {self._how_to_send}", flush=True)
        self._arguments: dict[str, Any] = {
            "dir": str(folder),
            "id": _run_id(folder),
            "resume": "allow",
            "reinit": "create_new",  # leave a run that the calling program may have open alone
            "name": run_name,
            "project": project,
            "entity": entity,
            "tags": list(tags),
            "config": config,
            # Neither console output nor code nor the git remote (its address may hold a token) leaves the machine.
            "settings": wandb.Settings(
                console="off",
                save_code=False,
                disable_code=True,
                disable_git=True,
                x_save_requirements=False,
                init_timeout=INIT_TIMEOUT_S,
                finish_timeout=UPLOAD_TIMEOUT_S,
                finish_timeout_raises=True,
            ),
        }
        self._thread = threading.Thread(target=self._work, name="wandb", daemon=True)
        self._thread.start()

    def log(self, metrics: dict[str, Any], step: int, split: str) -> None:
        """Queues the numbers; raises what went wrong with earlier ones."""
        row = {**_scalars(metrics, split), "step": step}
        self._put(lambda run: run.log(row, step=step))

    def pictures(self, files: Sequence[Path], step: int) -> None:
        """Queues image files, which must still be there when their turn comes."""

        def show(run: Any) -> None:
            import wandb

            run.log({"pictures": [wandb.Image(str(file), caption=file.stem) for file in files], "step": step}, step=step)

        self._put(show)

    def finish(self, summary: dict[str, Any]) -> None:
        """Sends what is queued and the summary; gives up after a bounded time, since the run folder has it all."""
        if self._thread is None:
            return

        def close(run: Any) -> None:
            run.summary.update({key: value for key, value in summary.items() if key not in ("best", "final")})
            for name, best in summary.get("best", {}).items():
                run.summary.update({f"best/{name}": best["value"], f"best/{name}_step": best["step"]})
            run.finish(exit_code=1 if summary["status"] == "failed" else 0)

        self._put(close)
        self._queue.put(None)
        self._thread.join(FINISH_TIMEOUT_S if summary["status"] == "finished" else STOP_TIMEOUT_S)
        if self._thread.is_alive():
            self._given_up = True
            raise TimeoutError("the server doesn't answer; metrics.jsonl has everything")
        if self._error:
            raise self._error

    def _put(self, action: Callable[[Any], None]) -> None:
        if self._error:
            raise self._error
        if self._thread:
            self._queue.put(action)

    def _work(self) -> None:
        try:
            run = self._start()
            run.define_metric("*", step_metric="step")
            while action := self._queue.get():
                action(run)
        except Exception as error:
            self._error = error

    def _start(self) -> Any:
        import wandb

        quiet = wandb.Settings(silent=True)
        wandb.setup(quiet)
        if self._online:
            try:
                return wandb.init(mode="online", **self._arguments)
            except Exception as error:
                if self._given_up:
                    raise
                print(f"wandb: {_one_line(error)}; {self._how_to_send}", file=sys.stderr, flush=True)
            # The failed attempt's service holds the id.
            wandb.teardown()
            wandb.setup(quiet)
        return wandb.init(mode="offline", **self._arguments)


def _run_id(folder: Path) -> str:
    """The id under which W&B knows this run: made once, then kept in the run folder."""
    file = folder / "tracking.json"
    if not file.exists():
        atomic_write(file, json.dumps({"wandb": {"id": uuid.uuid4().hex[:12]}}) + "\n")
    return json.loads(file.read_text(encoding="utf-8"))["wandb"]["id"]


def _has_key(server: str) -> bool:
    """Whether W&B would find an API key without asking: in WANDB_API_KEY, or for this server's host in a netrc file."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    candidates = [Path(os.environ["NETRC"])] if os.environ.get("NETRC") else [Path.home() / ".netrc", Path.home() / "_netrc"]
    for file in candidates:
        try:
            entry = netrc.netrc(file.expanduser()).authenticators(urlsplit(server).netloc)
        except FileNotFoundError:
            continue
        except (OSError, netrc.NetrcParseError):
            return False
        return bool(entry and entry[2])
    return False


# ---------------------------------------------------------------- TensorBoard


@tracker()
class TensorBoard:
    """TensorBoard events under `tensorboard/` in the run folder: `tensorboard --logdir runs`.

    Args:
        folder: the run folder.
        run_name: not used, TensorBoard names a run after its folder.
        config: the resolved recipe, shown as text.
    """

    def __init__(self, folder: Path, run_name: str, config: dict[str, Any], /) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # After a resume what was shown beyond the checkpoint is hidden: it comes again.
        lines = RunFolder(folder).read_metrics()
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=lines[-1]["step"] + 1 if lines else 0, flush_secs=10)
        self._writer.add_text("recipe", _as_code(config))

    def log(self, metrics: dict[str, Any], step: int, split: str) -> None:
        """Writes the numbers."""
        for name, value in _scalars(metrics, split).items():
            self._writer.add_scalar(name, value, step)

    def pictures(self, files: Sequence[Path], step: int) -> None:
        """Writes the images; the n-th of every step stands behind one slider."""
        for index, file in enumerate(files):
            with Image.open(file) as image:
                self._writer.add_image(f"pictures/{index}", np.asarray(image.convert("RGB")), step, dataformats="HWC")

    def finish(self, summary: dict[str, Any]) -> None:
        """Writes the summary as text and closes the file."""
        self._writer.add_text("summary", _as_code(summary))
        self._writer.close()


def _as_code(tree: dict[str, Any]) -> str:
    return "\n".join(f"    {line}" for line in json.dumps(tree, indent=2).splitlines())
