#!/usr/bin/env bash
# Sets up .venv with the development tools, then runs the linter and the tests. Arguments go to pytest;
# --all also runs the tests marked slow. PYTHON names another interpreter. With --interop first: only
# tests/interop, which open our exports with torch, timm, transformers and onnxruntime.
source "$(dirname "$0")/common.sh"
if [ "${1:-}" = --interop ]; then
  prepare '.[dev,interop]'
  exec .venv/bin/python -m pytest --interop tests/interop "${@:2}"
fi
prepare '.[dev]'
if [[ " $* " == *" --all "* ]]; then prepare_gpu_compiler; fi
.venv/bin/ruff format --check --quiet .
.venv/bin/ruff check --quiet .
# A file's tests stay together: what they share is made once.
exec .venv/bin/python -m pytest -n auto --maxprocesses 4 --dist loadfile "$@"
