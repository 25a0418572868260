"""`trainer demo`: a local page on which a trained model can be tried."""

from __future__ import annotations

import argparse

HELP = "open a local page to try a trained model: drop an image, see the result"
EPILOG = """The page is served on this machine only (127.0.0.1) and needs no network: images that
are dropped on it stay here, and are deleted when Ctrl-C ends the command.

Example:
  pip install 'recipe-trainer[demo]'
  trainer demo quickstart"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of this verb."""
    parser.epilog = EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "run",
        metavar="RUN",
        help="a run folder or the name of a run in $TRAINER_RUNS, one of its checkpoint folders, or a published model: "
        "its folder or hf://OWNER/NAME",
    )
    parser.add_argument("--port", type=int, metavar="N", help="port of the page (default: the first free from 7860)")
    parser.add_argument(
        "--checkpoint",
        default="best",
        metavar="best|last|NAME",
        help="which checkpoint of the run, e.g. step_00000100 (default: best, or the newest where none is the best)",
    )


def run(options: argparse.Namespace) -> int:
    """Serves the page until Ctrl-C.

    Raises:
        UserError: no such run or checkpoint, the port can't be used, or gradio isn't installed.
    """
    from pathlib import Path
    from tempfile import TemporaryDirectory

    from trainer.inference.demo import build_page, import_gradio, listen, serve, write_examples
    from trainer.inference.model import load

    with TemporaryDirectory(prefix="trainer_demo_") as temporary, listen(options.port) as listening:
        model = load(options.run, options.checkpoint)
        gradio = import_gradio(Path(temporary))
        page = build_page(gradio, model, write_examples(model, Path(temporary)))
        host, port = listening.getsockname()
        serve(gradio, page, listening, f"{model.trained.name}: open http://{host}:{port} in a browser; Ctrl-C ends it")
    print("stopped; uploaded images are deleted")
    return 0
