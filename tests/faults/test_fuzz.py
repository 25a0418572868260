"""Damaged recipes, archives, prepared sets and checkpoints: each ends in a result or in one message, never in a
traceback, a crash, a hang, or a file where none belongs.

Case n of a kind is always the same: it is drawn from the seed n. `TRAINER_FAULTS=long` takes 2,000 recipes and 510
files.
"""

from __future__ import annotations

import dataclasses
import io
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import struct
import sys
import tarfile
import traceback
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import datasets  # noqa: F401  # not in every child
import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from tests.processes import RECIPE, write_recipe
from tests.unit.runs.test_checkpoint import make
from trainer.commands import main
from trainer.data.archives import members
from trainer.data.card import Card, sha256
from trainer.data.images import encode_png
from trainer.data.order import Order
from trainer.data.prepare import ensure_prepared, prepare
from trainer.data.reader import Reader
from trainer.data.source import Archive, DataInfo, Row, Source
from trainer.data.stream import TrainingSamples, ValidationSamples
from trainer.distributed.launch import Launch
from trainer.errors import TrainingFailed, UserError
from trainer.recipe.load import load_recipe
from trainer.runs.folder import RunFolder
from trainer.runs.resume import open_run
from trainer.runs.state import Checkpoint
from trainer.tasks.checks import TASK_CHECKS

LONG = os.environ.get("TRAINER_FAULTS") == "long"
RECIPES, FILES = (2000, 170) if LONG else (150, 20)  # files of each of three kinds
LIMIT_S = 60  # for one case, which takes 2 s at most on an idle machine
CHECKS = [*Launch().checks(), *TASK_CHECKS]
# The alarm is this file's.
pytestmark = pytest.mark.timeout(3600 if LONG else 300, method="thread")


# ---------------------------------------------------------------- one case


class Hung(BaseException):
    """No Exception, so that nobody takes it for one of the errors that damaged files cause."""


@contextmanager
def time_limit() -> Iterator[None]:
    def ring(*_: object) -> None:
        raise Hung(f"no answer in {LIMIT_S} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(LIMIT_S)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def outcome(case: Callable[[], Any]) -> str:
    """`valid` or `refused`; anything else but an error with a message is raised."""
    with time_limit():
        try:
            case()
        except (UserError, TrainingFailed) as error:
            assert str(error).strip(), "an error without a message"
            return "refused"
    return "valid"


def outcome_in_child(case: Callable[[], Any]) -> str:
    """The same in a forked process, whose crash is an outcome too."""

    def run() -> None:
        torch.set_num_threads(1)
        code = 1
        try:
            code = {"valid": 10, "refused": 11}[outcome(case)]
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)

    child = multiprocessing.get_context("fork").Process(target=run)
    child.start()
    child.join(2 * LIMIT_S)
    child.kill()
    assert child.exitcode in (10, 11), f"exit code {child.exitcode}"
    return {10: "valid", 11: "refused"}[child.exitcode]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@contextmanager
def identified(kind: str, number: int, what: object) -> Iterator[None]:
    """Names the case that failed."""
    try:
        yield
    except BaseException as error:
        raise AssertionError(f"{kind} case {number} ({type(error).__name__}: {error}): {what!r:.3000}") from error


def show(counts: Mapping[str, Counter[str]]) -> None:
    print(f"\n{'':24}{'cases':>8}{'valid':>8}{'refused':>8}")
    for kind, found in counts.items():
        print(f"{kind:24}{found.total():8}{found['valid']:8}{found['refused']:8}")


# ---------------------------------------------------------------- recipes

