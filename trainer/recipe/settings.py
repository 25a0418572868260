"""The sections of a recipe, each with the keys that all its components share, and their defaults."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_type_hints

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from trainer.components import InnerFraction, Settings, Size, weights_field
from trainer.recipe.durations import Duration, Span


class DataSettings(Settings):
    """Keys of `data:` that every data set has.

    Each process tolerates `max_unreadable` unreadable training samples and replaces each by the next sample. An
    unreadable validation sample is always an error, since metrics on different samples aren't comparable.
    `resize_mode: letterbox` keeps the aspect ratio and pads the rest; it can't be used with class masks, since padding
    has no class. `overfit: N` trains and validates on the first N training samples, which a working model memorises.
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
    """Keys of `model:` that every model has: its initial weights, the layers to reset and the trainable layers.
    Some models also accept published weights by name.
    """

    name: str
    weights: Annotated[str, weights_field()] = "none"
    reset_layers: list[str] = []
    train_only: list[str] = []


class OptimizerSettings(Settings):
    """Keys of `optimizer:` that every optimizer has: the learning rate, which the schedule scales."""

    name: str
    lr: PositiveFloat


class NamedSettings(Settings):
    """A section without keys of its own, only those of its component."""

    name: str


class TrainSettings(Settings):
    """Keys of `train:`, which configure the training loop.

    `precision: tf32` stores fp32 and computes matrix products and convolutions in TF32, on GPUs from Ampere on; `fp32`
    never does. `deterministic: auto` is true on CPUs and false on GPUs, where it costs speed; there a resumed run has
    the bits of an uninterrupted one only with `true`. `timeout` is how long a rank may stall. `freeze: N` freezes the
    first N layers of a model that numbers them (`model.0`, `model.1`, …).
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
    """Keys of `evaluate:`: how often, which metric decides on the best checkpoint, and after how many evaluations
    without an improvement training ends.
    """

    every: Duration = Span.parse("1 epoch")
    best: str = "loss"
    stop_after: PositiveInt | None = None
    batch_size: PositiveInt | None = None
    pictures: NonNegativeInt = 8


class CheckpointSettings(Settings):
    """Keys of `checkpoint:`: how often, and how many are kept in addition to the best."""

    every: Duration = Span.parse("1 epoch")
    keep: Annotated[int, Field(ge=2)] = 3


class Sections:
    """The sections of a recipe. One that names a component also has that component's keys.

    An invalid section is missing while checks run; each check lists the sections that it reads.
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


# section -> schema of the keys that all its components share
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

# Other sections are required.
DEFAULTS: dict[str, Any] = {"schedule": {"name": "constant"}, "evaluate": {}, "checkpoint": {}}

# section that names a component -> the keys that it keeps if it names another one
SHARED: dict[str, set[str]] = {section: {*SCHEMAS[section].model_fields} - {"name"} for section in KINDS}
SHARED["data"].add("augment")  # a list of components, so not in the schema

# Keys that may change when a run is resumed: they don't change what is computed, or only extend it.
RESUMABLE = (
    *("train.duration", "train.non_finite", "train.timeout", "evaluate.stop_after", "track", "reference"),
    *("data.workers", "data.cache", "data.max_unreadable", "checkpoint"),
)
