"""Copy a converted checkpoint back under Hugging Face's names, for transformers and everything that reads its folders.

    python scripts/convert_lit_checkpoint.py --checkpoint_dir checkpoints/lit/name --out_dir checkpoints/hf/name

Also takes a Hugging Face folder, to write it in another dtype.
"""

from pathlib import Path

from lit_gpt.checkpoint import convert
from lit_gpt.cli import run
from lit_gpt.device import DType, as_dtype


def main(checkpoint_dir: Path, out_dir: Path, dtype: DType | None = None) -> None:
    """Write model.safetensors, with config.json and the tokenizer.

    Args:
        checkpoint_dir: What scripts/convert_hf_checkpoint.py wrote.
        out_dir: Where the copy goes.
        dtype: Of the copy. None is that of each tensor.
    """
    convert(checkpoint_dir, out_dir, hugging_face=True, dtype=as_dtype(dtype))
    print(f"Wrote {out_dir}. transformers loads it with AutoModelForCausalLM.from_pretrained({str(out_dir)!r}).")


if __name__ == "__main__":
    run(main)
