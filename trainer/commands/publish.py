"""`trainer publish RUN OWNER/NAME`: a trained model on the Hugging Face Hub."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trainer.inference.model import Model

HELP = "publish a trained model on the Hugging Face Hub: weights, recipe, metrics and a model card"
FILES = {"onnx": "model.onnx", "torch": "model.pt2"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of this verb."""
    parser.add_argument("run", metavar="RUN", help="a run folder, a name below $TRAINER_RUNS, or a checkpoint folder")
    parser.add_argument("repository", metavar="OWNER/NAME", help="the repository; it is created if necessary")
    parser.add_argument(
        "--checkpoint", default="best", metavar="NAME", help="best (default), last, or a name such as step_00000100"
    )
    parser.add_argument("--private", action="store_true", help="create a private repository")
    parser.add_argument(
        "--no-pictures", action="store_true", help="leave out the run's pictures, which show validation samples"
    )
    parser.add_argument("--export", choices=tuple(FILES), help="add the model as exported by `trainer export`")
    parser.add_argument("--dry-run", action="store_true", help="write the folder, list its files, and upload nothing")
    parser.add_argument("--out", type=Path, metavar="DIR", help="of --dry-run: the folder (default: ./NAME)")
    parser.epilog = (
        "Uploading needs a token with write access: run `hf auth login` once, or set HF_TOKEN. To load the model back, "
        'use trainer.load("hf://OWNER/NAME") or model.weights: hf://OWNER/NAME in a recipe. Look at the model card '
        "(README.md) with --dry-run first, and choose a license: the data set may restrict it."
    )


def run(options: argparse.Namespace) -> int:
    """Assembles the folder, then uploads it or moves it to its place.

    Raises:
        UserError: an invalid name or no token, no such run, --out can't be written, or the Hub refuses the upload.
    """
    from huggingface_hub import get_token

    from trainer.errors import UserError
    from trainer.inference.model import Model
    from trainer.inference.publish import assemble, upload
    from trainer.inference.trained import find_trained

    repository = _repository(options.repository)
    if options.out and not options.dry_run:
        raise UserError(f"--out {options.out}: only with --dry-run; without it nothing is left on this machine")
    out = options.out or Path(repository.partition("/")[2])
    if options.dry_run:
        _check_free(out)
    elif not get_token():
        raise UserError("no Hugging Face token: run `hf auth login` or set HF_TOKEN, or add --dry-run")
    trained = find_trained(options.run, options.checkpoint)
    if trained.published:
        raise UserError(f"{options.run} is already published; publish takes a run")
    model = Model(trained, "cpu")
    # Next to its place, so that it is moved there at once.
    with tempfile.TemporaryDirectory(prefix=".publish-", dir=out.parent if options.dry_run else None) as scratch:
        folder = Path(scratch) / "model"
        folder.mkdir()
        if options.export and (code := _export(options, model, folder)):
            return code
        assemble(model, folder, repository, not options.no_pictures)
        files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
        for note in _notes(model, files):
            print(f"note: {note}")
        if options.dry_run:
            sizes = {file.relative_to(folder).as_posix(): file.stat().st_size for file in files}
            if out.exists():
                out.rmdir()  # empty
            folder.rename(out)
            print("\n".join(f"{size:>12,}  {name}" for name, size in sizes.items()))
            print(f"{out}: this is what would be uploaded to {repository}; nothing was")
        else:
            print(f"published step {trained.step} of {trained.name}: {upload(folder, repository, options.private)}")
            print(f'load it with trainer.load("hf://{repository}")')
    return 0


def _repository(given: str) -> str:
    """A valid `OWNER/NAME`."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils._validators import validate_repo_id

    from trainer.components import HUB, HUB_ADDRESS
    from trainer.errors import UserError

    reason = "letters, digits and - _ . form a name"
    if HUB_ADDRESS.fullmatch(HUB + given) and "@" not in given:
        try:
            validate_repo_id(given)
            return given
        except HFValidationError as error:
            reason = str(error).partition(": '")[0]
    raise UserError(f"{given!r}: must be OWNER/NAME of a repository on the Hub, e.g. me/flowers ({reason})")


def _check_free(out: Path) -> None:
    import os

    from trainer.errors import UserError

    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists: remove it, or choose another folder with --out")
    if not out.parent.is_dir() or not os.access(out.parent, os.W_OK):
        raise UserError(f"--out {out}: {out.parent.resolve()} is not a folder that can be written to")


def _export(options: argparse.Namespace, model: Model, folder: Path) -> int:
    """What `trainer export` does, into the folder; returns its exit code."""
    from trainer.commands import main

    dynamic = [] if model.trained.size else ["--dynamic"]
    words = [options.run, "--checkpoint", options.checkpoint, "--format", options.export, *dynamic]
    return main(["export", *words, "--out", str(folder / FILES[options.export])])


def _notes(model: Model, files: list[Path]) -> list[str]:
    """What whoever publishes should know."""
    notes = ["the model card names no license: choose one and add it to README.md, at the top"]
    if any(file.suffix == ".png" for file in files):
        notes.append(f"the pictures show validation samples of {model.recipe.data.name}; --no-pictures leaves them out")
    if model.recipe.plugins:
        notes.append(f"plugins are code and aren't published: {', '.join(model.recipe.plugins)}")
    return notes
