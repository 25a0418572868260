# What the scripts of this folder share; sourced, with TRAINER_HOME naming the repository.
#
# An attempt is one launch of the training. Small files outlive it: TRAINER_ATTEMPT.mistake, which rank.sh leaves if the
# user has to fix something, and TRAINER_ATTEMPT.progress, the newest checkpoint and how many attempts ended with it.
# TRAINER_ATTEMPT.stop records a SIGUSR1 that came before the training could handle it.

if [[ -d $TRAINER_HOME/.venv/bin ]]; then
    PATH=$TRAINER_HOME/.venv/bin:$PATH
fi
export TRAINER_HOME PATH

# Each attempt would start from scratch, or from the same checkpoint.
refuse_resume() {
    local argument
    for argument in "$@"; do
        if [[ $argument == --resume* ]]; then
            echo "error: $argument: this script always resumes from the newest checkpoint; to start from scratch, give the run another name=…" >&2
            exit 2
        fi
    done
}

newest_checkpoint() {
    { trainer status --json "$@" || true; } | python -c 'import json, sys; print(json.load(sys.stdin)[0]["checkpoint"])'
}

# The outcome of an attempt: 0 finished, 2 user error, 3 failed, 75 to be resumed, 1 no more attempts.
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
        echo "error: no newer checkpoint after three more attempts; not trying again" >&2
        return 1
    fi
    return 75
}

# The body of a SLURM job: one attempt, then a requeue until the run is finished.
train_on_slurm() {
    local job=$SLURM_JOB_ID code=0
    if [[ -n ${SLURM_ARRAY_TASK_ID:-} ]]; then
        job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID # the job id of one task is that of the array, all of which would be requeued
    fi
    refuse_resume "$@"
    trainer status "$@" || code=$?
    if ((code == 0 || code == 2)); then
        exit "$code"
    fi
    mkdir -p logs
    export TRAINER_LOG=logs/$SLURM_JOB_NAME-$job TRAINER_ATTEMPT=logs/.$SLURM_JOB_NAME-$job
    rm -f "$TRAINER_ATTEMPT.mistake" "$TRAINER_ATTEMPT.stop"
    trap ': >"$TRAINER_ATTEMPT.stop"' USR1 # it may reach this shell too, and would kill it
    echo "attempt $((${SLURM_RESTART_COUNT:-0} + 1)) on $SLURM_JOB_NODELIST; each process writes to $TRAINER_LOG-rank*.log"
    # One SLURM task per node, with all the cores that the job has there. If one fails, the others can't continue.
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
