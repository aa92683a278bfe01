"""What was fine-tuned as a plain model, for a folder of its own."""

from pathlib import Path
from typing import Literal, get_args

import torch
from torch import nn

from lit_gpt.checkpoint.load import cast_without_overflow
from lit_gpt.checkpoint.peft import CONFIG, save_peft
from lit_gpt.checkpoint.save import copy_companions, save_hf
from lit_gpt.data.tokenizer import Tokenizer
from lit_gpt.errors import InputError
from lit_gpt.files import must_be_empty, new_folder
from lit_gpt.formats.verify import EXACT, ROUNDING, Difference, Logits, difference, logits_of, prove
from lit_gpt.lora import LoRA, lora_filter, merge_lora_weights
from lit_gpt.model.gpt import GPT
from lit_gpt.quantize import dequantize_linears
from lit_gpt.runs.header import Header, finetuned_file, read_header, read_peft_header
from lit_gpt.runs.load_finetuned import load_finetuned
from lit_gpt.runs.methods import METHODS

Base = Literal["original", "dequantized"]


def export_merged(
    finetuned: Path,
    checkpoint_dir: Path | None,
    out_dir: Path,
    dtype: torch.dtype | None = None,
    base: Base = "original",
    max_shard: int | None = None,
) -> None:
    """Merges a LoRA into its base, writes a Hugging Face folder and proves that it is the model.

    Where the base was quantized in training, the change was learned for the quantized weights. Both bases are tried:
    the original weights and those that the codes stand for; how far each is from what was trained is printed.

    Raises:
        InputError: see `must_be_empty`, `load_finetuned` and `prove`; it is no LoRA, or the merge is not what was
            trained.
    """
    must_be_empty(out_dir)
    if whole := whole_model(finetuned):
        raise InputError(f"{finetuned} holds a whole model, nothing to merge: --checkpoint_dir {whole}.")
    if (method := describe(finetuned).method) != "lora":
        raise InputError(f"{finetuned} was trained with {method}; only LoRA can be merged.")
    model, description = load_finetuned(checkpoint_dir, finetuned)
    source = Path(checkpoint_dir or description.checkpoint_dir)
    tokenizer, stored = Tokenizer(source), model.transformer.wte.weight.dtype
    expected = logits_of(model, tokenizer)
    if description.quantize is None:
        model = merge(model, stored)
        found = difference(expected, logits_of(model, tokenizer))
        print(f"Merged: {found}, from the model as it was trained.")
        must_explain(found, stored)
    else:
        del model  # no two of them at once
        model = merge_into(base, finetuned, checkpoint_dir, expected, tokenizer)
    if model.config.tie_embeddings and model.lm_head.weight is not model.transformer.wte.weight:
        print("The head was the embedding and now differs from it: the merged checkpoint holds both.")
    expected = logits_of(model, tokenizer)
    if dtype not in (None, stored):
        expected = rounded(model, dtype, tokenizer, expected)
    save_hf(model, source, out_dir, max_shard, lambda folder: prove(expected, folder))


def describe(finetuned: Path) -> Header:
    """What was trained there, without loading it."""
    return read_peft_header(finetuned) if (finetuned / CONFIG).is_file() else read_header(finetuned)


def whole_model(finetuned: Path) -> Path | None:
    """The checkpoint folder there, where all weights were trained."""
    method = METHODS.get(describe(finetuned).method)
    if method is None or not method.trains_base:
        return None
    return finetuned_file(finetuned).parent


def merge(model: GPT, dtype: torch.dtype) -> GPT:
    """Merges in place. What was quantized becomes plain, block by block, since it is float32 for a moment."""
    for part in (*model.transformer.h, model):
        merge_lora_weights(part)
        dequantize_linears(part)
        cast_weights(part, dtype)
    return model


def cast_weights(model: nn.Module, dtype: torch.dtype) -> None:
    """Rounds the weights; the rotary frequencies, which no file holds, stay as they are."""
    for name, param in model.named_parameters():
        param.data = cast_without_overflow(name, param.data, dtype)


def rounded(model: GPT, dtype: torch.dtype, tokenizer: Tokenizer, before: Logits) -> Logits:
    """Rounds the weights, and says what that did to the logits; returns those that are to be read back."""
    cast_weights(model, dtype)
    expected = logits_of(model, tokenizer)
    print(f"Rounded to {str(dtype).removeprefix('torch.')}: {difference(before, expected)}.")
    return expected


def must_explain(found: Difference, dtype: torch.dtype) -> None:
    """Raises InputError where a merge changed more than rounding to `dtype` can."""
    if not found.largest <= ROUNDING[dtype] * found.scale:
        raise InputError(f"What was merged is not the model that was trained: {found}. Nothing was written.")


def merge_into(base: Base, finetuned: Path, checkpoint_dir: Path | None, expected: Logits, tokenizer: Tokenizer) -> GPT:
    """The merged model on the base that is asked for; says which of both is nearer to what was trained.

    Only one of them is in memory at a time, the one asked for last.
    """
    found: dict[str, Difference] = {}
    for name in sorted(get_args(Base), key=lambda name: name == base):
        model = None
        model, _ = load_finetuned(checkpoint_dir, finetuned, quantize="none" if name == "original" else "auto")
        stored = model.transformer.wte.weight.dtype
        merge(model, stored)
        found[name] = difference(expected, logits_of(model, tokenizer))
        print(f"Merged into the {name} weights: {found[name]}, from the quantized model that was trained.")
    must_explain(found["dequantized"], stored)
    nearer = min(found, key=lambda name: found[name].mean)
    advice = "" if nearer == base else f" scripts/merge_lora.py --base {nearer} chooses it."
    print(f"Nearer to what was trained: the {nearer} weights. Written: the {base} ones.{advice}")
    return model


def export_peft(finetuned: Path, checkpoint_dir: Path | None, out_dir: Path) -> None:
    """Writes a LoRA as peft's adapter, reads it back and proves that it is the same.

    Raises:
        InputError: see `must_be_empty`, `load_finetuned` and `save_peft`; or what is read back differs.
    """
    must_be_empty(out_dir)
    if (method := describe(finetuned).method) != "lora":
        raise InputError(f"{finetuned} was trained with {method}; peft knows LoRA.")
    model, description = load_finetuned(checkpoint_dir, finetuned)
    source = Path(checkpoint_dir or description.checkpoint_dir)
    tokenizer, weights = Tokenizer(source), {k: v for k, v in model.state_dict().items() if lora_filter(k)}
    with new_folder(out_dir) as folder:
        save_peft(weights, LoRA(**description.settings), model.config, str(source), folder)
        copy_companions(source, folder)
        again, _ = load_finetuned(source, folder, quantize=description.quantize or "none")
        found = difference(logits_of(model, tokenizer), logits_of(again, tokenizer))
        print(f"Read back: {found}.")
        if not found.largest <= EXACT * found.scale:
            raise InputError(f"What was written is not the adapter: {found}. Nothing was kept. Please report this.")
