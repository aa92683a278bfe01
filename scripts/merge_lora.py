"""Merge what LoRA has learned into its base: a plain checkpoint folder.

    python scripts/merge_lora.py --finetuned out/lora/docstrings --out_dir checkpoints/mine/SmolLM2-docstrings

The result is a Hugging Face folder, for every script here and for transformers.
"""

from pathlib import Path

from lit_gpt.checkpoint import save_hf
from lit_gpt.cli import run
from lit_gpt.device import DType, as_dtype
from lit_gpt.finetuned import load_finetuned
from lit_gpt.lora import merge_lora_weights


def main(finetuned: Path, out_dir: Path, checkpoint_dir: Path | None = None, dtype: DType | None = None) -> None:
    """Merge LoRA weights into their base.

    Args:
        finetuned: What finetune/lora.py wrote: its out_dir (then its best), or one folder of it.
        out_dir: Where the merged checkpoint goes.
        checkpoint_dir: The base, if it is no longer where it was in training.
        dtype: Of the merged weights. None is the base's own.
    """
    model, description = load_finetuned(checkpoint_dir, finetuned, quantize="none")
    names = merge_lora_weights(model)
    if model.config.tie_embeddings and "lm_head" in names:
        print("The head was the embedding and now differs from it: the merged checkpoint holds both.")
    save_hf(model, Path(checkpoint_dir or description.checkpoint_dir), out_dir, as_dtype(dtype))
    print(f"Merged {len(names)} linears into {out_dir}.")


if __name__ == "__main__":
    run(main)
