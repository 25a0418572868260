"""Loads recipes strictly: validates each section against the component it names; reports all mistakes and their places.

    problem = "recipes/mine.yaml:8:3: optimizer.lr: must be greater than 0 (got -0.001)"

`load_recipe` reads the file and its parents (`file.py`), validates each section (`settings.py`) against the schema of
the component it names (`components.py`) and runs the cross-field checks (`checks.py`).
"""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError, create_model

from trainer.components import Component, Settings, catalogue
from trainer.errors import UserError
from trainer.recipe.checks import CHECKS, Check
from trainer.recipe.file import KeyPath, Problem, Reader, RecipeError, nearest, place_of, short
from trainer.recipe.recipe import Choice, Recipe
from trainer.recipe.settings import DEFAULTS, KINDS, SCHEMAS, SHARED, DataSettings, NamedSettings

S = TypeVar("S", bound=Settings)


def load_recipe(
    path: str | Path, overrides: Iterable[str] = (), checks: Iterable[Check] = (), data: bool = True
) -> Recipe:
    """Reads, merges and validates a recipe.

    Args:
        path: the YAML file.
        overrides: `key.path=value` arguments, applied last.
        checks: further cross-field checks.
        data: whether its data set is needed; False for a trained model that only predicts: `recipe.data` then has the
            keys that all sets share, there is no `recipe.source`, and nothing is checked across sections.

    Raises:
        RecipeError: with every problem found.
    """
    path = Path(path)
    reader = Reader(SHARED)
    tree = reader.read(path)
    top, places = reader.overrides(overrides)
    tree = reader.merge(tree, top, places)
    validator = Validator(reader, path)
    recipe = Recipe(path.stem, path, reader.places, reader.dropped)
    _check_keys(tree, validator)
    _plugins(tree.get("plugins", []), recipe, validator)
    _name(tree.get("name"), recipe, validator)
    _reference(tree.get("reference", {}), recipe, validator)
    if not reader.complete:  # a missing key may be in a file that couldn't be read
        raise RecipeError(reader.problems)
    dataset = tree.get("data")
    if isinstance(dataset, dict) and not data:
        tree["data"] = {key: value for key, value in dataset.items() if key in DataSettings.model_fields}
    elif isinstance(dataset, dict):
        recipe.augmentations = validator.choices("augmentation", dataset.pop("augment", []), ("data", "augment"))
    recipe.trackers = validator.choices("tracker", tree.get("track", []), ("track",))
    for section in SCHEMAS:
        kind = KINDS.get(section) if data or section != "data" else None
        _section(section, kind, tree.get(section, DEFAULTS.get(section)), recipe, validator)
    if data and hasattr(recipe, "data"):
        try:
            recipe.source = recipe.build("data")
        except (ValueError, UserError) as error:
            validator.add_problem(("data",), str(error))
    for needs, check in (*CHECKS, *checks) if data else ():
        if all(hasattr(recipe, part) for part in needs):
            reader.problems.extend(check(recipe))
    if reader.problems:
        raise RecipeError(reader.problems)
    return recipe


def _check_keys(tree: dict[str, Any], validator: Validator) -> None:
    known = ["name", "inherit", "plugins", "track", "reference", *SCHEMAS]
    for key in tree:
        if key not in known:
            validator.add_problem((key,), f"unknown key; {nearest(key, known)}", tree[key])


def _name(name: Any, recipe: Recipe, validator: Validator) -> None:
    if isinstance(name, str) and re.fullmatch(r"\w[\w.+=,-]{0,127}", name):
        recipe.name = name
    elif name is not None:
        validator.add_problem(("name",), "must consist of letters, digits and . _ - + = , (it names a folder)", name)


def _reference(reference: Any, recipe: Recipe, validator: Validator) -> None:
    if isinstance(reference, dict) and all(
        isinstance(key, str) and type(value) in (int, float) for key, value in reference.items()
    ):
        recipe.reference = {key: float(value) for key, value in reference.items()}
    else:
        validator.add_problem(("reference",), "must map metric names to numbers, e.g. {accuracy: 0.58}", reference)


def _plugins(plugins: Any, recipe: Recipe, validator: Validator) -> None:
    """Imports the listed modules, so that the recipe can name their components."""
    if not isinstance(plugins, list) or not all(isinstance(plugin, str) for plugin in plugins):
        validator.add_problem(("plugins",), "must be a list of module names or .py files", plugins)
        return
    folder = Path(place_of(recipe.places, ("plugins",), recipe.path).rsplit(":", 2)[0]).parent
    for i, plugin in enumerate(plugins):
        try:
            recipe.plugins.append(import_plugin(plugin, folder))
        except (ImportError, OSError, SyntaxError, ValueError, TypeError) as error:
            validator.add_problem(("plugins", i), f"can't be imported: {error}", plugin)


