#!/usr/bin/env bash
# Everything that needs a GPU, in one call that ends with a short table: the GPU tests, the recipes at full size on real
# data, the loop against a plain one, compile and precision. It prepares and downloads nothing; before it,
#
#     python benchmarks/pack.py recipes/{deeplab_iou,quickstart,stanford_best,yolo_finetune,pennfudan_mask_rcnn}.yaml --out .gpu/data
#     benchmarks/gpu.sh [OUT]                       # OUT gets the logs and table.md, default .gpu/out
#
# with wheels of packages that the machine lacks in .gpu/wheels. STEPS=20 makes it short, to try it on a CPU.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out=${1:-.gpu/out}
steps=${STEPS:-300}
mkdir -p "$out"
export TRAINER_DATA=$PWD/.gpu/data TRAINER_RUNS=$PWD/.gpu/runs WANDB_MODE=disabled PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
if compgen -G ".gpu/wheels/*.whl" >/dev/null; then
    python3 -m pip install -q --no-index --no-deps --target .gpu/site .gpu/wheels/*.whl || exit
    export PYTHONPATH=$PYTHONPATH:$PWD/.gpu/site
fi
rows=()

# measure NAME RECIPE OVERRIDE…: trains and keeps a row with speed and the best value of the recipe's metric.
measure() {
    local name=$1 recipe=$2
    shift 2
    local started=$SECONDS
    if timeout 400 python3 trainer/run.py "$recipe" --resume never "name=$name" "track=[]" "$@" >"$out/$name.log" 2>&1; then
        rows+=("$(python3 - "$TRAINER_RUNS/$name" "$name" $((SECONDS - started)) <<'P'
import json, pathlib, sys
from ruamel.yaml import YAML
run, name, seconds = pathlib.Path(sys.argv[1]), *sys.argv[2:]
train = [line for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if line["split"] == "train"]
summary = json.loads((run / "summary.json").read_text())
metric = YAML(typ="safe").load(run / "recipe.yaml")["evaluate"]["best"]
best = summary["best"].get(metric, {}).get("value", float("nan"))
print(f"| {name} | {train[-1]['samples_per_second']:.0f} | {metric} {best:.4f} | {seconds} |")
P
)")
    else
        rows+=("| $name | failed, see $name.log | | |")
    fi
}

python3 -m pytest -q -m gpu tests/gpu >"$out/tests.log" 2>&1
tests=$(tail -n 1 "$out/tests.log")
short=("train.duration=$steps steps" "evaluate.every=100%" "checkpoint.every=100%" "train.log_every=$((steps / 2)) steps" evaluate.pictures=0)
for precision in fp32 tf32 bf16 fp16; do
    measure "flowers-$precision" recipes/deeplab_cpu_iou.yaml "data.resize=[320,320]" "train.precision=$precision" "${short[@]}"
done
measure flowers-bf16-compile recipes/deeplab_cpu_iou.yaml "data.resize=[320,320]" train.precision=bf16 train.compile=true "${short[@]}"
measure flowers-bf16-deterministic recipes/deeplab_cpu_iou.yaml "data.resize=[320,320]" train.precision=bf16 train.deterministic=true "${short[@]}"
measure resnet101-bf16 recipes/deeplab_iou.yaml model.weights=none "model.train_only=[]" train.precision=bf16 "${short[@]}"
for freeze in 0 10; do
    measure "yolo-freeze-$freeze" recipes/yolo_finetune.yaml "train.freeze=$freeze" "${short[@]}"
done
if [[ -z "${STEPS:-}" ]]; then
    measure quickstart recipes/quickstart.yaml
    measure stanford-best recipes/stanford_best.yaml
    measure pennfudan-watershed recipes/pennfudan_watershed.yaml
    measure pennfudan-mask-rcnn recipes/pennfudan_mask_rcnn.yaml model.weights=none "train.duration=40 epochs" "evaluate.every=10 epochs"
    measure flowers-full recipes/deeplab_cpu_iou.yaml "data.resize=[320,320]" "train.duration=40 epochs"
fi
timeout 300 python3 benchmarks/bench_loop.py --turns 2 --steps "$steps" >"$out/loop.txt" 2>&1

{
    python3 -c "import torch; print('#', torch.cuda.get_device_name() if torch.cuda.is_available() else 'CPU', '- torch', torch.__version__)"
    echo "commit $(git rev-parse --short HEAD 2>/dev/null || echo unknown); GPU tests: $tests"
    printf '\n| run | samples/s | best | seconds |\n|---|---|---|---|\n'
    printf '%s\n' "${rows[@]}"
    printf '\nThe loop against a plain one (shapes):\n\n'
    sed 's/^/    /' "$out/loop.txt"
} | tee "$out/table.md"
