"""Exports of what was fine-tuned: a LoRA merged into its base, or kept apart as an adapter of the peft library."""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import nn

from lit_gpt.checkpoint.load import EMBEDDING, HEAD, cast_without_overflow, stored_dtypes, widest
from lit_gpt.checkpoint.peft import save_peft, scale_metadata
from lit_gpt.checkpoint.save import copy_companions, replace_tokenizer, save_hf
from lit_gpt.config import Config
from lit_gpt.data.embedding_rows import beyond_rows, describe
from lit_gpt.data.prompts import write_stop_ids, write_style
from lit_gpt.data.tokenizer import Tokenizer
from lit_gpt.errors import InputError
from lit_gpt.files import must_be_empty, new_folder
from lit_gpt.formats.gguf_writer import GGUFType, check_can_be_gguf, export_gguf
from lit_gpt.formats.verify import EXACT, ROUNDING, Difference, Logits, compare_logits, logits_of, verify_copy
from lit_gpt.lock import locks
from lit_gpt.lora import LoRA, fix_lora_scale, lora_filter, merge_lora_weights
from lit_gpt.model.gpt import GPT
from lit_gpt.quantize import Quantize, dequantize_linears
from lit_gpt.runs.header import Header, finetuned_file, is_peft, read_header, read_peft_header
from lit_gpt.runs.load_finetuned import (
    QuantizeAs,
    base_of,
    describe_weights,
    has_own_tokenizer,
    knows_quantization,
    load_finetuned,
    trained_tokenizer,
)
from lit_gpt.runs.methods import METHODS

Base = Literal["original", "dequantized"]
BITS_AND_BYTES: dict[Quantize, str] = {  # what transformers' from_pretrained needs to quantize in the same way
    "bnb.nf4": 'BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")',
    "bnb.nf4-dq": 'BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)',
    "bnb.fp4": "BitsAndBytesConfig(load_in_4bit=True)",
    "bnb.fp4-dq": "BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_use_double_quant=True)",
    "bnb.int8": "BitsAndBytesConfig(load_in_8bit=True)",
}


@locks("out_dir")
def export_merged(
    finetuned: Path,
    checkpoint_dir: Path | None,
    out_dir: Path,
    dtype: torch.dtype | None = None,
    base: Base = "dequantized",
    max_shard: int | None = None,
    quantize: QuantizeAs = "auto",
    scale: float = 1.0,
) -> None:
    """Merges a LoRA into its base, writes a Hugging Face folder and verifies that it holds the model.

    Weights get the `dtype`, None is what each has in the base. They are merged in a dtype that holds the base and the
    result, and rounded once.

    If the base was quantized in training, the change was learned for the quantized weights. Both bases are tried then:
    the original weights and those that the codes stand for. How far each is from the trained model is printed.
    `quantize` says how it was, of an adapter of peft, which does not say so itself.
    `scale` is how much of the change is merged: 1 is all of it. Another one stands in the headers of the files.
    The style that was trained becomes the folder's chat template.

    Raises:
        InputError: see `must_be_empty`, `load_finetuned` and `verify_copy`; it is no LoRA, or the merged model is not
            the one that was trained.
    """
    must_be_empty(out_dir)
    check_is_lora(finetuned)
    header = header_of(finetuned)
    quantized = quantization_in_training(header, finetuned, quantize)
    source = base_of(finetuned, checkpoint_dir, header)
    config = Config.from_checkpoint(source)
    tokenizer = fitting_tokenizer(finetuned, source, config)

    # the dtypes: of the base, of what is written, and one in which both are exact
    stored = stored_dtypes(source, config)
    written = {name: dtype or stored_dtype for name, stored_dtype in stored.items()}
    written.setdefault(HEAD, written[EMBEDDING])  # a head that was the embedding gets weights of its own if it changes
    working = widest([*stored.values(), *written.values()])

    # the model as it was trained
    model, header = load_finetuned(checkpoint_dir, finetuned, working, quantize=quantized or "none", scale=scale)
    trained_logits = logits_of(model, tokenizer)

    # merge
    if quantized is None:
        model = merge_in_place(model, working)
        difference = compare_logits(trained_logits, logits_of(model, tokenizer))
        print(f"Merged: {difference}, from the model as it was trained.")
        check_merge(difference, working)
    else:
        del model  # no two of them at once
        model = merge_into(base, finetuned, checkpoint_dir, working, quantized, scale, trained_logits, tokenizer)
    if model.config.tie_embeddings and model.lm_head.weight is not model.transformer.wte.weight:
        print("The head was the embedding and now differs from it: the merged checkpoint holds both.")

    # round, write, read back
    merged_logits = logits_of(model, tokenizer)
    if set(written.values()) != {working}:
        merged_logits = round_weights(model, written, tokenizer, merged_logits)

    def check(folder: Path) -> None:
        finish_tokenizer(finetuned, header, folder)
        verify_copy(merged_logits, folder)

    save_hf(model, source, out_dir, max_shard, check=check, dtypes=written, metadata=scale_metadata(scale))


