#!/usr/bin/env bash
# All that is to be measured where there is one GPU, in parts of at most 100 s each:
#
#   bash benchmarks/accelerator.sh                 # all parts, at most 10 minutes
#   bash benchmarks/accelerator.sh rates host      # some parts, by name
#   bash benchmarks/accelerator.sh --append        # also keeps the tables in benchmarks/results
#   bash benchmarks/accelerator.sh --small         # a try on a CPU
#
# Each table is printed when it is measured. The parts are listed by --help. They need jax, flax,
# optax, safetensors, jaxtyping, etils and lazy_loader; `peers` torch and timm, `quantised` qwix,
# `job` the whole package.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1 XLA_PYTHON_CLIENT_PREALLOCATE=false
exec timeout 600 "${PYTHON:-python3}" -m benchmarks.accelerator "$@"
