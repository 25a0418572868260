"""The sections of a recipe: which keys each has, whatever component it names, and their defaults."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_type_hints

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from trainer.components import InnerFraction, Settings, Size, weights_field
from trainer.recipe.durations import Duration, Span


class DataSettings(Settings):
    """Keys of `data:` that every data set has.

    `max_unreadable` training samples may be unreadable, as each process counts: the next sample of the set takes the
    place of each. A validation sample that can't be read is always an error: metrics over another set can't be
    compared. `resize_mode: letterbox` keeps the aspect and pads what is left; it is for sets of boxes, whose padding
    has none. `overfit: N` trains and validates on the first N training samples, which a working model
    memorises.
    """

    name: str
    batch_size: Annotated[int, Field(gt=0, le=2**20)]
    workers: Literal["auto"] | Annotated[int, Field(ge=0, le=1024)] = "auto"
    cache: Literal["auto", "off"] = "auto"
    window: PositiveInt = 8
    resize: Size | None = None
    resize_mode: Literal["stretch", "letterbox"] = "stretch"
    max_unreadable: NonNegativeInt = 0
    overfit: PositiveInt | None = None


class ModelSettings(Settings):
    """Keys of `model:` that every model has: its initial weights, the layers that are reset and
    those that are trainable. Some know published weights by name.
    """

    name: str
    weights: Annotated[str, weights_field()] = "none"
    reset_layers: list[str] = []
    train_only: list[str] = []


class OptimizerSettings(Settings):
    """Keys of `optimizer:` that every optimizer has: the learning rate,
    by which the schedule's factor is multiplied.
    """

    name: str
    lr: PositiveFloat


class NamedSettings(Settings):
    """A section that has nothing but its component's keys."""

    name: str


class TrainSettings(Settings):
    """`train:`, how the loop runs.

    `precision: tf32` stores fp32 and computes products and convolutions in TF32, on GPUs from Ampere on; `fp32` never
    does. `deterministic: auto` is true on CPUs and false on GPUs, where it costs speed: there a resumed run has the
    bits of an uninterrupted one with `true` only. `timeout` is how long a rank may stall. `freeze: N` keeps the
    first N layers of a model that numbers them (`model.0`, `model.1`, …) as they are.
    """

    duration: Duration
    precision: Literal["auto", "fp32", "tf32", "bf16", "fp16", "fp64"] = "auto"
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    accumulate: PositiveInt = 1
    clip_norm: PositiveFloat | None = None
    freeze: NonNegativeInt = 0
    ema: InnerFraction | None = None
    channels_last: bool = True
    compile: bool = False
    deterministic: Literal["auto"] | bool = "auto"
    threads: Literal["auto"] | PositiveInt = "auto"
    log_every: Duration = Span.parse("10 steps")
    non_finite: Literal["error", "skip"] = "error"
    timeout: Duration = Span.parse("10 minutes")


class EvaluateSettings(Settings):
    """`evaluate:`, when, which metric makes a checkpoint the best,
    and after how many evaluations without a better one training ends.
    """

    every: Duration = Span.parse("1 epoch")
    best: str = "loss"
    stop_after: PositiveInt | None = None
    batch_size: PositiveInt | None = None
    pictures: NonNegativeInt = 8


class CheckpointSettings(Settings):
    """`checkpoint:`, when, and how many are kept besides the best."""

    every: Duration = Span.parse("1 epoch")
    keep: Annotated[int, Field(ge=2)] = 3


class Sections:
    """The sections of a recipe, each with the keys below; one that names a component has its keys too.

    While checks run, a section with mistakes of its own is missing; each check is registered for those it reads.
    """

    task: NamedSettings
    data: DataSettings
    model: ModelSettings
    loss: NamedSettings
    optimizer: OptimizerSettings
    schedule: NamedSettings
    train: TrainSettings
    evaluate: EvaluateSettings
    checkpoint: CheckpointSettings


# section -> schema of the keys that it has whatever component it names
SCHEMAS: dict[str, type[Settings]] = get_type_hints(Sections)

# section -> the kind of component that it names
KINDS = {
    "task": "task",
    "data": "dataset",
    "model": "model",
    "loss": "loss",
    "optimizer": "optimizer",
    "schedule": "schedule",
}

# A section that isn't among them is required.
DEFAULTS: dict[str, Any] = {"schedule": {"name": "constant"}, "evaluate": {}, "checkpoint": {}}

# section that names a component -> the keys that stay where it names another
SHARED: dict[str, set[str]] = {section: {*SCHEMAS[section].model_fields} - {"name"} for section in KINDS}
SHARED["data"].add("augment")  # a list of components: not part of the schema

# Changes with which a run can be resumed: they leave what is computed as it is, or only add to it.
RESUMABLE = (
    *("train.duration", "train.non_finite", "train.timeout", "evaluate.stop_after", "track", "reference"),
    *("data.workers", "data.cache", "data.max_unreadable", "checkpoint"),
)
