# Sourced by run.sh and test.sh: makes .venv and installs a requirements file into it, once.
#
# PYTHON names the interpreter (default: python3, at least 3.11). A .venv of another interpreter or
# of other requirements is brought up to date.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

prepare() {
  local requirements=$1 python=${PYTHON:-python3} stamp wanted
  if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    echo "$python is not Python 3.11 or newer; set PYTHON to one that is" >&2
    exit 2
  fi
  stamp=.venv/installed
  wanted=$("$python" --version; cat requirements*.txt)
  if [ -f "$stamp" ] && [ "$(head -n 1 "$stamp")" != "$("$python" --version)" ]; then
    echo "removing .venv: it was made with $(head -n 1 "$stamp")"
    rm -rf .venv
  fi
  if [ ! -f "$stamp" ] || [ "$(cat "$stamp")" != "$wanted $requirements" ]; then
    echo "installing $requirements into .venv ($("$python" --version))"
    [ -d .venv ] || "$python" -m venv .venv
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -r "$requirements"
    printf '%s %s' "$wanted" "$requirements" >"$stamp"
  fi
}