NASTY = [
    *(
        "",
        "null",
        "~",
        "true",
        "-1",
        "0",
        "1",
        "1.5",
        "1e-320",
        "1e999",
        "-1e999",
        ".inf",
        "-.inf",
        ".nan",
        "0x1F",
        "0o17",
        "1_000",
        "'8'",
        "2001-01-01",
    ),
    *(
        str(2**31),
        str(2**63 - 1),
        str(2**63),
        str(-(2**63)),
        "9" * 30,
        "9" * 5000,
        "0x" + "f" * 5000,
        "1e400",
        "0." + "0" * 400 + "1",
    ),
    *(
        "10%",
        "0 steps",
        "1e9 epochs",
        "9" * 400 + " epochs",
        "9" * 400 + ".5 epochs",
        "9" * 5000 + " steps",
        "0.0000001 minutes",
        "٣ epochs",
        "-1 steps",
    ),
    *(
        "[]",
        "{}",
        "[1, [2, [3]]]",
        "{a: {b: c}}",
        "{name: }",
        "{name: [x]}",
        "{name: unet, name: unet}",
        "[name, name]",
        "[[[name]]]",
        "{1: 2, true: 3, ~: 4}",
    ),
    *(
        "&a [*a]",
        "&a {b: *a}",
        "*a",
        "&a b",
        "&a",
        "{<<: *a}",
        "<<: *a",
        "<<",
        "? [a, b] : c",
        "- - - a",
        "a: b: c",
        "{? }",
        "[&a 1, &a 2, *a]",
    ),
    *(
        "!!python/object/apply:os.system [touch sentinel]",
        "!!python/name:os.system",
        "!!python/object/new:os.system [touch sentinel]",
        "!!python/module:os",
    ),
    *(
        "!!binary aGk=",
        "!!binary x",
        "!!int x",
        "!!int ''",
        "!!float ''",
        "!!float x",
        "!!bool maybe",
        "!!null x",
        "!!timestamp x",
        "!!timestamp 2001-99-99",
    ),
    *(
        "!!set {a, b}",
        "!!omap [a: 1]",
        "!!pairs [a: 1]",
        "!!str [a]",
        "!!map [a]",
        "!!seq {a: b}",
        "!!merge x",
        "!local x",
        "!",
        "!<tag:yaml.org,2002:python/none>",
    ),
    *(
        "\t",
        "\0",
        "\ufeff",
        "\x1b[31m",
        "\x7f",
        "\u2028",
        '"\\ud800"',
        '"\\x00"',
        '"\\',
        "'",
        '"',
        "|",
        ">",
        "|9",
        "- ",
        ": ",
        "? ",
        "---",
        "...",
        "@",
        "`",
        "%",
        "# ",
    ),
    *(
        "%YAML 1.1\n---\n",
        "%YAML 9.9\n---\n",
        "%TAG ! tag:yaml.org,2002:python/\n---\n",
        "\n---\n",
        "\n...\n",
        "\r",
        "\r\n",
        "\n\t",
    ),
    *(
        "..",
        ".",
        "/",
        "~",
        "../../../etc/passwd",
        "/etc/passwd",
        "/dev/zero",
        "/dev/stdin",
        "/proc/self/mem",
        "${HOME}",
        "$(touch sentinel)",
        "a\0b",
    ),
    *(
        "x" * 300,
        "x" * 300 + ".yaml",
        "x" * 300 + ".safetensors",
        "'a\\0b.safetensors'",
        '"a\\0b.safetensors"',
        "/dev/zero.safetensors",
        "x" * 100_000,
        "🙂" * 1000,
    ),
    *(
        "os.system",
        "builtins.eval",
        "__import__('os').system('touch sentinel')",
        "torch.nn.Linear",
        "名前",
        "un𝐞t",
        "UNET",
        "unet ",
        "wandb",
        "tensorboard",
    ),
    *(
        "[" * 50,
        "[" * 2000,
        "[" * 200 + "]" * 200,
        "{a: " * 300,
        "- " * 500,
        "(" * 1000,
        "[" + "x, " * 30_000 + "]",
        "{" + ", ".join(f"k{i}: 1" for i in range(3000)) + "}",
    ),
    "[" + ", ".join(f"&a{i} " + (f"[*a{i - 1}, *a{i - 1}]" if i else "x") for i in range(40)) + "]",
]
PATHS = [
    "case.yaml",
    "cycle_a.yaml",
    "cycle_b.yaml",
    ".",
    "..",
    "folder.yaml",
    "pipe.yaml",
    "/dev/zero",
    "/dev/tty",
    "a\\0b",
    '"a\\0b"',
    "x" * 300,
    "quickstart",
    "''",
    "large.yaml",
]
KEYS = [
    "inherit",
    "name",
    "plugins",
    "track",
    "task",
    "data",
    "model",
    "loss",
    "optimizer",
    "schedule",
    "train",
    "evaluate",
    "checkpoint",
    "augment",
    "lr",
    "x",
]


def damaged_recipe(draw: random.Random, texts: list[bytes], keys: list[str]) -> tuple[bytes, list[str]]:
    """One of the texts with up to four mutations, and overrides; often a single one, which no other mistake hides."""
    data = draw.choice(texts)
    overrides = [f"{draw.choice(keys)}={draw.choice(NASTY)}" for _ in range(draw.choice((0, 0, 1, 1, 2)))]
    for _ in range(draw.choice((0, 1)) if overrides else draw.choice((1, 1, 2, 4))):
        data = _mutate_recipe(draw, data)
    return data, overrides


