"""TODO doc of studies.cost"""

import time

import numpy as np
import torch

from lit_gpt.config import Config
from lit_gpt.data.inspect import XRay
from lit_gpt.device import Precision, default_device, weight_dtype
from lit_gpt.lora import LoRA, apply_lora, mark_only_lora_as_trainable
from lit_gpt.model.gpt import GPT
from lit_gpt.model.packing import Layout


def add_cost(found: XRay, config: Config, precision: Precision) -> None:
    """To each cut-off the minutes of an epoch and the GB of its largest batch, with LoRA, on this machine.

    Measured on one and three of the model's blocks with random weights, and scaled: an estimate. Attention, which grows
    with the square of the length, is that of 256 tokens, and no prefix is shared.
    """
    trained = found.trained_tokens["train"] / found.tokens["train"]
    one, three = (np.array(measure_step(config.replace(n_layer=n), precision, trained)) for n in (1, 3))
    seconds, saved, fixed = (one + (config.n_layer - 1) / 2 * (three - one)).tolist()
    for row in found.cutoffs:
        row["minutes_per_epoch"] = round(row["tokens_per_epoch"] * seconds / 60, 2)
        row["memory_gb"] = round((fixed + saved * row["largest_batch"]) / 1e9, 2)


def measure_step(config: Config, precision: Precision, trained: float) -> tuple[float, float, float]:
    """(seconds per token, bytes per token saved for backward, other bytes) of a step with LoRA and AdamW.

    `trained` is the share of tokens that the loss counts.
    """
    T, device = min(256, config.block_size), default_device()
    record = torch.zeros(T, dtype=torch.int64), torch.arange(T) >= (1 - trained) * T
    idx, layout = Layout.end_to_end([record])
    idx, layout = idx.to(device), layout.to(device)
    with torch.device(device):
        model = GPT(config).to(weight_dtype(precision))
    apply_lora(model, LoRA())
    mark_only_lora_as_trainable(model)
    weights = {param.untyped_storage().data_ptr() for param in model.parameters()}
    saved: dict[int, int] = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return x

    seconds = []
    while sum(seconds) < 1 or len(seconds) < 3:
        saved.clear()
        since = time.perf_counter()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            loss = model(idx, layout=layout)
        loss.backward()
        loss.item()  # waits for the device
        seconds.append(time.perf_counter() - since)
    fixed = sum(param.nbytes * (4 if param.requires_grad else 1) for param in model.parameters())  # gradient and AdamW
    return min(seconds) / T, sum(saved.values()) / T, fixed
