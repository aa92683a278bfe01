"""Classification: the hidden state of a text goes to a small head of classes instead of the language model head.

A record is the tokens of a text and then one number more. That number is no token: it is the index of the text's
class, which stands where the next token would, and so is the one thing that is trained.

    idx             a0 a1 a2  y        a text of three tokens, and its class y
    trained                   x
    target_index          2            the hidden state that predicts y
    target                    y

So texts with labels are batched, laid end to end and counted by the code that does it for tokens. The embedding of y
is computed, too, but no other token attends to it, since attention is causal.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from lit_gpt.classifier.pooling import POOLINGS, pool_last
from lit_gpt.errors import InputError
from lit_gpt.lora import lora_filter, lora_learning_rate
from lit_gpt.model.gpt import GPT
from lit_gpt.model.loss import Judge
from lit_gpt.model.packing import Layout
from lit_gpt.quantize import Quantize
from lit_gpt.ranges import check_range

ClassifierMethod = Literal["features", "head", "last_k", "lora", "qlora", "full"]
Pooling = Literal["last", "mean", "first"]


@dataclass(frozen=True)
class ClassifierArgs:
    """How much of a classifier is trained, and how its head looks."""

    method: ClassifierMethod = "last_k"
    """features: a logistic regression on hidden states that are computed once. head: the output layer alone. last_k:
    also the last k blocks and the final norm. lora: the output layer, and LoRA in the blocks. qlora: the same over a
    quantized base. full: all weights."""
    k: int = 1
    """How many blocks the method last_k trains: the last ones."""
    head_layers: int = 0
    """How many hidden layers the head has before its output layer."""
    pooling: Pooling = "last"
    """Which hidden state stands for a text: that of its last token, the mean of all, or that of its first. In a causal
    model the first token knows nothing of the others."""
    balanced: bool = False
    """Weigh each class by the inverse of how often it occurs, so that rare classes count as much."""

    def __post_init__(self) -> None:
        check_range("--k", self.k, at_least=1)
        check_range("--head_layers", self.head_layers, at_least=0)
        if self.method == "features" and self.head_layers:
            raise InputError("A logistic regression on features has no hidden layers: use --method head.")

    @property
    def uses_lora(self) -> bool:
        return self.method in ("lora", "qlora")

    @property
    def trains_blocks(self) -> bool:
        """Whether anything below the head changes in training."""
        return self.method not in ("features", "head")

    @property
    def trains_base(self) -> bool:
        """Whether weights of the GPT itself are trained, which float16 does not allow."""
        return self.method in ("last_k", "full")

    def first_trained_block(self, n_layer: int) -> int:
        """The number of the first block that changes in training; its input never does, if that is not block 0.

        It is n_layer if no block changes. Raises InputError if the model has fewer than k blocks.
        """
        if self.k > n_layer:
            raise InputError(f"--k is {self.k}, but the model has {n_layer} blocks.")
        if not self.trains_blocks:
            return n_layer
        if self.method == "last_k":
            return n_layer - self.k
        return 0


def default_learning_rate(args: ClassifierArgs, n_embd: int) -> float | None:
    """The peak of the learning rate, if the user names none. The measurements are in tutorials/classifier.md.

    The head is new, and has far to go: what suits pretrained weights leaves it near where it began.
    """
    rates = {
        # the step of an output is that of a weight times their number; 3.0e-3 for the sample model
        "head": 1.7 / n_embd,
        # the more blocks change together, the shorter the steps of each
        "last_k": 3e-3 / math.sqrt(args.k),
        "lora": lora_learning_rate(n_embd),
        "qlora": lora_learning_rate(n_embd),
        "full": 3e-4,
    }
    rate = rates.get(args.method)  # none for features: they are fitted at once
    return None if rate is None else float(f"{rate:.1e}")  # two digits, for who reads it


@dataclass(frozen=True)
class TrainedClassifier:
    """What a file of trained weights says about its classifier, so that the head can be built again."""

    args: dict[str, Any]
    """The fields of ClassifierArgs."""
    lora: dict[str, Any] | None
    """The fields of LoRA; they count if the method is lora or qlora."""
    names: list[str]
    """The names of the classes, in the order of the head's outputs."""
    max_seq_length: int
    """Longer texts were cut to their first tokens."""
    temperature: float = 1.0
    """What the logits are divided by where a probability is told, see classifier/calibration.py. 1 in `last`, and in
    what was saved before December 2026."""


class Standardize(nn.Module):
    """(x - mean) / std of each feature, over the training texts. It is not trained, but saved with what is.

    Some features of a GPT are twenty times as large as most: steps that suit most of them are too long for these.
    """

    def __init__(self, n_embd: int) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(n_embd), requires_grad=False)
        self.std = nn.Parameter(torch.ones(n_embd), requires_grad=False)

    @torch.no_grad()
    def fit(self, features: torch.Tensor) -> None:
        """Takes mean and standard deviation of `features` (N, C)."""
        features = features.double()
        self.mean.copy_(features.mean(0))
        self.std.copy_(features.std(0, correction=0) + 1e-6)  # a feature that never changes stays 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x - self.mean) / self.std


