"""A local page that tries a trained model on images: what it shows, the page, and its server.

Nothing leaves the machine: the server listens on the loopback interface, gradio's telemetry is off, and a content
security policy forbids the page to load anything from another host.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Sequence
from html import escape
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torchvision.transforms.v2.functional import to_pil_image

from trainer.data.card import Card
from trainer.data.parquet import Unreadable
from trainer.data.prepare import data_dir
from trainer.data.reader import Reader
from trainer.errors import TrainingFailed, UserError, one_line
from trainer.inference.inputs import UnreadableImage, read_image
from trainer.inference.model import Model
from trainer.inference.results import ClassMap, ImageClass, Objects, Picture, Result
from trainer.runs.folder import RunFolder, metrics_of
from trainer.signals import Stopped
from trainer.tasks.drawing import class_colors
from trainer.tasks.objects import SHOWN_SCORE
from trainer.tasks.task import Color

HOST = "127.0.0.1"
FIRST_PORT, PORTS, LAST_PORT = 7860, 100, 65535
EXAMPLES = 6  # images of the validation set
FRAME_HEIGHT = 420  # pixels of the page, for each picture
SHOWN_SIDE = 1600  # pixels; larger pictures only take longer to reach the browser
CLOSING_S = 5.0  # how long requests may take to end with the server

POLICY = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; frame-ancestors 'none'"
"""The page loads and sends nothing but what this server provides; gradio's scripts need the rest."""

STYLE = """
.gradio-container { width: 100%; max-width: 1200px !important; margin: 0 auto !important }
.heading h1 { font-size: 1.5rem; font-weight: 600; margin: .4rem 0 .1rem }
.heading p { margin: 0; opacity: .75 }
.picture img { width: 100% !important; height: 100% !important; object-fit: contain !important }
.outcome table, .outcome tr { border: 0 !important }
.picture img { width: 100% !important; height: 100% !important; object-fit: contain !important }
.outcome table, .outcome tr { border: 0 !important }
.outcome table { border-collapse: collapse; width: auto; font-variant-numeric: tabular-nums }
.outcome th, .outcome td { padding: .25rem 1.5rem .25rem 0; text-align: left; border: 0 !important }
.outcome th { font-weight: 600; border-bottom: 1px solid var(--border-color-primary) !important }
.outcome .swatch { display: inline-block; width: .8em; height: .8em; margin-right: .5em; border-radius: 2px }
"""


def outcome(model: Model, file: str | Path, threshold: float) -> tuple[list[Image.Image], str]:
    """What the page shows for an image: pictures, see `captions`, and a table (HTML) or a message.

    Args:
        model: the trained model.
        file: the image.
        threshold: objects of a lower score are left out.

    Returns:
        No pictures where the image can't be read: the text says why.
    """
    try:
        (result,) = model.predict([read_image(file)], threshold=threshold)
    except UnreadableImage as error:
        return [], f"<b>This image can't be read:</b> {escape(one_line(error))}"
    except (RuntimeError, UserError) as error:  # out of memory, or too small for the network
        return [], f"<b>The model can't process this image:</b> {escape(one_line(error))}"
    pictures = [result.plot()]
    if isinstance(result, Picture):
        pictures.insert(0, to_pil_image(result.image).convert("L"))
    for picture in pictures:
        picture.thumbnail((SHOWN_SIDE, SHOWN_SIDE))
    return pictures, table(result)


def captions(kind: type[Result]) -> tuple[str, ...]:
    """The captions of the pictures that are shown for a result."""
    return ("Grey input", "Result") if issubclass(kind, Picture) else ("Result",)


