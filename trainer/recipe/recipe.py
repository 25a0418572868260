"""The recipe: its validated sections, and the components they name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.components import Component, Settings
from trainer.recipe.durations import Span
from trainer.recipe.file import KeyPath, Place, Problem, place_of
from trainer.recipe.settings import RESUMABLE, SCHEMAS, Sections

if TYPE_CHECKING:  # the package of data is above this one
    from trainer.data.source import Source

Choice = tuple[Component, Settings]
"""A component that a list in the recipe names, with its settings."""


@dataclass(eq=False, repr=False)
class Recipe(Sections):
    """A validated recipe: its sections, and the components they name.

    Attributes:
        name: of the run.
        path: of the recipe's file.
        places: of each key.
        dropped: a line for each change of a component that dropped inherited keys.
        plugins: modules and files imported for their components.
        components: what `task`, `data`, `model`, `loss`, `optimizer` and `schedule` name.
        source: the data set that `data` names.
        augmentations: those of `data.augment`.
        trackers: those of `track`.
        reference: published values of metrics, for reports.
    """

    name: str
    path: Path
    places: dict[KeyPath, Place]
    dropped: list[str]
    plugins: list[str] = field(default_factory=list)
    components: dict[str, Component] = field(default_factory=dict)
    source: Source = field(init=False)
    augmentations: list[Choice] = field(default_factory=list)
    trackers: list[Choice] = field(default_factory=list)
    reference: dict[str, float] = field(default_factory=dict)

    def build(self, section: str, **context: Any) -> Any:
        """Builds the component that `section` names; `context` holds its factory's arguments before `/`."""
        return build(self.components[section], getattr(self, section), **context)

    def resolved(self) -> dict[str, Any]:
        """The recipe with all defaults written out, in the form of a recipe file."""
        out: dict[str, Any] = {"name": self.name}
        if self.plugins:
            out["plugins"] = list(self.plugins)
        out |= {section: getattr(self, section).model_dump(mode="json") for section in SCHEMAS}
        out["data"]["augment"] = [settings.model_dump(mode="json") for _, settings in self.augmentations]
        out["track"] = [settings.model_dump(mode="json") for _, settings in self.trackers]
        if self.reference:
            out["reference"] = dict(self.reference)
        return out

    def at_default(self) -> set[str]:
        """The dotted keys that have their default value."""
        keys: set[str] = set()
        for section in SCHEMAS:
            settings = getattr(self, section)
            fields = type(settings).model_fields.items()
            keys |= {f"{section}.{key}" for key, info in fields if getattr(settings, key) == info.default}
        return keys

    def problem(self, path: str, what: str, got: Any = None) -> Problem:
        """A problem with `path` (dotted), at the place of that key or of the nearest one above it."""
        key: KeyPath = tuple(path.split("."))
        return Problem(place_of(self.places, key, self.path), key, what, None if got is None else str(got))


def build(component: Component, settings: Settings, **context: Any) -> Any:
    """Builds a component from its own keys of a section, without those that all components of its kind share."""
    return component.build({key: getattr(settings, key) for key in component.schema.model_fields}, **context)


def flatten(tree: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """The values of a resolved recipe by dotted key."""
    out: dict[str, Any] = {}
    for key, value in tree.items():
        out |= flatten(value, f"{path}{key}.") if isinstance(value, dict) else {f"{path}{key}": value}
    return out


def differing(resolved: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Keys (dotted) in which resolved recipes differ, but for `name`, with the value in each, or None."""
    flat = [flatten(tree) for tree in resolved]
    values = {key: [tree.get(key) for tree in flat] for key in dict.fromkeys(key for tree in flat for key in tree)}
    return {key: each for key, each in values.items() if key != "name" and any(value != each[0] for value in each)}


def differences(old: Mapping[str, Any], recipe: Recipe) -> list[str]:
    """The dotted keys that differ between a resolved recipe and this one, except those that may change on resume.

    A key that is missing in the old recipe and at its default in this one doesn't count: a later version added it.
    """
    a, b = flatten(old), flatten(recipe.resolved())
    defaults = recipe.at_default()
    changed = [key for key in {**a, **b} if a.get(key) != b.get(key) and (key in a or key not in defaults)]
    differing = [
        key for key in changed if not any(key == free or key.startswith(f"{free}.") for free in ("name", *RESUMABLE))
    ]
    before, after = Span.parse(a["train.duration"]), Span.parse(b["train.duration"])
    if after.unit == before.unit and after.value < before.value:
        differing.append("train.duration (shorter than before)")
    return differing
