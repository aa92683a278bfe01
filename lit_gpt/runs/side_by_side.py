"""Several fine-tuned models on one copy of the weights they were trained on.

    base                    transformer.h.0.attn.q.weight   <-+-  the very tensor, also quantized
    out/lora/docstrings     transformer.h.0.attn.q.linear.weight  and its own lora_A, lora_B
    out/adapter/docstrings  transformer.h.0.attn.q.weight         and its own adapter_prompt, adapter_gate

Each is a GPT of its own: modules take no memory, and weights that a method does not train are shared. A parameter of
the base that a method trains, such as a norm of adapter v2, is copied for it. A model that was trained as a whole has
nothing to share, and is loaded beside the others.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from lit_gpt.checkpoint.load import build_model, load_weights, move_buffers, quantize_empty_model
from lit_gpt.config import Config
from lit_gpt.cpu_codes import CpuQuantize
from lit_gpt.data.prompts import resolve_style, style_label
from lit_gpt.data.tokenizer import Tokenizer
from lit_gpt.device import inference_dtype
from lit_gpt.errors import InputError
from lit_gpt.fast_linears import prepare_for_answers
from lit_gpt.model.gpt import GPT
from lit_gpt.quantize import Quantize
from lit_gpt.runs.header import Header, read_header
from lit_gpt.runs.load_finetuned import (
    UseArgs,
    choose_quantization,
    describe_weights,
    load_model_for_use,
    put_trained_on,
    read_base,
    read_for_use,
    use_scale,
)
from lit_gpt.runs.methods import METHODS, Method

BASE = "base"
"""The name of the model as it was before it was fine-tuned."""


@dataclass(frozen=True)
class Trained:
    """What a folder of trained weights says, before a weight is read."""

    name: str
    folder: Path
    header: Header
    base_dir: Path
    tokenizer: Tokenizer
    prompt_style: str | None

    @property
    def is_whole(self) -> bool:
        """Whether all weights were trained: it shares nothing with a base."""
        return METHODS[self.header.method].trains_base


def load_models_for_use(
    args: UseArgs, finetuned: Sequence[Path], device: torch.device, with_base: bool = False, n_rows: int = 1
) -> tuple[dict[str, GPT], Tokenizer, str | None]:
    """Models by name, the tokenizer that all have, and the prompt style that the first was trained in, if any.

    The names are "base", if there is no fine-tuned one or with `with_base`, and those of the folders as `model_names`
    makes them. `args.finetuned` is the first of the folders, if it is set; `args.scale` is for all that are fine-tuned.
    `n_rows` is how many texts each of them will decode at once, for which weights that none shares are laid out.

    Raises:
        InputError: two of them have another base, tokenizer or quantization; there are several, and --stream_blocks;
            or see `read_for_use`, `load_finetuned` and `load_weights`.
    """
    folders = list(finetuned)
    if args.finetuned is not None:
        folders.insert(0, args.finetuned)
    if not folders or (len(folders) == 1 and not with_base):
        return load_one(args, folders, device, n_rows)
    if args.stream_blocks:
        raise InputError("--stream_blocks is for one model. Leave it out, or name one --finetuned without --with_base.")

    # what they are; all that does not go together is found before a weight is read
    names = model_names(folders)
    trained = [read_trained(args, name, folder) for name, folder in zip(names, folders, strict=True)]
    for other in trained[1:]:
        check_tokenizer(trained[0], other)
    adapters = [one for one in trained if not one.is_whole]
    for other in adapters[1:]:
        check_base(adapters[0], other)
    kinds = [choose_quantization(one.header, args.quantize, one.folder) for one in adapters]
    for other, kind in zip(adapters[1:], kinds[1:], strict=True):
        check_quantization(adapters[0], kinds[0], other, kind)
    say_other_styles(trained)

    # the base, once, and the adapters on it
    models: dict[str, GPT] = {}
    if adapters or with_base:
        base_dir = adapters[0].base_dir if adapters else base_of_whole(args, trained[0])
        kind = kinds[0] if adapters else asked_quantization(args)
        base = build_model(Config.from_checkpoint(base_dir))
        quantize_empty_model(base, kind, device)
        fingerprint = load_weights(base, base_dir, inference_dtype(args.precision), device)
        models[BASE] = base.eval()
        for one in adapters:
            model = sharing(base, METHODS[one.header.method], kind)
            model, _ = put_trained_on(model, fingerprint, base_dir, one.header, one.folder)
            use_scale(model, args.scale, one.header)
            models[one.name] = model.eval()
        for model in models.values():
            prepare_for_answers(model, shares_weights=True)

    # those that were trained as a whole, and all in the order in which they were named
    for one in trained:
        if one.is_whole:
            models[one.name] = load_model_for_use(replace(args, finetuned=one.folder), device, n_rows=n_rows)
    names = [one.name for one in trained]
    if with_base:
        names.insert(0, BASE)
    models = {name: models[name] for name in names}
    return models, trained[0].tokenizer, trained[0].prompt_style


def load_one(
    args: UseArgs, folders: Sequence[Path], device: torch.device, n_rows: int
) -> tuple[dict[str, GPT], Tokenizer, str | None]:
    """The only model, as `load_for_use` loads it."""
    args = replace(args, finetuned=folders[0] if folders else None)
    name = model_names(folders)[0] if folders else BASE
    tokenizer, _, prompt_style = read_for_use(args)
    return {name: load_model_for_use(args, device, n_rows=n_rows)}, tokenizer, prompt_style


def sharing(base: GPT, method: Method, kind: Quantize | CpuQuantize | None) -> GPT:
    """A GPT whose parameters are those of `base`, the very objects, but for copies of those that `method` trains.

    `kind` is how the base is quantized.
    """
    model = build_model(base.config)
    quantize_empty_model(model, kind, base.transformer.wte.weight.device)
    copies: dict[int, nn.Parameter] = {}
    # a tensor that has two names, as an embedding that is the head, is one here, too
    for name, param in base.named_parameters(remove_duplicate=False):
        if method.filter(name, param) and id(param) not in copies:
            copies[id(param)] = nn.Parameter(param.detach().clone(), requires_grad=False)
        path, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(path), leaf, copies.get(id(param), param))
    move_buffers(model, base.transformer.wte.weight.device)
    return model


# ---- what goes together


def read_trained(args: UseArgs, name: str, folder: Path) -> Trained:
    """What a folder of trained weights says. Raises InputError for what `read_for_use` refuses."""
    header, base_dir = read_base(args.checkpoint_dir, folder)
    tokenizer, _, prompt_style = read_for_use(replace(args, finetuned=folder))
    return Trained(name, folder, header, base_dir, tokenizer, prompt_style)


def check_tokenizer(first: Trained, other: Trained) -> None:
    """Raises InputError if a prompt does not have the same tokens for both."""
    if other.tokenizer.fingerprint != first.tokenizer.fingerprint:
        raise InputError(f"{other.folder} has another tokenizer than {first.folder}. Load them one at a time.")


def check_base(first: Trained, other: Trained) -> None:
    """Raises InputError if two were trained on different weights. An adapter of peft names a folder alone."""
    knows_weights = first.header.base and other.header.base
    if knows_weights:
        is_same = first.header.base == other.header.base
    else:
        is_same = first.base_dir.resolve() == other.base_dir.resolve()
    if not is_same:
        raise InputError(
            f"{other.folder} was trained on another base than {first.folder}: on {other.header.checkpoint_dir}, and not"
            f" on {first.header.checkpoint_dir}. Load them one at a time."
        )


def check_quantization(
    first: Trained, kind: Quantize | CpuQuantize | None, other: Trained, other_kind: Quantize | CpuQuantize | None
) -> None:
    """Raises InputError if two would have their base quantized in different ways."""
    if other_kind != kind:
        raise InputError(
            f"{other.folder} was trained on {describe_weights(other_kind)}, {first.folder} on {describe_weights(kind)}."
            f" Choose one for both: --quantize {kind or 'none'}, or --quantize {other_kind or 'none'}."
        )


def say_other_styles(trained: Sequence[Trained]) -> None:
    """A line on stderr if some were trained in another prompt style than the first, whose style is that of all."""
    first = way_of_asking(trained[0])
    others = [str(one.folder) for one in trained[1:] if way_of_asking(one) != first]
    if others:
        print(
            f"{', '.join(others)}: trained in another prompt style than {trained[0].folder}, in which all are asked"
            f" ({style_label(first[0])}). --prompt_style names another for all.",
            file=sys.stderr,
        )


def way_of_asking(one: Trained) -> tuple[str, str]:
    """The style that a model is asked in, and the chat template that this style stands for."""
    style = resolve_style("auto", one.tokenizer, one.prompt_style)
    return style, one.tokenizer.templates_fingerprint if style == "chat" else ""


def asked_quantization(args: UseArgs) -> Quantize | CpuQuantize | None:
    """How to quantize a base on which no adapter was trained: as the flag says."""
    return None if args.quantize == "auto" or args.quantize == "none" else args.quantize


def base_of_whole(args: UseArgs, whole: Trained) -> Path:
    """The folder of the model that a whole model was trained from.

    Raises:
        InputError: it is no longer there.
    """
    if args.checkpoint_dir is not None:
        return args.checkpoint_dir
    header = read_header(whole.folder)
    base_dir = Path(header.checkpoint_dir)
    if not base_dir.is_dir():
        raise InputError(
            f"{whole.folder} was trained from {base_dir}, which is not there, as seen from {Path.cwd()}. Name it:"
            " --checkpoint_dir."
        )
    return base_dir


# ---- names


def model_names(folders: Sequence[Path]) -> list[str]:
    """A name for each folder: that of its out_dir, with as many of the folders above as it takes to tell them apart.

    out/lora/mine and out/adapter/mine/best are lora/mine and adapter/mine.

    Raises:
        InputError: a folder is named twice.
    """
    parts = []
    for folder in folders:
        path = folder.resolve()
        if path.name == "best":
            path = path.parent
        *above, last_part = path.parts
        if (path.parent / "best").is_dir():  # another folder of a run, such as last
            last_part = f"{above.pop()}/{last_part}"
        parts.append([*above, last_part])
    for i, path in enumerate(parts):
        if path in parts[:i]:
            raise InputError(f"{folders[i]} is named twice. Name each model once.")
    for n in range(1, max(map(len, parts)) + 1):
        names = ["/".join(path[-n:]) for path in parts]
        if len({BASE, *names}) == len(names) + 1:
            break
    return names