def table(result: Result) -> str:
    """A result in words (HTML): the shares of the classes, the objects, or the class."""
    if isinstance(result, ClassMap):
        colors = class_colors(len(result.classes))
        shares = [
            (share, color, name) for (name, share), color in zip(result.shares().items(), colors, strict=True) if share
        ]
        shares.sort(key=lambda each: -each[0])
        return _table(
            ("class", "share of pixels"), [(_named(name, color), f"{share:.1%}") for share, color, name in shares]
        )
    if isinstance(result, Objects):
        colors = class_colors(len(result.classes) + 1)[1:]
        rows = [
            (_named(each["class"], colors[label]), f"{each['score']:.2f}", ", ".join(f"{x:.0f}" for x in each["box"]))
            for each, label in zip(result.as_dicts(), result.labels.tolist(), strict=True)
        ]
        if not rows:
            return "No objects of this score or higher; lower the threshold to see less certain ones."
        return _table(("class", "score", "box: left, top, right, bottom"), rows)
    return f"Class: <b>{escape(result.name)}</b>" if isinstance(result, ImageClass) else ""


def _named(name: str, color: Color) -> str:
    return f'<span class="swatch" style="background: rgb{tuple(color)}"></span>{escape(name)}'


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(each)}</th>" for each in header)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def figures(model: Model) -> dict[str, float]:
    """The validation metrics of the loaded checkpoint, the one that chose the best first; empty where its run isn't
    known.
    """
    metrics: dict[str, float] = {}
    for line in RunFolder(model.trained.recipe.parent).read_metrics():
        if line["split"] == "validation" and line["step"] == model.trained.step:
            metrics = metrics_of(line)
    names = dict.fromkeys([model.recipe.evaluate.best, *model.task.metric_names])
    return {name: metrics[name] for name in names if name in metrics}


def heading(model: Model) -> str:
    """Title and figures of the run (HTML)."""
    recipe, step = model.recipe, model.trained.step
    what = f"{recipe.task.name} by {recipe.model.name}, trained on {recipe.data.name}, checkpoint of step {step}"
    measured = " · ".join(f"{name} {value:.4f}" for name, value in figures(model).items())
    second = f"<p>Validation: {escape(measured)}</p>" if measured else ""
    return f"<h1>{escape(model.trained.name)}</h1><p>{escape(what[0].upper() + what[1:])}</p>{second}"