def export_merged_gguf(
    finetuned: Path,
    checkpoint_dir: Path | None,
    out_dir: Path,
    kind: GGUFType,
    base: Base = "dequantized",
    scale: float = 1.0,
) -> None:
    """Merges a LoRA into its base in float32, and writes that as a GGUF file: its weights are rounded once.

    A `scale` other than 1 is in the name of the file, and of the model in it.

    Raises:
        InputError: see `export_merged` and `export_gguf`.
    """
    # what can be refused before weights are read
    must_be_empty(out_dir)
    check_is_lora(finetuned)
    check_can_be_gguf(base_of(finetuned, checkpoint_dir, header_of(finetuned)))

    # the name of the file is that of the folder that is merged to: the run's
    best = finetuned.resolve()
    name = best.parent.name if best.name in ("best", "last") else best.name
    if scale != 1:
        name += f"-scale-{scale:g}"
    out_dir.absolute().parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out_dir.absolute().parent, prefix=".merged-") as folder:
        merged = Path(folder) / name
        export_merged(finetuned, checkpoint_dir, merged, torch.float32, base, scale=scale)
        export_gguf(merged, out_dir, kind)


@locks("out_dir")
def export_peft(finetuned: Path, checkpoint_dir: Path | None, out_dir: Path, scale: float = 1.0) -> None:
    """Writes a LoRA as peft's adapter, reads it back and verifies that it is the same.

    With a `scale`, B and the magnitudes of DoRA are those that have it: peft has no place for it. The header says so.

    If the base was quantized in training, lines say how far the adapter is from it on the original weights, which are
    those that peft gets if nobody asks for others, and how to ask.

    Raises:
        InputError: see `must_be_empty`, `load_finetuned` and `save_peft`; or what is read back differs.
    """
    must_be_empty(out_dir)
    method = header_of(finetuned).method
    if method != "lora":
        raise InputError(f"{finetuned} was trained with {method}; peft knows LoRA.")
    source = base_of(finetuned, checkpoint_dir, header_of(finetuned))
    tokenizer = fitting_tokenizer(finetuned, source, Config.from_checkpoint(source))
    model, header = load_finetuned(checkpoint_dir, finetuned, scale=scale)
    fix_lora_scale(model)
    trained = {key: value for key, value in model.state_dict().items() if lora_filter(key)}

    with new_folder(out_dir) as folder:
        save_peft(
            trained,
            LoRA(**header.settings),
            model.config,
            base=str(source),
            folder=folder,
            quantize=header.quantize,
            scale=scale,
        )
        copy_companions(source, folder)
        finish_tokenizer(finetuned, header, folder)
        expected = logits_of(model, tokenizer)
        copy, _ = load_finetuned(source, folder)
        difference = compare_logits(expected, logits_of(copy, tokenizer))
        print(f"Read back: {difference}.")
        if not difference.is_within(EXACT):
            raise InputError(
                f"What was written is not the adapter: {difference}. Nothing was kept. Please report this."
            )

    if header.quantize is not None:
        del model, copy  # no two of them at once
        original, _ = load_finetuned(source, finetuned, quantize="none", scale=scale)
        difference = compare_logits(expected, logits_of(original, tokenizer))
        print(f"On the original weights: {difference}, from the quantized model that was trained.")
        print(f"For peft, quantize the base as in training: quantization_config={BITS_AND_BYTES[header.quantize]}.")


def quantization_in_training(header: Header, finetuned: Path, quantize: QuantizeAs) -> Quantize | None:
    """How the base was quantized in training: as the header says, or `quantize` if it does not know.

    Raises:
        InputError: the header says something else.
    """
    is_known = knows_quantization(finetuned)
    if quantize == "auto":
        if not is_known:
            print(
                "An adapter of peft does not say whether its base was quantized in training. If it was: --quantize"
                " bnb.nf4 of scripts/merge_lora.py."
            )
        return header.quantize
    asked = None if quantize == "none" else quantize
    if asked != header.quantize and is_known:
        raise InputError(
            f"{finetuned} says itself that it was trained on {describe_weights(header.quantize)}: leave out --quantize."
        )
    return asked


def fitting_tokenizer(finetuned: Path, source: Path, config: Config) -> Tokenizer:
    """The tokenizer that was trained, whose stop tokens the base knows.

    Raises:
        InputError: it has none for one of them, since it is not the one that the tokenizer was made for.
    """
    tokenizer = trained_tokenizer(finetuned, source)
    stop_ids = sorted(tokenizer.stop_ids) if has_own_tokenizer(finetuned) else [tokenizer.eos_id]
    token_id = beyond_rows(stop_ids, config)
    if token_id is not None:
        raise InputError(
            f"What ends an answer in {finetuned} is {describe(token_id, tokenizer, config)}, {source}. If it was"
            " trained on a base with a larger one, name that: --checkpoint_dir."
        )
    return tokenizer


