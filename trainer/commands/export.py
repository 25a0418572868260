"""`trainer export RUN`: a trained model as a file that runs without this package."""

from __future__ import annotations

import argparse
import os
import sys
from math import nan
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainer.inference.comparison import Comparison

HELP = "write a trained model as ONNX or torch.export file, preprocessing included, and compare it with the network"
DEFAULT_SAMPLES = 64


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of this verb."""
    parser.add_argument("run", metavar="RUN", help="a run folder, a name below $TRAINER_RUNS, or a checkpoint folder")
    parser.add_argument("--format", required=True, choices=("onnx", "torch"), help="torch is torch.export's .pt2")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: RUN.onnx or RUN.pt2 in the current folder")
    parser.add_argument(
        "--dynamic", action="store_true", help="take images of any size, not only of the size that the run validated on"
    )
    parser.add_argument(
        "--precision", default="fp32", choices=("fp32", "fp16"), help="of weights and activations (default: fp32)"
    )
    parser.add_argument(
        "--checkpoint", default="best", metavar="NAME", help="best (default), last, or a name such as step_00000100"
    )
    parser.add_argument(
        "--samples",
        type=int,
        default=DEFAULT_SAMPLES,
        metavar="N",
        help="validation samples that file and network are compared on (default: %(default)s)",
    )
    parser.epilog = (
        "The file takes uint8 RGB images (B, 3, H, W) and returns named outputs; its metadata lists them, with the "
        "classes and the input size. It is kept only if it computes what the network does (else exit code 3)."
    )


def run(options: argparse.Namespace) -> int:
    """Writes the file, compares it with the network, and reports both.

    Raises:
        UserError: no such run, a missing package, an unusable --out, or a network that can't be exported.
    """
    from trainer.errors import UserError
    from trainer.inference import export
    from trainer.inference.comparison import compare, validation_data
    from trainer.inference.model import load
    from trainer.reporting.progress import Progress
    from trainer.runs.durable import flush

    if options.samples < 1:
        raise UserError(f"--samples {options.samples}: must be at least 1")
    export.check_installed(options.format)
    suffix = export.SUFFIXES[options.format]
    if options.out and options.out.suffix != suffix:
        raise UserError(f"--out {options.out}: a file of --format {options.format} ends in {suffix}")
    folder = options.out.parent if options.out else Path()
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise UserError(f"--out {options.out}: {folder.resolve()} is not a folder that can be written to")
    if options.out and options.out.is_dir():
        raise UserError(f"--out {options.out}: is a folder")
    model = load(options.run, options.checkpoint, "cpu")
    out = options.out or Path(f"{model.trained.name}{suffix}")
    size = None if options.dynamic else model.trained.size
    if size is None and not options.dynamic:
        raise UserError(f"the images of {model.trained.name} differ in size: add --dynamic, for a file that takes any")
    data = validation_data(model)
    progress = Progress(True)
    temporary = out.with_name(f".{out.stem}.tmp{suffix}")
    try:
        progress.say(f"exporting {model.trained.name}, step {model.trained.step}, as {options.format}")
        metadata = export.write(model, temporary, options.format, size, options.precision)
        progress.say("comparing the file with the network")
        progress.start(min(options.samples, len(data.validation)) if data else 0, 0)
        function = export.open_file(temporary, options.format)
        comparison = compare(model, function, options.precision, size, data, options.samples, progress.step)
        if comparison.is_close:
            flush(temporary)
            temporary.replace(out)
            flush(out.parent)
    finally:
        progress.close()
        temporary.unlink(missing_ok=True)
    print("\n".join(describe(comparison, metadata)))
    if not comparison.is_close:
        print(
            f"error: file and network differ by {comparison.largest:.2g}, more than the {comparison.tolerance:g} "
            f"tolerated for {options.precision}; {out} was not written",
            file=sys.stderr,
        )
        return 3
    print(f"{out}: {out.stat().st_size / 2**20:.1f} MiB; image {_shape(metadata)} to {', '.join(metadata['outputs'])}")
    return 0


def describe(comparison: Comparison, metadata: dict[str, Any]) -> list[str]:
    """What the comparison found, a line for each fact."""
    found = (
        f"{comparison.num_samples} validation samples"
        if comparison.num_samples
        else "random images, as the run's set isn't prepared here"
    )
    lines = [
        f"compared on {found}: largest difference of the raw outputs {comparison.difference:.2g}, relative "
        f"{comparison.relative:.2g} (tolerated: {comparison.tolerance:g})"
    ]
    if comparison.agreement < 1:
        lines.append(f"equal classes: {comparison.agreement:.4%}")
    if comparison.other_numbers:
        lines.append(f"another number of detections than the network's in {comparison.other_numbers} images")
    for name, value in comparison.by_network.items():
        noted = metadata["metrics"].get(name)
        run = "" if noted is None else f"; {noted:.4f} by the run's own evaluation of all samples, in its precision"
        by_file = comparison.by_file.get(name, nan)
        lines.append(f"{name}: {by_file:.4f} by the file, {value:.4f} by the network in fp32{run}")
    return lines + ([metadata["note"]] if "note" in metadata else [])


def _shape(metadata: dict[str, Any]) -> str:
    height, width = metadata["size"] or ("H", "W")
    return str(metadata["input"]).removeprefix("image: ").replace("H, W", f"{height}, {width}")
