#!/usr/bin/env bash
# All that is to be measured where there is one GPU, in one call of under 8 minutes:
#
#   bash benchmarks/accelerator.sh                 # prints targets beside measurements
#   bash benchmarks/accelerator.sh --append        # and keeps them in benchmarks/results
#   bash benchmarks/accelerator.sh --small         # a try on a CPU
#
# Needs jax, flax, optax, safetensors, jaxtyping, etils and lazy_loader; torch and timm for the
# peers, qwix for int8 and fp8. What is missing is said and left out.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1 XLA_PYTHON_CLIENT_PREALLOCATE=false
exec timeout 480 "${PYTHON:-python3}" -m benchmarks.accelerator "$@"
