#!/usr/bin/env bash
# From nothing to a fine-tuned language model, on a laptop without a GPU, in under ten minutes.
#
# Each step is a command that you can run yourself. Run it again and it reuses what is there; interrupt it and it
# continues.
#
#     bash scripts/quickstart.sh            five to ten minutes on two cores of an AMD EPYC, most of them training
set -euo pipefail
usage() { sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"; exit 0; } # the comment above
case ${1:-} in -h | --help) usage ;; ?*) echo "error: $1 found, expected no argument: see --help." >&2; exit 2 ;; esac
cd "$(dirname "$0")/.."
step() { echo; echo "\$ $*" >&2; "$@"; }

step bash scripts/setup.sh sample,report
export PATH="$PWD/.venv/bin:$PATH"
step python scripts/download_sample.py
[ -f data/docstrings/meta.json ] || step python scripts/prepare_docstrings.py
resume=()
[ ! -f out/lora/quickstart/hyperparameters.yaml ] || resume=(--resume)
step python finetune/lora.py --config finetune/recipes/quickstart.yaml "${resume[@]}"

cat <<'END'

What is where
    checkpoints/sample/             the base model
    data/docstrings/                the prepared data
    out/lora/quickstart/best/       what was trained: one small file
    out/lora/quickstart/report.md   the figures, the plot and the answers before and after

What to try next (first: source .venv/bin/activate)
    python generate/base.py --finetuned out/lora/quickstart --prompt 'What does the function `shutil.move` do?'
    python generate/chat.py --finetuned out/lora/quickstart
    python finetune/lora.py --out_dir out/lora/epoch
    python scripts/merge_lora.py --finetuned out/lora/quickstart --out_dir checkpoints/mine/quickstart
    python scripts/prepare_json.py --json_path YOURS.jsonl --data_dir data/yours
END
