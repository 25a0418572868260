"""Strict recipes: every section validated against the component it names, every mistake at once, each with its place.

    problem = "recipes/mine.yaml:8:3: optimizer.lr: must be greater than 0 (got -0.001)"

`load_recipe` reads the file and its parents (`recipe_file.py`), validates each section (`settings.py`) against the schema of
the component it names (`components.py`) and runs the cross-field checks.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError, create_model

from trainer.components import Component, Settings, catalogue
from trainer.durations import Clock, Span
from trainer.recipe_file import KeyPath, Place, Problem, Reader, RecipeError, nearest, place_of, short
from trainer.settings import DEFAULTS, RESUMABLE, SECTIONS, SHARED, NamedSettings

Choice = tuple[Component, Settings]
"""A component that a list in the recipe names, with its settings."""


@dataclass
class Recipe:
    """A validated recipe: a settings object for each section, and the component it names.

    While checks run, a section that has mistakes of its own is missing from `sections`.
    """

    name: str
    path: Path
    plugins: list[str] = field(default_factory=list)
    sections: dict[str, Any] = field(default_factory=dict)
    components: dict[str, Component] = field(default_factory=dict)
    trackers: list[Choice] = field(default_factory=list)
    augmentations: list[Choice] = field(default_factory=list)
    reference: dict[str, float] = field(default_factory=dict)  # published values of metrics, for reports
    places: dict[KeyPath, Place] = field(default_factory=dict)
    dropped: list[str] = field(default_factory=list)  # inherited keys that a change of `name` dropped, a line for each change

    def __getattr__(self, section: str) -> Any:
        try:
            return self.__dict__["sections"][section]
        except KeyError:
            raise AttributeError(section) from None

    def build(self, section: str, **context: Any) -> Any:
        """Builds the component that `section` names; `context` is what its factory takes before `/`."""
        return build(self.components[section], self.sections[section], **context)

    def resolved(self) -> dict[str, Any]:
        """The whole recipe with every default written out; it can be run again."""
        out: dict[str, Any] = {"name": self.name}
        if self.plugins:
            out["plugins"] = list(self.plugins)
        out |= {section: self.sections[section].model_dump(mode="json") for section in SECTIONS}
        out["data"]["augment"] = [settings.model_dump(mode="json") for _, settings in self.augmentations]
        out["track"] = [settings.model_dump(mode="json") for _, settings in self.trackers]
        if self.reference:
            out["reference"] = dict(self.reference)
        return out

    def at_default(self) -> set[str]:
        """The keys (dotted) of its sections that have their default value."""
        fields = ((section, settings, key, info) for section, settings in self.sections.items() for key, info in type(settings).model_fields.items())
        return {f"{section}.{key}" for section, settings, key, info in fields if getattr(settings, key) == info.default}

    def problem(self, path: str, what: str, got: Any = None) -> Problem:
        """A problem at `path` (dotted), placed where the recipe says that key, or the nearest one above it."""
        key: KeyPath = tuple(path.split("."))
        return Problem(place_of(self.places, key, self.path), key, what, None if got is None else str(got))


def build(component: Component, settings: Settings, **context: Any) -> Any:
    """Builds a component from its section; keys that the section shares with others of its kind are left out."""
    return component.build({key: getattr(settings, key) for key in component.schema.model_fields}, **context)


# ---------------------------------------------------------------- validation


class Validator:
    """Validates the parts of a recipe; what is wrong is reported to its reader."""

    def __init__(self, reader: Reader, path: Path) -> None:
        self.reader, self.path = reader, path

    def report(self, path: KeyPath, what: str, got: Any = None) -> None:
        """Adds a mistake, with the place where the key stands."""
        place = place_of(self.reader.places, path, self.path)
        self.reader.problems.append(Problem(place, path, what, None if got is None else short(got)))

    def component(self, kind: str, value: Any, path: KeyPath) -> Component | None:
        """The component of this kind that a section names; None where there is none, which is reported."""
        if not isinstance(value, dict) or not isinstance(value.get("name"), str):
            self.report(path, f"must be the name of a {kind}, or a mapping with its name; known: {', '.join(catalogue(kind))}", value)
            return None
        found = catalogue(kind).get(value["name"])
        if found is None:
            self.report((*path, "name"), f"unknown {kind}; {nearest(value['name'], catalogue(kind))}", value["name"])
        return found

    def choices(self, kind: str, value: Any, path: KeyPath) -> list[Choice]:
        """A list of components, each a name or a mapping with a name."""
        if not isinstance(value, list):
            self.report(path, f"must be a list; known: {', '.join(catalogue(kind))}", value)
            return []
        chosen: list[Choice] = []
        for i, entry in enumerate(value):
            entry = {"name": entry} if isinstance(entry, str) else entry
            component = self.component(kind, entry, (*path, i))
            settings = component and self.section(_join(NamedSettings, component), entry, (*path, i))
            if component and settings:
                chosen.append((component, settings))
        return chosen

    def section(self, schema: type[Settings], value: Any, path: KeyPath) -> Any:
        """Validates a mapping; reports every mistake in it and returns None if there is one."""
        try:
            return schema.model_validate(value)
        except ValidationError as error:
            mistakes: dict[KeyPath, list[Any]] = {}
            for item in error.errors():
                mistakes.setdefault(path + _known_prefix(item["loc"], value), []).append(item)
            for where, items in mistakes.items():  # several for one key: a union reports each of its members
                known = _keys(schema, items[0]["loc"][:-1])
                first, *others = dict.fromkeys(_sentence(item, known) for item in items)
                self.report(where, " or ".join([first, *(other.removeprefix("must be ") for other in others)]), _got(items[0]))
            return None


def _sentence(item: Any, known: list[str]) -> str:
    """A mistake that pydantic found, in this project's words."""
    match item["type"]:
        case "extra_forbidden":
            return f"unknown key; {nearest(str(item['loc'][-1]), known)}"
        case "missing":
            return "this key is required"
        case "value_error":
            return str(item["ctx"]["error"])
        case _:
            return str(item["msg"]).replace("Input should be", "must be")


