"""What recipes can say, in words: the components of each kind, their keys, the sections, the recipes there are.

Lists of components are read from the catalogue's sources, without importing them: most need torch. The keys of one
are those of its schema, each with the sentence that the docstring's `Args` has for it.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic import AfterValidator, PlainValidator
from pydantic.fields import FieldInfo
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from trainer.components import CATALOGUE, Component, Settings, registered
from trainer.recipe.durations import Span
from trainer.recipe.settings import KINDS, SCHEMAS

# What `trainer list` calls them.
PLURALS = {kind: "losses" if kind == "loss" else f"{kind}s" for kind in CATALOGUE}
MANY = 12  # choices that a type still names one by one


@dataclass(frozen=True)
class Entry:
    """A component in a list.

    Attributes:
        kind: a key of `CATALOGUE`.
        name: what a recipe calls it.
        module: that has it.
        interfaces, fields: see `Component`.
        summary: the first sentence of its docstring.
    """

    kind: str
    name: str
    module: str
    interfaces: tuple[str, ...]
    fields: tuple[str, ...]
    summary: str

    def component(self) -> Component:
        """The component; imports its module, but not those of the others."""
        importlib.import_module(self.module)
        return registered(self.kind)[self.name]


@dataclass(frozen=True)
class Key:
    """A key of a recipe.

    Attributes:
        name: its name.
        type: type and limits, in words.
        default: as YAML says it; None where the key is required.
        help: what it means; empty where the docstring doesn't say.
    """

    name: str
    type: str
    default: str | None
    help: str


# ---------------------------------------------------------------- components


def entries(kind: str) -> list[Entry]:
    """The components of a kind by name: those of the catalogue, and those of the plugins that were imported."""
    found = {entry.name: entry for entry in _scan(kind)}
    for name, component in registered(kind).items():
        if name not in found:
            factory, interfaces, fields = component.factory, component.interfaces, component.fields
            summary = first_sentence(factory.__doc__ or "")
            found[name] = Entry(kind, name, factory.__module__, interfaces, fields, summary)
    return [found[name] for name in sorted(found)]


@lru_cache
def _scan(kind: str) -> tuple[Entry, ...]:
    """The functions and classes below the catalogue's place for a kind that have its decorator."""
    spec = find_spec(CATALOGUE[kind])
    assert spec is not None and spec.origin is not None
    file = Path(spec.origin)
    modules = {CATALOGUE[kind]: file}
    if spec.submodule_search_locations:
        modules = {f"{CATALOGUE[kind]}.{each.stem}": each for each in sorted(file.parent.glob("*.py"))}
    return tuple(
        _entry(kind, module, node, decorator)
        for module, each in modules.items()
        for node in ast.parse(each.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
        for decorator in node.decorator_list
        if isinstance(decorator, ast.Call) and isinstance(decorator.func, ast.Name) and decorator.func.id == kind
    )


def _entry(kind: str, module: str, node: ast.FunctionDef | ast.ClassDef, decorator: ast.Call) -> Entry:
    given = {keyword.arg: ast.literal_eval(keyword.value) for keyword in decorator.keywords}
    interface = given.get("interface", "")
    return Entry(
        kind,
        given.get("name") or node.name.lower(),
        module,
        (interface,) if isinstance(interface, str) else tuple(interface),
        tuple(given.get("fields", ())),
        first_sentence(ast.get_docstring(node) or ""),
    )


def component_keys(component: Component) -> list[Key]:
    """The keys that a component's section has beside those of `section_keys`."""
    factory = component.factory
    bases = reversed(factory.__mro__[:-1]) if isinstance(factory, type) else [factory]
    sentences: dict[str, str] = {}
    for base in bases:
        sentences |= argument_sentences(base.__doc__ or "")
    return _keys(component.schema, sentences)


def section_keys(section: str) -> list[Key]:
    """The keys that a section has whatever component it names."""
    schema = SCHEMAS[section]
    return _keys(schema, argument_sentences(schema.__doc__ or ""))


def section_summary(section: str) -> str:
    """What a section is for, in a sentence."""
    return first_sentence(SCHEMAS[section].__doc__ or "")


def section_of(kind: str) -> str | None:
    """The section that names a component of this kind; None for those that lists name."""
    return next((section for section, named in KINDS.items() if named == kind), None)


def _keys(schema: type[Settings], sentences: dict[str, str]) -> list[Key]:
    return [
        Key(
            name,
            type_text(info.annotation, info.metadata),
            None if info.is_required() else yaml_text(info.default),
            sentences.get(name, ""),
        )
        for name, info in schema.model_fields.items()
    ]


# ---------------------------------------------------------------- types


def type_text(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    """A type and its limits in words, e.g. `integer > 0`, `number in [0, 1)`, `list of 2 integers > 0`, `text | null`.

    Args:
        annotation: as in a signature.
        metadata: limits and validators, as `Annotated` has them.
    """
    metadata = [each for one in metadata for each in (one.metadata if isinstance(one, FieldInfo) else [one])]
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return type_text(arguments[0], [*arguments[1:], *metadata])
    if origin is Literal:
        shown = [yaml_text(value) for value in arguments]
        return " | ".join(shown if len(shown) <= MANY else [*shown[: MANY - 1], "…"])
    if origin in (Union, UnionType):
        return " | ".join(type_text(argument) for argument in arguments)
    if annotation is NoneType:
        return "null"
    if annotation is Span:
        parse = next((each.func for each in metadata if isinstance(each, PlainValidator)), None)
        return "duration, or 0%" if parse == Span.parse else "duration"
    if annotation is bool:
        return "true | false"
    if inspect.isclass(origin) and issubclass(origin, Sequence):
        text = _list_text(arguments[0], metadata)
    else:
        words = {int: "integer", float: "number", str: "text"}
        text = f"{words.get(annotation, getattr(annotation, '__name__', str(annotation)))}{_range_text(metadata)}"
    remarks = [each.func.__doc__ for each in metadata if isinstance(each, AfterValidator) and each.func.__doc__]
    return text + "".join(f" ({_lowered(remark.strip().rstrip('.'))})" for remark in remarks)


def _lowered(text: str) -> str:
    """A phrase without its capital, which a sentence has; OWNER keeps its."""
    return text[0].lower() + text[1:] if text[1:2].islower() else text


def _list_text(item: Any, metadata: Sequence[Any]) -> str:
    bounds: dict[str, int] = {}
    for each in metadata:
        for name in ("min_length", "max_length"):
            if getattr(each, name, None) is not None:
                bounds[name] = getattr(each, name)
    low, high = bounds.get("min_length", 0), bounds.get("max_length")
    number = f"{low} " if low == high else f"{low} to {high} " if high else f"at least {low} " if low else ""
    word, *limits = type_text(item).split(" ", 1)
    plural = word if word == "text" or "|" in "".join(limits) else f"{word}s"
    return " ".join([f"list of {number}{plural}", *limits])


def _range_text(metadata: Iterable[Any]) -> str:
    low: tuple[str, str, Any] | None = None
    high: tuple[str, str, Any] | None = None
    for each in metadata:
        match each:
            case annotated_types.Gt():
                low = ("(", "> ", each.gt)
            case annotated_types.Ge():
                low = ("[", "≥ ", each.ge)
            case annotated_types.Lt():
                high = (")", "< ", each.lt)
            case annotated_types.Le():
                high = ("]", "≤ ", each.le)
    if low and high:
        return f" in {low[0]}{low[2]}, {high[2]}{high[0]}"
    one = low or high
    return f" {one[1]}{one[2]}" if one else ""


def yaml_text(value: Any) -> str:
    """A value of a recipe as YAML in one line."""
    if isinstance(value, Span):
        value = str(value)
    if isinstance(value, str):
        return value if _is_plain(value) else _quoted(value)
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(yaml_text, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{yaml_text(key)}: {yaml_text(each)}' for key, each in value.items())}}}"
    if isinstance(value, float):
        return re.sub(r"e([+-])0?", r"e\1", repr(value)).replace("e+", "e")
    return json.dumps(value)


def _quoted(text: str) -> str:
    return "".join(c if c.isprintable() else f"\\U{ord(c):08x}" for c in json.dumps(text, ensure_ascii=False))


def _is_plain(text: str) -> bool:
    """Whether YAML reads this text as itself, without quotes, in a list too."""
    if not re.fullmatch(r"[\w./][\w ./%+=-]*", text) or text != text.strip():
        return False
    try:
        return bool(YAML(typ="safe", pure=True).load(text) == text)
    except (YAMLError, ValueError):
        return False


# ---------------------------------------------------------------- docstrings


def first_sentence(text: str) -> str:
    """The first sentence of a text's first paragraph, in one line."""
    paragraph = " ".join(inspect.cleandoc(text).split("\n\n")[0].split())
    end = re.search(r"(?<!e\.g)(?<!i\.e)(?<!al)\.(?=$|\s+[A-Z`\"(])", paragraph)
    return (paragraph[: end.start()] if end else paragraph).rstrip(".")


def description(text: str) -> str:
    """A docstring without its sections: what stands before `Args` and the like."""
    return re.split(r"\n+(?:Args|Attributes|Raises|Returns|Yields):\n", inspect.cleandoc(text))[0].strip()


def argument_sentences(text: str) -> dict[str, str]:
    """What a Google docstring says of each argument or attribute, in one line each."""
    found = re.search(r"^(?:Args|Attributes):\n((?:[ ].*\n|\n)*)", inspect.cleandoc(text) + "\n", re.MULTILINE)
    sentences: dict[str, str] = {}
    for names, sentence in re.findall(
        r"^    (\w+(?:, \w+)*): (.*(?:\n {5,}.*)*)", found[1] if found else "", re.MULTILINE
    ):
        sentences |= dict.fromkeys(names.split(", "), " ".join(sentence.split()))
    return sentences


# ---------------------------------------------------------------- recipes


@dataclass(frozen=True)
class Header:
    """The comment at the top of a recipe.

    Attributes:
        lines: as they stand there.
    """

    lines: list[str]

    @classmethod
    def of(cls, file: Path) -> Header:
        """That of a recipe's file; raises OSError and ValueError where it can't be read."""
        lines = []
        for line in file.read_text(encoding="utf-8").splitlines():
            if not line.startswith("#"):
                break
            lines.append(line.rstrip())
        return cls(lines)

    @property
    def text(self) -> str:
        """Without the comment signs."""
        return "\n".join(line[1:].removeprefix(" ") for line in self.lines)

    @property
    def summary(self) -> str:
        """The first sentence."""
        return first_sentence(self.text)

    @property
    def result(self) -> str:
        """What follows `Result:`; empty where nothing does."""
        found = re.search(r"^Result:(.*(?:\n {4,}\S.*)*)", self.text, re.MULTILINE)
        return " ".join(found[1].split()) if found else ""


def recipe_folders() -> list[Path]:
    """Where recipes are looked for: here, then beside the package."""
    return [Path("recipes"), Path(__file__).resolve().parents[2] / "recipes"]


def recipe_files() -> dict[str, Path]:
    """The recipes of the first of these folders that has any, by name."""
    for folder in recipe_folders():
        if found := {file.stem: file for file in sorted(folder.glob("*.yaml"))}:
            return found
    return {}
