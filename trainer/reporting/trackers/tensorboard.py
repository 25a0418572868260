"""TensorBoard."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from trainer.components import tracker
from trainer.reporting.trackers.tracker import scalars
from trainer.runs.folder import Line, RunFolder


@tracker()
class TensorBoard:
    """TensorBoard events under `tensorboard/` in the run folder: `tensorboard --logdir runs`.

    Args:
        folder: the run folder.
        run_name: unused; TensorBoard names a run after its folder.
        config: the resolved recipe, shown as text.
    """

    def __init__(self, folder: Path, run_name: str, config: dict[str, Any], /) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # After resuming, what was shown beyond the checkpoint is hidden: it will be logged again.
        lines = RunFolder(folder).read_metrics()
        self._writer = SummaryWriter(
            str(folder / "tensorboard"), purge_step=lines[-1]["step"] + 1 if lines else 0, flush_secs=10
        )
        self._writer.add_text("recipe", _as_code(config))

    def log(self, line: Line) -> None:
        """Writes the numbers."""
        for name, value in scalars(line).items():
            self._writer.add_scalar(name, value, line["step"])

    def pictures(self, files: Sequence[Path], step: int) -> None:
        """Writes the images; the n-th of all steps share one slider."""
        for index, file in enumerate(files):
            with Image.open(file) as image:
                self._writer.add_image(f"pictures/{index}", np.asarray(image.convert("RGB")), step, dataformats="HWC")

    def finish(self, summary: dict[str, Any]) -> None:
        """Writes the summary as text and closes the file."""
        self._writer.add_text("summary", _as_code(summary))
        self._writer.close()


def _as_code(tree: dict[str, Any]) -> str:
    return "\n".join(f"    {line}" for line in json.dumps(tree, indent=2).splitlines())
