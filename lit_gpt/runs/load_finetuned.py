"""Using what a run has trained: the base model, and on it the trained weights, unmerged."""

import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from lit_gpt.checkpoint import peft
from lit_gpt.checkpoint.load import (
    build_model,
    checked_tensors,
    is_finite,
    load_model,
    load_weights,
    quantize_empty_model,
)
from lit_gpt.checkpoint.quantized_elsewhere import PLAIN
from lit_gpt.checkpoint.weight_files import read_tensors
from lit_gpt.config import SAMPLE, Config
from lit_gpt.cpu_codes import CPU_KINDS, CpuQuantize
from lit_gpt.data.embedding_rows import check_special_tokens
from lit_gpt.data.tokenizer import Tokenizer, how_to_save_as_json
from lit_gpt.device import Precision, inference_dtype
from lit_gpt.errors import InputError
from lit_gpt.fast_linears import prepare_for_answers
from lit_gpt.files import some_of
from lit_gpt.lora import apply_lora, lora_filter
from lit_gpt.model.gpt import GPT
from lit_gpt.quantize import Quantize
from lit_gpt.ranges import check_penalty, check_range, check_seed
from lit_gpt.runs.header import Header, finetuned_file, is_peft, read_header, read_peft_header
from lit_gpt.runs.methods import METHODS, Method
from lit_gpt.sharding import let_go_of_wholes, local_tensor, mesh_of_model, rows_like, shard_weights
from lit_gpt.stream_blocks import stream_blocks

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

QuantizeAs = Literal["auto", "none", Quantize]  # auto: as in training
QuantizeForUse = Literal[QuantizeAs, CpuQuantize]  # those of the second kind are for answers alone


@dataclass(frozen=True)
class UseArgs:
    """Flags of every script that generates text: with which model, and how."""

    checkpoint_dir: Path | None = None
    """The model. None is the sample model, or the base of what was fine-tuned."""
    finetuned: Path | None = None
    """The folder that a fine-tuning script wrote: an out_dir (its best), or one folder of it. It is not merged."""
    scale: float = 1.0
    """How much of the change of a LoRA or an adapter is used: 1 is all of it, 0 none, and 1.25 more than was trained.
    scripts/choose_scale.py compares some."""
    top_p: float | None = None
    """Sample from the fewest likeliest tokens that together have this probability."""
    min_p: float | None = None
    """Sample from the tokens that are at least so likely, as a share of the likeliest one's probability."""
    repetition_penalty: float = 1.0
    """Makes tokens that were there before less likely if it is above 1, such as 1.1."""
    precision: Precision = "auto"
    """Dtype of the weights and of the arithmetic."""
    quantize: QuantizeForUse = "auto"
    """Keep the linears in 4 or 8 bits. cpu.int4 and cpu.int8 are for answers on a CPU, and the faster for it; the
    others make a model small, and on a CPU slow. auto is what the fine-tuned weights were trained on, none the weights
    as they are."""
    draft_tokens: int = 0
    """Look up so many tokens that may follow, and read them at once: the same answers, and fewer passes where they
    repeat what stands in the text. 8 or so pay for summaries, corrections, and code. Answers made together share
    them."""
    stream_blocks: bool = False
    """Keep the weights of the blocks in the host's memory, for a model that is larger than the device's: each token
    takes the time to copy them all."""
    seed: int = 1337
    """Seed of the sampling."""

    def __post_init__(self) -> None:
        check_range("--scale", self.scale, at_least=0)
        check_range("--top_p", self.top_p, above=0, at_most=1)
        check_range("--min_p", self.min_p, at_least=0, at_most=1)
        check_penalty(self.repetition_penalty)
        check_range("--draft_tokens", self.draft_tokens, at_least=0)
        check_seed("--seed", self.seed)


def load_for_use(args: UseArgs, device: torch.device, n_rows: int = 1) -> tuple[GPT, Tokenizer, str | None]:
    """A model, its tokenizer, and the prompt style it was fine-tuned with; None if it was not, or if that is unknown.

    `n_rows` is that of `load_model_for_use`.

    Raises:
        InputError: see `read_for_use`, `load_finetuned` and `load_weights`.
    """
    tokenizer, _, trained_style = read_for_use(args)
    return load_model_for_use(args, device, n_rows=n_rows), tokenizer, trained_style


