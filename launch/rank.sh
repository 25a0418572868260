#!/usr/bin/env bash
# What a launcher runs for each process: the training, with its output in a file of its own where TRAINER_LOG says so.
# It leaves TRAINER_ATTEMPT.mistake where no other attempt would help: launchers don't pass exit codes on.
set -euo pipefail

if [[ -n ${TRAINER_LOG:-} ]]; then
    exec >>"$TRAINER_LOG-rank$RANK.log" 2>&1
fi
trap : HUP INT TERM # the training gets them as well and decides when it ends; this shell waits for it; USR1 is ignored here already
code=0
python "$TRAINER_HOME/trainer/run.py" "$@" || code=$?
if ((code == 2)); then
    touch "$TRAINER_ATTEMPT.mistake"
fi
exit "$code"
