"""Plain training loops, without the framework: the baseline of the benchmarks, and proof that it hides nothing.

    python benchmarks/plain_loop.py shapes --steps 100            # a U-Net: speed
    python benchmarks/plain_loop.py cifar10_horses --epochs 25    # the colourisation U-Net, evaluated after each epoch

Reads the prepared Parquet into memory, shuffles, trains. One process, no checkpoints, no resuming.
"""

from __future__ import annotations

import argparse
import io
import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from trainer.models.colorization import ColorizationUNet
from trainer.models.unet import UNet

MEAN, STD = (
    torch.tensor(values, dtype=torch.float64).view(3, 1, 1) * 255
    for values in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Batches = Iterator[tuple[Tensor, Tensor]]


def read(folder: Path) -> tuple[Tensor, Tensor]:
    """All images uint8 (N, 3, H, W) and masks uint8 (N, H, W) of a split."""
    rows = [
        row
        for file in sorted(folder.glob("*.parquet"))
        for row in pq.ParquetFile(file).read(["image", "mask"]).to_pylist()
    ]
    images, masks = (
        [np.asarray(Image.open(io.BytesIO(row[column]["bytes"]))) for row in rows] for column in ("image", "mask")
    )
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(np.stack(masks))


def shuffled(images: Tensor, masks: Tensor, batch_size: int, flips: bool) -> Batches:
    """Endless batches; an epoch's last, smaller batch is dropped."""
    while True:
        for chosen in torch.randperm(len(images)).split(batch_size)[: len(images) // batch_size]:
            x, y = images[chosen], masks[chosen]
            if flips:
                flip = torch.rand(len(chosen)) < 0.5
                x, y = (
                    torch.where(flip.view(-1, 1, 1, 1), x.flip(-1), x),
                    torch.where(flip.view(-1, 1, 1), y.flip(-1), y),
                )
            yield x, y


def normalised(images: Tensor, dtype: torch.dtype) -> Tensor:
    """Colours minus their mean, divided by their standard deviation."""
    return (images.to(dtype) - MEAN.to(images.device, dtype)) / STD.to(images.device, dtype)


def grey(images: Tensor, dtype: torch.dtype) -> Tensor:
    """The mean of the colours, in [0, 1)."""
    return images.to(dtype).mean(1, keepdim=True) / 256


def train(
    model: nn.Module,
    batches: Batches,
    steps: int,
    optimizer: torch.optim.Optimizer,
    inputs: Callable[..., Tensor] = normalised,
    cosine: bool = True,
) -> Iterator[Tensor]:
    """The loop; yields the loss of each step, cross entropy that ignores 255."""
    device, dtype = (weights := next(model.parameters())).device, weights.dtype
    lr = optimizer.param_groups[0]["lr"]
    for step, (images, masks) in zip(range(steps), batches, strict=False):
        model.train()
        if cosine:
            for group in optimizer.param_groups:
                group["lr"] = lr * (1 + math.cos(math.pi * (step + 0.5) / steps)) / 2
        logits = model(inputs(images.to(device), dtype))
        loss = F.cross_entropy(logits, masks.to(device).long(), ignore_index=255)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield loss.detach()


@torch.no_grad()
def evaluate(
    model: nn.Module, images: Tensor, masks: Tensor, inputs: Callable[..., Tensor], batch_size: int
) -> tuple[float, float]:
    """Mean cross entropy and pixel accuracy."""
    model.eval()
    loss, correct = 0.0, 0
    for x, y in zip(images.split(batch_size), masks.split(batch_size), strict=True):
        logits, y = model(inputs(x.to(DEVICE), torch.float32)), y.to(DEVICE).long()
        loss += float(F.cross_entropy(logits, y, reduction="sum"))
        correct += int((logits.argmax(1) == y).sum())
    return loss / masks.numel(), correct / masks.numel()


def configure_backends(threads: int) -> None:
    """What the framework sets for `train.precision: fp32` and images of one size."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = True
    torch.set_num_threads(threads)


def shapes(folder: Path, steps: int, batch_size: int) -> None:
    """Prints the loss of the first and last step, and samples per second over the second half of the steps."""
    images, masks = read(folder / "train")
    model = UNet(4, width=16, depth=4).to(DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = train(model, shuffled(images, masks, batch_size, flips=True), steps, optimizer)
    print(f"step 1  loss {float(next(losses)):.4f}  0 samples/s", flush=True)
    for _ in range((steps - 1) // 2):
        next(losses)
    started = time.monotonic()
    rest = [float(loss) for loss in losses]
    rate = len(rest) * batch_size / (time.monotonic() - started)
    print(f"step {steps}  loss {rest[-1]:.4f}  {rate:.1f} samples/s", flush=True)


def colorization(folder: Path, epochs: int, batch_size: int) -> None:
    """Prints loss and accuracy on the validation images after each epoch,
    and the seconds of training and evaluation.
    """
    (images, masks), validation = read(folder / "train"), read(folder / "validation")
    model = ColorizationUNet(24).to(DEVICE)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    steps = len(images) // batch_size
    started = time.monotonic()
    losses = train(
        model, shuffled(images, masks, batch_size, flips=False), epochs * steps, optimizer, grey, cosine=False
    )
    for step, _ in enumerate(losses, 1):
        if step % steps == 0:
            loss, accuracy = evaluate(model, *validation, grey, 500)
            print(
                f"epoch {step // steps}  validation loss {loss:.4f}  accuracy {accuracy:.4f}  "
                f"{time.monotonic() - started:.1f} s",
                flush=True,
            )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("set", choices=("shapes", "cifar10_horses"))
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--epochs", type=int, default=25)
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    configure_backends(len(os.sched_getaffinity(0)))
    folder = Path(os.environ.get("TRAINER_DATA", "data")) / options.set
    if options.set == "shapes":
        shapes(folder, options.steps, options.batch_size or 16)
    else:
        colorization(folder, options.epochs, options.batch_size or 100)