def write_examples(model: Model, folder: Path) -> list[Path]:
    """Writes a few images of the run's validation set as PNG files, evenly spaced over the set.

    Returns:
        The files; none if the model is published, the set isn't prepared, or has no images.
    """
    if model.trained.published:  # without its data set
        return []
    prepared = data_dir() / model.recipe.source.name
    files = []
    try:
        card = Card.load(prepared)
        if overfit := model.recipe.data.overfit:
            card = card.of_first(overfit)
        column = next(name for name, role in card.columns.items() if role == "image")
        reader = Reader(prepared, card, "validation", cache=False)
        for number in range(min(EXAMPLES, len(reader))):
            _, sample = reader.read(number * len(reader) // min(EXAMPLES, len(reader)))
            files.append(folder / f"example_{number}.png")
            to_pil_image(sample[column].as_subclass(torch.Tensor)).save(files[-1])
    except (UserError, TrainingFailed, Unreadable, StopIteration):
        return files
    return files


def listen(port: int | None) -> socket.socket:
    """A socket on the loopback interface.

    Args:
        port: its port; None for the first free one from 7860.

    Raises:
        UserError: the port can't be used, or none is free.
    """
    if port is not None and not 1 <= port <= LAST_PORT:
        raise UserError(f"--port {port}: a port is a number from 1 to {LAST_PORT}")
    for candidate in range(FIRST_PORT, FIRST_PORT + PORTS) if port is None else [port]:
        try:
            return socket.create_server((HOST, candidate))
        except OSError as error:
            problem = os.strerror(error.errno or 0).lower()
    if port is None:
        raise UserError(f"no port from {FIRST_PORT} to {FIRST_PORT + PORTS - 1} is free; give one with --port")
    raise UserError(f"--port {port}: {problem}; leave out --port for the first free one, or give another")


def import_gradio(folder: Path) -> Any:
    """Imports gradio so that it keeps files in `folder` only and sends nothing, whatever the environment says.

    Raises:
        UserError: it isn't installed.
    """
    for name in [name for name in os.environ if name.startswith("GRADIO_")]:
        del os.environ[name]  # settings of other pages, such as a public link
    os.environ |= {
        "GRADIO_ANALYTICS_ENABLED": "False",  # version check and telemetry
        "GRADIO_RUN_HISTORY": "False",
        "GRADIO_TEMP_DIR": str(folder),
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    try:
        return import_module("gradio")
    except ImportError as error:
        raise UserError(f"trainer demo needs gradio ({error}): pip install 'recipe-trainer[demo]'") from None


def build_page(gradio: Any, model: Model, examples: Sequence[Path]) -> Any:
    """The page, as gradio's Blocks.

    Args:
        gradio: the module, see `import_gradio`.
        model: the trained model.
        examples: files of images to try.
    """
    height, width = model.trained.size or (256, 256)
    kind = type(model(Image.new("RGB", (width, height))))  # this also warms up the model
    buttons = ["download", "fullscreen"]  # not gradio's "share", which uploads
    framed = {"height": FRAME_HEIGHT, "elem_classes": "picture", "buttons": buttons}
    with gradio.Blocks(title=f"{model.trained.name} · trainer demo", analytics_enabled=False) as page:
        gradio.HTML(heading(model), elem_classes="heading")
        with gradio.Row():
            with gradio.Column():
                photo = gradio.Image(
                    label="Image", type="filepath", image_mode=None, sources=["upload", "clipboard"], **framed
                )
                # gradio would decode the image first, and fail where that is impossible.
                photo.preprocess = lambda upload: upload and upload.path
                threshold = gradio.Slider(
                    *(0, 1, SHOWN_SCORE), step=0.01, label="Threshold: lowest score shown", visible=kind is Objects
                )
                if examples:
                    gradio.Examples([[str(file)] for file in examples], photo, label="Images of the validation set")
            with gradio.Column():
                with gradio.Row():
                    pictures = [
                        gradio.Image(label=caption, interactive=False, format="png", **framed)
                        for caption in captions(kind)
                    ]
                text = gradio.HTML(elem_classes="outcome")

        def answer(file: str | None, lowest: float) -> list[Any]:
            shown, words = outcome(model, file, lowest) if file else ([], "")
            empty = [None] * (len(pictures) - len(shown))
            return [*shown, *empty, words]

        for event in (photo.change, threshold.release):
            event(answer, [photo, threshold], [*pictures, text], concurrency_id="model")  # one at a time
    return page


def serve(gradio: Any, page: Any, listening: socket.socket, ready: str) -> None:
    """Serves the page until a signal stops it, see `trainer.signals`.

    Args:
        gradio: the module.
        page: the Blocks.
        listening: where it is served.
        ready: printed as soon as the page can be opened.
    """
    uvicorn, fastapi = import_module("uvicorn"), import_module("fastapi")
    font = [gradio.themes.Font(name) for name in ("system-ui", "sans-serif")]
    mono = [gradio.themes.Font(name) for name in ("ui-monospace", "monospace")]
    app = gradio.mount_gradio_app(
        fastapi.FastAPI(openapi_url=None),
        page,
        path="/",
        server_name=HOST,
        server_port=listening.getsockname()[1],
        footer_links=[],
        ssr_mode=False,
        mcp_server=False,
        theme=gradio.themes.Default(font=font, font_mono=mono),
        css=STYLE,
    )
    headers = [("Content-Security-Policy", POLICY), ("Referrer-Policy", "no-referrer")]
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical", headers=headers, access_log=False))
    ended = threading.Event()

    def run() -> None:
        try:
            server.run([listening])
        finally:
            ended.set()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        print(ready, flush=True)
        ended.wait()  # not thread.join(), which takes the thread for ended when a signal interrupts it (Python 3.11)
    except Stopped:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C would leave the uploaded files behind
        server.should_exit = server.force_exit = True
        thread.join(CLOSING_S)
    else:
        raise RuntimeError("the server of the page has ended")
