#!/usr/bin/env bash
# Makes .venv and installs the package with the exact versions of constraints.txt; does nothing the second time.
#
#     bash scripts/setup.sh [EXTRAS]        such as sample,report
set -euo pipefail
cd "$(dirname "$0")/.."
extras=${1:-sample,report}
python=${PYTHON:-python3}

fail() { echo "error: $1" >&2; exit 2; }
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null ||
    fail "$("$python" --version 2>&1 || true) found, Python 3.11 or newer expected. PYTHON=/path/to/python3.12 bash $0 names another."

stamp=.venv/installed-$extras
want=$(cat pyproject.toml scripts/constraints.txt | cksum)
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$want" ]; then exit 0; fi

echo "Installing into .venv: this takes a minute or two ..." >&2
[ -x .venv/bin/python ] || "$python" -m venv .venv || fail "no virtual environment could be made (Debian: apt install python3-venv)."
index=()
if [ "$(uname -s)" = Linux ] && [ ! -e /dev/nvidiactl ] && [ ! -e /dev/dxg ] && [ ! -e /dev/kfd ]; then # nor WSL, nor AMD
    # PyPI's wheel for Linux brings gigabytes of CUDA along; PyTorch's own index has one without
    url=https://download.pytorch.org/whl/cpu
    if "$python" -c "import urllib.request; urllib.request.urlopen('$url/torch/', timeout=5)" 2>/dev/null; then
        index=(--extra-index-url "$url")
    fi
fi
pip() { .venv/bin/python -m pip --quiet --disable-pip-version-check "$@" 2>&1 | { grep -v '^WARNING' || true; } >&2; }
pip install -c scripts/constraints.txt ${index[@]+"${index[@]}"} torch # first: a later package must not choose another
pip install -c scripts/constraints.txt ${index[@]+"${index[@]}"} -e ".[$extras]"
echo "$want" > "$stamp"
