"""An estimate of what training costs on this machine: minutes and memory for each max_seq_length."""

import time
from typing import NamedTuple

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


ROUNDS = 8  # steps of each model at the least, of which the fastest counts
SECONDS = 3  # of measuring at the least


def add_cost(report: DataReport, config: Config, precision: Precision) -> None:
    """Adds to each cut-off the minutes of an epoch and the GB of its largest batch, with LoRA, on this machine.

    One and three of the model's blocks are measured with random weights, and the others are extrapolated. It is an
    estimate: attention, which grows with the square of the length, is that of 256 tokens, and no prefix is shared.
    """
    trained_share = report.trained_tokens["train"] / report.tokens["train"]
    small = TrialModel(config.replace(n_layer=1), precision, trained_share)
    large = TrialModel(config.replace(n_layer=3), precision, trained_share)
    one_block, three_blocks = measure(small, large)

    # two blocks lie between them. Where the machine is so busy that they seem to cost nothing, a third of three does
    costs = []
    for one, three in zip(one_block, three_blocks):
        per_block = (three - one) / 2 if three > one else three / 3
        costs.append(one + (config.n_layer - 1) * per_block)
    step = StepCost(*costs)

    for row in report.cutoffs:
        seconds = row["tokens_per_epoch"] * step.seconds_per_token
        row["minutes_per_epoch"] = round(seconds / 60, 2)
        memory = step.fixed_bytes + step.saved_bytes_per_token * row["largest_batch"]
        row["memory_gb"] = round(memory / 1e9, 2)


def measure(*models: "TrialModel") -> list[StepCost]:
    """What a step of each model costs. They take turns, so that other work of the machine slows all of them alike.

    The fastest step of each counts, since other work makes a step only slower.
    """
    seconds: list[list[float]] = [[] for _ in models]
    began = time.perf_counter()
    while len(seconds[0]) < ROUNDS or time.perf_counter() - began < SECONDS:
        for model, of_model in zip(models, seconds):
            of_model.append(model.step())
    return [model.cost(min(of_model)) for model, of_model in zip(models, seconds)]


class TrialModel:
    """A model with random weights and LoRA, and a record for it whose last tokens are trained."""

    def __init__(self, config: Config, precision: Precision, trained_share: float) -> None:
        """`trained_share` is the share of tokens that the loss counts."""
        self.T = min(256, config.block_size)
        tokens = torch.zeros(self.T, dtype=torch.int64)
        trained = torch.arange(self.T) >= (1 - trained_share) * self.T
        idx, layout = Layout.end_to_end([(tokens, trained)])

        device = default_device()
        self.idx = idx.to(device)
        self.layout = layout.to(device)
        with torch.device(device):
            self.model = GPT(config).to(weight_dtype(precision))
        apply_lora(self.model, LoRA())
        mark_only_lora_as_trainable(self.model)

        self.weights = {param.untyped_storage().data_ptr() for param in self.model.parameters()}
        self.saved: dict[int, int] = {}  # the bytes of each storage that a step kept for backward

    def step(self) -> float:
        """Forward and backward; returns the seconds that they took.

        On a CPU they are those in which this thread was running: it takes part in all that the others compute, and
        does not run while other programs have the core, or while it waits for a thread that has lost its own to them.
        """

        # autograd tells what it saves for backward; weights, which it saves too, are there anyway
        def count(x: torch.Tensor) -> torch.Tensor:
            storage = x.untyped_storage()
            if storage.data_ptr() not in self.weights:
                self.saved[storage.data_ptr()] = storage.nbytes()
            return x

        self.saved.clear()
        clock = time.thread_time if self.idx.device.type == "cpu" else time.perf_counter
        start = clock()
        with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
            loss = self.model(self.idx, layout=self.layout)
        loss.backward()
        loss.item()  # waits for the device
        return clock() - start

    def cost(self, seconds: float) -> StepCost:
        """The cost of a step that took so long."""
        fixed = 0
        for param in self.model.parameters():
            copies = 4 if param.requires_grad else 1  # beside the weight its gradient and AdamW's two averages
            fixed += copies * param.nbytes
        return StepCost(
            seconds_per_token=seconds / self.T,
            saved_bytes_per_token=sum(self.saved.values()) / self.T,
            fixed_bytes=fixed,
        )
