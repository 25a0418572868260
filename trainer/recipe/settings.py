"""The sections of a recipe, each with the keys that all its components share, and their defaults."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_type_hints

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from trainer.components import InnerFraction, Settings, Size, weights_field
from trainer.recipe.durations import Duration, Span


class DataSettings(Settings):
    """Keys of `data:` that every data set has.

    Attributes:
        name: the data set.
        batch_size: samples in one optimizer step, over all processes.
        workers: processes that load samples, for each training process. `auto` is none on CPUs, where they compete
            with the training.
        cache: whether decoded and resized pixels are kept on disk; `auto` does so where there is room.
        window: row groups of samples that are shuffled together; more mix better and take more memory.
        resize: height and width that images are resized to, once.
        resize_mode: `stretch` changes the aspect; `letterbox` keeps it and pads what is left, and is for sets of boxes.
        max_unreadable: training samples that may be unreadable, as each process counts. The next sample of the set
            takes the place of each. A validation sample that can't be read is always an error: metrics over another set
            can't be compared.
        overfit: train and validate on this many training samples only, which a working model memorises.
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
    """Keys of `model:` that every model has.

    Attributes:
        name: the model.
        weights: initial weights; some models know published ones by name.
        reset_layers: layers, by name, that start from new values whatever the weights.
        train_only: layers, by name, that are trained while all others stay frozen; none means all layers are trained.
    """

    name: str
    weights: Annotated[str, weights_field()] = "none"
    reset_layers: list[str] = []
    train_only: list[str] = []


class OptimizerSettings(Settings):
    """Keys of `optimizer:` that every optimizer has.

    Attributes:
        name: the optimizer.
        lr: learning rate, which the schedule's factor multiplies.
    """

    name: str
    lr: PositiveFloat


class NamedSettings(Settings):
    """Keys of a section that has no others than its component's.

    Attributes:
        name: the component.
    """

    name: str


class TrainSettings(Settings):
    """How the loop runs.

    Attributes:
        duration: how long to train, e.g. `25 epochs`, `500 steps` or `30 minutes`.
        precision: of the arithmetic; `auto` is bf16 where the hardware is fast at it, else fp32. `tf32` stores fp32 and
            computes products and convolutions in TF32, on GPUs from Ampere on; `fp32` never does.
        seed: of everything random.
        accumulate: parts of a batch whose gradients are added up, to save memory.
        clip_norm: largest norm of the gradients; larger ones are scaled down.
        freeze: keep this many first layers of a model that numbers them (`model.0`, `model.1`, …) as they are.
        ema: decay of an exponential moving average of the weights, which is then evaluated.
        channels_last: whether images are stored with the channels last, which is faster on most hardware.
        compile: whether to compile the model with torch.compile.
        deterministic: `auto` is true on CPUs and false on GPUs, where it costs speed. There a resumed run has the bits
            of an uninterrupted one with `true` only.
        threads: of each process, for computing on CPUs.
        log_every: how often metrics of the training are logged.
        non_finite: what to do about a loss or gradient that isn't finite; `skip` leaves out the step.
        timeout: how long a process may stall before the job ends.
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
    """When to evaluate, and which checkpoint is the best.

    Attributes:
        every: how often to evaluate.
        best: the validation metric that makes a checkpoint the best.
        stop_after: evaluations without a better value after which training ends early.
        batch_size: samples in a validation batch, over all processes; by default that of the training.
        pictures: validation samples that are drawn at each evaluation.
    """

    every: Duration = Span.parse("1 epoch")
    best: str = "loss"
    stop_after: PositiveInt | None = None
    batch_size: PositiveInt | None = None
    pictures: NonNegativeInt = 8


class CheckpointSettings(Settings):
    """When to save checkpoints, and how many stay.

    Attributes:
        every: how often to save one.
        keep: how many of the newest stay, besides the best.
    """

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
