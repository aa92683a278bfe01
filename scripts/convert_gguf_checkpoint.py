"""Turn a GGUF file of the llama or qwen2 architecture into a Hugging Face checkpoint folder.

python scripts/convert_gguf_checkpoint.py --gguf_path model.gguf --out_dir checkpoints/org/name
"""

from pathlib import Path

from lit_gpt.cli import run
from lit_gpt.device import DType
from lit_gpt.formats.gguf_reader import convert_gguf


def main(gguf_path: Path, out_dir: Path, dtype: DType = "float32") -> None:
    """Write a GGUF file (llama.cpp's format; llama or qwen2) as a Hugging Face checkpoint folder.

    Args:
        gguf_path: The file to read.
        out_dir: The folder to write: model.safetensors, config.json and the tokenizer.
        dtype: Dtype of the weights. Only float32 holds quantized values exactly.
    """
    convert_gguf(gguf_path, out_dir, dtype)
    print(f"Wrote {out_dir}.")


if __name__ == "__main__":
    run(main)
