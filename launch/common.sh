# What the scripts of this folder share; sourced, with TRAINER_HOME naming the repository.
#
# An attempt is one launch of the training. What outlives it lies in small files: TRAINER_ATTEMPT.mistake, which rank.sh
# leaves where the user has to fix something, and TRAINER_ATTEMPT.progress, the newest checkpoint and how many attempts
# ended with it. TRAINER_ATTEMPT.stop notes a SIGUSR1 that came before the training could handle it.

if [[ -d $TRAINER_HOME/.venv/bin ]]; then
    PATH=$TRAINER_HOME/.venv/bin:$PATH
fi
export TRAINER_HOME PATH

# A job that goes on by itself would start anew each time.
refuse_resume() {
    local argument
    for argument in "$@"; do
        if [[ $argument == --resume* ]]; then
            echo "error: $argument: this script always goes on from the newest checkpoint; to start anew, give the run another name=…" >&2
            exit 2
        fi
    done
}

newest_checkpoint() {
    { trainer status --json "$@" || true; } | python -c 'import json, sys; print(json.load(sys.stdin)[0]["checkpoint"])'
}

# What became of an attempt: 0 finished, 2 a mistake of the user, 3 failed, 75 another attempt is worth it, 1 it isn't.
judge() {
    local code=0 before="" now count=0
    trainer status "$@" || code=$?
    if [[ -e $TRAINER_ATTEMPT.mistake ]]; then
        return 2
    fi
    if ((code != 75)); then
        return "$code"
    fi
    now=$(newest_checkpoint "$@")
    if [[ -e $TRAINER_ATTEMPT.progress ]]; then
        read -r before count <"$TRAINER_ATTEMPT.progress"
    fi
    if [[ $now != "$before" ]]; then
        count=0
    fi
    echo "$now $((count + 1))" >"$TRAINER_ATTEMPT.progress"
    if ((count == 3)); then
        echo "error: three more attempts brought no newer checkpoint; giving up" >&2
        return 1
    fi
    return 75
}

# The body of a SLURM job: one attempt, then a requeue until the run is finished.
train_on_slurm() {
    local job=$SLURM_JOB_ID code=0
    if [[ -n ${SLURM_ARRAY_TASK_ID:-} ]]; then
        job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID # one task has the id of the whole array, and all of it would be requeued
    fi
    refuse_resume "$@"
    trainer status "$@" || code=$?
    if ((code == 0 || code == 2)); then
        exit "$code"
    fi
    mkdir -p logs
    export TRAINER_LOG=logs/$SLURM_JOB_NAME-$job TRAINER_ATTEMPT=logs/.$SLURM_JOB_NAME-$job
    rm -f "$TRAINER_ATTEMPT.mistake" "$TRAINER_ATTEMPT.stop"
    trap ': >"$TRAINER_ATTEMPT.stop"' USR1 # where it reaches this shell too, which would die of it
    echo "attempt $((${SLURM_RESTART_COUNT:-0} + 1)) on $SLURM_JOB_NODELIST; each process writes to $TRAINER_LOG-rank*.log"
    # A task of SLURM's is a node here, with all the cores that the job has there. Where one ends badly, the others can't go on.
    srun --ntasks-per-node=1 ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} --kill-on-bad-exit=1 \
        "$TRAINER_HOME/launch/node.sh" "$@" || echo "srun ended with exit code $?"
    code=0
    judge "$@" || code=$?
    if ((code == 75)); then
        scontrol requeue "$job" && exit 0
    elif ((code)); then
        echo "see the last lines of $TRAINER_LOG-rank*.log" >&2
    fi
    exit "$code"
}
