"""Turns names in a recipe into objects.

A component is a function or class with a decorator: `@task`, `@model`, `@loss`, `@dataset`,
`@augmentation`, `@optimizer`, `@schedule` or `@tracker`. Its typed signature is its recipe schema:

    @model(interface="dense")
    def unet(num_classes: int, /, *, width: Annotated[int, Field(gt=0)] = 32) -> nn.Module: ...

    model: {name: unet, width: 64}          # in a recipe

Parameters before `/` are supplied by the framework, by name; the others are the recipe's keys.
The folders are the catalogue: a new file in `trainer/models/` is a new name, with no other edit.
"""

from __future__ import annotations

import importlib
import inspect
import os
import pkgutil
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PositiveInt, create_model

# The package or module that holds the components of each kind.
CATALOGUE = {
    "task": "trainer.tasks",
    "model": "trainer.models",
    "loss": "trainer.losses",
    "dataset": "trainer.data.sets",
    "augmentation": "trainer.data.augment",
    "optimizer": "trainer.optim.optimizers",
    "schedule": "trainer.optim.schedules",
    "tracker": "trainer.reporting.trackers",
}

SUFFIX = ".safetensors"  # of weight files
HUB = "hf://"  # of models on the Hugging Face Hub: hf://OWNER/NAME or hf://OWNER/NAME@REVISION
HUB_ADDRESS = re.compile(r"hf://(?P<repository>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(?P<revision>[\w./-]+))?")

F = TypeVar("F", bound=Callable[..., Any])

# Ranges of settings, in addition to pydantic's PositiveInt, NonNegativeFloat, …
Fraction = Annotated[float, Field(ge=0, le=1)]
FractionBelowOne = Annotated[float, Field(ge=0, lt=1)]
InnerFraction = Annotated[float, Field(gt=0, lt=1)]  # neither 0 nor 1
Size = Annotated[list[PositiveInt], Field(min_length=2, max_length=2)]
"""Height and width in pixels."""


class Settings(BaseModel):
    """Base of every schema: no unknown keys, no silent conversions ("8" is not 8, true is not 1), finite numbers."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=(), frozen=True)


@dataclass(frozen=True)
class Component:
    """One name that a recipe can use.

    Attributes:
        kind: `model`, `loss`, … (a key of `CATALOGUE`).
        name: its name in recipes.
        factory: the decorated function or class.
        schema: pydantic model of the keys that a recipe may set.
        context: names of the positional-only parameters, which the framework supplies.
        interfaces: what the model outputs and the loss expects, e.g. `dense` (logits (B, C, H, W) and class maps
            (B, H, W)); a recipe's task, model and loss must have one in common.
        fields: of a data set, those that its samples have; of a task, those that it needs.
    """

    kind: str
    name: str
    factory: Callable[..., Any]
    schema: type[Settings]
    context: tuple[str, ...]
    interfaces: tuple[str, ...]
    fields: tuple[str, ...]

    def build(self, settings: Mapping[str, Any], **context: Any) -> Any:
        """Calls the factory with the recipe's keys and the context values that it takes."""
        missing = [name for name in self.context if name not in context]
        assert not missing, f"{self.kind} {self.name} takes {missing}, which nothing supplies"
        return self.factory(*(context[name] for name in self.context), **settings)


_registered: dict[str, dict[str, Component]] = {kind: {} for kind in CATALOGUE}
_loaded: set[str] = set()


def _decorator(kind: str) -> Callable[..., Callable[[F], F]]:
    def decorate(
        *, name: str | None = None, interface: str | tuple[str, ...] = "", fields: tuple[str, ...] = ()
    ) -> Callable[[F], F]:
        interfaces = (interface,) if isinstance(interface, str) else interface

        def register(factory: F) -> F:
            _register(kind, name or factory.__name__.lower(), factory, interfaces, fields)
            return factory

        return register

    return decorate


def _register(
    kind: str, name: str, factory: Callable[..., Any], interfaces: tuple[str, ...], fields: tuple[str, ...]
) -> None:
    known = _registered[kind].get(name)
    if known and (known.factory.__module__, known.factory.__qualname__) != (factory.__module__, factory.__qualname__):
        raise ValueError(f"{kind} {name!r} is defined twice: in {known.factory.__module__} and in {factory.__module__}")
    # A class may inherit `*args, **kwargs` from its base's __init__; these aren't settings.
    parameters = [
        p
        for p in inspect.signature(factory, eval_str=True).parameters.values()
        if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    context = tuple(p.name for p in parameters if p.kind is p.POSITIONAL_ONLY)
    keys: dict[str, Any] = {
        p.name: (p.annotation, ... if p.default is p.empty else p.default)
        for p in parameters
        if p.kind is not p.POSITIONAL_ONLY
    }
    schema = create_model(f"{kind}:{name}", __base__=Settings, **keys)
    _registered[kind][name] = Component(kind, name, factory, schema, context, interfaces, fields)


task = _decorator("task")
model = _decorator("model")
loss = _decorator("loss")
dataset = _decorator("dataset")
augmentation = _decorator("augmentation")
optimizer = _decorator("optimizer")
schedule = _decorator("schedule")
tracker = _decorator("tracker")


def weights_field(*names: str) -> AfterValidator:
    """Validates a recipe's `model.weights`; used as `Annotated[str, weights_field("coco")]`.

    Allowed are `names`, `none`, the path of an existing .safetensors file, and a model on the Hugging Face Hub.
    """
    one_of = f"{', '.join((*names, 'none'))} or an existing {SUFFIX} file"
    allowed = f"must be {one_of}"

    def check(weights: str) -> str:
        if weights.startswith(HUB):
            if not HUB_ADDRESS.fullmatch(weights):
                raise ValueError(f"must be {HUB}OWNER/NAME or {HUB}OWNER/NAME@REVISION for a model on the Hub")
            return weights
        # Path.is_file() would raise on an invalid file name.
        if weights.endswith(SUFFIX) and not os.path.isfile(weights):
            raise ValueError(f"{allowed}; no such file")
        if not weights.endswith(SUFFIX) and weights not in (*names, "none"):
            raise ValueError(f"{allowed}; to start from scratch, set model.weights=none")
        return weights

    check.__doc__ = one_of
    return AfterValidator(check)


def registered(kind: str) -> dict[str, Component]:
    """The components of a kind that imported modules have, by name."""
    return dict(sorted(_registered[kind].items()))


def is_trained(weights: str) -> bool:
    """Whether `model.weights` is a safetensors file, here or on the Hub, and not a name."""
    return weights.endswith(SUFFIX) or weights.startswith(HUB)


def catalogue(kind: str) -> dict[str, Component]:
    """All components of a kind by name; imports their modules on first use."""
    if kind not in _loaded:
        module = importlib.import_module(CATALOGUE[kind])
        for info in pkgutil.iter_modules(getattr(module, "__path__", ())):
            importlib.import_module(f"{CATALOGUE[kind]}.{info.name}")
        _loaded.add(kind)
    return registered(kind)
