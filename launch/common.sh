# shellcheck shell=bash
# Sourced by run.sh and test.sh: makes .venv and installs into it, once.
#
# PYTHON names the interpreter (default: python3, at least 3.11). A .venv of another interpreter is
# made again, changed requirements are installed again.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# prepare WHAT: . or .[extra], as pip takes it.
prepare() {
  local what=$1 python=${PYTHON:-python3} version
  if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    echo "$python is not Python 3.11 or newer; set PYTHON to one that is" >&2
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
