"""Published models: their files, here and on the Hugging Face Hub, and whether they are intact; nothing here imports
torch.

    model.safetensors, recipe.yaml, data.json, trainer.json, metrics.json, README.md, pictures/, manifest.json

The manifest holds size and SHA-256 of every other file. Address, token, cache and offline mode are those of
huggingface_hub: HF_ENDPOINT, HF_TOKEN, HF_HOME, HF_HUB_OFFLINE.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trainer.components import HUB, HUB_ADDRESS
from trainer.errors import UserError
from trainer.runs.checkpoint import COUNTERS, MANIFEST, sha256
from trainer.runs.folder import DATA, RECIPE

FORMAT = 1
MODEL = "model.safetensors"
ATTEMPTS = 3  # to download a file while the server has errors; huggingface_hub itself only repeats lost connections
_AGAIN = "delete this file and run the command again, which downloads it from the Hub"
LOADED = (RECIPE, DATA, COUNTERS, MODEL)  # what predicting takes


def seal(folder: Path) -> None:
    """Completes a folder with the manifest of its files."""
    files = {
        file.relative_to(folder).as_posix(): {"bytes": file.stat().st_size, "sha256": sha256(file)}
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }
    (folder / MANIFEST).write_text(json.dumps({"format": FORMAT, "files": files}, indent=1) + "\n", encoding="utf-8")


def verify(folder: Path, names: Iterable[str] = LOADED) -> None:
    """Compares files of a published folder with its manifest.

    Raises:
        UserError: one is missing or differs, or the manifest can't be read.
    """
    manifest = folder / MANIFEST
    try:
        content = json.loads(manifest.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise UserError(f"{manifest}: format {content['format']}, but this version reads format {FORMAT}")
        expected = {name: str(content["files"][name]["sha256"]) for name in names}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{manifest.resolve()} is damaged ({type(error).__name__}: {error}); {_AGAIN}") from None
    for name, checksum in expected.items():
        file = (folder / name).resolve()  # in the cache a link, and what is damaged is the file behind it
        try:
            found = sha256(file)
        except OSError as error:
            raise UserError(f"{file} can't be read: {error.strerror or error}; {_AGAIN}") from None
        if found != checksum:
            raise UserError(
                f"{name} is damaged: {file} has the SHA-256 {found}, the manifest expects {checksum}; {_AGAIN}"
            )


def fetch(address: str, names: Iterable[str] = LOADED) -> Path:
    """Downloads files of a model on the Hub to its cache, unless they are there, and compares their checksums.

    Args:
        address: `hf://OWNER/NAME`, optionally with `@` and a branch, tag or commit.
        names: of the files.

    Returns:
        The folder that contains them, all of one commit.

    Raises:
        UserError: no such model, it can't be downloaded, or a file is damaged.
    """
    found = HUB_ADDRESS.fullmatch(address)
    if not found:
        raise UserError(f"{address!r}: must be {HUB}OWNER/NAME or {HUB}OWNER/NAME@REVISION")
    with hub_errors(address, "downloaded"):
        folder = _download(found["repository"], MANIFEST, found["revision"])
        for name in names:
            _download(found["repository"], name, folder.name)
    verify(folder, names)
    return folder


def _download(repository: str, name: str, revision: str | None) -> Path:
    """Downloads a file to the cache, unless it is there; returns the folder of its commit, which has its name."""
    from huggingface_hub import errors, hf_hub_download

    for attempt in range(1, ATTEMPTS + 1):
        try:
            return Path(hf_hub_download(repository, name, revision=revision)).parent
        except errors.HfHubHTTPError as error:
            if error.response.status_code < 500 or attempt == ATTEMPTS:
                raise
        time.sleep(attempt)
    raise AssertionError


def local_weights(weights: str) -> str | Path:
    """The safetensors file that `model.weights` names; one on the Hub is downloaded.

    Raises:
        UserError: see `fetch`.
    """
    return fetch(weights, (MODEL,)) / MODEL if weights.startswith(HUB) else weights


@contextmanager
def hub_errors(address: str, done: str) -> Iterator[None]:
    """Reports errors of huggingface_hub as one sentence; `done` is what couldn't be: downloaded, published."""
    from huggingface_hub import errors

    try:
        yield
    except UserError:
        raise
    except errors.RevisionNotFoundError:
        raise UserError(f"{address}: this repository has no such revision") from None
    except errors.LocalEntryNotFoundError as error:
        if isinstance(error.__cause__, errors.OfflineModeIsEnabled):
            raise UserError(
                f"{address} isn't in the cache, and HF_HUB_OFFLINE is set: unset it to download it"
            ) from None
        raise UserError(
            f"{address} can't be {done}, and isn't in the cache: {_reason(error.__cause__ or error)}; check the "
            "network, HF_ENDPOINT and HF_HUB_OFFLINE"
        ) from error
    except errors.EntryNotFoundError as error:
        raise UserError(f"{address} isn't a model from `trainer publish`: {_missing(error)}") from error
    except Exception as error:  # errors of huggingface_hub, its HTTP library and sockets have no common base
        status = getattr(getattr(error, "response", None), "status_code", None)
        if isinstance(error, errors.OfflineModeIsEnabled):
            raise UserError(f"{address} can't be {done}: HF_HUB_OFFLINE is set; unset it") from error
        if isinstance(error, errors.RepositoryNotFoundError) or status in (401, 403):
            raise UserError(f"{address} can't be {done}: {_refusal(status, done)}") from error
        advice = "try again later" if status and status >= 500 else "check the network and HF_ENDPOINT"
        if isinstance(error, errors.HFValidationError):  # of the name
            raise UserError(f"{address} can't be {done}: {_reason(error)}") from error
        raise UserError(f"{address} can't be {done}: {_reason(error)}; {advice}") from error


def _missing(error: Any) -> str:
    return f"it has no file {str(error.response.url).rpartition('/')[2]}" if hasattr(error, "response") else str(error)


def _refusal(status: int | None, done: str) -> str:
    from huggingface_hub import get_token

    if done == "published":
        return (
            f"the Hub refused the token ({status}); log in as a member of the owner (`hf auth login`), or set HF_TOKEN "
            "to a token with write access"
        )
    advice = "your token may not read it" if get_token() else "needs a token: run `hf auth login` or set HF_TOKEN"
    return f"there is no such model, or it is private and {advice}"


def _reason(error: BaseException) -> str:
    """The first line of an error's message."""
    return (str(error).strip().partition("\n")[0] or type(error).__name__).rstrip(".")
