"""What recipes can say, in words, as `trainer list`, `trainer copy` and the documentation say it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Field, PositiveInt
from ruamel.yaml import YAML

from trainer.components import CATALOGUE, Fraction, FractionBelowOne, InnerFraction, Size, catalogue, weights_field
from trainer.recipe import describe
from trainer.recipe.durations import Duration, DurationOrZero, Span
from trainer.recipe.load import load_recipe
from trainer.recipe.settings import SCHEMAS
from trainer.recipe.template import template

ROOT = Path(__file__).resolve().parents[3]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("kind", CATALOGUE)
def test_the_lists_read_without_importing_are_those_of_the_imported_catalogue(kind: str) -> None:
    describe._scan.cache_clear()
    found = {entry.name: entry for entry in describe._scan(kind)}
    own = {name: each for name, each in catalogue(kind).items() if each.factory.__module__.startswith("trainer.")}
    assert found.keys() == own.keys()
    for name, component in own.items():
        summary = describe.first_sentence(component.factory.__doc__ or "")
        assert (found[name].interfaces, found[name].fields, found[name].summary) == (
            component.interfaces,
            component.fields,
            summary,
        )
        assert summary


def test_every_key_of_every_component_and_section_has_a_type_in_words_and_a_sentence() -> None:
    keys = {f"{section}.{key.name}": key for section in SCHEMAS for key in describe.section_keys(section)}
    for kind in CATALOGUE:
        for name, component in catalogue(kind).items():
            if component.factory.__module__.startswith("trainer."):
                keys |= {f"{kind} {name}.{key.name}": key for key in describe.component_keys(component)}
    assert len(keys) > 100
    assert [where for where, key in keys.items() if not key.help] == []
    assert [where for where, key in keys.items() if "typing" in key.type or "<" in key.type.replace("< ", "")] == []


@pytest.mark.parametrize(
    ("annotation", "words"),
    [
        (PositiveInt, "integer > 0"),
        (Annotated[int, Field(ge=0, le=1024)], "integer in [0, 1024]"),
        (Fraction, "number in [0, 1]"),
        (FractionBelowOne, "number in [0, 1)"),
        (InnerFraction | None, "number in (0, 1) | null"),
        (Size, "list of 2 integers > 0"),
        (list[str], "list of text"),
        (list[Size] | None, "list of lists of 2 integers > 0 | null"),
        (Sequence[Annotated[int, Field(ge=1)]], "list of integers ≥ 1"),
        (Annotated[list[float], Field(min_length=2)], "list of at least 2 numbers"),
        (Literal["auto"] | bool, "auto | true | false"),
        (Literal["none", "mean"], '"none" | mean'.replace('"', "")),
        (Duration, "duration"),
        (DurationOrZero, "duration, or 0%"),
        (Annotated[str, weights_field("coco")], "text (coco, none or an existing .safetensors file)"),
    ],
)
def test_types_and_limits_are_words(annotation: Any, words: str) -> None:
    assert describe.type_text(annotation) == words


@settings(max_examples=30, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers(-(2**62), 2**62) | st.floats(allow_nan=False, allow_infinity=False)
        | st.text(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
        max_leaves=5,
    )
)  # fmt: skip
def test_a_value_written_as_yaml_is_read_as_itself(value: Any) -> None:
    read = YAML(typ="safe", pure=True).load(f"key: {describe.yaml_text(value)}\n")["key"]
    assert read == value and type(read) is type(value)


def test_durations_are_written_as_recipes_write_them() -> None:
    assert describe.yaml_text(Span.parse("10%")) == "10%"
    assert describe.yaml_text(1e-6) == "1e-6"


def test_a_docstring_gives_its_first_sentence_its_description_and_its_arguments() -> None:
    text = """Half a cosine, e.g. Of two
    (Author et al., 2017). Then more.

    A second paragraph.

    Args:
        a: the first,
            of two lines.
        b, c: the others.

    Raises:
        ValueError: never.
    """
    assert describe.first_sentence(text) == "Half a cosine, e.g. Of two (Author et al., 2017)"
    assert describe.description(text).endswith("A second paragraph.")
    assert describe.argument_sentences(text) == {
        "a": "the first, of two lines.",
        "b": "the others.",
        "c": "the others.",
    }


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_a_copy_resolves_to_the_same_recipe_and_inherits_nothing(file: Path, tmp_path: Path) -> None:
    original = load_recipe(file)
    (tmp_path / "mine.yaml").write_text(template(original), encoding="utf-8")
    copy = load_recipe(tmp_path / "mine.yaml")
    assert copy.name == "mine"
    assert copy.resolved() | {"name": ""} == original.resolved() | {"name": ""}
    header = file.read_text(encoding="utf-8").split("\n\n")[0]
    assert header in template(original)


@pytest.mark.parametrize("file", RECIPES[::4], ids=lambda file: file.stem)
def test_every_comment_of_a_copy_can_become_a_key(file: Path, tmp_path: Path) -> None:
    """Without its `# `, each key at its default says its default."""
    text = template(load_recipe(file))
    lines = [
        line.replace("# ", "", 1) if line.lstrip(" ").startswith("# ") and not line.startswith("# name") else line
        for line in text.split("\n\n", 1)[1].splitlines()
        if not line.startswith("# track") and not line.startswith("  # augment")
    ]
    (tmp_path / "full.yaml").write_text("\n".join(lines), encoding="utf-8")
    full = load_recipe(tmp_path / "full.yaml")
    assert full.resolved() | {"name": ""} == load_recipe(file).resolved() | {"name": ""}
    for section in SCHEMAS:
        assert getattr(full, section).model_fields_set == set(type(getattr(full, section)).model_fields)


def test_a_copy_keeps_the_comments_behind_keys_of_its_own_and_of_inherited_files(tmp_path: Path) -> None:
    text = (ROOT / "recipes/quickstart.yaml").read_text(encoding="utf-8")
    (tmp_path / "quickstart.yaml").write_text(text, encoding="utf-8")
    (tmp_path / "child.yaml").write_text(
        "# Mine.\n\ninherit: quickstart.yaml\nmodel:\n  width: 8   # 'small' is enough\n"
        "train: {seed: 3}  # three\nreference: {'a#b': 0.5}   # of a paper\n",
        encoding="utf-8",
    )
    copy = template(load_recipe(tmp_path / "child.yaml"))
    for line in ("width: 8 # 'small' is enough", "depth: 4 # number of resolutions, each half the one above",
                 "train: # three", "reference: {\"a#b\": 0.5} # of a paper", "# Mine."):  # fmt: skip
        assert line in "\n".join(" ".join(each.split()) for each in copy.splitlines())
