#!/usr/bin/env bash
# Sets up .venv, then runs the quickstart on the embedded digits (at most 150 CPU seconds). With
# arguments, it runs singer_jax.main with them:
#
#   bash launch/run.sh
#   bash launch/run.sh --config=configs/singer_vitl_vitt.py --workdir=runs/mine
source "$(dirname "$0")/common.sh"
prepare .
if [ $# -eq 0 ]; then
  echo "quickstart: digits, results in runs/quickstart"
  set -- --config=configs/quickstart.py --workdir=runs/quickstart
  export NPROC=1 # XLA threads; at these sizes two take more CPU time than one
fi
exec .venv/bin/python -m singer_jax.main "$@"
