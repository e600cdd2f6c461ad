#!/usr/bin/env bash
# Sets up .venv with the development tools, then runs the linter and the tests. Arguments are passed
# to pytest; --all also runs the tests marked slow. PYTHON selects another interpreter. With --interop
# as the first argument, it runs only tests/interop, which open exports with torch, timm,
# transformers and onnxruntime.
source "$(dirname "$0")/common.sh"
if [ "${1:-}" = --interop ]; then
  prepare '.[dev,interop]'
  exec .venv/bin/python -m pytest --interop tests/interop "${@:2}"
fi
prepare '.[dev]'
if [[ " $* " == *" --all "* ]]; then prepare_gpu_compiler; fi
.venv/bin/ruff format --check --quiet .
.venv/bin/ruff check --quiet .
# Tests of a file run in one process, so that they share its fixtures.
exec .venv/bin/python -m pytest -n auto --maxprocesses 4 --dist loadfile "$@"
