#!/usr/bin/env bash
# Sets up what the tests need, and runs them.
#
#     bash scripts/test.sh                  everything that runs without a GPU
#     bash scripts/test.sh --gpu            what needs one; prints a page of results to paste
#     bash scripts/test.sh tests/test_lora.py -k merge        any arguments of pytest
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh test
export PATH="$PWD/.venv/bin:$PATH" OMP_NUM_THREADS=1
python scripts/download_sample.py >&2
if [ "${1:-}" = --gpu ]; then
    exec python -m pytest -m gpu -s -q tests/test_gpu.py
elif [ $# -gt 0 ]; then
    exec python -m pytest "$@"
fi
exec python -m pytest -m "not gpu" -n 2 --dist loadfile
