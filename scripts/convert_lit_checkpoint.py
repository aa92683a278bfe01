"""Copy a checkpoint, or what was fine-tuned, for other programs.

    python scripts/convert_lit_checkpoint.py --checkpoint_dir checkpoints/lit/name --out_dir checkpoints/hf/name
    python scripts/convert_lit_checkpoint.py --finetuned out/lora/mine --out_dir checkpoints/mine --dtype bfloat16
    python scripts/convert_lit_checkpoint.py --finetuned out/lora/mine --format peft --out_dir adapters/mine
    python scripts/convert_lit_checkpoint.py --format gguf --dtype float16 --out_dir checkpoints/gguf/sample

What was written is read back and compared with the model.
"""

import functools
import math
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lit_gpt import InputError, Tokenizer
from lit_gpt.checkpoint.load import load_model
from lit_gpt.checkpoint.save import convert_checkpoint
from lit_gpt.cli import run
from lit_gpt.config import SAMPLE
from lit_gpt.data.prompts import without_template
from lit_gpt.device import DType, as_dtype
from lit_gpt.files import must_be_empty
from lit_gpt.formats.gguf_writer import export_gguf
from lit_gpt.formats.merge import (
    export_merged,
    export_merged_gguf,
    export_peft,
    header_of,
    round_weights,
    whole_model,
)
from lit_gpt.formats.verify import logits_of, verify_copy
from lit_gpt.lock import locks
from lit_gpt.ranges import check_range
from lit_gpt.runs.load_finetuned import check_scale

if TYPE_CHECKING:
    import torch


def main(
    out_dir: Path,
    checkpoint_dir: Path | None = None,
    finetuned: Path | None = None,
    format: Literal["hf", "peft", "gguf"] = "hf",
    dtype: DType | Literal["q8_0"] | None = None,
    max_shard_size: float = 4.0,
    prove_it: bool = True,
    scale: float = 1.0,
) -> None:
    """Write a folder for transformers, peft or llama.cpp.

    Args:
        out_dir: Where it goes.
        checkpoint_dir: A folder that scripts/convert_hf_checkpoint.py wrote, or a Hugging Face folder. None is the
            sample model, or the base of what was fine-tuned.
        finetuned: The out_dir of finetune/lora.py, whose LoRA is merged first, or kept apart with --format peft. Or
            that of finetune/full.py, whose model is copied.
        format: hf is for AutoModelForCausalLM.from_pretrained(out_dir), peft for PeftModel.from_pretrained(base,
            out_dir), gguf (of the llama architecture) for llama.cpp.
        dtype: Dtype of the copy. None keeps that of each tensor. q8_0 is for gguf.
        max_shard_size: The largest file, in GB.
        prove_it: Compute sample texts with the model and with what was written, one after the other. False leaves it
            out where --format hf copies a checkpoint; what was fine-tuned, peft and gguf are always compared.
        scale: How much of the change of a LoRA is written, as in scripts/merge_lora.py: 1 is all of it.
    """
    check_flags(finetuned, format, dtype, max_shard_size, scale)
    must_be_empty(out_dir)
    max_shard = math.ceil(max_shard_size * 1e9)

    # what was fine-tuned as a whole is a checkpoint
    whole = None
    if finetuned is not None and format != "peft":
        whole = whole_model(finetuned)
    if whole is not None:
        check_scale(scale, header_of(finetuned), finetuned)
        sentence = without_template(header_of(finetuned).prompt_style, Tokenizer(whole))
        if sentence:
            print(sentence)
        checkpoint_dir = whole
        finetuned = None

    if format == "gguf":
        if finetuned is None:
            export_gguf(checkpoint_dir or SAMPLE, out_dir, dtype or "float16")
        else:
            export_merged_gguf(finetuned, checkpoint_dir, out_dir, dtype or "float16", scale=scale)
    elif format == "peft":
        export_peft(finetuned, checkpoint_dir, out_dir, scale)
    elif finetuned is not None:
        export_merged(finetuned, checkpoint_dir, out_dir, as_dtype(dtype), max_shard=max_shard, scale=scale)
    else:
        copy_checkpoint(checkpoint_dir or SAMPLE, out_dir, as_dtype(dtype), max_shard=max_shard, verify=prove_it)
    print(f"Wrote {out_dir}.")


def check_flags(finetuned: Path | None, format: str, dtype: str | None, max_shard_size: float, scale: float) -> None:
    """Raises InputError for flags that do not go together."""
    if dtype == "q8_0" and format != "gguf":
        raise InputError("--dtype q8_0 is for --format gguf. Here: float32, bfloat16 or float16.")
    if dtype is not None and format == "peft":
        raise InputError(f"--dtype {dtype} is not for --format peft, whose weights are float32. Leave it out.")
    check_range("--max_shard_size", max_shard_size, above=0, at_most=1e6)
    check_range("--scale", scale, at_least=0)
    if scale != 1 and finetuned is None:
        raise InputError(f"--scale {scale:g} is for what was fine-tuned. Name it: --finetuned.")
    if format == "peft" and finetuned is None:
        raise InputError("--format peft needs what was trained: --finetuned.")


@locks("out_dir")
def copy_checkpoint(source: Path, out_dir: Path, dtype: "torch.dtype | None", *, max_shard: int, verify: bool) -> None:
    """Copies a checkpoint as a Hugging Face folder; with `verify`, its logits are compared before it has its name."""
    check = None
    if verify:
        model = load_model(source)
        tokenizer = Tokenizer(source)
        expected = logits_of(model, tokenizer)
        if dtype is not None:
            dtypes = {name: dtype for name, _ in model.named_parameters()}
            expected = round_weights(model, dtypes, tokenizer, expected)
        del model  # no two of them at once
        check = functools.partial(verify_copy, expected)
    convert_checkpoint(source, out_dir, hugging_face=True, dtype=dtype, max_shard=max_shard, check=check)


if __name__ == "__main__":
    run(main)
