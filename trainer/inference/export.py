"""Trained models as files that run without this package: ONNX, and torch.export's `.pt2`."""

from __future__ import annotations

import importlib.util
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram

from trainer.errors import UserError, one_line
from trainer.inference.graphs import Graph, Tensors, example_size, graph_of
from trainer.inference.model import Model
from trainer.inference.trained import TrainedModel
from trainer.runs.folder import RunFolder

Format = Literal["onnx", "torch"]
Precision = Literal["fp32", "fp16"]
SUFFIXES: dict[str, str] = {"onnx": ".onnx", "torch": ".pt2"}
DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16}
OPSET = 18
METADATA = "metadata.json"
"""The extra file of a `.pt2` with the metadata."""
TORCHVISION = "import torchvision before torch.export.load: it has the non-maximum suppression"
LONGEST_REASON = 200  # characters of an exporter's message


def check_installed(form: Format) -> None:
    """Makes sure that what a format needs is installed.

    Raises:
        UserError: names the extra.
    """
    needed = ("onnx", "onnxruntime", "onnxscript") if form == "onnx" else ()
    if missing := [name for name in needed if importlib.util.find_spec(name) is None]:
        raise UserError(
            f"--format onnx needs {', '.join(missing)}, not installed here: pip install 'recipe-trainer[export]'"
        )


def write(
    model: Model, file: Path, form: Format, size: tuple[int, int] | None, precision: Precision = "fp32"
) -> dict[str, Any]:
    """Writes the model, its preprocessing and its postprocessing to a file.

    Args:
        model: on the CPU.
        file: what is written; not atomically.
        form: `onnx` or `torch`.
        size: height and width of the images that the file takes, or None: any that the network takes.
        precision: `fp16` has weights and activations in half precision; outputs are float32 in any case.

    Returns:
        The metadata in the file: names and classes, and how its inputs are prepared.

    Raises:
        UserError: the network can't be expressed in this format.
    """
    graph = graph_of(model.task, DTYPES[precision])
    height, width = example_size(model, size)
    example = torch.randint(
        0, 256, (1 if graph.one_image else 2, 3, height, width), dtype=torch.uint8, generator=torch.Generator()
    )
    if graph.one_image and (form == "torch" or precision == "fp16"):
        raise UserError(
            f"model {model.recipe.model.name} can't be exported with --format {form} --precision {precision}, as its "
            "regions of interest depend on the image; --format onnx --precision fp32 can"
        )
    try:
        with torch.no_grad(), _quiet():
            outputs = list(graph(example))
            metadata = describe(model, graph, form, outputs, size, precision)
            if graph.one_image:
                _write_traced(graph, example, file, outputs, size is None)
                _add_onnx_metadata(file, metadata)
                return metadata
            program = torch.export.export(
                graph, (example,), dynamic_shapes=(_dynamic(size, model.preparation.divisor),), strict=False
            )
            if form == "torch":
                torch.export.save(program, file, extra_files={METADATA: json.dumps(metadata)})
            else:
                _write_onnx(program, file, outputs)
                _add_onnx_metadata(file, metadata)
    except OSError as error:
        raise UserError(f"{file}: can't be written: {error.strerror or error}") from error
    except Exception as error:  # of many types, for operations and control flow that a graph can't hold
        any_size = " for images of any size; without --dynamic it may be" if size is None and model.trained.size else ""
        reason = one_line(error).split(". ")[0][:LONGEST_REASON]
        raise UserError(f"model {model.recipe.model.name} can't be exported as {form}{any_size}: {reason}") from error
    return metadata


def describe(
    model: Model,
    graph: Graph,
    form: Format,
    outputs: Sequence[str],
    size: tuple[int, int] | None,
    precision: Precision,
) -> dict[str, Any]:
    """The metadata of a file, as JSON has it."""
    recipe, trained = model.recipe, model.trained
    return {
        "run": trained.name,
        "step": trained.step,
        "task": recipe.task.name,
        "model": recipe.model.name,
        "data": recipe.data.name,
        "classes": list(model.classes),
        "metrics": run_metrics(trained, model.task.metric_names),
        "input": "image: uint8 RGB (B, 3, H, W)" if not graph.one_image else "image: uint8 RGB (1, 3, H, W)",
        "size": size and list(size),
        "size_divisor": model.preparation.divisor,
        "resize": recipe.data.resize_mode if model.preparation.size else None,
        "outputs": list(outputs),
        "precision": precision,
        "version": version("recipe-trainer"),
    } | (
        {"note": note}
        if (note := graph.note or (TORCHVISION if form == "torch" and "boxes" in outputs else ""))
        else {}
    )


def run_metrics(trained: TrainedModel, names: Sequence[str]) -> dict[str, float]:
    """These metrics of the run's own evaluation of the checkpoint, on the whole set in the run's precision; empty where
    there was none.
    """
    lines = RunFolder(trained.recipe.parent).read_metrics()
    found = [line for line in lines if line["split"] == "validation" and line["step"] == trained.step]
    return {name: found[-1][name] for name in names if name in found[-1]} if found else {}


def open_file(file: Path, form: Format) -> Callable[[Tensor], Tensors]:
    """A file as a function from images uint8 (B, 3, H, W) to named outputs, run by ONNX Runtime or PyTorch alone."""
    if form == "onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        names = [output.name for output in session.get_outputs()]

        def run(image: Tensor) -> Tensors:
            outputs = session.run(None, {"image": image.numpy()})
            return {name: torch.from_numpy(output) for name, output in zip(names, outputs, strict=True)}

        return run
    with _quiet():
        module: Callable[[Tensor], Tensors] = torch.export.load(file).module()
    return module


def _dynamic(size: tuple[int, int] | None, divisor: int) -> dict[int, Any]:
    """The dimensions of the input that a file leaves open."""
    sides: dict[int, Any] = {} if size else {2: Dim.DYNAMIC, 3: Dim.DYNAMIC}
    if sides and divisor > 1:
        sides = {2: divisor * Dim("height"), 3: divisor * Dim("width")}
    return {0: Dim.DYNAMIC, **sides}


def _write_onnx(program: ExportedProgram, file: Path, outputs: Sequence[str]) -> None:
    onnx_program: Any = torch.onnx.export(
        program, dynamo=True, opset_version=OPSET, input_names=["image"], output_names=outputs, verbose=False
    )
    onnx_program.save(file)


def _write_traced(graph: Graph, example: Tensor, file: Path, outputs: Sequence[str], any_size: bool) -> None:
    """By the exporter that traces with an example, for which torchvision prepared its detectors."""
    sides = {"image": {2: "height", 3: "width"}} if any_size else {}
    torch.onnx.export(
        graph,
        (example,),
        file,
        dynamo=False,
        opset_version=OPSET,
        input_names=["image"],
        output_names=outputs,
        dynamic_axes=sides | {name: {0: "detections"} for name in outputs},
    )


def _add_onnx_metadata(file: Path, metadata: Mapping[str, Any]) -> None:
    import onnx

    proto = onnx.load(file)
    texts = {name: each if isinstance(each, str) else json.dumps(each) for name, each in metadata.items()}
    onnx.helper.set_model_props(proto, texts)
    onnx.checker.check_model(proto)
    onnx.save(proto, file)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporters' remarks, which are for their own authors."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
