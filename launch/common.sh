# shellcheck shell=bash
# Sourced by run.sh and test.sh: makes .venv and installs into it, once.
#
# PYTHON selects the interpreter (default: python3, at least 3.11). A .venv of another interpreter is
# replaced, and changed requirements are installed again.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# prepare WHAT: installs WHAT, which is . or .[extra], as for pip.
prepare() {
  local what=$1 python=${PYTHON:-python3} version
  if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    echo "$python is not Python 3.11 or newer; set PYTHON to a newer interpreter" >&2
    exit 2
  fi
  version=$("$python" --version)
  if [ -d .venv ] && [ "$(.venv/bin/python --version 2>&1)" != "$version" ]; then
    echo "removing .venv, which is not $version"
    rm -rf .venv
  fi
  if ! cmp -s <(cat requirements.txt pyproject.toml) ".venv/installed $what"; then
    echo "installing $what into .venv ($version)"
    [ -d .venv ] || "$python" -m venv .venv
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --editable "$what"
    cat requirements.txt pyproject.toml >".venv/installed $what"
  fi
}

# Installs the compiler for NVIDIA GPUs, which works without a GPU. It lies outside the environment,
# because jax would otherwise look for a GPU in every process.
prepare_gpu_compiler() {
  local folder=.venv/gpu_compiler version
  version=$(.venv/bin/python -c 'import jax; print(jax.__version__)')
  if [ "$(cat "$folder/version" 2>/dev/null)" != "$version" ]; then
    echo "installing the compiler for GPUs into $folder"
    rm -rf "$folder"
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps \
      --target "$folder" "jax-cuda13-plugin==$version" "jax-cuda13-pjrt==$version" "nvidia-cudnn-cu13>=9.8"
    echo "$version" >"$folder/version"
  fi
}
