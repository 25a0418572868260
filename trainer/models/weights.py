"""Initial weights of a model: published ones by name, none, or a safetensors file."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import zip_longest
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn
from torchvision.models import WeightsEnum

from trainer.components import SUFFIX
from trainer.models.layers import check_layers, is_below

MAX_NAMED = 5  # tensors listed in an error; a wrong file differs in hundreds
NUM_EXAMPLES = 3  # tensors listed if a file is of another network

Shapes = dict[str, tuple[int, ...]]
"""Of tensors, by name."""
Alternatives = Iterable[tuple[str, nn.Module]]
"""Models by the settings (`key.path=value`) that make them."""


def load_safetensors(
    model: nn.Module, file: str | Path, reset_layers: Sequence[str], alternatives: Alternatives = ()
) -> None:
    """Loads the tensors of `file` into `model`, all but those below `reset_layers`, which keep their initial values.

    Strict: if `check_safetensors` finds a difference, nothing is loaded at all.

    Args:
        model: receives the weights.
        file: a safetensors file whose names are the keys of the model's state dict.
        reset_layers: paths of modules that are not loaded, e.g. `classifier.4`.
        alternatives: see `check_safetensors`.

    Raises:
        ValueError: a layer doesn't exist, the file can't be read, or its tensors don't fit.
    """
    check_safetensors(model, file, reset_layers, alternatives)
    skipped = [*reset_layers, *getattr(model, "unused_layers", ())]
    with _errors_explained(Path(file)):
        loaded = load_file(file)
    # Compared above.
    model.load_state_dict(
        {name: tensor for name, tensor in loaded.items() if not is_below(name, skipped)}, strict=False
    )


def check_safetensors(
    model: nn.Module, file: str | Path, reset_layers: Sequence[str], alternatives: Alternatives = ()
) -> None:
    """Compares the tensors of `file`, of which it reads the header alone, with those of `model`, all but those below
    `reset_layers`.

    Names and shapes must be the same. A model may name, as `unused_layers`, layers of published files that it has no
    use for (auxiliary classifiers).

    Args:
        model: on any device, meta too.
        file: a safetensors file.
        reset_layers: paths of modules that are not loaded.
        alternatives: other models that the file may be for, each with the settings that make it; the closest first.

    Raises:
        ValueError: a layer doesn't exist, the file can't be read, or its tensors don't fit; the message says which
            setting or which layers to reset would make them fit, if that is known.
    """
    shapes = _read_shapes(Path(file))
    comparison = _compare(shapes, model, reset_layers)
    if not comparison.differing:
        return
    candidates = {"": comparison}
    for settings, other in alternatives:
        with suppress(ValueError):  # it lacks a layer to reset
            candidates[settings] = _compare(shapes, other, reset_layers)
    fitting = [settings for settings, each in candidates.items() if each.new_layers is not None]
    # The first of equals is the closest.
    best = min(fitting, key=lambda settings: len(candidates[settings].differing), default=None)
    new_layers = candidates[best].new_layers if best is not None else None
    reset = f"model.reset_layers=[{', '.join([*reset_layers, *new_layers])}]" if new_layers else ""
    if best:
        raise ValueError(f"{file} doesn't fit the model, but fits {best}" + (f" with {reset}" if reset else ""))
    advice = f"; to reset these layers, set {reset}" if reset else ""
    raise ValueError(f"{file} doesn't fit the model: {comparison.explained()}{advice}")


def load_published(net: nn.Module, published: WeightsEnum, unused_layers: Sequence[str] = ()) -> None:
    """Loads torchvision's weights, downloaded at first use, into one of its networks, all but those below
    `unused_layers`.

    A network on the meta device, where `trainer check` builds models, holds no values: nothing is downloaded for it.

    Raises:
        ConnectionError: the weights can't be downloaded, or the downloaded file is damaged.
    """
    if any(parameter.is_meta for parameter in net.parameters()):
        return
    try:
        # weights_only: torchvision's own builders would unpickle the file, and with it any code it may hold.
        state = published.get_state_dict(progress=False, check_hash=True, weights_only=True)
        net.load_state_dict({name: tensor for name, tensor in state.items() if not is_below(name, unused_layers)})
    except Exception as error:  # sockets, HTTP, checksums, truncated files: they have no narrower base class in common
        file = Path(torch.hub.get_dir(), "checkpoints", Path(published.url).name)
        what = f"{file} is damaged; delete it" if file.exists() else f"could not download {published.url}"
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConnectionError(
            f"{what} ({reason}); or set model.weights=none to start from scratch, or model.weights=FILE{SUFFIX}, or "
            f"put {file.name} into {file.parent}"
        ) from error


@dataclass(frozen=True)
class _Comparison:
    """The shapes of a file's tensors and of those that a model expects, by name."""

    given: Shapes
    expected: Shapes

    @cached_property
    def missing(self) -> list[str]:
        return [name for name in self.expected if name not in self.given]

    @cached_property
    def unexpected(self) -> list[str]:
        return [name for name in self.given if name not in self.expected]

    @cached_property
    def reshaped(self) -> list[str]:
        return [name for name, shape in self.expected.items() if self.given.get(name, shape) != shape]

    @property
    def differing(self) -> list[str]:
        return [*self.missing, *self.unexpected, *self.reshaped]

    @property
    def same(self) -> int:
        return len(self.expected) - len(self.missing) - len(self.reshaped)

    @property
    def is_of_another_network(self) -> bool:
        return not self.same or 2 * self.same < min(len(self.given), len(self.expected))

    @cached_property
    def new_layers(self) -> list[str] | None:
        """The layers to reset for the rest to fit; None if that would not be enough, or if there are too many."""
        if self.unexpected or self.is_of_another_network:
            return None
        lacking = dict.fromkeys(_module(name) for name in self.differing)
        if len(lacking) > MAX_NAMED:
            kept = dict.fromkeys(_module(name) for name in self.expected if _module(name) not in lacking)
            lacking = dict.fromkeys(_highest(layer, kept) for layer in lacking)
        return list(lacking) if len(lacking) <= MAX_NAMED else None

    def explained(self) -> str:
        """The differences; a few examples for a file of another network."""
        wrong = {name: f"{name} {self.given[name]} instead of {self.expected[name]}" for name in self.reshaped}
        kinds = {"missing": self.missing, "unexpected": self.unexpected, "wrong shape of": list(wrong.values())}
        if not self.is_of_another_network:
            return "; ".join(f"{kind} {_listed(names)}" for kind, names in kinds.items() if names)
        by_turns = zip_longest(*([f"{kind} {name}" for name in names] for kind, names in kinds.items()))
        examples = [example for turn in by_turns for example in turn if example][:NUM_EXAMPLES]
        return (
            f"it is a file of another network ({self.same} of its {len(self.given)} tensors fit; e.g. "
            f"{', '.join(examples)})"
        )


