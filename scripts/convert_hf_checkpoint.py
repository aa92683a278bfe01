"""Copy a Hugging Face checkpoint under our own names, or in another dtype.

    python scripts/convert_hf_checkpoint.py --checkpoint_dir checkpoints/org/name --out_dir checkpoints/lit/name

No other script needs this: they all read Hugging Face's folders as they are.
"""

from pathlib import Path

from lit_gpt.checkpoint.save import convert_checkpoint
from lit_gpt.cli import run
from lit_gpt.device import DType, as_dtype


def main(checkpoint_dir: Path, out_dir: Path, dtype: DType | None = None) -> None:
    """Write lit_model.safetensors and lit_config.json.

    Args:
        checkpoint_dir: The Hugging Face folder.
        out_dir: Where the copy goes.
        dtype: Dtype of the copy. None keeps that of each tensor.
    """
    convert_checkpoint(checkpoint_dir, out_dir, hugging_face=False, dtype=as_dtype(dtype))
    print(f"Wrote {out_dir}. Any script takes it as --checkpoint_dir.")


if __name__ == "__main__":
    run(main)
