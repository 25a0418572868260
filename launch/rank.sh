#!/usr/bin/env bash
# What a launcher runs for each process: the training, with its output in a separate file if TRAINER_LOG is set.
# It leaves TRAINER_ATTEMPT.mistake if another attempt wouldn't help: launchers don't forward exit codes.
set -euo pipefail

if [[ -n ${TRAINER_LOG:-} ]]; then
    exec >>"$TRAINER_LOG-rank$RANK.log" 2>&1
fi
trap : HUP INT TERM # the training gets them too and decides when to end; this shell waits for it; USR1 is already ignored here
code=0
python "$TRAINER_HOME/trainer/run.py" "$@" || code=$?
if ((code == 2)); then
    touch "$TRAINER_ATTEMPT.mistake"
fi
exit "$code"
