#!/usr/bin/env bash
# Trains a recipe on this machine, with a process for each visible GPU (see num_processes.sh), and resumes automatically after a crash:
#
#   launch/local.sh recipes/quickstart.yaml train.seed=1
#
# TRAINER_PROCESSES_PER_NODE sets another number of processes. Ctrl-C, and closing the terminal, save a checkpoint; the
# same command resumes from it. Under `nohup` it keeps training without a terminal.
# It stops after three attempts in a row without a newer checkpoint, a user error (exit code 2) or a failed training (3).
set -euo pipefail
TRAINER_HOME=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$TRAINER_HOME/launch/common.sh"

refuse_resume "$@"
code=0
trainer status "$@" || code=$?
if ((code == 0 || code == 2)); then
    exit "$code"
fi
memory=$(mktemp -d)
trap 'rm -r "$memory"' EXIT
export TRAINER_ATTEMPT=$memory/attempt
processes=${TRAINER_PROCESSES_PER_NODE:-$("$TRAINER_HOME/launch/num_processes.sh")}
launcher="" stopping=""
set -m # the launcher gets its own process group, or it would count Ctrl-C and the signal forwarded below as two

# Forwards a stop signal, as soon as there is a launcher.
stop() {
    stopping=yes
    if [[ $launcher ]]; then
        trap '' HUP INT TERM USR1
        kill -TERM "$launcher" || true
    fi
}

code=75
while ((code == 75)); do
    trap stop HUP INT TERM USR1
    (trap '' USR1 && exec accelerate launch --config_file "$TRAINER_HOME/accelerate_config.yaml" \
        --num_processes "$processes" --no_python "$TRAINER_HOME/launch/rank.sh" "$@") &
    launcher=$!
    if [[ $stopping ]]; then
        stop # the signal came before the launcher's pid was known
    fi
    wait "$launcher" || true
    if [[ $stopping ]]; then
        wait "$launcher" || true # the signal ended the first wait
        trainer status "$@" || code=$?
        exit "$((code == 75 ? 0 : code))"
    fi
    trap - HUP INT TERM USR1
    launcher=""
    code=0
    judge "$@" || code=$?
done
exit "$code"
