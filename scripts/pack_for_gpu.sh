#!/usr/bin/env bash
# Makes .gpu/: what tests/benchmarks/on_a_gpu.py needs on a borrowed GPU machine that has PyTorch and no network.
#
#     PYTHON=.venv/bin/python bash scripts/pack_for_gpu.sh     # here, where pip reaches PyPI; a minute or two
#     PYTHONPATH=$PWD:$PWD/.gpu/site python3 tests/benchmarks/on_a_gpu.py     # there: Linux, CUDA 13
#
# .gpu/site has unpacked wheels, 16 MB, so that no pip is needed there. All are pure Python but bitsandbytes, which loads
# its libraries itself: they fit every Python from 3.11 on. .gpu/plans.json has the planned memory of the steps, which
# takes a minute to compute.
set -euo pipefail
usage() { sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"; exit 0; } # the comment above
case ${1:-} in -h | --help) usage ;; ?*) echo "error: $1 found, expected no argument: see --help." >&2; exit 2 ;; esac
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}

packages=(
    bitsandbytes==0.50.2
    jsonargparse==4.53.0 docstring_parser==0.18.0 typeshed_client==2.14.0 # the latter two are its [signatures]
    lightning-fabric==2.6.6 lightning-utilities==0.15.3 # the part of lightning that is imported, by itself
    liger-kernel==0.8.5
)

# download
wheels=$(mktemp -d)
trap 'rm -rf "$wheels"' EXIT
"$python" -m pip download -qq --disable-pip-version-check --no-deps --only-binary=:all: --dest "$wheels" \
    --python-version 3.12 --implementation cp --platform manylinux_2_24_x86_64 "${packages[@]}"

# unpack; of bitsandbytes' libraries, 150 MB, two are needed
rm -rf .gpu/site
mkdir -p .gpu/site
echo '*' > .gpu/.gitignore # nothing in here is part of the repository
for wheel in "$wheels"/*.whl; do
    "$python" -m zipfile -e "$wheel" .gpu/site
done
find .gpu/site/bitsandbytes -name 'libbitsandbytes_*' ! -name '*_cuda130.so' ! -name '*_cpu.so' -delete

# plan
PYTHONPATH=$PWD "$python" tests/benchmarks/on_a_gpu.py --plan .gpu/plans.json

du -sh .gpu/site
find .gpu/site -name '*.so*'
