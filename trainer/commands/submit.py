"""`trainer submit`: checks a recipe, then submits it to SLURM as `launch/slurm.sbatch` with the options filled in."""

from __future__ import annotations

import argparse
import itertools
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.commands.status import run_name
from trainer.errors import UserError
from trainer.runs.sweeps import variant_name, variants_of

if TYPE_CHECKING:  # imported where it is used: `trainer --help` must not wait for torch
    from trainer.recipe.recipe import Recipe

HELP = "check a recipe and submit it to SLURM, as one run or as a sweep"
ROOT = Path(__file__).resolve().parents[2]
LOGS = Path("logs")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of this verb."""
    parser.add_argument("recipe", metavar="RECIPE", type=Path, help="a recipe file")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="e.g. optimizer.lr=1e-3")
    parser.add_argument("--nodes", type=int, default=1, metavar="N", help="number of nodes (default: 1)")
    parser.add_argument("--gpus", type=int, metavar="G", help="GPUs per node")
    parser.add_argument(
        "--processes", type=int, metavar="P", help="processes per node (default: one per GPU, else one)"
    )
    parser.add_argument("--cpus", type=int, metavar="C", help="cores per node")
    parser.add_argument("--time", help="time limit of a single attempt, e.g. 12:00:00")
    parser.add_argument("--partition", help="SLURM partition")
    parser.add_argument("--account", help="SLURM account")
    parser.add_argument(
        "--sweep",
        action="append",
        default=[],
        metavar="key=a,b,c",
        help="one run for each value; give it again to run each combination",
    )
    parser.add_argument(
        "--parallel", type=int, metavar="N", help="maximum number of a sweep's runs at a time (default: all)"
    )
    parser.add_argument("--dry-run", action="store_true", help="print what would be submitted, without submitting it")


def run(options: argparse.Namespace) -> None:
    """Checks every run, prints the job script and submits it.

    Raises:
        UserError: the recipe is invalid, there is no SLURM here, or SLURM rejects the job.
    """
    name = run_name(options.recipe, options.overrides)
    variants = variants_of(options.sweep)
    runs = [[*options.overrides, f"name={variant_name(name, variant)}", *variant] for variant in variants] or [
        options.overrides
    ]
    for overrides in runs:
        _check(options, overrides)
    if variants:
        name = _free_name(name)
    script, log, sweep = job_script(options, name, len(variants)), LOGS / name, LOGS / f"{name}.txt"
    lines = [shlex.join(overrides) for overrides in runs]
    command = [
        "sbatch",
        "--parsable",
        f"{log}.sbatch",
        str(options.recipe),
        *([str(sweep)] if variants else options.overrides),
    ]
    print(script, f"# {shlex.join(command)}", sep="\n")
    if variants:
        print(f"\n# {sweep}:", *lines, sep="\n")
    if options.dry_run:
        return
    if not shutil.which("sbatch"):
        raise UserError(
            "sbatch not found: submit from a login node of a SLURM cluster; --dry-run prints the job script"
        )

    LOGS.mkdir(exist_ok=True)  # SLURM doesn't create the folder, and without it a job fails silently
    Path(f"{log}.sbatch").write_text(script, encoding="utf-8")
    if variants:
        sweep.write_text("\n".join(lines) + "\n", encoding="utf-8")
    job = _sbatch(command)
    if not variants:
        print(f"submitted job {job}; follow it with: tail -F {log}-{job}.out {log}-{job}-rank0.log", file=sys.stderr)
        return
    destination = [f"--{key}={getattr(options, key)}" for key in ("partition", "account") if getattr(options, key)]
    settings = [f"--job-name={name}-table", f"--output={log}-table.txt", f"--export=ALL,TRAINER_HOME={ROOT}"]
    _sbatch(
        [
            "sbatch",
            "--parsable",
            f"--dependency=afterany:{job}",
            *settings,
            *destination,
            str(ROOT / "launch" / "sweep_status.sbatch"),
            str(sweep),
        ]
    )
    print(
        f"submitted {len(runs)} runs as job array {job}; follow them with `trainer status --sweep {sweep}`; when all "
        f"have ended, see {log}-table.txt and {log}.png",
        file=sys.stderr,
    )


def job_script(options: argparse.Namespace, name: str, num_variants: int) -> str:
    """`launch/slurm.sbatch`, or `slurm_array.sbatch` for a sweep, with the options filled in."""
    settings = {"job-name": name, "nodes": options.nodes, "gpus-per-node": options.gpus, "cpus-per-task": options.cpus}
    settings |= {key: getattr(options, key) for key in ("time", "partition", "account")}
    if num_variants:
        settings["array"] = f"0-{num_variants - 1}" + (f"%{options.parallel}" if options.parallel else "")
    variables = {"TRAINER_HOME": ROOT, "TRAINER_PROCESSES_PER_NODE": options.processes}
    lines = [f"#SBATCH --{key}={value}" for key, value in settings.items() if value is not None]
    lines += [f"export {key}={shlex.quote(str(value))}" for key, value in variables.items() if value is not None]
    template = (ROOT / "launch" / ("slurm_array.sbatch" if num_variants else "slurm.sbatch")).read_text(
        encoding="utf-8"
    )
    template = re.sub(r"#SBATCH --job-name=.*\n", "", template)
    directives, strict, body = template.partition("set -euo pipefail\n")
    return directives + "\n".join(lines) + "\n" + strict + body


def _check(options: argparse.Namespace, overrides: list[str]) -> Recipe:
    """The recipe of a run, checked for its number of processes, regardless of this machine's devices."""
    from trainer.distributed.launch import Launch
    from trainer.recipe.load import load_recipe
    from trainer.tasks.checks import TASK_CHECKS, batch_checks

    launch = Launch(processes=options.nodes * (options.processes or options.gpus or 1))
    return load_recipe(
        options.recipe, overrides, [(("data", "train"), launch.check), *TASK_CHECKS, *batch_checks(launch.processes)]
    )


def _free_name(name: str) -> str:
    """An unused name for a sweep, by which SLURM knows its job array."""
    return next(
        free for number in itertools.count(1) if not (LOGS / f"{(free := f'{name}-sweep-{number}')}.txt").exists()
    )


def _sbatch(command: list[str]) -> str:
    """Submits a job; returns its id."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"SLURM rejected the job: {done.stderr.strip()}")
    return done.stdout.strip().partition(";")[0]  # `--parsable` may add the name of the cluster
