"""Recipe files: YAML with `inherit` and `key.path=value`, merged into one tree, with the place of every key.

Mappings merge recursively, the child's keys over the parent's; lists are replaced. If a section names another
component, the keys of the old component are dropped; those that all components of the section share are kept.
"""

from __future__ import annotations

import difflib
import io
import warnings
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, ReusedAnchorWarning, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from trainer.errors import UserError

KeyPath = tuple[str | int, ...]

Place = str
"""The location of a value: `file:line:column`, or `command line`."""

COMMAND_LINE: Place = "command line"

MAX_NODES = 20_000  # a recipe fills a page; more is a mistake or an alias bomb

MAX_BYTES = 2**17  # the parser takes seconds for these


@dataclass(frozen=True)
class Problem:
    """One mistake: its place and key, what is wrong and what to do."""

    place: Place
    path: KeyPath
    what: str
    got: str | None = None

    def __str__(self) -> str:
        key = f" {dotted(self.path)}:" if self.path else ""
        got = "" if self.got is None else f" (got {self.got})"
        return f"{self.place}:{key} {self.what}{got}"


class RecipeError(UserError):
    """The recipe is invalid; lists every problem."""

    label = ""  # each line starts with a place instead

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = sorted(set(problems), key=lambda p: (_natural(p.place), p.path != (), str(p.path)))
        super().__init__("\n".join(map(str, self.problems)))


def _natural(place: Place) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (0, part) for part in place.split(":")]


def dotted(path: KeyPath) -> str:
    """`("track", 0, "mode")` as `track[0].mode`."""
    return "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in path).lstrip(".")


