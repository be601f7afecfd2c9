#!/bin/sh
# Train on this machine: one process per GPU, two on the CPU where there is none. Every knob is a variable:
#   RECIPE=debug NPROC=2 OUT=runs/try DATA="a.txt b.jsonl" ARGS="--set train-iters=500" launch/train_local.sh
# What follows the script's name is handed on too. DRY_RUN=1 shows what would run, and runs nothing.
set -eu
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-.venv/bin/python}
RECIPE=${RECIPE:-debug}
NPROC=${NPROC:-}     # empty: one for each GPU that the recipe can use
OUT=${OUT:-}         # empty: runs/RECIPE
DATA=${DATA:-}       # empty: texts that Python carries; several paths are separated by spaces
ARGS=${ARGS:-}       # more options, separated by spaces
DRY_RUN=${DRY_RUN:-0}

echo "commit $(git rev-parse HEAD 2>/dev/null || echo unknown)"
# DATA and ARGS hold several words: their splitting is meant.
# shellcheck disable=SC2086
set -- "$PYTHON" -m megamoe_train.pretrain --recipe "$RECIPE" \
    ${NPROC:+--nproc "$NPROC"} ${OUT:+--out "$OUT"} ${DATA:+--data $DATA} $ARGS "$@"
if [ "$DRY_RUN" = 1 ]; then
    echo "would run: $*"
    exit 0
fi
exec "$@"
