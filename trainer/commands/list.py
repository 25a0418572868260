"""`trainer list`: what recipes can name, and the keys of each. Only the keys of a component wait for torch."""

from __future__ import annotations

import argparse
import textwrap
from pathlib import Path

from trainer.components import CATALOGUE, Component
from trainer.errors import UserError
from trainer.recipe import describe
from trainer.recipe.describe import PLURALS, Header, Key
from trainer.recipe.file import nearest
from trainer.recipe.load import import_plugin
from trainer.recipe.settings import KINDS, SCHEMAS
from trainer.reporting.table import cut, table, terminal_width

HELP = "list recipes, models, losses, data sets, …, or the keys of one of them"
RECIPES, SECTIONS = "recipes", "sections"
KIND_OF = {plural: kind for kind, plural in PLURALS.items()}
DURATION = "A duration is e.g. 500 steps, 2 epochs, 10% (of the training) or 30 minutes."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of this verb."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = (
        "For example\n"
        "  trainer list                 all kinds, with the names of each\n"
        "  trainer list models          one line for each model\n"
        "  trainer list unet            the keys of the model unet, with types, limits, defaults and meaning\n"
        "  trainer list train           the keys of a recipe's section train\n"
        "  trainer list quickstart      what a recipe's header says"
    )
    parser.add_argument(
        "what",
        nargs="?",
        metavar="KIND | NAME",
        help=f"a kind ({', '.join([RECIPES, *KIND_OF, SECTIONS])}), or the name of anything listed",
    )
    parser.add_argument(
        "--plugin",
        action="append",
        default=[],
        metavar="FILE",
        help="also list the components of this .py file or module, as `plugins:` of a recipe names it; may be repeated",
    )


def run(options: argparse.Namespace) -> None:
    """Prints the list, or the keys.

    Raises:
        UserError: there is nothing of that name, or a plugin can't be imported.
    """
    for plugin in options.plugin:
        try:
            import_plugin(plugin, Path())
        except Exception as error:  # whatever its code raises
            raise UserError(f"--plugin {plugin}: can't be imported: {error}") from error
    what = options.what
    if what is None:
        print(_overview())
    elif what in KIND_OF:
        print(_components(KIND_OF[what]))
    elif what == RECIPES:
        print(_recipes())
    elif what == SECTIONS:
        print(_sections())
    else:
        print("\n\n".join(_named(what)))


# ---------------------------------------------------------------- lists


def _overview() -> str:
    """The kinds, with their numbers and names."""
    names = {
        RECIPES: list(describe.recipe_files()),
        **{plural: [entry.name for entry in describe.entries(kind)] for plural, kind in KIND_OF.items()},
        SECTIONS: list(SCHEMAS),
    }
    width = terminal_width() or 120
    lines = []
    for plural, known in names.items():
        head = f"{plural:14}{len(known):3}  "
        text = ", ".join(known) or _no_recipes()
        lines += textwrap.wrap(
            text, width, initial_indent=head, subsequent_indent=" " * len(head), break_on_hyphens=False
        )
    return "\n".join([*lines, "", "trainer list KIND says more of each, trainer list NAME prints its keys."])


def _components(kind: str) -> str:
    """One line for each component of a kind."""
    width, rows = terminal_width(), []
    for entry in describe.entries(kind):
        fields = f"needs {', '.join(entry.fields)}" if kind == "task" else ", ".join(entry.fields)
        rows.append([entry.name, ", ".join(entry.interfaces), fields, entry.summary])
    return "\n".join(cut(line, width) for line in table(rows))


def _sections() -> str:
    width = terminal_width()
    rows = [[section, describe.section_summary(section)] for section in SCHEMAS]
    return "\n".join(cut(line, width) for line in table(rows))


def _recipes() -> str:
    """Two lines for each recipe: what it is, and its result."""
    files = describe.recipe_files()
    if not files:
        raise UserError(_no_recipes())
    width, lines = terminal_width(), [f"in {next(iter(files.values())).parent}:"]
    for name, file in files.items():
        header = _header(file)
        lines += [f"{name}: {header.summary}", *([f"    Result: {header.result}"] if header.result else [])]
    return "\n".join(cut(line, width) for line in lines)


def _no_recipes() -> str:
    places = " nor in ".join(map(str, describe.recipe_folders()))
    return f"no recipes (*.yaml) in {places}; run this in a folder that has some, e.g. in a checkout of the repository"


def _header(file: Path) -> Header:
    try:
        return Header.of(file)
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: can't be read: {error}") from error


# ---------------------------------------------------------------- one of them


def _named(name: str) -> list[str]:
    """What each thing of that name is; a kind in the singular stands for its list."""
    texts = []
    if name in SCHEMAS:
        texts.append(_section(name))
    elif name in CATALOGUE:
        return [_components(name)]
    elif name == "recipe":
        return [_recipes()]
    known = [entry for kind in CATALOGUE for entry in describe.entries(kind)]
    texts += [_component(entry.component()) for entry in known if entry.name == name]
    files = describe.recipe_files()
    if name in files:
        texts.append(f"recipe {files[name]}\n\n{_indented(_header(files[name]).text)}")
    if not texts:
        hint = nearest(name, [*KIND_OF, RECIPES, SECTIONS, *SCHEMAS, *files, *(entry.name for entry in known)])
        raise UserError(
            f"there is no {name!r}; " + (hint if hint.startswith("did") else "`trainer list` prints all names")
        )
    return texts


def _section(section: str) -> str:
    parts = [f"section {section}: {describe.section_summary(section)}"]
    parts.append(_keys_table(describe.section_keys(section)))
    if section in KINDS:
        plural = PLURALS[KINDS[section]]
        parts.append(f"It has the keys of what it names, too: `trainer list {plural}`, then `trainer list NAME`.")
    return "\n\n".join(parts)


def _component(component: Component) -> str:
    kind = component.kind
    interfaces = f", interface {', '.join(component.interfaces)}" if any(component.interfaces) else ""
    verb = "needs" if kind == "task" else "has"
    fields = f", {verb} {', '.join(component.fields)}" if component.fields else ""
    parts = [
        f"{kind} {component.name}{interfaces}{fields}",
        _indented(describe.description(component.factory.__doc__ or "")),
    ]
    keys = describe.component_keys(component)
    section = describe.section_of(kind)
    own = {key.name for key in keys} | {"name"}
    shared = [key.name for key in describe.section_keys(section) if key.name not in own] if section else []
    parts.append(_keys_table(keys) if keys else "It has no keys of its own.")
    if shared:
        parts.append(f"Keys of every {kind} (`trainer list {section}`): {', '.join(shared)}.")
    return "\n\n".join(part for part in parts if part)


def _keys_table(keys: list[Key]) -> str:
    """Key, type and default, with what it means below each other in the last column."""
    rows = [["key", "type", "default", "meaning"]]
    rows += [[key.name, key.type, "required" if key.default is None else key.default, key.help] for key in keys]
    heads = table([row[:3] for row in rows])
    start = max(map(len, heads)) + 2
    width = max(terminal_width() or 160, start + 40)
    lines = []
    for head, row in zip(heads, rows, strict=True):
        first, *rest = textwrap.wrap(row[3], width - start, break_on_hyphens=False) or [""]
        lines += [f"{head:{start}}{first}".rstrip(), *(" " * start + line for line in rest)]
    if any(key.type.startswith("duration") for key in keys):
        lines += ["", DURATION]
    return "\n".join(lines)


def _indented(text: str) -> str:
    return textwrap.indent(text, "  ")
