"""The launcher's settings, and those that contradict the recipe."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trainer.errors import UserError
from trainer.recipe.checks import Check
from trainer.recipe.file import Problem
from trainer.recipe.recipe import Recipe

LAUNCH_FILE = Path("accelerate_config.yaml")


@dataclass(frozen=True)
class Launch:
    """The launcher's settings, and where they are.

    Attributes:
        processes: number of processes.
        file_processes: number of processes in the launch file, which `trainer check` assumes.
        mixed_precision: `no` where unset.
        accumulation: gradient accumulation steps; None where unset.
        dynamo: compile backend; `no` where unset.
        where: the file or variables that hold them, for messages.
    """

    processes: int = 1
    file_processes: int = 1
    mixed_precision: str = "no"
    accumulation: int | None = None
    dynamo: str = "no"
    where: str = "the launcher"

    @classmethod
    def read(cls, environment: Mapping[str, str] = os.environ, file: Path = LAUNCH_FILE) -> Launch:
        """From the variables that a launcher sets; without a launcher from the launch file, so that both agree."""
        accumulation = environment.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS")
        launched = "ACCELERATE_MIXED_PRECISION" in environment
        values = {} if launched or not file.is_file() else _launch_file(file)
        in_file = values.get("num_processes")
        return cls(
            processes=int(environment.get("WORLD_SIZE", 1)),
            file_processes=in_file if isinstance(in_file, int) else 1,
            mixed_precision=str(
                environment.get("ACCELERATE_MIXED_PRECISION", values.get("mixed_precision") or "no")
            ).lower(),
            accumulation=int(accumulation)
            if accumulation and accumulation.isdigit()
            else values.get("gradient_accumulation_steps"),
            dynamo=str(environment.get("ACCELERATE_DYNAMO_BACKEND", "no")).lower(),
            where="the launcher (its options, its configuration file or ACCELERATE_… variables)"
            if launched or accumulation
            else str(file),
        )

    def check(self, recipe: Recipe) -> Iterator[Problem]:
        """Settings of the launcher that contradict the recipe."""
        precision, accumulate = recipe.train.precision, recipe.train.accumulate
        if self.mixed_precision not in ("no", precision):
            yield recipe.problem(
                "train.precision",
                f"{self.where} sets mixed_precision: {self.mixed_precision}, the recipe {precision}; set it to 'no' "
                "there, the recipe decides",
            )
        if self.accumulation not in (None, accumulate):
            yield recipe.problem(
                "train.accumulate",
                f"{self.where} sets gradient_accumulation_steps: {self.accumulation}, the recipe {accumulate}; "
                "remove it there, the recipe decides",
            )
        if self.dynamo not in ("no", "") and not recipe.train.compile:
            yield recipe.problem(
                "train.compile",
                f"{self.where} sets dynamo backend {self.dynamo}, the recipe doesn't compile; set it to 'no' there, "
                "the recipe decides",
            )
        if self.processes > 1 and recipe.data.batch_size % (self.processes * accumulate):
            split = f"{self.processes} processes" + (f" x train.accumulate {accumulate}" if accumulate > 1 else "")
            share = self.processes * accumulate
            near = max(share, round(recipe.data.batch_size / share) * share)
            yield recipe.problem(
                "data.batch_size",
                f"must be divisible by {split}: it is the number of samples in an optimizer step; try {near}",
                recipe.data.batch_size,
            )

    def checks(self) -> tuple[Check, ...]:
        """The checks for `load_recipe`, each with the sections that it reads."""
        return ((("data", "train"), self.check), (("train",), check_device))


def _launch_file(file: Path) -> dict[str, Any]:
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    try:
        values = YAML(typ="safe", pure=True).load(file.read_text(encoding="utf-8"))
    except (OSError, YAMLError) as error:
        raise UserError(f"{file}: can't be read: {error}") from error
    return values if isinstance(values, dict) else {}


def check_device(recipe: Recipe) -> Iterator[Problem]:
    """A precision that this machine doesn't support."""
    precision = recipe.train.precision
    if precision == "fp16" and not torch.cuda.is_available():
        yield recipe.problem("train.precision", "fp16 needs a GPU; use bf16, fp32 or auto", precision)
    if (
        precision == "bf16"
        and torch.cuda.is_available()
        and not torch.cuda.is_bf16_supported(including_emulation=False)
    ):
        yield recipe.problem("train.precision", "this GPU has no fast bf16; use fp16, fp32 or auto", precision)
    if precision == "tf32" and not (torch.cuda.is_available() and torch.cuda.is_tf32_supported()):
        yield recipe.problem(
            "train.precision", "tf32 needs an NVIDIA GPU of the Ampere generation or later; use fp32 or auto", precision
        )
