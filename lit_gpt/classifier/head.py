"""Classification: the last hidden state of a record goes to a small head of classes instead of tokens.

    tokens        a0 a1 a2 y          a record ends with its label y, the only token that is trained
    trained                x
    layout        target_index 2, target y

So a record of text and label is a record like any other: it is read, dealt out and computed by the same code. What
stands at y is never looked at by anything, since attention looks back."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from lit_gpt.errors import InputError
from lit_gpt.model.gpt import GPT
from lit_gpt.model.packing import Layout

Method = Literal["features", "head", "last_k", "lora", "qlora", "full"]
Pooling = Literal["last", "mean", "first"]


@dataclass(frozen=True)
class ClassifierArgs:
    """What is trained of a classifier."""

    method: Method = "last_k"
    """features: a logistic regression on hidden states that are computed once. head: the output layer alone. last_k:
    also the last k blocks and the final norm. lora: the output layer, and LoRA in the blocks. qlora: the same over a
    quantized base. full: all weights."""
    k: int = 1
    """For last_k: how many blocks."""
    head_layers: int = 0
    """Hidden layers in the output layer."""
    pooling: Pooling = "last"
    """Which hidden state stands for a text: of its last token, the mean of all, or of its first. In a causal model the
    first token knows nothing of the others."""
    balanced: bool = False
    """Weigh each class by the inverse of how often it occurs, so that rare classes count as much."""

    def __post_init__(self) -> None:
        if self.k < 1 or self.head_layers < 0:
            raise InputError(
                f"--k is {self.k}, expected 1 or more; --head_layers {self.head_layers}, expected 0 or more."
            )
        if self.method == "features" and self.head_layers:
            raise InputError("A logistic regression on features has no hidden layers: use --method head.")

    @property
    def uses_lora(self) -> bool:
        return self.method in ("lora", "qlora")

    def first_trained_block(self, n_layer: int) -> int:
        """Below it nothing changes, so that its input can be computed once."""
        if self.k > n_layer:
            raise InputError(f"--k is {self.k}, but the model has {n_layer} blocks.")
        return {"features": n_layer, "head": n_layer, "last_k": n_layer - self.k}.get(self.method, 0)


@dataclass(frozen=True)
class TrainedClassifier:
    """What stands in the header of a trained classifier."""

    args: dict[str, Any]
    """Of ClassifierArgs."""
    lora: dict[str, Any] | None
    names: list[str]
    """Of the classes, in the order of the head's outputs."""
    max_seq_length: int
    """Longer texts were cut to their first tokens."""


class Classifier(nn.Module):
    """A GPT without its language model head, and a head of classes in float32."""

    def __init__(
        self, gpt: GPT, n_classes: int, args: ClassifierArgs, class_weights: torch.Tensor | None = None
    ) -> None:
        """`class_weights` (n_classes,) float32."""
        super().__init__()
        gpt.lm_head = None
        self.gpt, self.pool = gpt, POOLINGS[args.pooling]
        n_embd, device = gpt.config.n_embd, gpt.transformer.wte.weight.device
        with torch.device(device):
            hidden = [layer for _ in range(args.head_layers) for layer in (nn.Linear(n_embd, n_embd), nn.GELU())]
            self.head = nn.Sequential(*hidden, nn.Linear(n_embd, n_classes))
        self.register_buffer("class_weights", class_weights, persistent=False)

    def features(self, idx: torch.Tensor, layout: Layout) -> torch.Tensor:
        """A hidden state (N, C) per record of idx (1, T)."""
        return self.pool(self.gpt.transformer.ln_f(self.gpt.hidden(idx, layout=layout))[0], layout)

    def logits(self, idx: torch.Tensor, layout: Layout) -> torch.Tensor:
        """(N, n_classes), in the order of the layout's targets."""
        return self.head(self.features(idx, layout).to(self.head[-1].weight.dtype))

    def forward(self, idx: torch.Tensor, layout: Layout) -> torch.Tensor:
        """The summed loss of the records, a scalar; weighted where there are class weights."""
        return F.cross_entropy(self.logits(idx, layout), layout.target, self.class_weights, reduction="sum")


def pool_last(x: torch.Tensor, layout: Layout) -> torch.Tensor:
    """(T, C) -> (N, C)"""
    return x.index_select(0, layout.target_index)


def pool_first(x: torch.Tensor, layout: Layout) -> torch.Tensor:
    return x[[parts[0][0] for parts in spans(layout)]]


def pool_mean(x: torch.Tensor, layout: Layout) -> torch.Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    rows = [torch.cat([x[start:end] for start, end in parts]).mean(0, dtype=wide) for parts in spans(layout)]
    return torch.stack(rows) if rows else x[:0]


def spans(layout: Layout) -> list[list[tuple[int, int]]]:
    """Where the tokens of each record are, without its label: in a shared prefix, where it has one, and in its own."""
    if layout.n_targets == 0:  # a device's turn without records
        return []
    prefixes = {segment.prefix_start for segment in layout.segments if segment.prefix_length}
    own = [s for s in layout.segments if s.prefix_length or s.start not in prefixes]
    parts = [[(s.prefix_start, s.prefix_start + s.prefix_length), (s.start, s.start + s.length - 1)] for s in own]
    return [[(start, end) for start, end in part if end > start] for part in parts]


POOLINGS: dict[str, Callable[[torch.Tensor, Layout], torch.Tensor]] = {
    "last": pool_last,
    "first": pool_first,
    "mean": pool_mean,
}


def mark_trainable(model: Classifier, args: ClassifierArgs, is_lora: Callable[[str], bool]) -> None:
    """Says which parameters train: of last_k the blocks from `first_trained_block` on, and the final norm."""
    first = args.first_trained_block(model.gpt.config.n_layer)
    for name, param in model.named_parameters():
        parts = name.split(".")
        if parts[0] == "head":
            param.requires_grad = True
        elif args.uses_lora:
            param.requires_grad = is_lora(name)
        elif args.method == "full":
            param.requires_grad = True
        else:
            in_block = parts[2] == "h" and int(parts[3]) >= first
            param.requires_grad = args.method == "last_k" and (in_block or parts[2] == "ln_f")


def class_weights(labels: Sequence[int], balanced: bool) -> torch.Tensor | None:
    """The inverse of each class's share, such that the mean over these texts is 1; None where all count alike."""
    counts = np.bincount(labels)
    return torch.tensor(len(labels) / (len(counts) * counts), dtype=torch.float32) if balanced else None
