"""Nothing from outside is executed, and no secret is written down."""

from __future__ import annotations

import ast
import io
import json
import os
import pickle
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import nn

from tests.processes import RECIPE, run_processes, train, write_recipe
from tests.unit.runs.test_checkpoint import make
from trainer.data.archives import members
from trainer.data.card import sha256
from trainer.data.parquet import RowGroups
from trainer.errors import UserError
from trainer.models.weights import load_safetensors
from trainer.recipe.file import RecipeError
from trainer.recipe.load import load_recipe
from trainer.runs.checkpoint import InvalidCheckpoint, verify
from trainer.runs.state import Checkpoint
from trainer.runs.store import CheckpointStore

PACKAGE = Path(__file__).resolve().parents[2] / "trainer"

# ---------------------------------------------------------------- the sources

# The one place that may read a pickle, with an unpickler that knows numbers and arrays and nothing else: CIFAR's
# official batches are pickles.
MAY_UNPICKLE = {"data/cifar_batches.py"}
UNSAFE_MODULES = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "yaml"}
UNSAFE_BUILTINS = {"eval", "exec", "compile", "__import__"}
UNSAFE_CALLS = {
    *("os.system", "os.popen", "torch.hub.load", "pandas.read_pickle"),
    *(
        f"{name}_object{end}"
        for name in ("all_gather", "gather", "broadcast", "scatter", "send", "recv")
        for end in ("", "_list")
    ),
}
# A call that ends in this name must have this argument, whatever its others are.
NEEDS = {
    "torch.load": ("weights_only", True),
    "get_state_dict": ("weights_only", True),
    "load_state_dict_from_url": ("weights_only", True),
}
NEEDS |= {"extractall": ("filter", "data"), "extract": ("filter", "data"), "unpack_archive": ("filter", "data")}
# No call may have one of these.
REFUSED = {
    ("shell", True),
    ("allow_pickle", True),
    ("weights_only", False),
    ("trust_remote_code", True),
    ("typ", "unsafe"),
    ("typ", "full"),
}


def dotted(node: ast.expr) -> str:
    """`torch.load` of the node that stands for it."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def violations(source: str) -> Iterator[str]:
    """What a source imports or calls that could run code from a file."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            yield from (
                f"line {node.lineno}: imports {name}" for name in names if name.partition(".")[0] in UNSAFE_MODULES
            )
        if not isinstance(node, ast.Call):
            continue
        name = dotted(node.func)
        last = name.rpartition(".")[2]
        given = {
            (keyword.arg, keyword.value.value) for keyword in node.keywords if isinstance(keyword.value, ast.Constant)
        }
        if name in UNSAFE_BUILTINS | UNSAFE_CALLS or last in UNSAFE_CALLS:
            yield f"line {node.lineno}: calls {name}"
        for needed in (NEEDS.get(name), NEEDS.get(last)):
            if needed and needed not in given:
                yield f"line {node.lineno}: {name} without {needed[0]}={needed[1]!r}"
        yield from (f"line {node.lineno}: {name} with {argument}={value!r}" for argument, value in REFUSED & given)


def test_the_package_uses_nothing_that_could_run_code_from_a_file() -> None:
    files = sorted(PACKAGE.rglob("*.py"))
    assert len(files) > 50
    found = [
        f"{file.relative_to(PACKAGE)} {violation}"
        for file in files
        if file.relative_to(PACKAGE).as_posix() not in MAY_UNPICKLE
        for violation in violations(file.read_text(encoding="utf-8"))
    ]
    assert found == []


@pytest.mark.parametrize(
    "source",
    [
        *(
            "import pickle",
            "from pickle import loads",
            "import os, dill",
            "def f():\n    from joblib import load",
            "import yaml",
            "import marshal",
            "import shelve",
        ),
        *(
            "torch.load(f)",
            "torch.load(f, weights_only=False)",
            "torch.load(f, weights_only=flag)",
            "published.get_state_dict(check_hash=True)",
        ),
        *(
            "np.load(f, allow_pickle=True)",
            "YAML(typ='unsafe').load(f)",
            "eval(text)",
            "exec(text)",
            "os.system('ls')",
            "subprocess.run('ls', shell=True)",
        ),
        *(
            "dist.all_gather_object(a, b)",
            "torch.distributed.broadcast_object_list(a)",
            "gather_object(a)",
            "archive.extractall(folder)",
            "archive.extract(name)",
        ),
        *(
            "archive.extractall(folder, filter='fully_trusted')",
            "shutil.unpack_archive(f)",
            "load_dataset('x', trust_remote_code=True)",
        ),
    ],
)
def test_what_could_run_code_would_be_found(source: str) -> None:
    assert list(violations(source))


@pytest.mark.parametrize(
    "source",
    [
        "model.eval()",
        "torch.load(f, weights_only=True)",
        "np.load(f)",
        "YAML(typ='safe').load(f)",
        "re.compile(x)",
        "model.compile()",
    ],
)
def test_what_is_safe_is_not_found(source: str) -> None:
    assert not list(violations(source))


# ---------------------------------------------------------------- malicious files


@pytest.fixture
def sentinel(tmp_path: Path) -> Iterator[Path]:
    """A file that is there if code of a malicious file ran."""
    file = tmp_path / "sentinel"
    yield file
    assert not file.exists(), "code from a file was run"


class Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[object, tuple[str, int]]:
        return os.open, (str(self.file), os.O_CREAT | os.O_WRONLY)


def test_the_bomb_works(tmp_path: Path) -> None:
    os.close(pickle.loads(pickle.dumps(Bomb(tmp_path / "sentinel"))))
    assert (tmp_path / "sentinel").exists()