def _got(item: Any) -> Any:
    return None if item["type"] == "missing" else item["input"]


def _known_prefix(location: tuple[str | int, ...], value: Any) -> KeyPath:
    """The part of pydantic's location that stands in the recipe, and one key that should; the rest names members of unions."""
    path: list[str | int] = []
    for part in location:
        if isinstance(value, dict):
            path.append(part)
            if part not in value:
                break
            value = value[part]
        elif isinstance(value, list) and isinstance(part, int) and part < len(value):
            path.append(part)
            value = value[part]
        else:
            break
    return tuple(path)


def _keys(schema: type[Settings], location: tuple[str | int, ...]) -> list[str]:
    for part in location:
        annotation = schema.model_fields[str(part)].annotation if str(part) in schema.model_fields else None
        if not (isinstance(annotation, type) and issubclass(annotation, Settings)):
            continue
        schema = annotation
    return list(schema.model_fields)


Check = Callable[[Recipe], Iterator[Problem]]
"""Looks at a recipe and yields problems; reads only the sections it is registered for."""


def load_recipe(path: str | Path, overrides: Iterable[str] = (), checks: Iterable[tuple[tuple[str, ...], Check]] = ()) -> Recipe:
    """Reads, merges and validates a recipe.

    Args:
        path: the YAML file.
        overrides: `key.path=value` arguments, applied last.
        checks: further cross-field checks, each with the sections it reads: it runs when these are valid.

    Raises:
        RecipeError: with every problem found.
    """
    path = Path(path)
    reader = Reader(SHARED)
    tree = reader.read(path)
    top, places = reader.overrides(overrides)
    tree = reader.merge(tree, top, places)
    validator = Validator(reader, path)
    recipe = Recipe(name=path.stem, path=path, places=reader.places, dropped=reader.dropped)
    _top_level(tree, recipe, validator)
    if not reader.complete:  # what seems to be missing may stand in what couldn't be read
        raise RecipeError(reader.problems)
    data = tree.get("data")
    if isinstance(data, dict):
        recipe.augmentations = validator.choices("augmentation", data.pop("augment", []), ("data", "augment"))
    recipe.trackers = validator.choices("tracker", tree.get("track", []), ("track",))
    for section, (kind, shared, required) in SECTIONS.items():
        value = tree.get(section, DEFAULTS.get(section))
        if value is None:
            validator.report((section,), "this section is required" if required else "must be a mapping")
            continue
        schema = shared
        if kind:
            component = validator.component(kind, value, (section,))
            if component is None:
                continue
            recipe.components[section] = component
            schema = _join(shared, component)
        elif not isinstance(value, dict):
            validator.report((section,), "must be a mapping", value)
            continue
        settings = validator.section(schema, value, (section,))
        if settings is not None:
            recipe.sections[section] = settings
    for needs, check in (*CHECKS, *checks):
        if all(section in recipe.sections for section in needs):
            reader.problems.extend(check(recipe))
    if reader.problems:
        raise RecipeError(reader.problems)
    return recipe


