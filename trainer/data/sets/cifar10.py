"""CIFAR-10 for colourisation: images of one class, each pixel labelled with the nearest of a few colours.

A. Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009. The labels are computed once, when the
set is prepared: on the fly they took 34 ms of each training step of 637 ms (a batch of 100 on one busy CPU core);
reading them takes 0.4 ms.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image
from pydantic import Field

from trainer.components import dataset
from trainer.data.archives import Member, members
from trainer.data.cifar_batches import read_batch
from trainer.data.images import encode_png
from trainer.data.source import Archive, DataInfo, Row, Source
from trainer.errors import UserError

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
OFFICIAL = Archive(
    "cifar-10-python.tar.gz",
    ("https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",),
    "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce",
)
HORSES = Archive("cifar10_horses.tar")  # the class as JPEG files, train/horse/0000.jpg …
COURSE_CENTRES = Archive("colour_kmeans24_cat7.npy")  # float64 (24, 3), RGB in [0, 1)
SCALE = 256  # the course divides pixels by 256, not by 255
KMEANS_PIXELS = 200_000
NOTES = (
    "The official split: 5000 training images, 1000 test images for validation.",
    "A mask holds the index of each pixel's nearest colour centre, by squared distance of RGB / 256.",
)

Split = Literal["train", "validation"]
Pixels = npt.NDArray[np.uint8]
NumColours = Annotated[int, Field(ge=2, le=255)]


@dataset(fields=("image", "mask", "colour_centres"))
def cifar10_horses(*, centres: Literal["course", "kmeans"] = "course", num_colours: NumColours = 24) -> Source:
    """The horses as JPEG files, with the course's 24 colour centres or `num_colours` by k-means.

    Args:
        centres: the course's, or those that k-means finds in the training set.
        num_colours: classes of colour; 24 with the course's centres.
    """
    if centres == "course" and num_colours != 24:
        raise ValueError(f"the course has 24 colour centres, not {num_colours}: set data.centres=kmeans")
    name = "cifar10_horses" if centres == "course" else f"cifar10_horses_kmeans{num_colours}"
    command = "" if centres == "course" else f"cifar10_horses centres=kmeans num_colours={num_colours}"
    return _source(name, (HORSES, COURSE_CENTRES) if centres == "course" else (HORSES,), num_colours, "horse", command)


@dataset(fields=("image", "mask", "colour_centres"))
def cifar10(*, category: Literal[CLASSES] = "horse", num_colours: NumColours = 24) -> Source:  # type: ignore[valid-type]
    """One class of the official archive, with `num_colours` colour centres by k-means.

    Args:
        category: the class of the photographs.
        num_colours: classes of colour, found by k-means in the training set.
    """
    return _source(
        f"cifar10_{category}_kmeans{num_colours}",
        (OFFICIAL,),
        num_colours,
        category,
        f"cifar10 category={category} num_colours={num_colours}",
    )


def _source(name: str, archives: tuple[Archive, ...], num_colours: int, category: str, command: str) -> Source:
    info = DataInfo(tuple(f"colour {index}" for index in range(num_colours)))
    rows = partial(_rows, num_colours=num_colours, category=category)
    statistics = partial(_statistics, num_colours=num_colours, category=category)
    return Source(name, info, {"image": "image", "mask": "mask"}, rows, archives, statistics, command, notes=NOTES)


def _rows(archives: Mapping[str, Path], num_colours: int, category: str) -> Iterator[tuple[str, Row]]:
    centres = _centres(tuple(archives.items()), num_colours, category)
    for split, name, data in _images(archives, category):
        labels = nearest_centre(_decode(name, data), centres)
        yield split, {"image": Member(name, data), "mask": encode_png(labels)}


def _statistics(archives: Mapping[str, Path], num_colours: int, category: str) -> dict[str, Any]:
    return {"colour_centres": _centres(tuple(archives.items()), num_colours, category).tolist()}


def _images(archives: Mapping[str, Path], category: str) -> Iterator[tuple[Split, str, bytes]]:
    """Split, name and encoded bytes of every image."""
    if HORSES.name in archives:
        for member in members(archives[HORSES.name], (".jpg",)):
            yield "train" if "train/" in member.name else "validation", member.name, member.data
        return
    for batch in members(
        archives[OFFICIAL.name], tuple(f"/{name}" for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"))
    ):
        try:
            images, labels = read_batch(batch.data)
        except ValueError as error:
            raise UserError(
                f"{archives[OFFICIAL.name]}: {batch.name}: {error}; replace it with the official archive"
            ) from error
        for index in np.flatnonzero(np.array(labels) == CLASSES.index(category)):
            yield (
                "validation" if "test" in batch.name else "train",
                f"{batch.name}/{index}.png",
                encode_png(images[index]),
            )


@cache
def _centres(archives: tuple[tuple[str, Path], ...], num_colours: int, category: str) -> npt.NDArray[np.float64]:
    """Colour centres, float64 (num_colours, 3) in [0, 1)."""
    paths = dict(archives)
    if COURSE_CENTRES.name in paths:
        path = paths[COURSE_CENTRES.name]
        try:
            centres = np.asarray(np.load(path, allow_pickle=False), np.float64)
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"{path} can't be read: {error}; replace it, or set data.centres=kmeans") from error
        if centres.shape != (num_colours, 3) or not np.isfinite(centres).all():
            problem = (
                "non-finite numbers"
                if centres.shape == (num_colours, 3)
                else f"an array of shape {centres.shape}, not ({num_colours}, 3)"
            )
            raise UserError(f"{path} contains {problem}; replace it, or set data.centres=kmeans")
        return centres
    pixels = np.concatenate(
        [_decode(name, data).reshape(-1, 3) for split, name, data in _images(paths, category) if split == "train"]
    )
    return _kmeans(pixels, num_colours)


def _kmeans(pixels: Pixels, num_colours: int) -> npt.NDArray[np.float64]:
    """Centres by k-means (seeded) on a sample of the pixels (N, 3)."""
    try:
        from sklearn.cluster import KMeans
    except ImportError:
        raise UserError("colour centres by k-means require scikit-learn: pip install scikit-learn") from None
    chosen = np.random.default_rng(0).choice(len(pixels), min(KMEANS_PIXELS, len(pixels)), replace=False)
    return np.asarray(
        KMeans(num_colours, n_init=4, random_state=0).fit(pixels[chosen] / SCALE).cluster_centers_, np.float64
    )


def nearest_centre(image: Pixels, centres: npt.NDArray[np.float64]) -> Pixels:
    """The index of each pixel's nearest centre, uint8 (H, W), for an image (H, W, 3)."""
    pixels = image.reshape(-1, 3) / SCALE
    distances = ((pixels[:, None] - centres) ** 2).sum(axis=2)
    nearest: Pixels = distances.argmin(axis=1).astype(np.uint8).reshape(image.shape[:2])
    return nearest


def _decode(name: str, data: bytes) -> Pixels:
    try:
        with Image.open(io.BytesIO(data)) as image:
            return np.asarray(image.convert("RGB"))
    except Exception as error:  # decoders raise all kinds of errors on damaged data
        raise UserError(f"{name} can't be decoded ({error}); replace the archive that contains it") from error
