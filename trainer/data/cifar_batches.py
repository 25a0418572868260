"""The official batches of CIFAR-10: Python 2 pickles, unpickled with only arrays and plain containers allowed.

Nothing else in this package unpickles data.
"""

from __future__ import annotations

import io
import pickle
from typing import Any

import numpy as np
import numpy.typing as npt

_ALLOWED = {
    ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
}


class _Restricted(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it refers to {module}.{name}, which official batches never do")
        return _ALLOWED[module, name]


def read_batch(data: bytes) -> tuple[npt.NDArray[np.uint8], list[int]]:
    """Images uint8 (N, 32, 32, 3) and their class indices.

    Raises:
        ValueError: the data are not such a batch.
    """
    try:
        batch = _Restricted(io.BytesIO(data), encoding="bytes").load()
        pixels, labels = batch[b"data"], batch[b"labels"]
        images = pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        if (
            images.dtype != np.uint8
            or len(images) != len(labels)
            or not all(isinstance(label, int) for label in labels)
        ):
            raise ValueError("images and labels don't match")
    except Exception as error:  # damaged pickles raise all kinds of errors
        raise ValueError(f"not a batch of CIFAR-10: {error}") from error
    return np.ascontiguousarray(images), labels