def _join(shared: type[Settings], component: Component) -> type[Settings]:
    """The schema of a section: the keys all its components share, and those of the one it names."""
    keys: dict[str, Any] = {key: (info.annotation, info) for key, info in component.schema.model_fields.items()}
    return create_model(component.schema.__name__, __base__=shared, **keys)


def _top_level(tree: dict[str, Any], recipe: Recipe, validator: Validator) -> None:
    known = ["name", "inherit", "plugins", "track", "reference", *SECTIONS]
    for key in tree:
        if key not in known:
            validator.report((key,), f"unknown key; {nearest(key, known)}", tree[key])
    name = tree.get("name")
    if name is not None:
        if isinstance(name, str) and re.fullmatch(r"[\w][\w.+=,-]{0,127}", name):
            recipe.name = name
        else:
            validator.report(("name",), "a run's name is made of letters, digits and . _ - + = , (it names a folder)", name)
    reference = tree.get("reference", {})
    if isinstance(reference, dict) and all(isinstance(key, str) and type(value) in (int, float) for key, value in reference.items()):
        recipe.reference = {key: float(value) for key, value in reference.items()}
    else:
        validator.report(("reference",), "must map names of metrics to numbers, e.g. {accuracy: 0.58}", reference)
    plugins = tree.get("plugins", [])
    if not isinstance(plugins, list) or not all(isinstance(p, str) for p in plugins):
        validator.report(("plugins",), "must be a list of module names or .py files", plugins)
        return
    for i, plugin in enumerate(plugins):
        try:
            recipe.plugins.append(_import_plugin(plugin, place_of(validator.reader.places, ("plugins",), recipe.path)))
        except (ImportError, OSError, SyntaxError, ValueError, TypeError) as error:
            validator.report(("plugins", i), f"can't be imported: {error}", plugin)


def _import_plugin(plugin: str, place: Place) -> str:
    """Imports a listed module; a `.py` file is looked up beside the recipe that lists it."""
    if not plugin.endswith(".py"):
        importlib.import_module(plugin)
        return plugin
    file = Path(plugin) if Path(plugin).is_absolute() else Path(place.rsplit(":", 2)[0]).parent / plugin
    file = file.resolve()
    name = f"trainer_plugin_{file.stem}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, file)
        if spec is None or spec.loader is None or not file.is_file():
            raise ImportError(f"no file {file}")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]  # half a module would pass for a whole one the next time
            raise
    return str(file)


# ---------------------------------------------------------------- cross-field checks


