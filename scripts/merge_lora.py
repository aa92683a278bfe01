"""Merge what LoRA has learned into its base: a plain checkpoint folder.

    python scripts/merge_lora.py --finetuned out/lora/docstrings --out_dir checkpoints/mine/SmolLM2-docstrings
    python scripts/merge_lora.py --finetuned out/lora/docstrings --scale 0.75 --out_dir checkpoints/mine/three-quarters

The result is a Hugging Face folder, for every script here and for transformers. It is read back and compared.
"""

from pathlib import Path

from lit_gpt.cli import run
from lit_gpt.device import DType, as_dtype
from lit_gpt.formats.merge import Base, export_merged
from lit_gpt.ranges import check_range
from lit_gpt.runs.load_finetuned import QuantizeAs


def main(
    finetuned: Path,
    out_dir: Path,
    checkpoint_dir: Path | None = None,
    dtype: DType | None = None,
    base: Base = "dequantized",
    quantize: QuantizeAs = "auto",
    scale: float = 1.0,
) -> None:
    """Merge LoRA weights into their base.

    Args:
        finetuned: The out_dir of finetune/lora.py (its best), or one folder of it. Or an adapter that peft saved.
        out_dir: Where the merged checkpoint goes.
        checkpoint_dir: The base, if it is no longer where it was in training.
        dtype: Dtype of the merged weights, which are rounded once. None keeps that of each weight of the base.
        base: Where to merge a LoRA that was trained on quantized weights: into those that the codes stand for
            (dequantized), which gives the model that was trained, or into the original ones, which gives another. How
            far each is from the trained model is measured and printed.
        quantize: How the base was quantized in training, if that was done by peft, which does not say: bnb.nf4 for
            most. auto is as it says of itself.
        scale: How much of the change is merged: 1 is all of it, 0 none, and 1.25 more than was trained.
            scripts/choose_scale.py compares some.
    """
    check_range("--scale", scale, at_least=0)
    export_merged(finetuned, checkpoint_dir, out_dir, as_dtype(dtype), base, quantize=quantize, scale=scale)
    print(f"Wrote {out_dir}.")


if __name__ == "__main__":
    run(main)