def place_of(places: Mapping[KeyPath, Place], path: KeyPath, default: object) -> Place:
    """The place of `path`, or of the nearest key above it."""
    for end in range(len(path), -1, -1):
        if path[:end] in places:
            return places[path[:end]]
    return str(default)


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint for an unknown word: the nearest known one, else all of them."""
    known = list(known)
    if not known:
        return "there are none"
    by_lower = {name.lower(): name for name in known}
    match = difflib.get_close_matches(word.lower(), by_lower, 1, cutoff=0.6)
    return f"did you mean {by_lower[match[0]]!r}?" if match else f"known: {', '.join(known)}"


class Reader:
    """Reads a recipe and its parents into one tree, with the place of every key.

    Args:
        shared: the sections that name a component, each with the keys that all its components share. Such a section may
            be just a name, `loss: soft_iou` for `loss: {name: soft_iou}`.

    Attributes:
        problems: the mistakes found so far.
        places: of each key of the merged tree.
        dropped: a line for each change of a component that dropped keys: its place, both names and these keys.
        complete: whether every file could be read; if not, keys may be missing from the tree.
    """

    def __init__(self, shared: Mapping[str, Container[str]]) -> None:
        self.shared = shared
        self.problems: list[Problem] = []
        self.places: dict[KeyPath, Place] = {}
        self.dropped: list[str] = []
        self.complete = True

    def read(self, path: Path, children: tuple[Path, ...] = (), at: Place | None = None) -> dict[str, Any]:
        """Reads `path` over its parents; `children` inherit from it, at the place `at`. Mistakes go to `problems`."""
        where = at or str(path)
        try:
            resolved = path.resolve()
            if resolved in children:
                chain = " -> ".join(str(p.name) for p in (*children, path))
                return self._unread(where, ("inherit",), f"circular inheritance: {chain}")
            text = _read_text(resolved)
        except FileNotFoundError:
            near = difflib.get_close_matches(path.stem, _siblings(path), 1)
            hint = f"; did you mean {path.with_name(near[0])}.yaml?" if near else ""
            what = "the parent recipe doesn't exist" if children else "no such recipe"
            return self._unread(where, ("inherit",) if children else (), what + hint, str(path))
        except (OSError, ValueError) as error:
            return self._unread(where, (), f"can't be read: {error}", short(str(path)))
        places: dict[KeyPath, Place] = {}
        problems_before = len(self.problems)
        tree = self._parse(text, str(path), places)
        if tree is None and len(self.problems) > problems_before:
            self.complete = False
        parent = tree.pop("inherit", None) if isinstance(tree, dict) else None
        if tree is not None and not isinstance(tree, dict):
            tree = self._unread(
                f"{path}:1:1", (), "must be a mapping of sections (task:, data:, model:, …)", short(tree)
            )
        merged: dict[str, Any] = {}
        if parent is not None:
            place = places.get(("inherit",), str(path))
            if isinstance(parent, str):
                merged = self.read(path.parent / parent, (*children, resolved), place)
            else:
                self._unread(place, ("inherit",), "must be the file name of another recipe", short(parent))
        return self.merge(merged, tree or {}, places)

    def _unread(self, place: Place, path: KeyPath, what: str, got: str | None = None) -> dict[str, Any]:
        self.problems.append(Problem(place, path, what, got))
        self.complete = False
        return {}

    def overrides(self, arguments: Iterable[str]) -> tuple[dict[str, Any], dict[KeyPath, Place]]:
        """`key.path=value` arguments as one tree, and the places of its keys."""
        tree: dict[str, Any] = {}
        places: dict[KeyPath, Place] = {}
        for argument in arguments:
            dotted_path, equals, value = argument.partition("=")
            path = dotted_path.strip().split(".")
            if not equals or not all(path):
                self.problems.append(
                    Problem(COMMAND_LINE, (), "an override must be key.path=value, e.g. optimizer.lr=1e-3", argument)
                )
                continue
            inner: dict[KeyPath, Place] = {}
            one = self._parse(value, COMMAND_LINE, inner)
            for part in reversed(path):
                one = {part: one}
            above = [tuple(path[:end]) for end in range(1, len(path) + 1)]
            tree = self._merge(
                tree, places, one, dict.fromkeys([*above, *((*path, *rest) for rest in inner)], COMMAND_LINE)
            )
        return tree, places

    def merge(self, base: dict[str, Any], top: dict[str, Any], places: dict[KeyPath, Place]) -> dict[str, Any]:
        """Merges `top`, with the places of its keys, over `base`; drops the keys of components that `top` replaces."""
        return self._merge(base, self.places, top, places)

    def _merge(
        self, base: dict[str, Any], below: dict[KeyPath, Place], top: dict[str, Any], places: dict[KeyPath, Place]
    ) -> dict[str, Any]:
        base, top = self._long_form(base), self._long_form(top)
        for section, shared in self.shared.items():
            old, new = base.get(section), top.get(section)
            if isinstance(old, dict) and isinstance(new, dict) and _names_differ(old, new):
                base[section] = {key: value for key, value in old.items() if key in shared}
                lost: list[KeyPath] = [(section, key) for key in old if key not in base[section]]
                if section == "data" and "reference" in base:  # published values, valid only for their data
                    del base["reference"]
                    lost.append(("reference",))
                for path in [path for path in below if path[:1] in lost or path[:2] in lost]:
                    del below[path]
                dropped = [dotted(path) for path in lost if path not in places and path != (section, "name")]
                if dropped:
                    place = place_of(places, (section, "name"), COMMAND_LINE)
                    change = f"{section}.name changed from {old['name']} to {new['name']}"
                    self.dropped.append(f"{place}: {change}: dropped {', '.join(dropped)}")
        below |= places
        return _over(base, top)

    def _long_form(self, tree: dict[str, Any]) -> dict[str, Any]:
        return {
            key: {"name": value} if isinstance(value, str) and key in self.shared else value
            for key, value in tree.items()
        }

    def _parse(self, text: str, file: str, places: dict[KeyPath, Place]) -> Any:
        return _Document(file, places, self.problems).parse(text)


class _Document:
    """Converts one YAML text to plain values.

    Args:
        file: the text's source.
        places: receives the place of each key.
        problems: receives the mistakes.
    """

    def __init__(self, file: str, places: dict[KeyPath, Place], problems: list[Problem]) -> None:
        self.file, self.places, self.problems = file, places, problems
        self.yaml = YAML(typ="safe", pure=True)
        self.nodes = 0

    def parse(self, text: str) -> Any:
        """The values; None if there are none or the text isn't YAML."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ReusedAnchorWarning)  # YAML allows it
                node = self.yaml.compose(io.StringIO(text))
            return None if node is None else self._value(node, ())
        except RecursionError:
            return self._refused(self.file, (), "nested too deeply, or an alias that contains itself")
        except MarkedYAMLError as error:
            what = f"not valid YAML: {error.problem or error.context}"
            mark = error.problem_mark or error.context_mark
            if self.file == COMMAND_LINE:
                return self._refused(self.file, (), what, short(text))
            return self._refused(self._place(mark) if mark else self.file, (), what)
        except (YAMLError, ValueError) as error:
            return self._refused(self.file, (), f"not valid YAML: {str(error).splitlines()[0]}")

    def _value(self, node: Node, path: KeyPath) -> Any:
        place = self._place(node.start_mark)
        self.nodes += 1
        if self.nodes > MAX_NODES:
            if self.nodes == MAX_NODES + 1:
                self._refused(place, path, f"more than {MAX_NODES} values; a recipe this large is a mistake")
            return None
        self.places.setdefault(path, place)
        tag = str(node.tag)
        if not tag.startswith("tag:yaml.org,2002:") or "python" in tag:
            return self._refused(place, path, "YAML tags aren't allowed: a recipe holds plain values", tag)
        if isinstance(node, MappingNode):
            return self._mapping(node, path)
        if isinstance(node, SequenceNode):
            return [self._value(child, (*path, i)) for i, child in enumerate(node.value)]
        try:
            value = self.yaml.constructor.construct_object(node, deep=True)
        except Exception:  # constructors raise all kinds of errors if a tag doesn't fit its value
            return self._refused(place, path, "not a plain value", short(node.value))
        if isinstance(value, int) and abs(value) >= 2**63:
            return self._refused(place, path, "must fit in a 64-bit integer", short(node.value))
        return value

    def _mapping(self, node: MappingNode, path: KeyPath) -> dict[str, Any]:
        values: dict[str, Any] = {}
        lines: dict[str, int] = {}
        for key_node, value_node in node.value:
            place = self._place(key_node.start_mark)
            if not isinstance(key_node, ScalarNode):
                self._refused(place, path, "a key must be a plain value")
                continue
            key = key_node.value
            if key in values:
                self._refused(place, (*path, key), f"duplicate key; first defined on line {lines[key]}")
                continue
            lines[key] = key_node.start_mark.line + 1
            self.places[(*path, key)] = place
            values[key] = self._value(value_node, (*path, key))
        return values

    def _place(self, mark: Any) -> Place:
        return f"{self.file}:{mark.line + 1}:{mark.column + 1}"

    def _refused(self, place: Place, path: KeyPath, what: str, got: str | None = None) -> None:
        self.problems.append(Problem(place, path, what, got))


def _names_differ(old: dict[str, Any], new: dict[str, Any]) -> bool:
    return "name" in old and "name" in new and bool(old["name"] != new["name"])


def _over(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    out = dict(base)
    for key, value in top.items():
        below = out.get(key)
        out[key] = _over(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return out


def _read_text(path: Path) -> str:
    if path.exists() and not path.is_file():
        raise OSError("it is not a file")  # a pipe or a device may never end
    if path.exists() and path.stat().st_size > MAX_BYTES:
        raise OSError(f"it is larger than {MAX_BYTES // 2**10} KiB")
    return path.read_text(encoding="utf-8")


def _siblings(path: Path) -> list[str]:
    return [p.stem for p in path.parent.glob("*.yaml")] if path.parent.is_dir() else []


def short(value: Any, limit: int = 80) -> str:
    """A value, shortened for a message."""
    text = repr(value) if isinstance(value, str) else str(value)
    return text if len(text) <= limit else text[: limit - 1] + "…"