def read_for_use(args: UseArgs) -> tuple[Tokenizer, Config, str | None]:
    """What is known before a weight is read: the tokenizer, the shape of the model, and the prompt style as above.

    Raises:
        InputError: there is no such model, or nothing of it to scale; or its tokenizer does not fit it, or is not the
            one of the training.
    """
    # a model as it was downloaded
    if args.finetuned is None:
        if args.scale != 1:
            raise InputError(f"--scale {args.scale:g} is for what was fine-tuned. Name it: --finetuned.")
        checkpoint_dir = args.checkpoint_dir or SAMPLE
        config = Config.from_checkpoint(checkpoint_dir)
        tokenizer = Tokenizer(checkpoint_dir)
        check_special_tokens(tokenizer, config)
        return tokenizer, config, None

    # or one that was fine-tuned; an adapter of peft does not say with which tokenizer
    header, base_dir = read_base(args.checkpoint_dir, args.finetuned)
    check_scale(args.scale, header, args.finetuned)
    config = Config.from_checkpoint(base_dir)
    tokenizer = trained_tokenizer(args.finetuned, base_dir)
    if header.tokenizer not in ("", tokenizer.fingerprint):
        raise InputError(f"{args.finetuned} was trained with another tokenizer than the one of its base now is.")
    check_special_tokens(tokenizer, config)
    return tokenizer, config, header.prompt_style or None


def trained_tokenizer(finetuned_dir: Path, base_dir: Path) -> Tokenizer:
    """The tokenizer that a model was fine-tuned with, and the chat template: its base's, or its own."""
    base = Tokenizer(base_dir)
    if not has_own_tokenizer(finetuned_dir):
        return base
    own = Tokenizer(finetuned_dir)
    own.named_stop_ids |= base.named_stop_ids  # generation_config.json stays with the base
    return own


