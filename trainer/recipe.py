"""Strict recipes: YAML with `inherit` and `key.path=value`, every mistake at once, each with its place.

    problem = "recipes/mine.yaml:8:3: optimizer.lr: must be greater than 0 (got -0.001)"

`load_recipe` reads the file and its parents, merges them, validates each section against the schema
of the component it names (`components.py`) and runs the cross-field checks.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import io
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveInt, ValidationError, create_model
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from trainer.components import Component, Settings, catalogue
from trainer.durations import Clock, Duration, Span
from trainer.errors import UserError

KeyPath = tuple[str | int, ...]
Place = str
"""Where a value stands: `file:line:column`, or `command line`."""

MAX_NODES = 20_000  # a recipe is a page; more is a mistake or an alias bomb


@dataclass(frozen=True)
class Problem:
    """One mistake: where it stands, which key, what is wrong and what to do."""

    place: Place
    path: KeyPath
    what: str
    got: str | None = None

    def __str__(self) -> str:
        key = f" {dotted(self.path)}:" if self.path else ""
        got = "" if self.got is None else f" (got {self.got})"
        return f"{self.place}:{key} {self.what}{got}"


class RecipeError(UserError):
    """A recipe is wrong; holds every problem found."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = sorted(set(problems), key=lambda p: (_natural(p.place), p.path != (), str(p.path)))
        super().__init__("\n".join(map(str, self.problems)))


def _natural(place: Place) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (0, part) for part in place.split(":")]


def dotted(path: KeyPath) -> str:
    """`("track", 0, "mode")` as `track[0].mode`."""
    return "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in path).lstrip(".")


# ---------------------------------------------------------------- the sections and their schemas


class DataSettings(Settings):
    """Keys of `data:` that every data set has."""

    name: str
    batch_size: PositiveInt
    workers: Literal["auto"] | Annotated[int, Field(ge=0)] = "auto"
    cache: Literal["auto", "off"] = "auto"
    window: PositiveInt = 8
    resize: Annotated[list[PositiveInt], Field(min_length=2, max_length=2)] | None = None


class ModelSettings(Settings):
    """Keys of `model:` that every model has: what starts new and what learns."""

    name: str
    reset_layers: list[str] = []
    train_only: list[str] = []


class NamedSettings(Settings):
    """A section that has nothing but its component's keys."""

    name: str


class TrainSettings(Settings):
    """`train:`, how the loop runs."""

    duration: Duration
    precision: Literal["auto", "fp32", "bf16", "fp16", "fp64"] = "auto"
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    accumulate: PositiveInt = 1
    clip_norm: Annotated[float, Field(gt=0)] | None = None
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    channels_last: bool = True
    compile: bool = False
    deterministic: Literal["auto"] | bool = "auto"
    threads: Literal["auto"] | PositiveInt = "auto"
    log_every: Duration = Span.parse("10 steps")


class EvaluateSettings(Settings):
    """`evaluate:`, when, and which metric makes a checkpoint the best."""

    every: Duration = Span.parse("1 epoch")
    best: str = "loss"
    batch_size: PositiveInt | None = None
    pictures: Annotated[int, Field(ge=0)] = 8


class CheckpointSettings(Settings):
    """`checkpoint:`, when, and how many are kept besides the best."""

    every: Duration = Span.parse("1 epoch")
    keep: Annotated[int, Field(ge=2)] = 3


