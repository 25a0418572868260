"""A recipe written out as the start of another one: flattened, with each key that it doesn't set as a comment."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from trainer.components import Component, Settings
from trainer.recipe.describe import (
    Header,
    Key,
    component_keys,
    first_sentence,
    section_keys,
    section_summary,
    yaml_text,
)
from trainer.recipe.file import KeyPath
from trainer.recipe.recipe import Choice, Recipe
from trainer.recipe.settings import SCHEMAS

WIDEST = 44  # where comments begin at most; a longer line has its comment right behind it
NOTE = (
    "# Copied from {recipe} by `trainer copy`, with what it inherits. A key that has its default is a comment: to set\n"
    "# it, remove its `# `, and that of its section where that is a comment, too. `trainer list SECTION` prints types\n"
    "# and limits, and so does `trainer list NAME` for what a section names."
)


@dataclass
class Line:
    """A line of the template: YAML, and a comment behind it."""

    code: str
    comment: str = ""


def template(recipe: Recipe) -> str:
    """A YAML file that resolves to the same recipe, apart from its name, and inherits nothing.

    It keeps the comments of the recipe: its header, and those behind its keys, where an inherited file has the key
    that file's. Other comments are what docstrings say.

    Raises:
        OSError, ValueError: a file of the recipe can't be read any more.
    """
    comments = _own_comments(recipe)
    parts = [NOTE.format(recipe=recipe.path.name), *Header.of(recipe.path).lines]
    if len(parts) > 1:
        parts.insert(1, "#")
    top = [Line("# name: …", "of the run and its folder; by default that of this file")]
    if recipe.plugins:
        top.append(Line(f"plugins: {yaml_text(recipe.plugins)}", "imported for their components"))
    blocks = [top, *(_section(recipe, section, comments) for section in SCHEMAS)]
    if recipe.trackers:
        blocks.append([Line("track:", comments.get(("track",), "")), *_choices(recipe.trackers, ("track",), comments)])
    else:
        blocks.append([Line("# track: [tensorboard]", "where metrics also go; see `trainer list trackers`")])
    if recipe.reference:
        blocks.append([Line(f"reference: {yaml_text(recipe.reference)}", comments.get(("reference",), ""))])
    return "\n".join([*parts, *("\n" + _aligned(block) for block in blocks)]) + "\n"


def _section(recipe: Recipe, section: str, comments: dict[KeyPath, str]) -> list[Line]:
    settings, component = getattr(recipe, section), recipe.components.get(section)
    keys = _keys(section, component, settings)
    lines = _settings(settings, keys, (section,), comments, "  ")
    comment = comments.get((section,)) or section_summary(section) * (component is None)
    if not settings.model_fields_set:  # a section of comments alone would be null
        return [
            Line(f"# {section}:", comment),
            *(Line("# " + line.code.replace("# ", "", 1), line.comment) for line in lines),
        ]
    if section == "data":
        if recipe.augmentations:
            lines.append(Line("  augment:", comments.get(("data", "augment"), "")))
            lines += [
                Line(f"  {line.code}", line.comment)
                for line in _choices(recipe.augmentations, ("data", "augment"), comments)
            ]
        else:
            lines.append(
                Line(
                    "  # augment: [horizontal_flip]",
                    "random changes of training samples; none by default; see `trainer list augmentations`",
                )
            )
    return [Line(f"{section}:", comment), *lines]


def _keys(section: str, component: Component | None, settings: Settings) -> list[Key]:
    """The keys of a section: the component's name and keys first, then those that others have, too."""
    shared = section_keys(section)
    if component is None:
        return shared
    own = component_keys(component)
    names = {key.name for key in own} | {"name"}
    return [_name_key(component), *own, *(key for key in shared if key.name not in names)]


def _name_key(component: Component) -> Key:
    return Key("name", "", None, first_sentence(component.factory.__doc__ or ""))


def _choices(choices: list[Choice], path: KeyPath, comments: dict[KeyPath, str]) -> list[Line]:
    """The entries of a list of components."""
    lines = []
    for index, (component, settings) in enumerate(choices):
        keys = [_name_key(component), *component_keys(component)]
        first, *rest = _settings(settings, keys, (*path, index), comments, "    ")
        lines += [Line(f"  - {first.code.lstrip()}", comments.get((*path, index)) or first.comment), *rest]
    return lines


def _settings(
    settings: Settings, keys: list[Key], path: KeyPath, comments: dict[KeyPath, str], indent: str
) -> list[Line]:
    """The keys that are set, then the others as comments."""
    values = settings.model_dump(mode="json")
    given = [key for key in keys if key.name in settings.model_fields_set]
    lines = [
        Line(f"{indent}{key.name}: {yaml_text(values[key.name])}", comments.get((*path, key.name)) or _words(key))
        for key in given
    ]
    return lines + [
        Line(f"{indent}# {key.name}: {yaml_text(values[key.name])}", _words(key)) for key in keys if key not in given
    ]


def _words(key: Key) -> str:
    """Choices, where there are few, and the first sentence of what a key means."""
    choices = (
        key.type if re.fullmatch(r"(?!true)[\w.]+( \| (?!null|text|integer|number|list)[\w.]+)+", key.type) else ""
    )
    return ": ".join(part for part in (choices, first_sentence(key.help)) if part)


def _aligned(lines: list[Line]) -> str:
    start = min(WIDEST, max(len(line.code) for line in lines) + 2)
    return "\n".join(f"{line.code:{start - 2}}  # {line.comment}" if line.comment else line.code for line in lines)


# ---------------------------------------------------------------- the recipe's own comments


def _own_comments(recipe: Recipe) -> dict[KeyPath, str]:
    """The comments behind keys, each for the one key that its line has; of `{a: 1, b: 2}` it is that of the mapping."""
    lines: dict[str, list[KeyPath]] = {}
    for path, place in recipe.places.items():
        lines.setdefault(place.rpartition(":")[0], []).append(path)
    comments: dict[KeyPath, str] = {}
    for place, paths in lines.items():
        file, _, number = place.rpartition(":")
        first = min(paths, key=len)
        if not first or not number.isdigit() or any(path[: len(first)] != first for path in paths):
            continue
        found = re.match(r"""(?:[^#'"]|'[^']*'|"[^"]*"|(?<=\S)#)*\s#\s*(.*)""", _text(file)[int(number) - 1])
        if found:
            comments[first] = found[1].strip()
    return comments


@lru_cache(maxsize=16)
def _text(file: str) -> list[str]:
    return Path(file).read_text(encoding="utf-8").splitlines()
