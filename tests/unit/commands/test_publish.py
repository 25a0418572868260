"""Promises of `trainer publish`: what is published is loaded back bit for bit, without run and data set, or refused."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard, constants
from safetensors.torch import load_file

import trainer
from tests.hub_server import COMMIT, Hub, Repository
from tests.processes import RECIPE, run_processes, train, write_recipe
from trainer.commands import main, publish
from trainer.errors import UserError
from trainer.inference.evaluation import evaluation_recipe
from trainer.inference.trained import find_trained
from trainer.recipe.load import load_recipe
from trainer.runs.published import fetch
from trainer.tasks.build import build_task
from trainer.tasks.checks import TASK_CHECKS

TOKEN, OTHER = "hf_of_me_alone", "hf_of_another"
IMAGE = np.random.default_rng(0).integers(0, 256, (30, 41, 3), dtype=np.uint8)

Outcome = tuple[int, str, str]
"""Exit code, stdout and stderr of a command."""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the data and the run, which averages its weights and has been evaluated."""
    folder = tmp_path_factory.mktemp("publish")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRAINER_DATA", str(folder / "data"))
        patch.setenv("TRAINER_RUNS", str(folder / "runs"))
        text = RECIPE.replace("pictures: 0", "pictures: 2").replace("3 epochs", "1 epoch").replace("fp64", "fp32")
        run_processes(1, train, write_recipe(folder, text + "name: squares\n"), ("train.ema=0.5",))
    return folder


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, finished: Path) -> Iterator[Hub]:
    """A Hub of which this process knows the address and, as `me`, the token; with a cache of its own."""
    repositories = {
        "other/open": Repository(writers=(OTHER,)),
        "other/secret": Repository(readers=(OTHER,), writers=(OTHER,)),
        "me/public": Repository({COMMIT: {"README.md": b"mine"}}, writers=(TOKEN,)),
    }
    with Hub(repositories, {"me": TOKEN, "other": OTHER}).serving() as server:
        # huggingface_hub has read the environment when it was imported.
        monkeypatch.setattr(constants, "ENDPOINT", server.address)
        template = server.address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setenv("TRAINER_DATA", str(finished / "data"))
        monkeypatch.setenv("TRAINER_RUNS", str(finished / "runs"))
        monkeypatch.chdir(tmp_path)
        yield server


@pytest.fixture
def command(hub: Hub, capsys: pytest.CaptureFixture[str]) -> Callable[[str], Outcome]:
    def run(line: str) -> Outcome:
        code = main(line.split())
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def published(command: Callable[[str], Outcome]) -> str:
    """The address of the published run."""
    code, _, errors = command("publish squares me/squares")
    assert code == 0, errors
    return "hf://me/squares"


def predicted(model: object) -> torch.Tensor:
    return torch.as_tensor(model(IMAGE).mask)  # type: ignore[operator]


