"""The run that finetune/adapter.py and adapter_v2.py share. One decision lies between them: which of METHODS it is."""

from collections.abc import Callable
from typing import Any

from lit_gpt.checkpoint.load import build_model, load_weights
from lit_gpt.config import Config
from lit_gpt.data.dataset import open_splits
from lit_gpt.data.tokenizer import Tokenizer
from lit_gpt.device import weight_dtype
from lit_gpt.evaluation.forgetting_in_training import general_text_of
from lit_gpt.evaluation.validation_metric import validation_metric
from lit_gpt.generate.answers import answers
from lit_gpt.quantize import Quantize, quantize_linears
from lit_gpt.recipe import (
    RunArgs,
    check_streaming,
    new_checkpoints,
    number_of_answers,
    recompute_or_compile_blocks,
    start_processes,
)
from lit_gpt.runs.methods import Method
from lit_gpt.runs.out_dir import claim_out_dir, start_run
from lit_gpt.runs.report import report_run
from lit_gpt.sharding import mesh_of, split_among_devices
from lit_gpt.train import TrainArgs, check_run, fit


def finetune_adapter(
    method: Method,
    args: RunArgs,
    method_settings: Any,
    quantize: Quantize | None,
    stream_blocks: bool,
    train: TrainArgs,
    show_plan: Callable[..., None] | None = None,
) -> None:
    """A run of one of the adapters; the acts are those of finetune/lora.py, where they are explained.

    `show_plan` says before the first step what memory it will take: `memory.plan.print_plan`.
    """
    # settings
    settings = vars(args) | {
        method.flag: method_settings,
        "quantize": quantize,
        "stream_blocks": stream_blocks,
        "train": train,
    }
    if stream_blocks:
        check_streaming(args)
    claim_out_dir(args.out_dir, args.resume, args.overwrite, args.checkpoint_dir)

    # data
    tokenizer = Tokenizer(args.checkpoint_dir)
    config = Config.from_checkpoint(args.checkpoint_dir)
    train_data, val_data = open_splits(args.data_dir, tokenizer, config)
    check_run(train_data, val_data, train)
    metric = validation_metric(train, tokenizer, val_data)
    general_text = general_text_of(train, tokenizer, config, method)

    # device
    fabric = start_processes(args, optimizer_in_backward=train.optimizer_in_backward)

    # build, quantize, load, adapt
    model = build_model(config)
    quantize_linears(model, quantize)
    dtype = weight_dtype(args.precision)
    base_fingerprint = load_weights(
        model, args.checkpoint_dir, dtype, fabric.device, mesh_of(fabric), blocks_on_host=stream_blocks
    )
    method.apply(model, method_settings)
    for name, param in model.named_parameters():
        param.requires_grad = method.filter(name, param)
    recompute_or_compile_blocks(model, args, stream_to=fabric.device if stream_blocks else None)
    split_among_devices(fabric, model)

    # what the run writes
    start_run(fabric, args.out_dir, settings)
    checkpoints = new_checkpoints(method, method_settings, args, model, base_fingerprint, tokenizer, train_data)

    # the memory of a step
    if show_plan is not None:
        show_plan(fabric, method, settings, config, train_data)

    # answers before, training, answers after
    n_answers = number_of_answers(fabric, args)
    before = answers(model, tokenizer, val_data, n_answers)
    log = fit(
        fabric,
        model,
        train_data,
        val_data,
        train,
        checkpoints,
        resume=args.resume,
        show_sample=lambda: answers(model, tokenizer, val_data, min(n_answers, 1)),
        optimizer_path=args.optimizer,
        metric=metric,
        general_text=general_text,
    )
    if n_answers:
        checkpoints.load("best")
    after = answers(model, tokenizer, val_data, n_answers)

    # report
    report_run(fabric, log, args.out_dir, method.title, settings, before, after)
