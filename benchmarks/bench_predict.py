"""`trainer predict` against a plain loop with the same network, batches and decoder, in turns in one process.

    python benchmarks/bench_predict.py RUN [--images 48] [--turns 5]

RUN is a segmentation run with `data.resize`. Ratios above 1 are in the framework's favour. Times of a busy machine
mean little; ratios of medians over turns do.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.transforms.v2.functional import resize

import trainer
from trainer.inference.model import Model
from trainer.inference.pipeline import Pipeline
from trainer.inference.results import ClassMap, Result

SIZES = ((640, 480), (481, 643), (1023, 767))  # width and height of the images


def make_images(folder: Path, count: int) -> list[Path]:
    """JPEG files of odd sizes: smooth colours and some noise, about as large as photographs."""
    files = []
    for index in range(count):
        random, (width, height) = np.random.default_rng(index), SIZES[index * len(SIZES) // count]
        coarse = Image.fromarray(random.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        pixels = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(np.int16)
        pixels = (pixels + random.integers(-12, 13, pixels.shape)).clip(0, 255).astype(np.uint8)
        files.append(folder / f"{index:04}.jpg")
        Image.fromarray(pixels).save(files[-1], quality=88)
    return files


def plain(model: Model, files: list[Path], batch_size: int, finish: Callable[[Path, Result], None]) -> None:
    """Reads, predicts and writes one batch after the other."""
    size = model.preparation.size
    assert size is not None
    with torch.inference_mode():
        for start in range(0, len(files), batch_size):
            chosen = files[start : start + batch_size]
            arrays = [np.array(Image.open(file).convert("RGB")) for file in chosen]
            images = [torch.from_numpy(array).permute(2, 0, 1) for array in arrays]
            inputs = torch.stack([resize(image, list(size), antialias=True) for image in images])
            logits = model.forward(model.task.inputs(inputs.to(model.device)))  # type: ignore[attr-defined]
            for file, image, each in zip(chosen, images, logits, strict=True):
                full = F.interpolate(each[None], image.shape[1:], mode="bilinear", align_corners=False)
                finish(file, ClassMap(image, model.classes, full.max(1).indices[0].cpu()))


def ours(model: Model, files: list[Path], batch_size: int, finish: Callable[[Path, Result], None]) -> None:
    """What the command does."""
    assert len(list(Pipeline([model], finish, threshold=0.3, batch_size=batch_size).run(files))) == len(files)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--images", type=int, default=48)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=8)
    options = parser.parse_args()
    model = trainer.load(options.run)
    print(f"{model}, {torch.get_num_threads()} threads, {options.images} images, batches of {options.batch_size}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = make_images(folder, options.images)

        def nothing(file: Path, result: Result) -> None:
            pass

        def index_png(file: Path, result: Result) -> None:
            result.save(folder / "out" / file.stem, overlay=False)

        def all_files(file: Path, result: Result) -> None:
            result.save(folder / "out" / file.stem)

        for loop in (plain, ours):  # warm up
            loop(model, files[: options.batch_size], options.batch_size, all_files)
        for what, finish in (("nothing written", nothing), ("index PNGs", index_png), ("and overlays", all_files)):
            rates: dict[str, list[float]] = {"plain": [], "ours": []}
            for turn in range(options.turns):
                for loop in (plain, ours) if turn % 2 else (ours, plain):
                    start = time.perf_counter()
                    loop(model, files, options.batch_size, finish)
                    rates[loop.__name__].append(len(files) / (time.perf_counter() - start))
            mine, theirs = (statistics.median(rates[name]) for name in ("ours", "plain"))
            turns = [a / b for a, b in zip(rates["ours"], rates["plain"], strict=True)]
            print(
                f"{what:16} trainer predict {mine:6.1f} images/s, plain loop {theirs:6.1f} images/s: "
                f"ratio {mine / theirs:.2f} (median of the turns' ratios {statistics.median(turns):.2f})",
                flush=True,
            )


if __name__ == "__main__":
    main()