def has_own_tokenizer(finetuned_dir: Path) -> bool:
    """Whether an adapter of peft has a tokenizer beside it, as TRL saves it, with the template that was trained.

    Raises:
        InputError: it has a part of one, without a vocabulary that is read.
    """
    if not is_peft(finetuned_dir):
        return False
    if any((finetuned_dir / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        return True
    parts = ("tokenizer_config.json", "chat_template.jinja", "vocab.json", "merges.txt")
    there = [name for name in parts if (finetuned_dir / name).is_file()]
    if there:
        raise InputError(
            f"{finetuned_dir} has {', '.join(there)} beside the adapter, and no tokenizer.json or tokenizer.model: the"
            f" tokenizer that was trained is not all there. {how_to_save_as_json(finetuned_dir)} Without these files"
            " that of the base is used."
        )
    return False


def load_model_for_use(args: UseArgs, device: torch.device, mesh: "DeviceMesh | None" = None, n_rows: int = 1) -> GPT:
    """The model that the flags name, as `prepare_for_answers` leaves it. With a `mesh` its weights are split instead.

    `n_rows` is how many texts will be decoded at once, for which weights are laid out.

    Raises:
        InputError: --stream_blocks or codes for a CPU with several devices; or see `load_finetuned` and `load_weights`.
    """
    dtype = inference_dtype(args.precision)
    if args.stream_blocks and mesh is not None:
        raise InputError("--stream_blocks is for one device. Leave it out: --devices splits the model among them.")
    if args.quantize in CPU_KINDS and (mesh is not None or args.stream_blocks):
        flag = "--stream_blocks" if args.stream_blocks else "--devices"
        raise InputError(f"--quantize {args.quantize} is for one CPU that holds all of the model. Leave out {flag}.")
    if args.finetuned is None:
        quantize = None if args.quantize == "auto" or args.quantize == "none" else args.quantize
        model = load_model(args.checkpoint_dir or SAMPLE, dtype, device, quantize, mesh, args.stream_blocks)
    else:
        model, _ = load_finetuned(
            args.checkpoint_dir,
            args.finetuned,
            dtype=dtype,
            device=device,
            quantize=args.quantize,
            mesh=mesh,
            blocks_on_host=args.stream_blocks,
            scale=args.scale,
        )
    if mesh is not None:
        shard_weights(model, mesh)
    if args.stream_blocks:
        model.requires_grad_(False)  # what was trained on the base is streamed, too
        stream_blocks(model, device)
    if mesh is None and not args.stream_blocks:
        prepare_for_answers(model, n_rows)
    return model


def load_finetuned(
    checkpoint_dir: Path | None,
    finetuned_dir: Path,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    quantize: QuantizeForUse = "auto",
    methods: Mapping[str, Method] = METHODS,
    mesh: "DeviceMesh | None" = None,
    blocks_on_host: bool = False,
    scale: float = 1.0,
) -> tuple[GPT, Header]:
    """A base model with what was trained on it, unmerged. `checkpoint_dir` None is the base it was trained on.

    `quantize` "auto" quantizes the base as it was in training. A line on stderr says if it is quantized otherwise.
    `mesh` is that of `load_weights`, and so is `blocks_on_host`. `scale` is how much of the change is used.

    Raises:
        InputError: another base, or keys that do not fit it; or see `check_scale`.
    """
    header, base_dir = read_base(checkpoint_dir, finetuned_dir, methods)
    check_scale(scale, header, finetuned_dir, methods)
    kind = choose_quantization(header, quantize, finetuned_dir)
    model = build_model(Config.from_checkpoint(base_dir))
    quantize_empty_model(model, kind, device)
    base = load_weights(model, base_dir, dtype, device, mesh, blocks_on_host)
    model, header = put_trained_on(model, base, base_dir, header, finetuned_dir, methods)
    use_scale(model, scale, header, methods)
    return model.eval(), header


def check_scale(scale: float, header: Header, finetuned_dir: Path, methods: Mapping[str, Method] = METHODS) -> None:
    """Raises InputError for a scale that is not 1, if what was trained cannot be scaled."""
    if scale != 1 and methods[header.method].scale is None:
        raise InputError(
            f"--scale {scale:g} is for LoRA and adapters, which leave their base as it is, and {finetuned_dir} holds a"
            " whole model. Leave it out."
        )


def use_scale(model: GPT, scale: float, header: Header, methods: Mapping[str, Method] = METHODS) -> None:
    """Scales what the method of `header` has changed in a model, in place. `check_scale` says for which that works."""
    if scale == 1:
        return
    set_scale = methods[header.method].scale
    assert set_scale is not None, "check_scale has refused it"
    set_scale(model, scale)


def put_trained_on(
    model: GPT,
    base: str,
    base_dir: Path,
    header: Header,
    finetuned_dir: Path,
    methods: Mapping[str, Method] = METHODS,
) -> tuple[GPT, Header]:
    """The model of `base_dir`, changed in place by the method that `header` names, with the weights it has trained.

    `base` is the model's fingerprint. What was trained as a whole is loaded already. Of an adapter in peft's format the
    header that is returned knows more.

    Raises:
        InputError: another base, or keys that do not fit it.
    """
    if is_peft(finetuned_dir):
        lora, tensors = peft.load_peft(finetuned_dir, model.config)
        apply_lora(model, lora)
        copy_parameters(model, tensors.items(), lora_filter, finetuned_dir)
        return model, replace(header, settings=asdict(lora), base=base)
    method = methods[header.method]
    if method.trains_base:
        return model, header
    if base != header.base:
        if Path(base_dir).resolve() == Path(header.checkpoint_dir).resolve():
            raise InputError(
                f"The weights in {base_dir} are not those that {finetuned_dir} was trained on: they have changed"
                " since. Put them back, or train anew."
            )
        raise InputError(f"{finetuned_dir} was trained on another base than {base_dir}: on {header.checkpoint_dir}.")
    settings = method.settings(**header.settings)
    model = method.apply(model, settings)
    load_trained(model, finetuned_dir, method)
    return model, header


def read_base(
    checkpoint_dir: Path | None, finetuned_dir: Path, methods: Mapping[str, Method] = METHODS
) -> tuple[Header, Path]:
    """The header of what was trained, and the folder of its base: `checkpoint_dir`, or the one it was trained on.

    Raises:
        InputError: what was trained writes no text, or its base is not there.
    """
    header = read_peft_header(finetuned_dir) if is_peft(finetuned_dir) else read_header(finetuned_dir)
    method = methods.get(header.method)
    if method is None:
        raise InputError(f"{finetuned_dir} holds a {header.method}, which writes no text: use generate/classify.py.")
    if method.trains_base:  # all weights were saved: the folder is its own base
        checkpoint_dir = finetuned_file(finetuned_dir).parent
        header = replace(header, checkpoint_dir=str(checkpoint_dir))
    return header, base_of(finetuned_dir, checkpoint_dir, header)


def base_of(finetuned_dir: Path, checkpoint_dir: Path | None, header: Header) -> Path:
    """The folder of the base model: `checkpoint_dir`, or None for the one that `header` names.

    Raises:
        InputError: that one is no longer there.
    """
    base_dir = Path(checkpoint_dir or header.checkpoint_dir)
    if checkpoint_dir is None and not base_dir.is_dir():
        raise InputError(
            f"{finetuned_dir} was trained on {base_dir}, which is not there, as seen from {Path.cwd()}. Name it:"
            " --checkpoint_dir."
        )
    return base_dir


def choose_quantization(header: Header, quantize: QuantizeForUse, finetuned_dir: Path) -> Quantize | CpuQuantize | None:
    """How to quantize the base: as in training, or as asked for, with a line on stderr if that is something else."""
    if quantize == "auto":
        return header.quantize
    asked = None if quantize == "none" else quantize
    if asked != header.quantize and knows_quantization(finetuned_dir):
        # the trained weights have made up for the errors of the base as it was rounded in training
        was = describe_weights(header.quantize)
        now = describe_weights(asked)
        line = f"{finetuned_dir} was trained on {was}, here it is used on {now}: not quite the same."
        print(line, file=sys.stderr)
    return asked


def knows_quantization(finetuned_dir: Path) -> bool:
    """Whether what was trained says how its base was quantized. An adapter that peft itself has written does not."""
    return not is_peft(finetuned_dir) or peft.says_quantize(finetuned_dir)


def describe_weights(quantize: Quantize | CpuQuantize | None) -> str:
    return "the original weights" if quantize is None else f"weights in {quantize}"


def load_trained(model: nn.Module, finetuned_dir: Path, method: Method) -> None:
    """Loads trained weights into a model that the method has been applied to.

    Raises:
        InputError: the keys or the shapes are not those of the model.
    """
    file = finetuned_file(finetuned_dir)
    if method.trains_base:  # a Hugging Face folder, under its names and perhaps in several files
        mesh = mesh_of_model(model)
        tensors = checked_tensors(model, file.parent, mesh)  # type: ignore[arg-type] # the base itself: a GPT
    else:
        tensors = read_tensors([file])
    copy_parameters(model, tensors, method.filter, file)


def copy_parameters(
    model: nn.Module,
    tensors: Iterable[tuple[str, torch.Tensor]],
    keep: Callable[[str, Any], bool],
    source: Path,
) -> None:
    """Copies tensors into the parameters that `keep` chooses, which have to be exactly those.

    Raises:
        InputError: a tensor has no such parameter, or another shape, or a parameter has no tensor; a value is not
            finite, or no plain number.
    """
    let_go_of_wholes(model)
    params = {}
    for name, param in model.named_parameters():
        if keep(name, param):
            params[name] = param
    missing = set(params)
    unfit = []
    not_finite = []

    # tensors come one at a time, so that a model that was saved whole is not in memory twice
    with torch.no_grad():
        for name, tensor in tensors:
            missing.discard(name)
            param = params.get(name)
            dtype = str(tensor.dtype).removeprefix("torch.")
            if param is None:
                unfit.append(f"{name} is not in it")
            elif param.shape != tensor.shape:
                unfit.append(f"{name} has shape {list(tensor.shape)}, expected {list(param.shape)}")
            elif dtype not in PLAIN:
                unfit.append(f"{name} is {dtype}, expected float32, bfloat16 or float16")
            elif not is_finite(rows_like(tensor, param)):
                not_finite.append(name)
            else:
                local_tensor(param).copy_(rows_like(tensor, param))

    unfit += [f"{name} is missing" for name in sorted(missing)]
    if unfit:
        raise InputError(f"{source} does not fit this model: {some_of(unfit, '; ')}.")
    if not_finite:
        raise InputError(
            f"{source} holds NaN or infinite values: {some_of(not_finite, '; ')}. Use another save of that run, or"
            " train again with a lower --train.learning_rate."
        )
