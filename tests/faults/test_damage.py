"""A damaged checkpoint is never used: the one before it is, and the message reports what was wrong."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

from tests.faults.conftest import LONG, OPTIONS, Tally
from tests.processes import Job, lines, weights, write_recipe
from trainer.recipe.load import load_recipe
from trainer.recipe.recipe import Recipe
from trainer.runs.folder import RunFolder
from trainer.runs.resume import open_run


def damage(file: Path, draw: random.Random) -> str:
    """Flips some bits of one byte, or cuts the file off; returns which."""
    content = bytearray(file.read_bytes())
    at = draw.randrange(len(content))
    if draw.random() < 0.3:
        file.write_bytes(content[:at])
        return "truncation"
    content[at] ^= draw.randint(1, 255)
    file.write_bytes(content)
    return "flipped byte"


def resume(folder: RunFolder, recipe: Recipe) -> tuple[str, list[str]]:
    """Name of the checkpoint that the run resumes from, and what is printed."""
    printed: list[str] = []
    found = open_run(folder, recipe, "auto", printed.append)
    return found.name if found else "", printed


def test_every_flipped_byte_and_truncation_is_noticed_and_the_checkpoint_before_used(
    tmp_path: Path, tally: Tally
) -> None:
    file = write_recipe(tmp_path)
    with Job(1, file, *OPTIONS) as job:
        assert job.wait() == [0], job.output
    intact, recipe, draw = tmp_path / "runs" / "run", load_recipe(file, OPTIONS), random.Random(0)
    for number in range(100 if LONG else 20):
        copy = shutil.copytree(intact, tmp_path / "runs" / f"copy{number}", symlinks=True)
        newest = copy / "checkpoints" / "step_00000020"
        victim = draw.choice(sorted(newest.iterdir()))
        kind = damage(victim, draw)
        before = json.loads((intact / "checkpoints" / newest.name / "manifest.json").read_bytes())
        found, printed = resume(RunFolder(copy), recipe)
        tally(f"damaged checkpoints: {kind} of {victim.name}")
        if found == newest.name:
            assert victim.name == "manifest.json" and json.loads(victim.read_bytes()) == before, (
                f"{kind} of {victim.name} was not noticed"
            )
            tally("damaged checkpoints: white space of the manifest, which changes nothing")
            continue
        assert found == "step_00000015" and len(printed) == 1, printed
        assert printed[0].startswith(f"{newest.name} is not intact: "), printed
        # A damaged manifest may be wrong about another file.
        assert victim.name in printed[0] or (
            victim.name == "manifest.json" and any(name in printed[0] for name in before["files"])
        ), printed
        tally("damaged checkpoints noticed, the one before used, and reported")
        if number % 10 == 3:
            with Job(1, file, f"name={copy.name}", *OPTIONS) as job:
                assert job.wait() == [0], job.output
            assert "resumed" in job.output and weights(copy) == weights(intact) and lines(copy) == lines(intact)
            tally("runs that resumed from the one before, weights and metrics equal to the bit")
        shutil.rmtree(copy)


def test_a_checkpoint_without_one_of_its_files_is_not_used(tmp_path: Path) -> None:
    file = write_recipe(tmp_path)
    with Job(1, file, *OPTIONS) as job:
        assert job.wait() == [0], job.output
    for name in ("model.safetensors", "optimizer.safetensors", "ema.safetensors", "trainer.json", "manifest.json"):
        copy = RunFolder(shutil.copytree(tmp_path / "runs" / "run", tmp_path / "runs" / name, symlinks=True))
        (copy.checkpoints.folder(20) / name).unlink()
        found, printed = resume(copy, load_recipe(file, OPTIONS))
        assert (
            found == "step_00000015" and printed[0].startswith("step_00000020 is not intact: ") and name in printed[0]
        )
