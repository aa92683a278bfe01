#!/usr/bin/env bash
# Makes .venv and installs the package with the exact versions of constraints.txt; does nothing the second time.
#
#     bash scripts/setup.sh [EXTRAS]                         without EXTRAS: sample,report
#     PYTHON=/path/to/python3.12 bash scripts/setup.sh       with another Python than python3, 3.11 or newer
#
# EXTRAS are names with commas between them, such as sample,report,data:
#
#     sample      the sample model: what reads the file that scripts/download_sample.py fetches
#     report      plots: loss.png of a run, lengths of records
#     data        parquet files, saved data sets, and data sets of the Hugging Face hub
#     classify    finetune/classifier.py: scikit-learn
#     serve       generate/serve.py: fastapi and uvicorn
#     json        answers by a JSON schema: llguidance
#     eval        tasks of lm-evaluation-harness, such as arc_easy
#     loggers     --logger tensorboard, --logger wandb
#     test        what scripts/test.sh needs; all of the above but loggers is in it
set -euo pipefail
usage() { sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"; exit 0; } # the comment above
case ${1:-} in -h | --help) usage ;; esac
cd "$(dirname "$0")/.."
extras=${1:-sample,report}
python=${PYTHON:-python3}

fail() { echo "error: $1" >&2; exit 2; }
[ $# -le 1 ] || fail "$# arguments found, expected one: names with commas and no spaces between them, such as sample,report."
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null ||
    fail "$("$python" --version 2>&1 || true) found, Python 3.11 or newer expected. PYTHON=/path/to/python3.12 bash $0 names another."
known=$("$python" -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"])')
for extra in ${extras//,/ }; do
    case " $known " in *" $extra "*) ;; *) fail "There is no extra $extra. Known are ${known// /, }: bash $0 --help says what for." ;; esac
done

stamp=.venv/installed-$extras
want=$(cat pyproject.toml scripts/constraints.txt | cksum)
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$want" ]; then
    echo "Already installed: $extras, in .venv." >&2
    exit 0
fi

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
# a card that torch will not see, said now and not at the first run
unseen=$(.venv/bin/python -c 'from lit_gpt.device import look_for_cuda; print(look_for_cuda()[1] or "")') || true
[ -z "$unseen" ] || echo "warning: $unseen" >&2
echo "Installed: $extras, in .venv. To use it: source .venv/bin/activate" >&2