@pytest.mark.parametrize("how", ["pickle", "torch", "torch zip"])
def test_weights_that_are_a_pickle_are_refused(tmp_path: Path, sentinel: Path, how: str) -> None:
    file = tmp_path / "net.safetensors"
    if how == "pickle":
        file.write_bytes(pickle.dumps({"weight": Bomb(sentinel)}))
    else:
        torch.save({"weight": Bomb(sentinel)}, file, _use_new_zipfile_serialization=how == "torch zip")
    with pytest.raises(ValueError, match="not a safetensors file but one written by torch"):
        load_safetensors(nn.Linear(1, 1), file, [])


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            "model: {name: deeplabv3, weights: bomb.pth}",
            r"model.weights: must be coco, none or an existing .safetensors file",
        ),
        (
            "model: !!python/object/apply:os.system ['touch SENTINEL']",
            r"model: YAML tags aren't allowed: a recipe holds plain values",
        ),
        (
            'model: {name: unet, width: !!python/object/apply:eval [\'open("SENTINEL", "w")\']}',
            r"model.width: YAML tags aren't allowed",
        ),
        ("model: os.system", r"model.name: unknown model"),
        ("model: {name: torch.nn.Linear}", r"model.name: unknown model"),
        ("loss: {name: 'trainer.losses.soft_iou.SoftIoU'}", r"loss.name: unknown loss"),
    ],
)
def test_a_recipe_runs_only_components_that_are_registered(
    tmp_path: Path, sentinel: Path, change: str, expected: str
) -> None:
    torch.save({"weight": Bomb(sentinel)}, tmp_path / "bomb.pth")
    key = change.partition(":")[0]
    kept = "\n".join(line for line in RECIPE.splitlines() if not line.startswith(f"{key}:"))
    recipe = write_recipe(tmp_path, f"{kept}\n{change.replace('SENTINEL', str(sentinel))}\n")
    with pytest.raises(RecipeError, match=expected):
        load_recipe(recipe)


def test_a_plugin_is_imported_only_where_the_recipe_lists_it(tmp_path: Path, sentinel: Path) -> None:
    (tmp_path / "evil.py").write_text(f"open({str(sentinel)!r}, 'w')\n")
    with pytest.raises(RecipeError, match="unknown model"):
        load_recipe(write_recipe(tmp_path, RECIPE.replace("name: unet", "name: evil")))


@pytest.mark.parametrize("name", ["model", "optimizer", "ema"])
def test_a_checkpoint_that_holds_a_pickle_is_refused(tmp_path: Path, sentinel: Path, name: str) -> None:
    folder = CheckpointStore(tmp_path / "checkpoints").save(make(1), keep=2, best=False)
    file = folder / f"{name}.safetensors"
    torch.save({"weight": Bomb(sentinel)}, file)
    with pytest.raises(InvalidCheckpoint, match="checksum"):
        verify(folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][file.name] = {"bytes": file.stat().st_size, "sha256": sha256(file)}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    verify(folder)
    with pytest.raises(UserError, match="can't be read"):
        Checkpoint.load(folder)


def test_an_archive_writes_nothing_outside(tmp_path: Path, sentinel: Path) -> None:
    for name in ("../sentinel", str(sentinel)):
        with tarfile.open(tmp_path / "set.tar", "w") as archive:
            info = tarfile.TarInfo(name)
            info.size = 4
            archive.addfile(info, io.BytesIO(b"evil"))
        with pytest.raises(UserError, match="points outside the archive"):
            list(members(tmp_path / "set.tar", ("sentinel",)))


def test_a_parquet_file_whose_type_is_a_pickle_runs_nothing(tmp_path: Path, sentinel: Path) -> None:
    metadata = {
        "ARROW:extension:name": "arrow.py_extension_type",
        "ARROW:extension:metadata": pickle.dumps(Bomb(sentinel)),
    }
    table = pa.table([pa.array([1, 2])], schema=pa.schema([pa.field("label", pa.int64(), metadata=metadata)]))
    pq.write_table(table, tmp_path / "00000.parquet")
    rows = RowGroups({tmp_path / "00000.parquet": (2,)}, keep=1)
    assert rows.row(0, 1) == {"label": 2}
    assert rows.integers("label").tolist() == [1, 2]


# ---------------------------------------------------------------- secrets

SECRETS = {
    "WANDB_API_KEY": "c0ffee" * 6 + "cafe",
    "HF_TOKEN": "hf_ThisIsNobodysTokenAtAll",
    "AWS_SECRET_ACCESS_KEY": "wJalrThisIsNobodysKeyEither",
}


@pytest.mark.slow
def test_no_secret_of_the_environment_is_written_or_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for variable, value in SECRETS.items():
        monkeypatch.setenv(variable, value)
    monkeypatch.setenv("NOT_SECRET", "but-nobody-elses-business")
    options = (
        "name=run",
        "track=[wandb, tensorboard]",
        "train.duration=2 steps",
        "train.precision=fp32",
        "evaluate.pictures=1",
    )
    run_processes(1, train, write_recipe(tmp_path), options)
    run = tmp_path / "runs" / "run"
    files = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    for kind in (
        "*.wandb",
        "events.out.tfevents.*",
        "environment.json",
        "recipe.yaml",
        "summary.json",
        "metrics.jsonl",
    ):
        assert list(run.rglob(kind)), f"no {kind} was written, so nothing was searched"
    printed = capfd.readouterr()
    files[Path("printed")] = (printed.out + printed.err).encode()
    for variable, value in [*SECRETS.items(), ("NOT_SECRET", os.environ["NOT_SECRET"])]:
        assert [str(file) for file, content in files.items() if value.encode() in content] == [], variable
    config = b"soft_iou"  # what W&B was given, so its file can be searched
    assert any(config in content for file, content in files.items() if file.suffix == ".wandb")
