"""Builds the Accelerator, and configures PyTorch for a recipe."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn

from trainer.errors import UserError
from trainer.recipe.recipe import Recipe

if TYPE_CHECKING:
    from accelerate import Accelerator

# The model's collectives time out this much later than train.timeout, so that the watchdog, which names the rank, acts
# first.
AFTER_WATCHDOG = timedelta(minutes=1)


def resolve_precision(precision: str) -> str:
    """`auto` is bf16 if the hardware accelerates it (Ampere GPUs and later, AVX-512 BF16 or AMX on CPUs), else fp32."""
    if precision != "auto":
        return precision
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    # Missing in torch 2.11 and older, which then use fp32.
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return "bf16" if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") else "fp32"


def num_cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def num_threads(setting: str | int, local_processes: int) -> int:
    """Threads of this process; `auto` divides the cores among the machine's processes (launchers set one thread, even
    for a single process).
    """
    return setting if isinstance(setting, int) else max(1, num_cores() // local_processes)


def num_workers(setting: str | int, local_processes: int) -> int:
    """Loader workers; `auto` is 0 on CPUs, where they compete with training, and a share of the cores with GPUs."""
    if isinstance(setting, int):
        return setting
    return min(8, max(1, num_cores() // local_processes - 1)) if torch.cuda.is_available() else 0


def launched_as(environment: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """Rank of this process and number of processes, as set by a launcher; (0, 1) if a variable needed to connect is
    missing.
    """
    if not {"RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"} <= environment.keys():
        return 0, 1
    return int(environment["RANK"]), int(environment.get("WORLD_SIZE", 1))


def build_accelerator(recipe: Recipe) -> Accelerator:
    """Builds the Accelerator of this process for the recipe; also configures PyTorch's backends.

    Raises:
        UserError: the launched processes don't see each other.
    """
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs

    _keep_freed_memory()
    precision = resolve_precision(recipe.train.precision)
    timeout = timedelta(minutes=float(recipe.train.timeout.value)) + AFTER_WATCHDOG
    launched = int(os.environ.get("WORLD_SIZE", 1))
    accelerator = Accelerator(
        # Without a GPU a bare Accelerator() ignores the launcher: every process would be rank 0 of 1.
        cpu=not torch.cuda.is_available(),
        mixed_precision=precision if precision in ("bf16", "fp16") else "no",
        kwargs_handlers=[
            DistributedDataParallelKwargs(gradient_as_bucket_view=True),
            InitProcessGroupKwargs(timeout=timeout),
        ],
    )
    # The Learner divides the loss itself; the launch file's setting must not divide it again.
    accelerator.gradient_accumulation_steps = 1
    if launched != accelerator.num_processes:
        raise UserError(
            f"{launched} processes were launched, but each sees {accelerator.num_processes}: "
            "start them with `accelerate launch --config_file accelerate_config.yaml --num_processes N`"
        )
    configure_backends(recipe)
    return accelerator


def configure_backends(recipe: Recipe) -> None:
    """Sets PyTorch's threads, TF32 and deterministic algorithms for this process, from the recipe."""
    precision = resolve_precision(recipe.train.precision)
    if precision in ("fp32", "tf32"):
        # The older of PyTorch's two interfaces, as Accelerate uses it: mixing them is an error.
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"
    torch.set_num_threads(num_threads(recipe.train.threads, int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
    deterministic = recipe.train.deterministic
    if deterministic is True or (deterministic == "auto" and not torch.cuda.is_available()):
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # costs time, and no code here reads uninitialised memory


def why_bits_may_differ(saved: Mapping[str, Any], world_size: int, device: torch.device) -> Iterator[str]:
    """Reasons why a resumed run may end with other bits than an uninterrupted one.

    Args:
        saved: the counters of the checkpoint.
        world_size: of the resumed run.
        device: of this process.
    """
    before, now = (saved["world_size"], saved["threads"]), (world_size, torch.get_num_threads())
    if before != now:
        yield (
            f"saved with {before[0]} processes x {before[1]} threads, resumed with {now[0]} x {now[1]}: the batches "
            "are the same, but floating-point results may differ slightly"
        )
    if device.type == "cuda" and not torch.are_deterministic_algorithms_enabled():
        yield (
            "deterministic kernels are off on this GPU: the batches are the same as in an uninterrupted run, but "
            "floating-point results may differ slightly; for equal bits, set train.deterministic=true from the start"
        )


def leave_processes(failed: bool) -> None:
    """Leaves the process group. After a failure NCCL would wait for a rank that may be gone (gloo doesn't), so it is
    aborted.
    """
    if not dist.is_initialized():
        return
    if failed and dist.get_backend() != "gloo":
        dist.distributed_c10d._abort_process_group()
    else:
        dist.destroy_process_group()


def _keep_freed_memory() -> None:
    """Makes the C library keep the memory that a step frees. Otherwise every step on a CPU returns it to the system and
    gets it back page by page.
    """
    M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # from glibc's malloc.h
    with suppress(OSError, AttributeError):  # another C library
        library = ctypes.CDLL(None)
        library.mallopt(M_MMAP_THRESHOLD, 2**25)  # the largest allowed value
        library.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def as_in_training(accelerator: Accelerator, model: nn.Module) -> Callable[..., Any]:
    """Calls an unwrapped model as training calls the wrapped one: under autocast, with fp32 outputs."""
    from accelerate.utils.operations import convert_to_fp32

    def call(*inputs: Any) -> Any:
        with accelerator.autocast():
            # Not compiled: each size of a last batch would trigger a recompilation.
            return convert_to_fp32(model.forward(*inputs))

    return call
