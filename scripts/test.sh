#!/usr/bin/env bash
# Sets up what the tests need, checks style and types, and runs the tests.
#
#     bash scripts/test.sh                  everything that runs without a GPU: 14 minutes or so on two cores
#     bash scripts/test.sh --fast           style, types, and the properties that matter most: about 30 seconds
#     bash scripts/test.sh --gpu            only what needs a GPU; prints a page of results to paste. Where nothing can be
#                                           installed, or scripts/pack_for_gpu.sh has packed, with the python3 at hand
#     bash scripts/test.sh tests/test_lora.py -k merge        only these tests: any arguments of pytest
#
# The first run takes minutes more: it installs packages into .venv, fetches the sample model, and mypy, which checks the
# types, looks at torch once.
set -euo pipefail
usage() { sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"; exit 0; } # the comment above
case ${1:-} in -h | --help) usage ;; esac
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1
unset PYTHONDONTWRITEBYTECODE # each of a hundred processes would compile the package again, for a quarter of a second

if [ "${1:-}" = --gpu ]; then
    if [ ! -d .gpu/site ] && bash scripts/setup.sh test; then
        export PATH="$PWD/.venv/bin:$PATH"
        python3 scripts/download_sample.py >&2 || echo "Without the sample model: its tests are skipped." >&2
    else
        echo "With the Python at hand: $(command -v python3), $(python3 --version)." >&2
        export PYTHONPATH="$PWD:$PWD/.gpu/site${PYTHONPATH:+:$PYTHONPATH}"
    fi
    exec python3 -m pytest -m gpu -s -q tests/test_gpu.py "${@:2}"
fi

bash scripts/setup.sh test
export PATH="$PWD/.venv/bin:$PATH"
python scripts/download_sample.py >&2

fast=( # of each property one case; tutorials/development.md says more
    tests/test_house.py
    "tests/test_families.py::test_logits_are_those_of_transformers[llama]"
    tests/test_packing.py::test_loss_and_gradients_are_those_of_separate_records
    tests/test_lora.py::test_identity_at_birth
    tests/test_train.py::test_gradient_does_not_depend_on_micro_batches
    tests/test_train.py::test_wrong_divisor_fails_the_check
    tests/test_finetune.py::test_loss_falls_and_files_are_there
)

check_style() {
    ruff check
    ruff format --check
}

case ${1:-} in
    # three workers for two cores: half of the time one of them waits for a process that it has started
    "")
        check_style
        mypy & # beside the tests: it takes one core for a minute
        python -m pytest -m "not gpu" -n 3 --dist loadfile --no-loadscope-reorder
        wait $!
        ;;
    --fast)
        check_style
        mypy
        exec python -m pytest -q -n 2 --dist loadfile "${fast[@]}" "${@:2}"
        ;;
    *) exec python -m pytest "$@" ;;
esac
