"""Masks as COCO's compressed run lengths, by pycocotools."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trainer.errors import UserError


def codec() -> Any:
    """The module of pycocotools that handles run-length encoded masks.

    Raises:
        UserError: it isn't installed.
    """
    try:
        from pycocotools import mask
    except ImportError:
        raise UserError("boxes and masks need pycocotools: pip install 'recipe-trainer[detection]'") from None
    return mask


def encode_masks(masks: Tensor) -> list[bytes]:
    """The run lengths of masks (M, H, W)."""
    pixels = np.asfortranarray(masks.to(torch.uint8).permute(1, 2, 0).cpu().numpy())
    return [each["counts"] for each in codec().encode(pixels)]


def decode_masks(counts: Sequence[bytes], size: Sequence[int]) -> Tensor:
    """Masks uint8 (M, H, W) of images of one size (H, W), from their run lengths."""
    if not counts:
        return torch.zeros(0, *size, dtype=torch.uint8)
    masks = codec().decode([{"size": list(size), "counts": each} for each in counts])
    return torch.from_numpy(np.ascontiguousarray(masks.transpose(2, 0, 1)))
