"""A plain training loop on the shapes, without the framework: what it is measured against, and proof that it hides nothing.

    python benchmarks/plain_loop.py --steps 100

Reads the prepared Parquet into memory, shuffles, flips, trains a U-Net with AdamW. One process, no checkpoint, no resume.
"""

from __future__ import annotations

import argparse
import io
import os
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from trainer.models.unet import UNet

MEAN, STD = (torch.tensor(values, dtype=torch.float64).view(3, 1, 1) * 255 for values in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))


def read(folder: Path) -> tuple[Tensor, Tensor]:
    """All images uint8 (N, 3, H, W) and masks uint8 (N, H, W) of a split."""
    rows = [row for file in sorted(folder.glob("*.parquet")) for row in pq.ParquetFile(file).read(["image", "mask"]).to_pylist()]
    images, masks = ([np.asarray(Image.open(io.BytesIO(row[column]["bytes"]))) for row in rows] for column in ("image", "mask"))
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(np.stack(masks))


def shuffled(images: Tensor, masks: Tensor, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches; an epoch's last, smaller batch is dropped."""
    while True:
        for chosen in torch.randperm(len(images)).split(batch_size)[: len(images) // batch_size]:
            x, y = images[chosen], masks[chosen]
            flip = torch.rand(len(chosen)) < 0.5
            yield torch.where(flip.view(-1, 1, 1, 1), x.flip(-1), x), torch.where(flip.view(-1, 1, 1), y.flip(-1), y)


def train(model: nn.Module, batches: Iterator[tuple[Tensor, Tensor]], steps: int, lr: float, bf16: bool = False) -> Iterator[Tensor]:
    """The loop; yields the loss of each step. Cosine schedule, AdamW, cross entropy that ignores 255."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    device, dtype = (weights := next(model.parameters())).device, weights.dtype
    mean, std = MEAN.to(device, dtype), STD.to(device, dtype)
    model.train()
    for step, (images, masks) in zip(range(steps), batches, strict=False):
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 + np.cos(np.pi * (step + 0.5) / steps)) / 2
        images, masks = images.to(device), masks.to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            logits = model((images.to(dtype) - mean) / std)
        loss = F.cross_entropy(logits.to(dtype), masks.long(), ignore_index=255)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield loss.detach()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=16)
    options = parser.parse_args()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    images, masks = read(Path(os.environ.get("TRAINER_DATA", "data")) / "shapes" / "train")
    model = UNet(4, width=16, depth=4).to("cuda" if torch.cuda.is_available() else "cpu")
    losses = train(model, shuffled(images, masks, options.batch_size), options.steps, lr=3e-3)
    print(f"step 1  loss {float(next(losses)):.4f}  0 samples/s", flush=True)
    half = (options.steps - 1) // 2
    for _ in range(half):  # the second half is measured
        next(losses)
    started = time.monotonic()
    rest = [float(loss) for loss in losses]
    rate = len(rest) * options.batch_size / (time.monotonic() - started)
    print(f"step {options.steps}  loss {rest[-1]:.4f}  {rate:.1f} samples/s", flush=True)