def keys_of(tree: Mapping[str, Any], path: str = "") -> list[str]:
    """The dotted keys of a resolved recipe, sections included."""
    below = [keys_of(value, f"{path}{key}.") for key, value in tree.items() if isinstance(value, dict)]
    return [*(f"{path}{key}" for key in tree), *(key for keys in below for key in keys)]


def _mutate_recipe(draw: random.Random, data: bytes) -> bytes:
    lines = data.split(b"\n")
    i, j = draw.randrange(len(lines)), draw.randrange(len(lines))
    nasty = draw.choice(NASTY).encode("utf-8", "surrogatepass")
    words = rb"(?<=: )[^\s,\[\]{}#]+" if draw.random() < 0.7 else rb"[\w.%+-]+"  # values, or anything
    tokens = [match.span() for match in re.finditer(words, data)] or [(0, 0)]
    start, end = draw.choice(tokens)
    at = draw.randint(0, len(data))
    match draw.randrange(14):
        case 0:
            return damaged_bytes(draw, data)
        case 1:
            del lines[i]
        case 2:
            lines.insert(j, lines[i])
        case 3:
            lines[i], lines[j] = lines[j], lines[i]
        case 4 | 5 | 6 | 7:
            return data[:start] + nasty + data[end:]
        case 8:
            return data[:at] + nasty + data[at:]
        case 9:
            lines.insert(i, draw.choice(KEYS).encode() + b": " + nasty)
        case 10:
            lines = [b"inherit: " + draw.choice(PATHS).encode(), *lines]
        case 11:
            lines[i] = draw.choice((b" ", b"  ", b"\t", b"- ")) + lines[i]
        case 12:
            return draw.choice((b"\xef\xbb\xbf", b"\xff\xfe", b"\xff", b"\xc0\x80", b"\0")) + data
        case 13:
            return data.decode("utf-8", "replace").encode(
                draw.choice(("utf-16", "utf-32", "latin-1", "cp500")), "replace"
            )
    return b"\n".join(lines)


def damaged_bytes(draw: random.Random, data: bytes) -> bytes:
    """Bits flipped, bytes overwritten, cut, repeated or removed."""
    changed = bytearray(data)
    if not changed:
        return b"\0"
    start = draw.randrange(len(changed))
    size = draw.choice((1, 4, 64, 512, 4096))
    match draw.randrange(6):
        case 0 | 1:
            for _ in range(draw.choice((1, 1, 2, 8))):
                changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
        case 2:
            del changed[start:]
        case 3:
            changed[start : start + size] = draw.choice((bytes(size), b"\xff" * size, draw.randbytes(size)))
        case 4:
            changed[start:start] = changed[start : start + size]
        case 5:
            del changed[start : start + size]
    return bytes(changed)


def resolve(recipe: Path, overrides: list[str]) -> None:
    load_recipe(recipe, overrides, CHECKS).resolved()


@pytest.mark.slow
def test_damaged_recipes_are_valid_or_refused_with_a_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "recipes"
    shutil.copytree(Path(__file__).resolve().parents[2] / "recipes", folder)
    texts = [path.read_bytes() for path in sorted(folder.glob("*.yaml"))] + [RECIPE.encode()]
    (folder / "cycle_a.yaml").write_text("inherit: cycle_b.yaml\n")
    (folder / "cycle_b.yaml").write_text("inherit: cycle_a.yaml\n")
    (folder / "folder.yaml").mkdir()
    (folder / "large.yaml").write_bytes(b"# \n" * 2**20)
    os.mkfifo(folder / "pipe.yaml")
    monkeypatch.chdir(tmp_path)  # where a command in a recipe would leave its sentinel
    whole = load_recipe(write_recipe(tmp_path))
    ensure_prepared(whole.source, tmp_path / "data", None, lambda line: None)
    case = folder / "case.yaml"
    case.write_bytes(b"")
    keys = [*keys_of(whole.resolved()), "model.weights", "train.x", "x", "..", "data.augment", "track"]
    before = contents(tmp_path)
    counts: dict[str, Counter[str]] = {"recipes, load_recipe": Counter(), "recipes, trainer check": Counter()}
    for number in range(RECIPES):
        data, overrides = damaged_recipe(random.Random(number), texts, keys)
        case.write_bytes(data)
        with identified("recipe", number, (overrides, data)):
            if number % 5:
                counts["recipes, load_recipe"][outcome(partial(resolve, case, overrides))] += 1
                continue
            with time_limit():
                code = main(["check", str(case), *overrides])
            printed = capsys.readouterr()
            assert "Traceback" not in printed.err and code in (0, 2)
            assert printed.err.strip() and (code == 0) == ("case.yaml: ok" in printed.err)
            counts["recipes, trainer check"]["valid" if code == 0 else "refused"] += 1
    case.write_bytes(b"")
    assert contents(tmp_path) == before
    with capsys.disabled():
        show(counts)
    for found in counts.values():
        assert found["refused"] > found["valid"] > 0