class Classifier(nn.Module):
    """A GPT without its language model head, and a head of classes in float32.

    It reads tokens. After `start_from` it reads the numbers of stored rows instead, and the part of the GPT that made
    these rows is gone:

        tokens                      embedding -> blocks -> final norm -> pooling -> head
        inputs of block i           blocks from i on    -> final norm -> pooling -> head
        features                                                                    head

    Where no block trains, features stay as they are, and are standardized before the head.
    """

    def __init__(
        self, gpt: GPT, n_classes: int, args: ClassifierArgs, class_weights: torch.Tensor | None = None
    ) -> None:
        """`class_weights` (n_classes,) float32."""
        super().__init__()
        gpt.lm_head = None
        self.gpt = gpt
        self.pool = POOLINGS[args.pooling]

        # the head, next to the GPT but not in its dtype: what trains is float32
        n_embd = gpt.config.n_embd
        layers: list[nn.Module] = []
        with torch.device(gpt.transformer.wte.weight.device):
            for _ in range(args.head_layers):
                layers.append(nn.Linear(n_embd, n_embd))
                layers.append(nn.GELU())
            layers.append(nn.Linear(n_embd, n_classes))
            self.standardize = nn.Identity() if args.trains_blocks else Standardize(n_embd)
        self.head = nn.Sequential(*layers)

        # all classes begin alike: a short run would else end with much of what a random output layer says
        nn.init.zeros_(self.output_layer.weight)
        nn.init.zeros_(self.output_layer.bias)

        # buffers, so that they move with the model; not persistent, so that no file holds them
        self.register_buffer("class_weights", class_weights, persistent=False)
        self.register_buffer("stored_rows", None, persistent=False)
        self.first_block = 0

    @property
    def output_layer(self) -> nn.Linear:
        """The last linear of the head: one output for each class."""
        return cast(nn.Linear, self.head[-1])

    def start_from(self, first_block: int, stored_rows: torch.Tensor) -> None:
        """Makes `idx` hold row numbers from now on: inputs of block `first_block`, or features if that is n_layer.

        The embedding and the blocks below are deleted, which frees their memory. `stored_rows` is (rows, C).
        """
        self.first_block = first_block
        self.stored_rows = stored_rows
        transformer = self.gpt.transformer
        del transformer["wte"]
        for i in range(first_block):
            # an Identity that is never called keeps the numbers of the later blocks, and so the names in their files
            transformer.h[i] = nn.Identity()
        if first_block == self.gpt.config.n_layer:
            del transformer["ln_f"]

    def features(self, idx: torch.Tensor, layout: Layout) -> torch.Tensor:
        """The hidden state of each record, (N, C), from the tokens or row numbers idx (1, T)."""
        # stored features have passed the final norm and the pooling already
        if self.first_block == self.gpt.config.n_layer:
            return pool_last(self.stored_rows[idx[0]], layout)

        if self.stored_rows is None:
            x = self.gpt.hidden(idx, layout=layout)  # (1, T, C)
        else:
            x = self.hidden_from_block(self.stored_rows[idx], layout)
        x = self.gpt.transformer.ln_f(x)
        return self.pool(x[0], layout)

    def hidden_from_block(self, x: torch.Tensor, layout: Layout) -> torch.Tensor:
        """The output of the last block, (1, T, C), from the input of the first one that is left, (1, T, C)."""
        positions = self.gpt.positions(x, layout=layout)
        return self.gpt.run_blocks(x, positions, first_block=self.first_block)

    def logits(self, idx: torch.Tensor, layout: Layout) -> torch.Tensor:
        """(N, n_classes), in the order of the layout's targets."""
        features = self.features(idx, layout).to(self.output_layer.weight.dtype)
        return self.head(self.standardize(features))

    def forward(self, idx: torch.Tensor, layout: Layout, judge: Judge | None = None) -> torch.Tensor:
        """The summed loss of the records, a scalar, in which each counts as much as its class weighs.

        With a judge, such as `model.loss.loss_of_each`, what it gives for each record, (N,), times that weight.
        """
        logits = self.logits(idx, layout)
        if judge is not None:
            each = judge(logits, layout.target)
            return each if self.class_weights is None else each * self.class_weights[layout.target]
        return F.cross_entropy(logits, layout.target, self.class_weights, reduction="sum")


def mark_trainable(model: Classifier, args: ClassifierArgs) -> None:
    """Freezes all parameters but those that the method trains."""
    first_block = args.first_trained_block(model.gpt.config.n_layer)
    for name, param in model.named_parameters():
        # the flag is also what decides which parameters are saved; see classifier/load.py
        param.requires_grad = trains_parameter(args, name, first_block)


def trains_parameter(args: ClassifierArgs, name: str, first_block: int) -> bool:
    """Whether the method trains a parameter: head.0.weight, gpt.transformer.h.3.norm_1.weight ..."""
    if name.startswith("head."):
        return True
    if args.uses_lora:
        return lora_filter(name)
    if args.method != "last_k":
        return args.method == "full"

    # last_k: gpt.transformer.ln_f.weight, and gpt.transformer.h.N... from the first block on
    part, number = name.split(".")[2:4]
    if part == "h":
        return int(number) >= first_block
    return part == "ln_f"


def class_weights(labels: Sequence[int] | np.ndarray, balanced: bool) -> torch.Tensor | None:
    """The inverse of each class's share, (n_classes,) float32, with a mean of 1 over these texts; None is all alike."""
    if not balanced:
        return None
    counts = np.bincount(labels)
    weights = len(labels) / (len(counts) * counts)
    return torch.tensor(weights, dtype=torch.float32)


def resolve_quantize(args: ClassifierArgs, quantize: Quantize | None, sweep: bool) -> Quantize | None:
    """How the base of a run is quantized: for qlora as `quantize` says, where None is bnb.nf4; for all others not.

    Raises:
        InputError: `quantize` says how, but nothing in this run has a quantized base.
    """
    has_quantized_base = args.method == "qlora" and not sweep  # a sweep goes from the head to all blocks, without LoRA
    if quantize is not None and not has_quantized_base:
        raise InputError("--quantize is for --method qlora, and nothing else here has a quantized base. Leave it out.")
    if not has_quantized_base:
        return None
    return quantize or "bnb.nf4"
