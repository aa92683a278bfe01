"""An estimate of what training costs on this machine: minutes and memory for each max_seq_length."""

import time
from typing import NamedTuple

import numpy as np
import torch

from lit_gpt.config import Config
from lit_gpt.data.find_problems import DataReport
from lit_gpt.device import Precision, default_device, weight_dtype
from lit_gpt.lora import LoRA, apply_lora, mark_only_lora_as_trainable
from lit_gpt.model.gpt import GPT
from lit_gpt.model.packing import Layout


class StepCost(NamedTuple):
    """What a step with LoRA and AdamW costs."""

    seconds_per_token: float
    saved_bytes_per_token: float
    """Kept from forward to backward."""
    fixed_bytes: float
    """Weights, gradients and the optimizer's state."""


def add_cost(report: DataReport, config: Config, precision: Precision) -> None:
    """Adds to each cut-off the minutes of an epoch and the GB of its largest batch, with LoRA, on this machine.

    One and three of the model's blocks are measured with random weights, and the others are extrapolated. It is an
    estimate: attention, which grows with the square of the length, is that of 256 tokens, and no prefix is shared.
    """
    trained_share = report.trained_tokens["train"] / report.tokens["train"]
    costs = []
    for n_layer in (1, 3):
        cost = measure_step(config.replace(n_layer=n_layer), precision, trained_share)
        costs.append(np.array(cost))
    one_block, three_blocks = costs

    # two blocks lie between them
    per_block = (three_blocks - one_block) / 2
    all_blocks = one_block + (config.n_layer - 1) * per_block
    step = StepCost(*all_blocks.tolist())

    for row in report.cutoffs:
        seconds = row["tokens_per_epoch"] * step.seconds_per_token
        row["minutes_per_epoch"] = round(seconds / 60, 2)
        memory = step.fixed_bytes + step.saved_bytes_per_token * row["largest_batch"]
        row["memory_gb"] = round(memory / 1e9, 2)


def measure_step(config: Config, precision: Precision, trained_share: float) -> StepCost:
    """Measures a step of a model with random weights. `trained_share` is the share of tokens that the loss counts."""
    # a record whose last tokens are trained
    T = min(256, config.block_size)
    tokens = torch.zeros(T, dtype=torch.int64)
    trained = torch.arange(T) >= (1 - trained_share) * T
    idx, layout = Layout.end_to_end([(tokens, trained)])

    # the model
    device = default_device()
    idx = idx.to(device)
    layout = layout.to(device)
    with torch.device(device):
        model = GPT(config).to(weight_dtype(precision))
    apply_lora(model, LoRA())
    mark_only_lora_as_trainable(model)

    # autograd tells what it saves for backward; weights, which it saves too, are there anyway
    weights = {param.untyped_storage().data_ptr() for param in model.parameters()}
    saved: dict[int, int] = {}

    def count(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return x

    # steps for at least a second
    seconds: list[float] = []
    while sum(seconds) < 1 or len(seconds) < 3:
        saved.clear()
        start = time.perf_counter()
        with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
            loss = model(idx, layout=layout)
        loss.backward()
        loss.item()  # waits for the device
        seconds.append(time.perf_counter() - start)

    fixed = 0
    for param in model.parameters():
        copies = 4 if param.requires_grad else 1  # beside the weight its gradient and AdamW's two averages
        fixed += copies * param.nbytes
    return StepCost(
        seconds_per_token=min(seconds) / T,
        saved_bytes_per_token=sum(saved.values()) / T,
        fixed_bytes=fixed,
    )