# ---------------------------------------------------------------- archives


def picture(number: int, format: str) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(number).integers(0, 256, (12, 16, 3), dtype=np.uint8)).save(file, format)
    return file.getvalue()


def pairs(archives: Mapping[str, Path]) -> Iterator[tuple[str, Row]]:
    """Images and masks of the same number; every third is for validation."""
    found = {PurePosixPath(member.name).name: member for member in members(archives["set"], (".jpg", ".png"))}
    for name in sorted(name for name in found if name.startswith("i")):
        mask = found.get(f"m{name[1:].partition('.')[0]}.png")
        if mask is None:
            raise UserError(f"{name} has no mask")
        yield "validation" if len(name) % 3 else "train", {"image": found[name], "mask": mask}


ARCHIVED = Source("pairs", DataInfo(("no", "yes"), 255), {"image": "image", "mask": "mask"}, pairs, (Archive("set"),))


def good_members() -> dict[str, bytes]:
    files = {"set/read.me": b"text " * 100}
    for i in range(8):
        name = "1" * (i + 1)
        files[f"set/i{name}.{'jpg' if i % 2 else 'png'}"] = picture(i, "JPEG" if i % 2 else "PNG")
        files[f"set/m{name}.png"] = encode_png(np.full((12, 16), i % 2, np.uint8))
    return files


def tarred(files: Mapping[str, bytes], mode: str, draw: random.Random | None = None) -> bytes:
    """A tar; with `draw` one of its headers is changed, and its checksum with it."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode=mode) as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    content = bytearray(stream.getvalue())
    if draw:
        headers = [at for at in range(0, len(content), 512) if content[at + 257 : at + 262] == b"ustar"]
        start = draw.choice(headers)
        at, size = draw.choice(((0, 100), (100, 8), (124, 12), (136, 12), (156, 1), (157, 100), (257, 8), (345, 155)))
        values = (
            b"\xff" * size,
            b"\x80" + b"\xff" * (size - 1),
            b"\x80" + bytes(max(0, size - 2)) + b"\x7f",
            b"7" * size,
            draw.randbytes(size),
            b"LKxgSD12346X"[: max(1, size)],
        )
        content[start + at : start + at + size] = draw.choice(values)[:size].ljust(size, b"\0")
        content[start + 148 : start + 156] = b" " * 8
        content[start + 148 : start + 156] = f"{sum(content[start : start + 512]):06o}\0 ".encode()
    return bytes(content)


def zipped(files: Mapping[str, bytes], links: bool = False) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            info = zipfile.ZipInfo(name)
            info.external_attr = (0o120777 if links else 0o100644) << 16
            archive.writestr(info, data)
    return stream.getvalue()


def damaged_archive(draw: random.Random) -> bytes:
    files = good_members()
    mode = draw.choice(("w", "w", "w:gz", "w:xz", "zip", "zip"))
    pack: Callable[[Mapping[str, bytes]], bytes] = zipped if mode == "zip" else lambda files: tarred(files, mode)
    victim = draw.choice(list(files))
    match draw.randrange(8):
        case 0 | 1 | 2:
            return damaged_bytes(draw, pack(files))
        case 3:
            outside = draw.choice(
                (
                    "../evil.png",
                    "set/../../evil.png",
                    "/evil.png",
                    "..\\evil.png",
                    "C:\\evil.png",
                    "",
                    ".",
                    "..",
                    "a" * 5000,
                    "a\0b.png",
                    "\udcff.png",
                    "é.png",
                )
            )
            content = files.pop(victim)
            return pack(files | {outside.encode("utf-8", "surrogateescape").decode("utf-8", "replace"): content})
        case 4:
            return pack(files | {victim: damaged_bytes(draw, files[victim])})
        case 5:
            return tarred(files, "w", draw)
        case 6:
            return zipped(files, links=True) if draw.random() < 0.3 else damaged_zip_header(draw, zipped(files))
        case _:
            return draw.choice(
                (
                    b"",
                    b"PK",
                    b"\x1f\x8b",
                    b"BZh9",
                    b"\xfd7zXZ\0",
                    bytes(10240),
                    pack(files) * 2,
                    draw.randbytes(5000),
                    pack({"set/in.tar": pack(files)}),
                    pack({}),
                )
            )


def damaged_zip_header(draw: random.Random, data: bytes) -> bytes:
    """Sizes, offsets, methods and flags of a zip's directory."""
    content = bytearray(data)
    signature, fields = draw.choice(
        (
            (b"PK\1\2", (8, 10, 16, 20, 24, 28, 30, 38, 42)),
            (b"PK\3\4", (6, 8, 14, 18, 22, 26, 28)),
            (b"PK\5\6", (8, 10, 12, 16, 20)),
        )
    )
    starts = [match.start() for match in re.finditer(re.escape(signature), data)]
    at = draw.choice(starts) + draw.choice(fields)
    content[at : at + 2] = struct.pack(
        "<H", draw.choice((0, 1, 2, 8, 9, 12, 14, 64, 93, 95, 0x7FFF, 0xFFFF, draw.randrange(2**16)))
    )
    return bytes(content[: len(data)])


