"""`trainer predict`: a trained model applied to image files."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainer.inference.model import Model
    from trainer.inference.results import Result
    from trainer.inference.trained import TrainedModel

HELP = "predict on image files: masks, objects or pictures, and overlays, at the size of each image"
FORMAT = 1
MANIFEST, COCO = "predict.json", "predictions.coco.json"
FAILED = 3  # exit code
EVERY_S = 10.0  # between two lines of progress where there is no terminal
EPILOG = """\
For photos/a/b.jpg, `trainer predict RUN photos --out DIR` writes
  DIR/a/b.overlay.jpg      the prediction drawn over the image
  DIR/a/b.png              segmentation: the index of each pixel's class; colorization: the coloured picture
  DIR/a/b.json             detection and instances: class, score, box (left, top, right, bottom) and mask (COCO RLE)
  DIR/predictions.coco.json   the objects in all images, in COCO's format
  DIR/predict.json         which model made them

Interrupted, the same command continues where it was. Exit codes: 0 done; 2 a mistake in the command line;
3 images couldn't be read (they are named and skipped), or results couldn't be written; 130 interrupted.

For example
  trainer predict runs/flowers photo.jpg --out predictions
  trainer predict runs/flowers photos 'more/*.png' --out predictions --no-overlay"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of this verb."""
    parser.epilog, parser.formatter_class = EPILOG, argparse.RawDescriptionHelpFormatter
    parser.add_argument("run", metavar="RUN", help="a run folder, a run's name below $TRAINER_RUNS, or a checkpoint")
    parser.add_argument(
        "inputs", nargs="+", metavar="INPUT", help="image files, folders (and the folders in them), or quoted patterns"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new folder, or one to continue")
    parser.add_argument(
        "--checkpoint", default="best", metavar="best|last|PATH", help="which checkpoint of the run (default: best)"
    )
    parser.add_argument(
        "--threshold", type=float, metavar="SCORE", help="leave out objects of a lower score, 0 to 1 (default: 0.3)"
    )
    parser.add_argument(
        "--batch-size", type=int, default=8, metavar="N", help="images of one size that the network sees at once"
    )
    parser.add_argument("--no-overlay", dest="overlay", action="store_false", help="write no overlays: faster")


def run(options: argparse.Namespace) -> int:
    """Predicts on what isn't predicted yet.

    Raises:
        UserError: no such model, no images, or a folder that holds other files.
    """
    from trainer.errors import UserError

    if options.threshold is not None and not 0 <= options.threshold <= 1:
        raise UserError(f"--threshold {options.threshold:g}: a score is between 0 and 1")
    if options.batch_size < 1:
        raise UserError(f"--batch-size {options.batch_size}: must be at least 1")
    earlier = _check_folder(options.out)

    from trainer.inference.inputs import find_images
    from trainer.inference.trained import find_trained

    names = find_images(options.inputs, without=options.out)
    for file, name in names.items():
        if f"{name}.json" in (MANIFEST, COCO):
            raise UserError(f"{file}: {name}.json in the results has another meaning: rename the image")
    trained = find_trained(options.run, options.checkpoint)
    manifest = _manifest(trained, options)
    _check_same(earlier, manifest, options.out)

    import torch

    from trainer.inference.model import Model

    devices = [f"cuda:{index}" for index in range(torch.cuda.device_count())] or ["cpu"]
    models = [Model(trained, device) for device in devices]
    if options.threshold is not None and not _has_objects(models[0]):
        raise UserError(f"--threshold: task {models[0].recipe.task.name} has no scores: leave it out")
    return predict_all(models, names, options.out, manifest, batch_size=options.batch_size)


def predict_all(
    models: Sequence[Model], names: dict[Path, Path], out: Path, manifest: dict[str, Any], batch_size: int
) -> int:
    """Predicts on files and writes the results; returns the exit code.

    Args:
        models: replicas, on a device each.
        names: what the results of each file are called, within `out`.
        out: the folder.
        manifest: what the results depend on.
        batch_size: images that a network sees at once.

    Raises:
        UserError: the folder can't be written.
    """
    from trainer.errors import UserError
    from trainer.inference.inputs import UnreadableImage
    from trainer.inference.pipeline import Pipeline
    from trainer.reporting.progress import Progress
    from trainer.runs.durable import atomic_write

    try:
        out.mkdir(parents=True, exist_ok=True)
        atomic_write(out / MANIFEST, json.dumps(manifest, indent=1))
    except OSError as error:
        raise UserError(f"--out {out}: can't be written: {error.strerror or error}") from error
    todo = [file for file, name in names.items() if not _is_done(file, out / name)]
    skipped, unreadable = len(names) - len(todo), list[Path]()
    if skipped:
        print(f"{skipped} of {len(names)} images have results already", file=sys.stderr)

    def save(file: Path, result: Result) -> None:
        result.save(out / names[file], overlay=manifest["overlay"])

    pipeline = Pipeline(models, save, manifest["threshold"], batch_size)
    progress, start, shown = Progress(True), time.monotonic(), time.monotonic()
    progress.start(len(names), skipped)
    done = 0
    try:
        for file, problem in pipeline.run(todo):
            if isinstance(problem, UnreadableImage):
                unreadable.append(file)
                progress.say(f"skipped {file}: {problem}")
            else:
                done += 1
            progress.step(skipped + done + len(unreadable))
            if progress.has_bar or time.monotonic() - shown >= EVERY_S:
                shown = time.monotonic()
                progress.show(f"{done / (shown - start):.1f} images/s", before=f"{skipped + done} of {len(names)}  ")
        if _has_objects(models[0]):
            _write_coco(out, names, models[0].classes, without=unreadable)
    except OSError as error:
        progress.close()
        reason = f"{error.filename or out}: can't be written: {error.strerror or error}"
        print(f"error: {reason}; {done} more images are done: rerun to continue", file=sys.stderr)
        return FAILED
    finally:
        progress.close()
    seconds = time.monotonic() - start
    counts = [f"{done} images"] + [f"{skipped} done before"] * bool(skipped)
    counts += [f"{len(unreadable)} unreadable"] * bool(unreadable)
    print(f"{out}: {', '.join(counts)}, {done / max(seconds, 1e-9):.1f} images/s ({seconds:.1f} s)")
    return FAILED if unreadable else 0


def _check_folder(out: Path) -> dict[str, Any] | None:
    """The manifest of a folder that holds predictions; None of one that is new or empty."""
    from trainer.errors import UserError

    if not out.exists():
        return None
    if not out.is_dir():
        raise UserError(f"--out {out} is a file: name a folder")
    try:
        if (out / MANIFEST).exists():
            manifest: dict[str, Any] = json.loads((out / MANIFEST).read_text(encoding="utf-8"))
            if isinstance(manifest, dict) and "format" in manifest:
                return manifest
        elif all(each.name == f".{MANIFEST}.tmp" for each in out.iterdir()):
            return None
    except (OSError, ValueError) as error:
        raise UserError(f"--out {out}: can't be read: {error}") from error
    raise UserError(f"--out {out} holds other files than predictions: name a new folder")


def _manifest(trained: TrainedModel, options: argparse.Namespace) -> dict[str, Any]:
    """What results depend on: those in a folder have all of it in common."""
    from trainer.tasks.objects import SHOWN_SCORE

    return {
        "format": FORMAT,
        "run": trained.name,
        "step": trained.step,
        "weights": trained.weights.name,
        "sha256": _checksum(trained.weights),
        "threshold": SHOWN_SCORE if options.threshold is None else options.threshold,
        "overlay": options.overlay,
    }


def _checksum(weights: Path) -> str:
    """The SHA-256 sum of the weights, as the checkpoint's manifest has it."""
    import hashlib

    from trainer.runs.checkpoint import MANIFEST as SUMS

    sums = weights.with_name(SUMS)
    if sums.exists():
        return str(json.loads(sums.read_text(encoding="utf-8"))["files"][weights.name]["sha256"])
    with weights.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _check_same(earlier: dict[str, Any] | None, manifest: dict[str, Any], out: Path) -> None:
    from trainer.errors import UserError

    differing = [key for key in manifest if earlier is not None and earlier.get(key) != manifest[key]]
    if earlier is None or not differing:
        return
    before = ", ".join(f"{key} {earlier.get(key)}" for key in differing if key != "sha256") or "other weights"
    now = ", ".join(f"{key} {manifest[key]}" for key in differing if key != "sha256") or "these weights"
    raise UserError(f"--out {out} holds predictions of {before}, not of {now}: name another folder, or remove it")


def _has_objects(model: Model) -> bool:
    from trainer.tasks.objects import ObjectTask

    return isinstance(model.task, ObjectTask)


def _is_done(file: Path, base: Path) -> bool:
    """Whether an image's results are there, and no older than the image."""
    from trainer.inference.results import LAST_SUFFIXES

    results = [base.with_name(base.name + suffix) for suffix in LAST_SUFFIXES]
    return any(each.exists() and each.stat().st_mtime >= file.stat().st_mtime for each in results)


def _write_coco(out: Path, names: dict[Path, Path], classes: Sequence[str], without: Iterable[Path]) -> None:
    """Joins the objects of all images in one COCO file, which appears as a whole."""
    left_out, temporary = set(without), out / f".{COCO}.tmp"
    shown = [(file, name) for file, name in names.items() if file not in left_out]
    category = {name: index + 1 for index, name in enumerate(classes)}
    images, number = [], 0
    try:
        with temporary.open("w", encoding="utf-8") as stream:
            stream.write('{"annotations": [')
            for image_id, (file, name) in enumerate(shown, 1):
                found = json.loads((out / f"{name}.json").read_text(encoding="utf-8"))
                images.append(
                    {"id": image_id, "file_name": str(name) + file.suffix}
                    | {side: found[side] for side in ("height", "width")}
                )
                for each in found["objects"]:
                    stream.write(",\n" if number else "\n")
                    number += 1
                    entry = _coco_entry(each) | {"id": number, "image_id": image_id}
                    json.dump(entry | {"category_id": category[each["class"]]}, stream)
            categories = [{"id": number, "name": name} for name, number in category.items()]
            rest = json.dumps({"images": images, "categories": categories})
            stream.write("],\n" + rest.removeprefix("{"))
        temporary.replace(out / COCO)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def _coco_entry(found: dict[str, Any]) -> dict[str, Any]:
    left, top, right, bottom = found["box"]
    width, height = right - left, bottom - top
    entry = {"score": found["score"], "bbox": [left, top, width, height], "area": width * height, "iscrowd": 0}
    return entry | ({"segmentation": found["mask"]} if "mask" in found else {})