def finish_tokenizer(finetuned: Path, header: Header, folder: Path) -> None:
    """Makes the tokenizer in a folder, so far the base's, the one that was trained, and the style its chat template.

    A sentence says so if the template was another.
    """
    if has_own_tokenizer(finetuned):
        replace_tokenizer(finetuned, folder)
        if (folder / "config.json").is_file():  # of a whole model, and no adapter
            write_stop_ids(folder, Tokenizer(folder))
    sentence = write_style(header.prompt_style, folder)
    if sentence:
        print(sentence)


def header_of(finetuned: Path) -> Header:
    """The description of what was trained there, by us or by peft. The weights are not loaded."""
    return read_peft_header(finetuned) if is_peft(finetuned) else read_header(finetuned)


def whole_model(finetuned: Path) -> Path | None:
    """The folder of a fine-tuned model that is a checkpoint of its own, since all its weights were trained."""
    method = METHODS.get(header_of(finetuned).method)
    if method is None or not method.trains_base:
        return None
    return finetuned_file(finetuned).parent


def check_is_lora(finetuned: Path) -> None:
    """Raises InputError if there is nothing to merge, or something that cannot be merged."""
    checkpoint_dir = whole_model(finetuned)
    if checkpoint_dir is not None:
        raise InputError(f"{finetuned} holds a whole model, nothing to merge: --checkpoint_dir {checkpoint_dir}.")
    method = header_of(finetuned).method
    if method != "lora":
        raise InputError(f"{finetuned} was trained with {method}; only LoRA can be merged.")


def merge_in_place(model: GPT, dtype: torch.dtype) -> GPT:
    """Merges LoRA into the model's linears; quantized ones become plain. All weights get the dtype.

    A linear is float32 until it has its dtype, so that the model is done block by block.
    """
    for part in (*model.transformer.h, model):
        merge_lora_weights(part)
        dequantize_linears(part)
        cast_weights(part, dtype)
    return model


def cast_weights(model: nn.Module, dtype: torch.dtype) -> None:
    """Casts the weights, in place. The rotary frequencies, which no file holds, stay as they are."""
    for name, param in model.named_parameters():
        param.data = cast_without_overflow(name, param.data, dtype)


def round_weights(model: GPT, dtypes: Mapping[str, torch.dtype], tokenizer: Tokenizer, logits: Logits) -> Logits:
    """Rounds each weight to its dtype, prints how that changed the `logits`, and returns the new ones.

    The model computes in one dtype: where weights get several, the widest of them holds the rounded values.
    """
    params = dict(model.named_parameters())
    computing = widest(dtypes[name] for name in params)
    for name, param in params.items():
        param.data = cast_without_overflow(name, param.data, dtypes[name]).to(computing)
    rounded_logits = logits_of(model, tokenizer)
    names = sorted({str(dtypes[name]).removeprefix("torch.") for name in params})
    print(f"Rounded to {' and '.join(names)}: {compare_logits(logits, rounded_logits)}.")
    return rounded_logits


def check_merge(difference: Difference, dtype: torch.dtype) -> None:
    """Raises InputError if a merge changed more than rounding to `dtype` can."""
    if not difference.is_within(ROUNDING[str(dtype).removeprefix("torch.")]):
        raise InputError(f"What was merged is not the model that was trained: {difference}. Nothing was written.")


def merge_into(
    base: Base,
    finetuned: Path,
    checkpoint_dir: Path | None,
    dtype: torch.dtype,
    quantized: Quantize,
    scale: float,
    trained_logits: Logits,
    tokenizer: Tokenizer,
) -> GPT:
    """Merges into both bases in `dtype`, prints which is nearer to the trained model, and returns that on `base`.

    Only one of them is in memory at a time.
    """
    differences: dict[str, Difference] = {}
    in_order = sorted(get_args(Base), key=lambda name: name == base)  # the wanted one last: it is returned
    for name in in_order:
        model = None  # frees the one before
        quantize: QuantizeAs = "none" if name == "original" else quantized
        model, _ = load_finetuned(checkpoint_dir, finetuned, dtype, quantize=quantize, scale=scale)
        merge_in_place(model, dtype)
        differences[name] = compare_logits(trained_logits, logits_of(model, tokenizer))
        print(f"Merged into the {name} weights: {differences[name]}, from the quantized model that was trained.")
    check_merge(differences["dequantized"], dtype)

    nearer = min(differences, key=lambda name: differences[name].mean)
    advice = "" if nearer == base else f" scripts/merge_lora.py --base {nearer} writes the others."
    print(f"Nearer to what was trained: the {nearer} weights. Written: the {base} ones.{advice}")
    return model
