#!/bin/sh
# A few steps of training under a profiler, on this machine or (through train.slurm with PROFILE=1) on each node.
#   RECIPE=debug launch/profile.sh
# PROFILER=nsys writes PROFILE_OUT.nsys-rep (Nsight Systems, recording between cudaProfilerStart and Stop);
# PROFILER=torch writes a trace for TensorBoard into the run's folder, and needs no Nsight.
# What follows the script's name goes to megamoe_train.pretrain. DRY_RUN=1 shows what would run, and runs nothing.
set -eu
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-.venv/bin/python}
PROFILER=${PROFILER:-nsys}
FIRST_STEP=${FIRST_STEP:-10}
LAST_STEP=${LAST_STEP:-12}
RANKS=${RANKS:-0}                  # ranks that record, separated by spaces
PROFILE_OUT=${PROFILE_OUT:-profiles/$(hostname)-$$}
ARGS=${ARGS:-}
DRY_RUN=${DRY_RUN:-0}

case $PROFILER in
nsys)
    if [ "$DRY_RUN" != 1 ] && ! command -v nsys >/dev/null; then
        echo "profile.sh: nsys is not on PATH; PROFILER=torch needs none" >&2
        exit 2
    fi
    set -- --set profile=true "$@"
    recorder="nsys profile --output $PROFILE_OUT --force-overwrite true --trace cuda,nvtx,osrt
        --capture-range cudaProfilerApi --capture-range-end stop --cuda-graph-trace node"
    ;;
torch)
    set -- --set profile=true --set use-pytorch-profiler=true "$@"
    recorder=
    ;;
*)
    echo "profile.sh: PROFILER=$PROFILER is neither nsys nor torch" >&2
    exit 2
    ;;
esac

# RECIPE is an option already where train.slurm calls this; alone it is a variable as in train_local.sh.
if [ -n "${SLURM_STEP_ID:-}" ]; then RECIPE=; else RECIPE=${RECIPE:-debug}; fi
# recorder and ARGS hold several words: their splitting is meant.
# shellcheck disable=SC2086
set -- $recorder "$PYTHON" -m megamoe_train.pretrain ${RECIPE:+--recipe "$RECIPE"} \
    --set "profile-step-start=$FIRST_STEP" --set "profile-step-end=$LAST_STEP" --set "profile-ranks=$RANKS" $ARGS "$@"
if [ "$DRY_RUN" = 1 ]; then
    echo "would run: $*"
    exit 0
fi
if [ -n "$recorder" ]; then mkdir -p "$(dirname "$PROFILE_OUT")"; fi
exec "$@"
