"""What was fine-tuned as a plain model, for a folder of its own."""

from pathlib import Path
from typing import Literal

import torch

from lit_gpt.checkpoint import save_hf
from lit_gpt.errors import InputError
from lit_gpt.files import must_be_empty, new_folder
from lit_gpt.finetuned import load_finetuned
from lit_gpt.lora import LoRA, lora_filter, merge_lora_weights
from lit_gpt.model import GPT
from lit_gpt.peft import save_peft
from lit_gpt.proof import ROUNDING, difference, logits_of, prove
from lit_gpt.quantize import dequantize_linears
from lit_gpt.tokenizer import Tokenizer

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
        InputError: see `must_be_empty`, `load_finetuned` and `prove`.
    """
    must_be_empty(out_dir)
    trained, description = load_finetuned(checkpoint_dir, finetuned)
    source = Path(checkpoint_dir or description.checkpoint_dir)
    tokenizer, weight = Tokenizer(source), trained.transformer.wte.weight
    if description.method != "lora":
        if description.method == "full":
            raise InputError(f"{finetuned} holds a whole model, nothing to merge: --checkpoint_dir {source}.")
        raise InputError(f"{finetuned} was trained with {description.method}; only LoRA can be merged.")
    if description.quantize is None:
        expected, model = logits_of(trained, tokenizer), merge(trained)
        print(f"Merged: {difference(expected, logits_of(model, tokenizer))}, from the model as it was trained.")
    else:
        model = nearer_base(trained, finetuned, checkpoint_dir, base, tokenizer)
    if model.config.tie_embeddings and model.lm_head.weight is not model.transformer.wte.weight:
        print("The head was the embedding and now differs from it: the merged checkpoint holds both.")
    expected = logits_of(model, tokenizer)
    save_hf(model, source, out_dir, dtype or weight.dtype, max_shard, lambda folder: prove(expected, folder))


def merge(model: GPT) -> GPT:
    merge_lora_weights(model)
    dequantize_linears(model)
    return model


def nearer_base(trained: GPT, finetuned: Path, checkpoint_dir: Path | None, base: Base, tokenizer: Tokenizer) -> GPT:
    """The merged model on the base that is asked for; says which of both is nearer to what was trained."""
    expected = logits_of(trained, tokenizer)
    models = {
        "original": merge(load_finetuned(checkpoint_dir, finetuned, quantize="none")[0]),
        "dequantized": merge(trained),
    }
    found = {name: difference(expected, logits_of(model, tokenizer)) for name, model in models.items()}
    for name, gap in found.items():
        print(f"Merged into the {name} weights: {gap}, from the quantized model that was trained.")
    nearer = min(found, key=lambda name: found[name].mean)
    advice = "" if nearer == base else f" --base {nearer} chooses it."
    print(f"Nearer to what was trained: the {nearer} weights. Written: the {base} ones.{advice}")
    return models[base]


def export_peft(finetuned: Path, checkpoint_dir: Path | None, out_dir: Path) -> None:
    """Writes a LoRA as peft's adapter, reads it back and proves that it is the same.

    Raises:
        InputError: see `must_be_empty`, `load_finetuned` and `save_peft`; or what is read back differs.
    """
    must_be_empty(out_dir)
    model, description = load_finetuned(checkpoint_dir, finetuned)
    if description.method != "lora":
        raise InputError(f"{finetuned} was trained with {description.method}; peft knows LoRA.")
    source = Path(checkpoint_dir or description.checkpoint_dir)
    tokenizer, weights = Tokenizer(source), {k: v for k, v in model.state_dict().items() if lora_filter(k)}
    with new_folder(out_dir) as folder:
        save_peft(weights, LoRA(**description.settings), model.config, str(source), folder)
        again, _ = load_finetuned(source, folder, quantize=description.quantize or "none")
        found = difference(logits_of(model, tokenizer), logits_of(again, tokenizer))
        print(f"Read back: {found}.")
        if not found.largest <= ROUNDING[torch.float32] * found.scale:
            raise InputError(f"What was written is not the adapter: {found}. Nothing was kept. Please report this.")
