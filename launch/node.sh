#!/usr/bin/env bash
# What srun runs once on each node: the preflight, then the launcher, which starts the node's processes.
set -euo pipefail

# The signal before a pre-emption reaches every process of the step. It would kill preflight and launcher, so they ignore it, as
# does everything they start, until trainer/run.py handles it. The shell below records it for a training that can't handle it yet.
trap '' USR1
exec {recorder}< <(
    trap ': >"$TRAINER_ATTEMPT.stop"' USR1
    trap '' HUP INT TERM
    echo ready
    exec </dev/null &>/dev/null
    while kill -0 $$; do # as long as the launcher runs, which replaces this process
        sleep 2 &
        wait || true
    done
)
read -r -u "$recorder" _ # until then a signal would be lost
exec {recorder}<&-

mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
address=${MASTER_ADDR:-${hosts[0]}}
# Each job that may share a node has its own two ports, and different ones after a requeue: the old ones may still be closing.
port=$((20000 + SLURM_JOB_ID % 1000 * 10 + ${SLURM_RESTART_COUNT:-0} % 5 * 2))
processes=${TRAINER_PROCESSES_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}

if ((SLURM_NNODES > 1)); then
    python "$TRAINER_HOME/launch/preflight.py" "$address" "$((port + 1))" "$SLURM_NODEID" "${hosts[@]}"
fi
exec accelerate launch --config_file "$TRAINER_HOME/accelerate_config.yaml" \
    --num_machines "$SLURM_NNODES" --machine_rank "$SLURM_NODEID" --num_processes "$((SLURM_NNODES * processes))" \
    --main_process_ip "$address" --main_process_port "$port" \
    --no_python "$TRAINER_HOME/launch/rank.sh" "$@"