def test_a_published_model_predicts_the_same_bits_without_its_run_and_data_set(
    published: str, hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    local = trainer.load("squares", device="cpu")
    monkeypatch.setenv("TRAINER_DATA", str(tmp_path / "nothing"))
    monkeypatch.setenv("TRAINER_RUNS", str(tmp_path / "nothing"))
    model = trainer.load(published, device="cpu")
    assert model.classes == local.classes and model.trained.step == local.trained.step
    assert "ema" in local.trained.weights.name
    for name, value in local.module.state_dict().items():
        assert torch.equal(model.module.state_dict()[name], value), name
    inputs = torch.from_numpy(IMAGE).movedim(-1, 0)
    prepared, _ = local.preparation(inputs)
    assert torch.equal(*(each.task.infer(each.forward, {"image": prepared[None]}) for each in (local, model)))
    assert torch.equal(predicted(model), predicted(local))
    assert len(hub.repositories["me/squares"].commits) == 1, "weights and manifest belong to one commit"


def test_every_file_is_in_the_manifest_and_none_contains_the_token_or_the_machine(published: str, hub: Hub) -> None:
    ((_, files),) = hub.repositories["me/squares"].commits.items()
    sums = json.loads(files.pop("manifest.json"))["files"]
    assert {name: each["sha256"] for name, each in sums.items()} == {
        name: hashlib.sha256(content).hexdigest() for name, content in files.items()
    }
    assert {"model.safetensors", "recipe.yaml", "data.json", "trainer.json", "metrics.json", "README.md"} <= {*files}
    assert not any(TOKEN.encode() in content for content in files.values())


def test_the_card_has_the_metadata_of_the_hub_and_the_figures_of_the_checkpoint(
    published: str, hub: Hub, finished: Path
) -> None:
    ((_, files),) = hub.repositories["me/squares"].commits.items()
    card = ModelCard(files["README.md"].decode())
    assert card.data.library_name == "recipe-trainer" and card.data.pipeline_tag == "image-segmentation"
    lines = [json.loads(line) for line in (finished / "runs/squares/metrics.jsonl").read_text().splitlines()]
    figures = next(line for line in reversed(lines) if line["split"] == "validation")
    assert {each.metric_type: each.metric_value for each in card.data.eval_results}["miou"] == round(figures["miou"], 6)
    for text in (f"| miou | {figures['miou']:.4f} |", f"| square | {figures['iou/square']:.4f} |", "hf://me/squares"):
        assert text in card.text
    for picture in re.findall(r"\]\((pictures/[^)]+)\)", card.text):
        assert files[picture].startswith(b"\x89PNG")
    assert "pictures/validation_step_" in card.text and "license: " in card.text


def test_a_dry_run_writes_the_folder_which_can_be_loaded_and_asks_the_hub_nothing(
    command: Callable[[str], Outcome], hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    code, printed, _ = command("publish squares me/squares --dry-run --no-pictures")
    assert code == 0 and hub.requests == 0 and "uploaded to me/squares; nothing was" in printed
    assert "model.safetensors" in printed and not (tmp_path / "squares/pictures").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["squares"]
    assert torch.equal(predicted(trainer.load("./squares")), predicted(trainer.load("squares")))


def test_an_exported_file_is_published_too_and_without_it_nothing_is(
    command: Callable[[str], Outcome], hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publish, "_export", lambda options, model, folder: 3)
    assert command("publish squares me/squares --export onnx")[0] == 3 and "me/squares" not in hub.repositories

    def export(options: Any, model: Any, folder: Path) -> int:
        (folder / publish.FILES[options.export]).write_bytes(b"graph")
        return 0

    monkeypatch.setattr(publish, "_export", export)
    assert command("publish squares me/squares --export onnx")[0] == 0
    ((_, files),) = hub.repositories["me/squares"].commits.items()
    assert files["model.onnx"] == b"graph" and b"`model.onnx`" in files["README.md"]
    assert "model.onnx" in json.loads(files["manifest.json"])["files"]


def test_a_damaged_download_is_refused_until_it_is_deleted(published: str) -> None:
    file = (fetch(published) / "model.safetensors").resolve()
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    got, expected = (hashlib.sha256(each).hexdigest() for each in (file.read_bytes(), content))
    with pytest.raises(UserError) as refused:
        trainer.load(published)
    for part in (str(file), f"has the SHA-256 {got}, the manifest expects {expected}", "delete this file"):
        assert part in str(refused.value)
    file.unlink()
    trainer.load(published)


def test_what_differs_from_the_manifest_on_the_hub_is_refused(published: str, hub: Hub) -> None:
    ((_, files),) = hub.repositories["me/squares"].commits.items()
    files["data.json"] = files["data.json"].replace(b"square", b"circle")
    with pytest.raises(UserError, match=r"data.json is damaged: \S+ has the SHA-256"):
        trainer.load(published)


def test_offline_a_cached_model_is_loaded_and_another_is_one_sentence(
    published: str, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer.load(published)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    before = hub.requests
    trainer.load(published)
    with pytest.raises(UserError, match=r"hf://me/other isn't in the cache, and HF_HUB_OFFLINE is set"):
        trainer.load("hf://me/other")
    assert hub.requests == before
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    hub.failures["HEAD", "manifest.json"] = [500] * 9
    trainer.load(published)  # the server is down, the cache is not


@pytest.mark.parametrize(("method", "failures"), [("HEAD", [500, 502]), ("GET", [503, 500]), ("GET", [-1000, -3000])])
def test_a_server_that_fails_for_a_moment_or_cuts_a_download_short_is_asked_again(
    published: str, hub: Hub, method: str, failures: list[int]
) -> None:
    hub.failures[method, "model.safetensors"] = failures
    trainer.load(published)
    assert not failures


def test_a_revision_is_the_model_of_that_commit(published: str, hub: Hub, command: Callable[[str], Outcome]) -> None:
    (first,) = hub.repositories["me/squares"].commits
    assert command("publish squares me/squares --checkpoint last --no-pictures")[0] == 0
    assert len(hub.repositories["me/squares"].commits) == 2
    assert fetch(f"{published}@{first}").name == first != fetch(published).name


def test_a_recipe_starts_from_published_weights_as_from_a_file(published: str, hub: Hub, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    loaded = load_recipe(recipe, [f"model.weights={published}"], TASK_CHECKS)
    state = build_task(loaded, loaded.source.info).model.state_dict()
    expected = load_file(trainer.load("squares").trained.weights)
    assert all(torch.equal(state[name], value) for name, value in expected.items())
    with pytest.raises(UserError, match=r"model.weights: .*doesn't fit the model"):
        load_recipe(recipe, [f"model.weights={published}", "model.width=8"], TASK_CHECKS)
    with pytest.raises(UserError, match=r"model.weights: hf://me/other can't be downloaded: there is no such model"):
        load_recipe(recipe, ["model.weights=hf://me/other"], TASK_CHECKS)
    with pytest.raises(UserError, match=r"model.weights: must be hf://OWNER/NAME"):
        load_recipe(recipe, ["model.weights=hf://squares"], TASK_CHECKS)


def test_code_that_a_published_recipe_names_is_not_run(
    command: Callable[[str], Outcome], finished: Path, tmp_path: Path
) -> None:
    assert command("publish squares me/squares --dry-run")[0] == 0
    folder, ran = tmp_path / "squares", tmp_path / "ran"
    (folder / "manifest.json").unlink()
    (folder / "evil.py").write_text(f"open({str(ran)!r}, 'w')\n")
    recipe = folder / "recipe.yaml"
    text = re.sub(r"plugins:\n- .*", "plugins: [evil.py]", recipe.read_text())
    assert "evil.py" in text
    recipe.write_text(text)
    trainer.load(folder)
    evaluation_recipe(find_trained(str(folder)))
    recipe.write_text(text.replace("name: unet", "name: evil"))
    with pytest.raises(UserError, match=r"needs plugins \(evil.py\), and code of published models isn't run"):
        trainer.load(folder)
    assert not ran.exists()


REFUSED = {
    "publish circles me/squares": r"no run 'circles' in .*; known: squares",
    "publish squares squares": r"'squares': must be OWNER/NAME",
    "publish squares me/a--b": r"'me/a--b': must be OWNER/NAME .*-- or",
    "publish squares me/squares --checkpoint step_00000001": r"no checkpoint 'step_00000001'; it has best, last",
    "publish squares me/squares --out there": r"--out there: only with --dry-run",
    "publish squares me/squares --dry-run --out full": r"full exists: remove it, or choose another folder with --out",
    "publish squares me/squares --dry-run --out no/where": r"--out no/where: \S+ is not a folder that can be written",
    "publish squares other/new": r"other/new can't be published: the Hub refused the token \(403\)",
    "publish squares other/secret": r"other/secret can't be published: the Hub refused the token",
    "publish squares other/open": r"other/open can't be published: the Hub refused the token \(403\)",
    "publish squares me/public --private": r"me/public exists and is public: --private only applies to a new",
    "publish full/published me/squares": r"full/published is already published; publish takes a run",
}


@pytest.mark.parametrize("line", REFUSED)
def test_a_mistake_is_one_sentence_and_leaves_nothing(
    command: Callable[[str], Outcome], hub: Hub, tmp_path: Path, line: str
) -> None:
    if "full" in line:
        (tmp_path / "full").mkdir()
        assert command("publish squares me/squares --dry-run --out full/published")[0] == 0
    before = {name: dict(each.commits) for name, each in hub.repositories.items()}
    code, _, errors = command(line)
    assert code == 2 and re.search(REFUSED[line], errors) and errors.count("\n") == 1, errors
    assert {name: dict(each.commits) for name, each in hub.repositories.items()} == before
    assert {path.name for path in tmp_path.iterdir()} <= {"full"}


def test_without_a_token_a_network_or_a_checkpoint_the_message_names_it(
    command: Callable[[str], Outcome], hub: Hub, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "me/squares can't be published: HF_HUB_OFFLINE is set" in command("publish squares me/squares")[2]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    code, _, errors = command("publish squares me/squares")
    assert code == 2 and re.search(r"me/squares can't be published: .*refused; check the network", errors), errors
    monkeypatch.setenv("HF_TOKEN", "hf_expired")
    monkeypatch.setattr(constants, "ENDPOINT", hub.address)
    assert "refused the token (401)" in command("publish squares me/squares")[2]
    monkeypatch.delenv("HF_TOKEN")
    assert "no Hugging Face token: run `hf auth login` or set HF_TOKEN" in command("publish squares me/squares")[2]
    shutil.copytree(finished / "runs/squares", finished / "runs/begun", ignore=lambda *_: ["step_00000005", "best"])
    for link in (finished / "runs/begun/checkpoints").iterdir():
        link.unlink() if link.is_symlink() else shutil.rmtree(link)
    assert "begun has no checkpoint yet" in command("publish begun me/begun --dry-run")[2]
    assert not hub.repositories.keys() & {"me/squares", "me/begun"}