# section -> (kind of component or None, schema of the keys that all its components share, required)
SECTIONS: dict[str, tuple[str | None, type[Settings], bool]] = {
    "task": ("task", NamedSettings, True),
    "data": ("dataset", DataSettings, True),
    "model": ("model", ModelSettings, True),
    "loss": ("loss", NamedSettings, True),
    "optimizer": ("optimizer", NamedSettings, True),
    "schedule": ("schedule", NamedSettings, False),
    "train": (None, TrainSettings, True),
    "evaluate": (None, EvaluateSettings, False),
    "checkpoint": (None, CheckpointSettings, False),
}
DEFAULTS: dict[str, Any] = {"schedule": {"name": "constant"}, "evaluate": {}, "checkpoint": {}}
# Changes under which a run still goes on: they leave what is computed as it is, or only add to it.
RESUMABLE = ("train.duration", "track", "data.workers", "data.cache", "checkpoint")


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
    places: dict[KeyPath, Place] = field(default_factory=dict)

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
        return out

    def problem(self, path: str, what: str, got: Any = None) -> Problem:
        """A problem at `path` (dotted), placed where the recipe says that key, or the nearest one above it."""
        key: KeyPath = tuple(path.split("."))
        return Problem(_place(self.places, key, self.path), key, what, None if got is None else str(got))


def build(component: Component, settings: Settings, **context: Any) -> Any:
    """Builds a component from its section; keys that the section shares with others of its kind are left out."""
    return component.build({key: getattr(settings, key) for key in component.schema.model_fields}, **context)


# ---------------------------------------------------------------- reading YAML, with positions