def read_all(folder: Path, card: Card, max_unreadable: int = 0) -> None:
    """Decodes every sample of a set."""
    for split in card.splits:
        tolerated = max_unreadable if split == "train" else None
        reader = Reader(folder, card, split, resize=v2.Resize([12, 16], antialias=True), max_unreadable=tolerated)
        order = Order(card.row_groups(split), 0, 2)
        samples = TrainingSamples(reader, order) if split == "train" else ValidationSamples(reader)
        for number in range(len(samples)):
            samples.batch([number])
        dataclasses.asdict(card)


@pytest.mark.slow
def test_damaged_archives_are_prepared_or_refused_with_a_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    counts = {"archives": Counter[str]()}
    (tmp_path / "archives").mkdir()
    (tmp_path / "neighbour").write_text("mine")
    for number in range(FILES):
        data = damaged_archive(random.Random(number))
        (tmp_path / "archives" / "set").write_bytes(data)
        target = tmp_path / "target"

        def case(target: Path = target) -> None:
            read_all(target / "pairs", prepare(ARCHIVED, target, tmp_path / "archives", lambda line: None))

        before = contents(tmp_path)
        with identified("archive", number, data):
            found = outcome_in_child(case)
            left = {path.name for path in target.iterdir()}
            assert (
                left == ({".pairs.lock", "pairs"} if found == "valid" else {".pairs.lock"})
                or (target / "pairs" / "card.json").exists()
            )
            shutil.rmtree(target)
            assert contents(tmp_path) == before
        counts["archives"][found] += 1
    with capsys.disabled():
        show(counts)
    assert counts["archives"]["refused"] > counts["archives"]["valid"] > 0


# ---------------------------------------------------------------- prepared sets


def damaged_json(draw: random.Random, text: str) -> str:
    """A JSON file in which one value is another one."""
    tree = json.loads(text)
    places: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        for key in node if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ():
            places.append((node, key))
            walk(node[key])

    walk(tree)
    node, key = draw.choice(places)
    values = (
        None,
        True,
        -1,
        0,
        2**63,
        10**30,
        1.5,
        float("nan"),
        "",
        "../../x",
        "/etc/passwd",
        "a\0b",
        [],
        {},
        [[]],
        {"a": None},
        [10**15],
        "0" * 64,
    )
    if draw.random() < 0.2:
        del node[key]
    else:
        node[key] = draw.choice(values)
    return json.dumps(tree)


def damage_file(draw: random.Random, path: Path) -> None:
    if path.suffix == ".json" and draw.random() < 0.7:
        path.write_text(damaged_json(draw, path.read_text()))
    else:
        path.write_bytes(damaged_bytes(draw, path.read_bytes()))


