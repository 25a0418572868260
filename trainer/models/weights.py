"""Initial weights of a model: published ones by name, none, or a safetensors file."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from pydantic import AfterValidator
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision.models import WeightsEnum

from trainer.models.layers import check_layers, is_below

SUFFIX = ".safetensors"
MAX_NAMED = 5  # tensors listed in an error; a wrong file differs in hundreds


def weights_field(*names: str) -> AfterValidator:
    """Validates a recipe's `model.weights`; to be used as `Annotated[str, weights_field("coco")]`.

    Allowed are `names`, `none`, and the path of a .safetensors file that exists.
    """
    allowed = f"must be {', '.join((*names, 'none'))} or an existing {SUFFIX} file"

    def check(weights: str) -> str:
        if weights.endswith(SUFFIX) and not os.path.isfile(weights):  # Path.is_file() raises where the name can't be one
            raise ValueError(f"{allowed}, and there is no such file")
        if not weights.endswith(SUFFIX) and weights not in (*names, "none"):
            raise ValueError(f"{allowed}; to start from scratch, set model.weights=none")
        return weights

    return AfterValidator(check)


def load_safetensors(model: nn.Module, file: str | Path, reset_layers: Sequence[str]) -> None:
    """Loads the tensors of `file` into `model`, all but those below `reset_layers`, which keep their initial values.

    Strict: apart from those layers, the file's tensors and the model's are the same in names and shapes,
    else nothing is loaded at all. A model may name, as `unused_layers`, what published files hold and it has no use
    for (auxiliary classifiers).

    Args:
        model: where the weights go.
        file: a safetensors file whose names are the keys of the model's state dict.
        reset_layers: paths of modules that start new, e.g. `classifier.4`.

    Raises:
        ValueError: a layer doesn't exist, the file can't be read, or its tensors don't fit.
    """
    check_layers(model, reset_layers, "model.reset_layers")
    skipped = [*reset_layers, *getattr(model, "unused_layers", ())]
    loaded = {name: tensor for name, tensor in _read(Path(file)).items() if not is_below(name, skipped)}
    expected = {name: tensor for name, tensor in model.state_dict().items() if not is_below(name, reset_layers)}
    problems = _differences(loaded, expected)
    if problems:
        raise ValueError(f"{file} doesn't fit the model: {'; '.join(problems)}")
    model.load_state_dict(loaded, strict=False)  # names and shapes were compared above


def load_published(net: nn.Module, published: WeightsEnum, unused_layers: Sequence[str] = ()) -> None:
    """Loads torchvision's weights, downloaded at first use, into one of its networks, all but those below `unused_layers`.

    Raises:
        ConnectionError: the weights can't be downloaded, or the downloaded file is damaged.
    """
    try:
        # weights_only: torchvision's own builders would unpickle the file, and with it any code it may hold.
        state = published.get_state_dict(progress=False, check_hash=True, weights_only=True)
        net.load_state_dict({name: tensor for name, tensor in state.items() if not is_below(name, unused_layers)})
    except Exception as error:  # sockets, HTTP, checksums, truncated files: they have no narrower base in common
        file = Path(torch.hub.get_dir(), "checkpoints", Path(published.url).name)
        what = f"{file} is damaged; delete it" if file.exists() else f"could not download {published.url}"
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConnectionError(
            f"{what} ({reason}); or set model.weights=none to start from scratch, or model.weights=FILE{SUFFIX}, or put {file.name} into {file.parent}"
        ) from error


def _read(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except OSError as error:
        raise ValueError(f"{file} can't be read: {error.strerror or error}") from error
    except SafetensorError as error:
        with file.open("rb") as stream:
            start = stream.read(2)
        if start == b"PK" or start[:1] == b"\x80":  # a zip archive or a bare pickle, as torch.save writes them
            raise ValueError(
                f"{file} is not a safetensors file but one written by torch.save; convert it with "
                f"safetensors.torch.save_file(torch.load('{file}', weights_only=True), 'NAME{SUFFIX}')"
            ) from error
        raise ValueError(f"{file} is damaged, or not a safetensors file: {error}") from error


def _differences(loaded: dict[str, Tensor], expected: dict[str, Tensor]) -> list[str]:
    missing = [name for name in expected if name not in loaded]
    unexpected = [name for name in loaded if name not in expected]
    reshaped = [name for name in expected if name in loaded and loaded[name].shape != expected[name].shape]
    problems = []
    if missing:
        problems.append(f"missing {_listed(missing)}")
    if unexpected:
        problems.append(f"unexpected {_listed(unexpected)}")
    if reshaped:
        shapes = [f"{name} {tuple(loaded[name].shape)} instead of {tuple(expected[name].shape)}" for name in reshaped]
        problems.append(f"wrong shape of {_listed(shapes)}")
    if reshaped and not missing and not unexpected:
        layers = dict.fromkeys(name.rpartition(".")[0] for name in reshaped)
        problems.append(f"to start these layers new, set model.reset_layers=[{_listed(list(layers))}]")
    return problems


def _listed(names: list[str]) -> str:
    more = len(names) - MAX_NAMED
    return ", ".join(names[:MAX_NAMED]) + (f" and {more} more" if more > 0 else "")