class _Reader:
    """Reads a recipe and its parents into one tree, with the place of every key."""

    def __init__(self) -> None:
        self.problems: list[Problem] = []
        self.places: dict[KeyPath, Place] = {}

    def read(self, path: Path, children: tuple[Path, ...] = (), at: Place | None = None) -> dict[str, Any]:
        where = at or str(path)
        if path.resolve() in children:
            chain = " -> ".join(str(p.name) for p in (*children, path))
            self.problems.append(Problem(where, ("inherit",), f"recipes inherit in a circle: {chain}"))
            return {}
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            near = difflib.get_close_matches(path.name, _siblings(path), 1)
            hint = f"; did you mean {path.with_name(near[0])}?" if near else ""
            what = "the parent recipe doesn't exist" if children else "no such recipe"
            self.problems.append(Problem(where, ("inherit",) if children else (), what + hint, str(path)))
            return {}
        except (OSError, UnicodeDecodeError) as error:
            self.problems.append(Problem(where, (), f"can't be read: {error}"))
            return {}
        places: dict[KeyPath, Place] = {}
        tree = self._parse(text, str(path), places)
        parent = tree.pop("inherit", None) if isinstance(tree, dict) else None
        if tree is not None and not isinstance(tree, dict):
            self.problems.append(Problem(f"{path}:1:1", (), "a recipe is a mapping of sections (task:, data:, model:, …)", _short(tree)))
            tree = {}
        merged: dict[str, Any] = {}
        if parent is not None:
            place = places.get(("inherit",), str(path))
            if isinstance(parent, str):
                merged = self.read(path.parent / parent, (*children, path.resolve()), place)
            else:
                self.problems.append(Problem(place, ("inherit",), "must be the file name of another recipe", _short(parent)))
        return self.merge(merged, tree or {}, places)

    def overrides(self, arguments: Iterable[str]) -> tuple[dict[str, Any], dict[KeyPath, Place]]:
        """`key.path=value` arguments as one tree."""
        tree: dict[str, Any] = {}
        places: dict[KeyPath, Place] = {}
        for argument in arguments:
            key, equals, value = argument.partition("=")
            path: KeyPath = tuple(key.strip().split("."))
            if not equals or not all(path):
                self.problems.append(Problem("command line", (), "an override is key.path=value, e.g. optimizer.lr=1e-3", argument))
                continue
            inner: dict[KeyPath, Place] = {}
            parsed = self._parse(value, "command line", inner, flow=True)
            node = tree
            for part in path[:-1]:
                node = node.setdefault(part, {}) if isinstance(node.get(part, {}), dict) else node.update({part: {}}) or node[part]
            node[path[-1]] = parsed
            places |= {path[: i + 1]: "command line" for i in range(len(path))}
            places |= {path + rest: "command line" for rest in inner}
        return tree, places

    def merge(self, base: dict[str, Any], top: dict[str, Any], places: dict[KeyPath, Place]) -> dict[str, Any]:
        """Merges `top` over `base`, deeply; a mapping whose `name` changes is replaced whole."""
        merged = self._merge(_named(base), _named(top), (), places)
        self.places |= places
        return merged

    def _merge(self, base: dict[str, Any], top: dict[str, Any], path: KeyPath, places: dict[KeyPath, Place]) -> dict[str, Any]:
        if "name" in base and "name" in top and base["name"] != top["name"] and path:
            self.places = {p: place for p, place in self.places.items() if p[: len(path)] != path}
            return top
        out = dict(base)
        for key, value in top.items():
            if isinstance(value, dict) and isinstance(out.get(key), dict):
                out[key] = self._merge(out[key], value, (*path, key), places)
            else:
                out[key] = value
        return out

    def _parse(self, text: str, file: str, places: dict[KeyPath, Place], flow: bool = False) -> Any:
        yaml = YAML(typ="safe", pure=True)
        try:
            node = yaml.compose(io.StringIO(text))
        except MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            place = f"{file}:{mark.line + 1}:{mark.column + 1}" if mark and not flow else file
            self.problems.append(Problem(place, (), f"not valid YAML: {error.problem or error.context}", _short(text) if flow else None))
            return None
        except (YAMLError, ValueError) as error:
            self.problems.append(Problem(file, (), f"not valid YAML: {str(error).splitlines()[0]}"))
            return None
        budget = [MAX_NODES]
        return None if node is None else self._plain(yaml, node, (), file, places, budget)

    def _plain(self, yaml: YAML, node: Node, path: KeyPath, file: str, places: dict[KeyPath, Place], budget: list[int]) -> Any:
        budget[0] -= 1
        place = f"{file}:{node.start_mark.line + 1}:{node.start_mark.column + 1}"
        if budget[0] < 0:
            if budget[0] == -1:
                self.problems.append(Problem(place, path, f"more than {MAX_NODES} values; a recipe this large is a mistake"))
            return None
        places.setdefault(path, place)
        if isinstance(node, MappingNode):
            out: dict[Any, Any] = {}
            first: dict[Any, int] = {}
            for key_node, value_node in node.value:
                key = key_node.value if isinstance(key_node, ScalarNode) else None
                key_place = f"{file}:{key_node.start_mark.line + 1}:{key_node.start_mark.column + 1}"
                if key is None:
                    self.problems.append(Problem(key_place, path, "a key is a word"))
                elif key in out:
                    self.problems.append(Problem(key_place, (*path, key), f"duplicate key; it stands on line {first[key]} already"))
                else:
                    first[key] = key_node.start_mark.line + 1
                    places[(*path, key)] = key_place
                    out[key] = self._plain(yaml, value_node, (*path, key), file, places, budget)
            return out
        if isinstance(node, SequenceNode):
            return [self._plain(yaml, child, (*path, i), file, places, budget) for i, child in enumerate(node.value)]
        try:
            return yaml.constructor.construct_object(node, deep=True)
        except (YAMLError, ValueError):
            self.problems.append(Problem(place, path, "not a plain value (tags such as !!python are refused)", str(node.tag)))
            return None


def _named(tree: dict[str, Any]) -> dict[str, Any]:
    """Writes the short form `loss: soft_iou` as `loss: {name: soft_iou}`."""
    return {
        key: {"name": value} if isinstance(value, str) and key in SECTIONS and SECTIONS[key][0] else value for key, value in tree.items()
    }


def _siblings(path: Path) -> list[str]:
    return [p.name for p in path.parent.glob("*.yaml")] if path.parent.is_dir() else []


def _short(value: Any, limit: int = 80) -> str:
    text = repr(value) if isinstance(value, str) else str(value)
    return text if len(text) <= limit else text[: limit - 1] + "…"


# ---------------------------------------------------------------- validation