def _check_interfaces(recipe: Recipe) -> Iterator[Problem]:
    task = recipe.components["task"]
    for section in ("model", "loss"):
        found = recipe.components[section]
        if found.interface != task.interface:
            fits = [c.name for c in catalogue(section).values() if c.interface == task.interface]
            yield recipe.problem(section, f"{section} {found.name} doesn't fit task {task.name}; choose one of {', '.join(fits)}", found.name)
    data = recipe.components["data"]
    lacking = [f for f in task.fields if f not in data.fields]
    if lacking:
        fits = [c.name for c in catalogue("dataset").values() if set(task.fields) <= set(c.fields)]
        yield recipe.problem("data", f"task {task.name} needs {', '.join(lacking)}, which {data.name} has not; data sets that fit: {', '.join(fits)}")


def _check_augmentations(recipe: Recipe) -> Iterator[Problem]:
    for index, (component, chosen) in enumerate(recipe.augmentations):
        try:
            build(component, chosen, ignore_index=None, resize=recipe.data.resize, has_objects=False)
        except ValueError as error:
            yield recipe.problem(f"data.augment.{index}", str(error))
        if component.name == "mosaic" and index:
            yield recipe.problem(f"data.augment.{index}", "must be the first augmentation: those after it see the mosaic", component.name)


def _check_resize(recipe: Recipe) -> Iterator[Problem]:
    if recipe.data.resize_mode == "letterbox":
        if not recipe.data.resize:
            yield recipe.problem("data.resize_mode", "needs data.resize, the size to pad to", recipe.data.resize_mode)
        if "mask" in recipe.components["data"].fields:
            yield recipe.problem("data.resize_mode", "is for sets of boxes: what it pads with has no class", recipe.data.resize_mode)


def _check_batch(recipe: Recipe) -> Iterator[Problem]:
    batch, accumulate = recipe.data.batch_size, recipe.train.accumulate
    if batch % accumulate:
        yield recipe.problem("data.batch_size", f"must be divisible by train.accumulate ({accumulate}); it counts all samples of an optimizer step", batch)


def _check_durations(recipe: Recipe) -> Iterator[Problem]:
    clock = Clock(recipe.train.duration, recipe.data.batch_size, 1)
    if recipe.train.duration.unit == "%":
        yield recipe.problem("train.duration", "can't be a share of itself; give it in steps, epochs or minutes", recipe.train.duration)
        return
    if recipe.train.timeout.unit != "minutes":
        yield recipe.problem("train.timeout", "is a time; give it in minutes", recipe.train.timeout)
    for key, value in recipe.schedule:
        if not isinstance(value, Span):
            continue
        try:
            share = clock.share(value)
        except ValueError as error:
            yield recipe.problem(f"schedule.{key}", str(error))
        else:
            comparable = {value.unit, clock.duration.unit} != {"steps", "epochs"}  # these need the size of the data set
            if comparable and share > 1:
                yield recipe.problem(f"schedule.{key}", f"is longer than the training (train.duration {clock.duration})", value)


CHECKS: tuple[tuple[tuple[str, ...], Check], ...] = (
    (("task", "data", "model", "loss"), _check_interfaces),
    (("data",), _check_augmentations),
    (("data",), _check_resize),
    (("data", "train"), _check_batch),
    (("data", "train", "schedule"), _check_durations),
)


def flatten(tree: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """The values of a resolved recipe by dotted key."""
    out: dict[str, Any] = {}
    for key, value in tree.items():
        out |= flatten(value, f"{path}{key}.") if isinstance(value, dict) else {f"{path}{key}": value}
    return out


def differences(old: Mapping[str, Any], recipe: Recipe) -> list[str]:
    """Keys (dotted) in which a resolved recipe and this one differ, `name` and what a resumed run may change left out.

    A key that the old one doesn't have, at its default in this one, is one that came with a later version.
    """
    a, b = flatten(old), flatten(recipe.resolved())
    defaults = recipe.at_default()
    changed = [key for key in {**a, **b} if a.get(key) != b.get(key) and (key in a or key not in defaults)]
    found = [key for key in changed if not any(key == free or key.startswith(f"{free}.") for free in ("name", *RESUMABLE))]
    before, after = Span.parse(a["train.duration"]), Span.parse(b["train.duration"])
    if after.unit == before.unit and after.value < before.value:
        found.append("train.duration (shorter than before)")
    return found
