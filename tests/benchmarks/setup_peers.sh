#!/usr/bin/env bash
# Makes the virtual environments of the programs that the benchmarks compare with. Run again, it changes nothing.
#
#     bash tests/benchmarks/setup_peers.sh         # into .peers/, or where $PEERS_DIR says; about 3 GB
set -euo pipefail

peers="${PEERS_DIR:-$(cd "$(dirname "$0")/../.." && pwd)/.peers}"

# torch comes first and alone, so that pip takes the CPU build where one is offered (pass -f or an index by PIP_*)
environment() {  # name, packages
    local python="$peers/$1/bin/python"
    [ -x "$python" ] || "${PYTHON:-python3}" -m venv "$peers/$1"
    "$python" -m pip install --quiet --disable-pip-version-check torch==2.13.0
    "$python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 "${@:2}"
    "$python" -m pip check
}

environment hf transformers==5.23.0 peft==0.21.2 accelerate==1.15.0 bitsandbytes==0.50.2 tokenizers==0.23.3 \
    safetensors==0.8.0 huggingface_hub==2.4.0 numpy==2.4.6
environment litgpt litgpt==0.5.13 lightning==2.6.6 jsonargparse==4.41.0 requests==2.34.2 tokenizers==0.23.3 \
    safetensors==0.8.0 huggingface_hub==1.3.7 numpy==1.26.4
echo "$peers is ready."