def _place(places: Mapping[KeyPath, Place], path: KeyPath, default: object) -> Place:
    for end in range(len(path), -1, -1):
        if path[:end] in places:
            return places[path[:end]]
    return str(default)


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint for an unknown word: the nearest known one, else all of them."""
    known = list(known)
    match = difflib.get_close_matches(word, known, 1, cutoff=0.6)
    return f"did you mean {match[0]!r}?" if match else f"known: {', '.join(known)}" if known else "there are none"


class _Validator:
    def __init__(self, reader: _Reader, path: Path) -> None:
        self.reader, self.path = reader, path

    def report(self, path: KeyPath, what: str, got: Any = None) -> None:
        place = _place(self.reader.places, path, self.path)
        self.reader.problems.append(Problem(place, path, what, None if got is None else _short(got)))

    def component(self, kind: str, value: Any, path: KeyPath) -> Component | None:
        if not isinstance(value, dict) or not isinstance(value.get("name"), str):
            self.report(path, f"must be a name, or a mapping with a name; {kind}s: {', '.join(catalogue(kind))}", value)
            return None
        found = catalogue(kind).get(value["name"])
        if found is None:
            self.report((*path, "name"), f"unknown {kind}; {nearest(value['name'], catalogue(kind))}", value["name"])
        return found

    def choices(self, kind: str, value: Any, path: KeyPath) -> list[Choice]:
        """A list of components, each a name or a mapping with a name."""
        if not isinstance(value, list):
            self.report(path, f"must be a list; {kind}s: {', '.join(catalogue(kind))}", value)
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
        try:
            return schema.model_validate(value)
        except ValidationError as error:
            seen: set[KeyPath] = set()
            for item in error.errors():
                where = path + _known_prefix(item["loc"], value)
                if where not in seen:  # a union reports each of its members
                    seen.add(where)
                    self._report_pydantic(schema, item, where)
            return None

    def _report_pydantic(self, schema: type[Settings], item: Any, where: KeyPath) -> None:
        key = str(where[-1]) if where else ""
        match item["type"]:
            case "extra_forbidden":
                self.report(where, f"unknown key; {nearest(key, _keys(schema, item['loc'][:-1]))}", item["input"])
            case "missing":
                self.report(where, "this key is required")
            case "value_error":
                self.report(where, str(item["ctx"]["error"]), item["input"])
            case _:
                self.report(where, _sentence(schema, item), item["input"])


def _known_prefix(location: tuple[str | int, ...], value: Any) -> KeyPath:
    """The part of pydantic's location that stands in the recipe (it also names members of unions)."""
    out: list[str | int] = []
    for part in location:
        if isinstance(value, dict) and part in value or isinstance(value, list) and isinstance(part, int) and part < len(value):
            value = value[part]
        elif not isinstance(value, dict) or out and not isinstance(value, dict):
            break
        else:
            out.append(part)
            break
        out.append(part)
    return tuple(out)


def _keys(schema: type[Settings], location: tuple[str | int, ...]) -> list[str]:
    for part in location:
        annotation = schema.model_fields[str(part)].annotation if str(part) in schema.model_fields else None
        if not (isinstance(annotation, type) and issubclass(annotation, Settings)):
            continue
        schema = annotation
    return list(schema.model_fields)


def _sentence(schema: type[Settings], item: Any) -> str:
    """Pydantic's message in this project's words; for a union, every form that is allowed."""
    message = item["msg"].replace("Input should be", "must be")
    root = schema.model_fields.get(str(item["loc"][0])) if item["loc"] else None
    union = root is not None and len(item["loc"]) > 1 and "|" in str(root.annotation)
    if union and root is not None:
        members = str(root.annotation).replace("typing.", "")
        members = re.sub(r"Annotated\[(\w+), .*?\](?= \||$)", r"\1", members).replace("Literal[", "one of [").replace("NoneType", "null").replace("None", "null")
        members = members.replace("bool", "true/false").replace("float", "a number").replace("int", "a whole number").replace(" | ", ", or ")
        return f"{message} (allowed: {members})"
    return message


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
    reader = _Reader()
    tree = reader.read(path)
    if not tree and reader.problems:
        raise RecipeError(reader.problems)
    top, places = reader.overrides(overrides)
    tree = reader.merge(tree, top, places)
    validator = _Validator(reader, path)
    recipe = Recipe(name=path.stem, path=path, places=reader.places)
    _top_level(tree, recipe, validator)
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