def _compare(given: Shapes, model: nn.Module, reset_layers: Sequence[str]) -> _Comparison:
    check_layers(model, reset_layers, "model.reset_layers")
    skipped = [*reset_layers, *getattr(model, "unused_layers", ())]
    return _Comparison(
        given={name: shape for name, shape in given.items() if not is_below(name, skipped)},
        expected={
            name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if not is_below(name, reset_layers)
        },
    )


def _module(name: str) -> str:
    """The module of a tensor."""
    return name.rpartition(".")[0]


def _highest(layer: str, kept: Iterable[str]) -> str:
    """The highest module that holds `layer` and none of those that are kept."""
    parts = layer.split(".")
    above = (".".join(parts[:length]) for length in range(1, len(parts)))
    return next((module for module in above if not any(is_below(each, [module]) for each in kept)), layer)


def _read_shapes(file: Path) -> Shapes:
    """The shapes of a file's tensors by name; reads the header alone."""
    with _errors_explained(file), safe_open(file, framework="pt") as header:
        return {name: tuple(header.get_slice(name).get_shape()) for name in header.keys()}  # noqa: SIM118 - it isn't a dict


@contextmanager
def _errors_explained(file: Path) -> Iterator[None]:
    try:
        yield
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


def _listed(names: list[str]) -> str:
    more = len(names) - MAX_NAMED
    return ", ".join(names[:MAX_NAMED]) + (f" and {more} more" if more > 0 else "")