def import_plugin(plugin: str, folder: Path) -> str:
    """Imports a module, or a `.py` file relative to `folder`, for its components; returns the module's name, or the
    file's path.

    Raises:
        Exception: whatever its code raises; ImportError where there is no such file.
    """
    if not plugin.endswith(".py"):
        importlib.import_module(plugin)
        return plugin
    file = (folder / plugin).resolve()
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
            del sys.modules[name]  # or the next import would return the half-initialised module
            raise
    return str(file)


def _section(section: str, kind: str | None, value: Any, recipe: Recipe, validator: Validator) -> None:
    """Validates a section with the keys of the component that it names; sets it on the recipe if it is valid."""
    if value is None:
        validator.add_problem((section,), "must be a mapping" if section in DEFAULTS else "this section is required")
        return
    schema = SCHEMAS[section]
    if kind:
        component = validator.component(kind, value, (section,))
        if component is None:
            return
        recipe.components[section] = component
        schema = joined_schema(schema, component)
    elif not isinstance(value, dict):
        validator.add_problem((section,), "must be a mapping", value)
        return
    settings = validator.section(schema, value, (section,))
    if settings is not None:
        setattr(recipe, section, settings)


def joined_schema(shared: type[S], component: Component) -> type[S]:
    """The schema of a section: the keys that all its components share, and those of the one it names."""
    keys: dict[str, Any] = {key: (info.annotation, info) for key, info in component.schema.model_fields.items()}
    return create_model(component.schema.__name__, __base__=shared, **keys)


class Validator:
    """Validates the parts of a recipe; adds mistakes to the reader's problems."""

    def __init__(self, reader: Reader, path: Path) -> None:
        self.reader, self.path = reader, path

    def add_problem(self, path: KeyPath, what: str, got: Any = None) -> None:
        """Adds a mistake at the place of the key."""
        place = place_of(self.reader.places, path, self.path)
        self.reader.problems.append(Problem(place, path, what, None if got is None else short(got)))

    def component(self, kind: str, value: Any, path: KeyPath) -> Component | None:
        """The component of this kind that a section names; None and a problem if there is none."""
        if not isinstance(value, dict) or not isinstance(value.get("name"), str):
            self.add_problem(
                path,
                f"must be the name of a {kind}, or a mapping with its name; known: {', '.join(catalogue(kind))}",
                value,
            )
            return None
        component = catalogue(kind).get(value["name"])
        if component is None:
            self.add_problem(
                (*path, "name"), f"unknown {kind}; {nearest(value['name'], catalogue(kind))}", value["name"]
            )
        return component

    def choices(self, kind: str, value: Any, path: KeyPath) -> list[Choice]:
        """The components that a list names, each by a name or a mapping with a name."""
        if not isinstance(value, list):
            self.add_problem(path, f"must be a list; known: {', '.join(catalogue(kind))}", value)
            return []
        chosen: list[Choice] = []
        for i, entry in enumerate(value):
            entry = {"name": entry} if isinstance(entry, str) else entry
            component = self.component(kind, entry, (*path, i))
            settings = component and self.section(joined_schema(NamedSettings, component), entry, (*path, i))
            if component and settings:
                chosen.append((component, settings))
        return chosen

    def section(self, schema: type[S], value: Any, path: KeyPath) -> S | None:
        """Validates a mapping; reports every mistake in it and returns None if there is one."""
        try:
            return schema.model_validate(value)
        except ValidationError as error:
            mistakes: dict[KeyPath, list[Any]] = {}
            for item in error.errors():
                mistakes.setdefault(path + _known_prefix(item["loc"], value), []).append(item)
            for where, items in mistakes.items():  # several for one key: one for each member of a union
                known = _keys(schema, items[0]["loc"][:-1])
                first, *others = dict.fromkeys(_sentence(item, known) for item in items)
                self.add_problem(
                    where, " or ".join([first, *(other.removeprefix("must be ") for other in others)]), _got(items[0])
                )
            return None


def _sentence(item: Any, known: list[str]) -> str:
    """A message for a pydantic error."""
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
    """The part of pydantic's location that is in the recipe, and one missing key; the rest names members of unions."""
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