def _top_level(tree: dict[str, Any], recipe: Recipe, validator: _Validator) -> None:
    known = ["name", "inherit", "plugins", "track", *SECTIONS]
    for key in tree:
        if key not in known:
            validator.report((key,), f"unknown key; {nearest(key, known)}", tree[key])
    name = tree.get("name")
    if name is not None:
        if isinstance(name, str) and re.fullmatch(r"[\w][\w.+=,-]{0,127}", name):
            recipe.name = name
        else:
            validator.report(("name",), "a run's name is made of letters, digits and . _ - + = , (it names a folder)", name)
    plugins = tree.get("plugins", [])
    if not isinstance(plugins, list) or not all(isinstance(p, str) for p in plugins):
        validator.report(("plugins",), "must be a list of module names or .py files", plugins)
        return
    for i, plugin in enumerate(plugins):
        try:
            recipe.plugins.append(_import_plugin(plugin, _place(validator.reader.places, ("plugins",), recipe.path)))
        except (ImportError, OSError, SyntaxError, ValueError) as error:
            validator.report(("plugins", i), f"can't be imported: {error}", plugin)


def _import_plugin(plugin: str, place: Place) -> str:
    """Imports a listed module; a `.py` file is looked up beside the recipe that lists it."""
    if not plugin.endswith(".py"):
        importlib.import_module(plugin)
        return plugin
    file = Path(plugin) if Path(plugin).is_absolute() else Path(place.split(":")[0]).parent / plugin
    file = file.resolve()
    name = f"trainer_plugin_{file.stem}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, file)
        if spec is None or spec.loader is None or not file.is_file():
            raise ImportError(f"no file {file}")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
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


def _check_batch(recipe: Recipe) -> Iterator[Problem]:
    batch, accumulate = recipe.data.batch_size, recipe.train.accumulate
    if batch % accumulate:
        yield recipe.problem("data.batch_size", f"must be divisible by train.accumulate ({accumulate}); it counts all samples of an optimizer step", batch)


def _check_durations(recipe: Recipe) -> Iterator[Problem]:
    clock = Clock(recipe.train.duration, recipe.data.batch_size, 1)
    if recipe.train.duration.unit == "%":
        yield recipe.problem("train.duration", "can't be a share of itself; give it in steps, epochs or minutes", recipe.train.duration)
        return
    for section in ("schedule",):
        for key, value in recipe.sections[section]:
            if isinstance(value, Span):
                try:
                    share = clock.share(value) if "epochs" not in (value.unit, clock.duration.unit) or value.unit == clock.duration.unit else 0.0
                except ValueError as error:
                    yield recipe.problem(f"{section}.{key}", str(error))
                else:
                    if share > 1:
                        yield recipe.problem(f"{section}.{key}", f"is longer than the training (train.duration {clock.duration})", value)


CHECKS: tuple[tuple[tuple[str, ...], Check], ...] = (
    (("task", "data", "model", "loss"), _check_interfaces),
    (("data", "train"), _check_batch),
    (("data", "train", "schedule"), _check_durations),
)


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Keys (dotted) in which two resolved recipes differ, `name` and what a resumed run may change left out."""

    def flatten(tree: Mapping[str, Any], path: str = "") -> dict[str, Any]:
        out: dict[str, Any] = {}
        for key, value in tree.items():
            out |= flatten(value, f"{path}{key}.") if isinstance(value, dict) else {f"{path}{key}": value}
        return out

    a, b = flatten(old), flatten(new)
    keys = [key for key in {**a, **b} if a.get(key, None) != b.get(key, None)]
    return [key for key in keys if not any(key == free or key.startswith(free + ".") for free in ("name", *RESUMABLE))]
