"""The baseline's probabilities are the class frequencies of the training set, however it was trained."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from tests.processes import TINY, lines, run_processes, train, weights, write_recipe
from trainer.errors import UserError
from trainer.losses.cross_entropy import CrossEntropy
from trainer.losses.focal import Focal
from trainer.losses.loss import Loss
from trainer.models.frequency import FLOOR, Frequency

CLASSES, IGNORED = 3, 255
RECIPE = f"""
plugins: [{TINY}]
task: segmentation
data: {{name: tiny, batch_size: 4, workers: 0}}
model: {{name: frequency, size: [24, 24]}}
loss: cross_entropy
optimizer: {{name: sgd, lr: 1, momentum: 0}}
train: {{duration: 1 epoch, precision: fp32, threads: 1, log_every: 1 steps}}
evaluate: {{every: 1 epoch, best: miou, pictures: 0}}
checkpoint: {{every: 5 steps}}
"""


def sample(images: int = 20) -> Tensor:
    """Random masks with a fifth of the pixels ignored,
    one pixel ignored everywhere and one always of the same class.
    """
    generator = torch.Generator().manual_seed(0)
    masks = torch.randint(CLASSES, (images, 5, 7), generator=generator)
    masks[torch.rand(masks.shape, generator=generator) < 0.2] = IGNORED
    masks[:, 0, 0], masks[:, 0, 1] = IGNORED, 2
    return masks.to(torch.uint8)


def count(masks: np.ndarray, num_classes: int) -> np.ndarray:
    return np.stack([(masks == label).sum(0) for label in range(num_classes)])


def fit(loss: Loss, masks: Tensor, batch_size: int = 4) -> Frequency:
    """One epoch of stochastic gradient descent."""
    model = Frequency(CLASSES, size=[5, 7])
    optimizer = torch.optim.SGD(model.parameters(), lr=1)
    for batch in masks.split(batch_size):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(torch.rand(len(batch), 3, 5, 7))
        loss.combine(loss(logits, batch))["loss"].backward()
        optimizer.step()
    return model


@pytest.mark.parametrize(
    "loss",
    [
        CrossEntropy(CLASSES, IGNORED, {}),
        CrossEntropy(CLASSES, IGNORED, {"class_pixels": [9, 1, 5]}, class_weights="inverse_frequency"),
        Focal(CLASSES, IGNORED, {}),
    ],
    ids=["plain", "weighted", "focal"],
)
def test_one_epoch_of_gradient_descent_gives_the_frequencies_that_numpy_counts(loss: Loss) -> None:
    masks = sample()
    counts = count(masks.numpy(), CLASSES)
    model = fit(loss, masks)
    np.testing.assert_array_equal(model.counts.detach(), counts)
    frequencies = counts / np.maximum(counts.sum(0), 1)
    expected = (frequencies + FLOOR) / (frequencies + FLOOR).sum(0)
    probabilities = model(torch.rand(2, 3, 5, 7)).detach().softmax(1)
    np.testing.assert_allclose(probabilities[1], expected, rtol=1e-5)
    assert torch.equal(probabilities[0], probabilities[1])


def test_where_every_pixel_was_ignored_all_classes_are_as_likely() -> None:
    probabilities = fit(CrossEntropy(CLASSES, IGNORED, {}), sample())(torch.rand(1, 3, 5, 7)).softmax(1)
    torch.testing.assert_close(probabilities[0, :, 0, 0], torch.full((CLASSES,), 1 / CLASSES))


def test_a_class_that_was_never_anything_else_continues_to_be_counted() -> None:
    """Its probability is nearly 1, and its gradient nearly 0."""
    masks = sample(images=5000)
    assert fit(CrossEntropy(CLASSES, IGNORED, {}), masks, batch_size=50).counts[:, 0, 1].tolist() == [0, 0, 5000]


def test_single_precision_counts_are_exact_to_sixteen_million() -> None:
    model = Frequency(CLASSES, size=[5, 7])
    with torch.no_grad():
        model.counts.fill_(2**24 - 1)
    loss = CrossEntropy(CLASSES, IGNORED, {})
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(torch.rand(1, 3, 5, 7))
    assert logits.dtype == torch.float32
    loss.combine(loss(logits, torch.zeros(1, 5, 7, dtype=torch.uint8)))["loss"].backward()
    torch.optim.SGD(model.parameters(), lr=1).step()
    assert model.counts[:, 0, 0].tolist() == [2**24, 2**24 - 1, 2**24 - 1]


def test_images_of_another_size_are_an_error_that_says_what_to_set() -> None:
    with pytest.raises(
        UserError,
        match=r"model.size is \[5, 7\], but an image is \[5, 8\]: .* data.resize=\[5, 7\] or model.size=\[5, 8\]",
    ):
        Frequency(CLASSES, size=[5, 7])(torch.rand(2, 3, 5, 8))


def training_masks(data: Path) -> np.ndarray:
    rows = [
        row
        for file in sorted((data / "tiny" / "train").glob("*.parquet"))
        for row in pq.read_table(file, columns=["mask"]).to_pylist()
    ]
    return np.stack([np.array(Image.open(io.BytesIO(row["mask"]["bytes"]))) for row in rows])


def frequencies_of(run: Path) -> np.ndarray:
    newest = max((run / "checkpoints").glob("step_*"))
    counts = load_file(newest / "model.safetensors")["counts"].double().numpy()
    return counts / np.maximum(counts.sum(0), 1e-9)


@pytest.mark.parametrize(
    "options", [(), ("train.precision=bf16",), ("train.accumulate=2", "data.batch_size=8", "train.duration=13 steps")]
)
@pytest.mark.slow
def test_a_run_counts_the_training_set_on_any_number_of_processes_and_through_checkpoints(
    tmp_path: Path, options: tuple[str, ...]
) -> None:
    recipe, runs = write_recipe(tmp_path, RECIPE), tmp_path / "runs"
    run_processes(1, train, recipe, ("name=one", *options))
    run_processes(4, train, recipe, ("name=four", *options))
    run_processes(1, train, recipe, ("name=cut", *options), 7)
    run_processes(1, train, recipe, ("name=cut", *options))
    counts = count(training_masks(tmp_path / "data"), 2)
    expected = counts / np.maximum(counts.sum(0), 1)
    for name in ("one", "four", "cut"):
        np.testing.assert_allclose(frequencies_of(runs / name), expected, rtol=1e-6)
    assert weights(runs / "cut") == weights(runs / "one")
    for key in ("loss", "miou", "pixel_accuracy"):
        one, four = (lines(runs / name, "validation")[-1][key] for name in ("one", "four"))
        assert four == pytest.approx(one, rel=1e-6)