@pytest.mark.slow
def test_damaged_prepared_sets_are_made_again_or_refused_with_a_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Damaged before training starts, or afterwards, when checksums have been compared and only reading can notice."""
    counts = {
        "prepared, before": Counter[str](),
        "prepared, meanwhile": Counter[str](),
        "prepared, tolerant": Counter[str](),
    }
    whole = tmp_path / "whole"
    (tmp_path / "archives").mkdir()
    (tmp_path / "archives" / "set").write_bytes(tarred(good_members(), "w"))
    prepare(ARCHIVED, whole, tmp_path / "archives", lambda line: None)
    (tmp_path / "neighbour").write_text("mine")
    for number in range(FILES):
        draw = random.Random(number)
        target = tmp_path / "target"
        before = contents(tmp_path)
        shutil.copytree(whole, target)
        folder, kind = target / "pairs", list(counts)[number % 3]
        victim = draw.choice(
            sorted(
                path
                for path in folder.rglob("*")
                if path.is_file() and (kind == "prepared, before" or path.suffix == ".parquet")
            )
        )
        card = Card.load(folder)
        damage_file(draw, victim)

        def case(target: Path = target, folder: Path = folder, kind: str = kind, card: Card = card) -> None:
            if kind == "prepared, before":
                read_all(folder, ensure_prepared(ARCHIVED, target, tmp_path / "archives", lambda line: None))
            else:
                read_all(folder, card, max_unreadable=100 if kind == "prepared, tolerant" else 0)

        with identified("prepared set", number, (kind, victim.name, victim.read_bytes())):
            found = outcome_in_child(case)
            shutil.rmtree(target)
            assert contents(tmp_path) == before
        counts[kind][found] += 1
    with capsys.disabled():
        show(counts)
    found_in_all = sum(counts.values(), Counter[str]())
    assert found_in_all["refused"] and found_in_all["valid"]


# ---------------------------------------------------------------- checkpoints

RUN = """task: segmentation
data: {name: shapes, batch_size: 32}
model: unet
loss: cross_entropy
optimizer: {name: adamw, lr: 3e-3}
train: {duration: 10 epochs}
"""


def damage_header(draw: random.Random, path: Path) -> None:
    """Lengths, offsets, shapes and types in the header of a safetensors file."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = damaged_json(draw, data[8 : 8 + size].decode())
    lengths = (len(header), len(header), len(header), 0, 2**30, 2**40, 2**64 - 1, len(header) - 1)
    path.write_bytes(struct.pack("<Q", draw.choice(lengths)) + header.encode() + data[8 + size :])


def reseal(folder: Path) -> None:
    """Makes the manifest right again: somebody did this on purpose."""
    manifest = json.loads((folder / "manifest.json").read_text())
    for name, file in manifest["files"].items():
        file |= {"bytes": (folder / name).stat().st_size, "sha256": sha256(folder / name)}
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.slow
def test_damaged_checkpoints_are_passed_over_or_refused_with_a_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    counts = {"checkpoints": Counter[str](), "checkpoints, resealed": Counter[str]()}
    (tmp_path / "r.yaml").write_text(RUN)
    recipe = load_recipe(tmp_path / "r.yaml")
    whole = RunFolder(tmp_path / "whole")
    open_run(whole, recipe, "auto", lambda line: None)
    for step in (2, 4):
        whole.log({"step": step, "epoch": step / 10, "split": "train", "loss": 1.0 / step})
        whole.checkpoints.save(make(step), keep=3, best=False)
    for number in range(FILES):
        draw = random.Random(number)
        run = RunFolder(tmp_path / "runs" / "r")
        before = contents(tmp_path)
        shutil.copytree(whole.path, run.path, symlinks=True)
        newest = run.checkpoints.folder(4)
        kind = list(counts)[number % 2]
        victim = draw.choice(sorted(newest.iterdir()))
        if victim.suffix == ".safetensors" and draw.random() < 0.5:
            damage_header(draw, victim)
        else:
            damage_file(draw, victim)
        if kind == "checkpoints, resealed" and victim.name != "manifest.json":
            reseal(newest)
        printed: list[str] = []

        def case(run: RunFolder = run, printed: list[str] = printed) -> None:
            found = open_run(run, recipe, "auto", printed.append)
            assert found is not None
            loaded = Checkpoint.load(found)
            assert isinstance(loaded.step, int)

        with identified("checkpoint", number, (kind, victim.name, victim.read_bytes())):
            found = outcome_in_child(case)
            assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["r"]
            shutil.rmtree(tmp_path / "runs")
            assert contents(tmp_path) == before
        counts[kind][found] += 1
    with capsys.disabled():
        show(counts)
    assert counts["checkpoints"]["valid"], "the one before is used"


def test_the_same_seed_gives_the_same_case() -> None:
    texts = [RECIPE.encode()]
    first, again, other = (
        (damaged_recipe(random.Random(n), texts, KEYS), damaged_archive(random.Random(n))) for n in (1, 1, 2)
    )
    assert first == again != other
