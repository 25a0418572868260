"""A user's set that was prepared again from other files under the same name is another set:
no run resumes with it.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.processes import Job, write_recipe
from trainer.commands import main
from trainer.runs.checkpoint import verify

RECIPE = """
task: segmentation
data: {name: folder, set: streets, batch_size: 4, workers: 0}
model: {name: unet, width: 4, depth: 2}
loss: soft_iou
optimizer: {name: adamw, lr: 1e-2}
train: {duration: 4 steps, precision: fp32, threads: 1}
evaluate: {every: 100%, pictures: 0}
"""
LONGER = "train.duration=6 steps"


def prepare(folder: Path, seed: int) -> None:
    """The set `streets` of 20 images, which another seed changes."""
    shutil.rmtree(folder / "data", ignore_errors=True)
    draw = np.random.default_rng(seed)
    for i in range(20):
        for name, pixels in (
            ("images", draw.integers(0, 256, (8, 8, 3), np.uint8)),
            ("masks", draw.integers(0, 2, (8, 8), np.uint8)),
        ):
            (folder / name).mkdir(exist_ok=True)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    (folder / "classes.txt").write_text("road\nsky\n", encoding="utf-8")
    given = {
        "name": "streets",
        "images": folder / "images",
        "masks": folder / "masks",
        "classes": folder / "classes.txt",
    }
    assert (
        main(["prepare", "folder", *(str(word) for key, value in given.items() for word in (f"--{key}", value))]) == 0
    )


def of_an_older_version(checkpoint: Path) -> None:
    """Makes a checkpoint one of the version that didn't know of the set's identity."""
    counters = json.loads((checkpoint / "trainer.json").read_text())
    del counters["data"]
    text = json.dumps(counters)
    (checkpoint / "trainer.json").write_text(text)
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["files"]["trainer.json"] = {"bytes": len(text), "sha256": hashlib.sha256(text.encode()).hexdigest()}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_run_whose_set_was_prepared_again_from_other_files_refuses_to_resume_until_it_is_as_before(
    tmp_path: Path, world_size: int
) -> None:
    recipe = write_recipe(tmp_path, RECIPE)
    prepare(tmp_path, 0)
    with Job(world_size, recipe) as job:
        assert job.wait() == [0] * world_size, job.output
    prepare(tmp_path, 1)
    with Job(world_size, recipe, LONGER) as job:
        assert job.wait() == [2] * world_size, job.output
    assert job.output.count("error: ") == 1 and "streets has changed since this run started" in job.output, job.output
    prepare(tmp_path, 0)  # the same files, at another time
    with Job(world_size, recipe, LONGER) as job:
        assert job.wait() == [0] * world_size, job.output
    assert "resumed run from step 4" in job.output


def test_a_run_of_a_version_that_did_not_record_its_set_resumes_and_records_it_from_then_on(tmp_path: Path) -> None:
    recipe, root = write_recipe(tmp_path, RECIPE), tmp_path / "runs" / "run" / "checkpoints"
    prepare(tmp_path, 0)
    with Job(1, recipe) as job:
        assert job.wait() == [0], job.output
    of_an_older_version(root / "step_00000004")
    verify(root / "step_00000004")
    with Job(1, recipe, LONGER) as job:
        assert job.wait() == [0], job.output
    assert "resumed run from step 4" in job.output
    prepare(tmp_path, 1)
    with Job(1, recipe, "train.duration=8 steps") as job:
        assert job.wait() == [2], job.output
