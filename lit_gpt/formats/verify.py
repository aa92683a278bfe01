"""Checks that written files hold the model in memory: they are read back, and the logits on sample texts compared."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from lit_gpt.checkpoint.load import load_model
from lit_gpt.data.tokenizer import Tokenizer
from lit_gpt.errors import InputError
from lit_gpt.model.gpt import GPT
from lit_gpt.model.loss import loss_of_each
from lit_gpt.scores.paired import Difference as PairedDifference
from lit_gpt.scores.paired import interval_text, paired_difference
from lit_gpt.scores.record_scores import RecordScores

TEXTS = (  # prose, a question, code, figures, another script
    "The sun rose over the harbour, and the fishermen were already far out at sea when the first bells rang.",
    "Question: What is the capital of France, and on which river does it lie?\nAnswer: The capital of France is",
    'def greet(name: str) -> str:\n    """Says hello."""\n    return f"Hello, {name}!"\n\n\nprint(greet(',
    "In 1998 there were 3,412 of them; by 2024 the number had fallen to 917 (-73.1 %).",
    "Füße, naïve café, Ελληνικά, 日本語 and 🙂 are all text.",
)
# How far logits may be apart, as a share of the largest: those of a copy, and those of weights that were rounded anew
# to a dtype.
EXACT = 1e-4
ROUNDING = {"float64": 1e-4, "float32": 1e-4, "float16": 0.03, "bfloat16": 0.15, "q8_0": 0.15}
SAME_LOSS = 5e-6  # nats per token: less does not show in six digits of a loss from 1 to 10


class TextLogits(NamedTuple):
    """What a model says at each position of a text, on the CPU."""

    logits: torch.Tensor
    """(T, V) float32"""
    ids: torch.Tensor
    """The tokens of the text, (T,)."""


Logits = list[TextLogits]  # of each of TEXTS


class Difference(NamedTuple):
    """How far the logits of two models are apart."""

    largest: float
    mean: float
    agreement: float
    """Share of the positions at which both find the same token the likeliest."""
    scale: float
    """The largest logit."""
    loss: PairedDifference
    """How the loss on the texts differs, position by position."""

    def __str__(self) -> str:
        return (
            f"logits (up to {self.scale:.1f}) differ by at most {self.largest:.2e}, by {self.mean:.2e} on average;"
            f" the likeliest token is the same at {100 * self.agreement:.1f} % of the positions;"
            f" {self.change_of_loss()}"
        )

    def change_of_loss(self) -> str:
        """How the loss differs, with a 95 % interval over the tokens of the texts."""
        if max(abs(self.loss.low), abs(self.loss.high)) < SAME_LOSS:
            return "the loss is the same to six digits"
        return f"the loss changes by {interval_text(self.loss, sign=True)} nats per token"

    def is_within(self, share: float) -> bool:
        """Whether the largest difference is at most this share of the largest logit. One that is NaN is not."""
        return self.largest <= share * self.scale


@torch.inference_mode()
def logits_of(model: GPT, tokenizer: Tokenizer) -> Logits:
    """The logits of every position of TEXTS, on the CPU."""
    device = next(model.parameters()).device
    logits = []
    for text in TEXTS:
        ids = tokenizer.encode(text, device)[: model.config.block_size]
        logits.append(TextLogits(model(ids[None])[0].float().cpu(), ids.cpu()))
    return logits


def compare_logits(expected: Logits, actual: Logits) -> Difference:
    """The difference between two models. The scale is that of the first."""
    gaps = []
    same_token = []
    for one, other in zip(expected, actual, strict=True):
        gaps.append((one.logits - other.logits).abs())
        same_token.append(one.logits.argmax(-1) == other.logits.argmax(-1))
    n_values = sum(gap.numel() for gap in gaps)
    return Difference(
        largest=max(gap.max().item() for gap in gaps),
        mean=sum(gap.sum().item() for gap in gaps) / n_values,
        agreement=torch.cat(same_token).float().mean().item(),
        scale=max(text.logits.abs().max().item() for text in expected),
        loss=paired_difference(loss_of_positions(expected), loss_of_positions(actual)),
    )


def loss_of_positions(texts: Logits) -> RecordScores:
    """The loss of each token of the texts that has one before it, as if it were a record."""
    each = [loss_of_each(text.logits[:-1], text.ids[1:]) for text in texts]
    values = torch.cat(each).double().numpy()
    return RecordScores("loss", values, np.ones(len(values)), [str(i) for i in range(len(values))], True)


def verify_copy(expected: Logits, folder: Path) -> None:
    """Reads the model in `folder` back, compares it and prints the difference.

    `expected` are the logits of the same weights, rounded before to the dtype of the files.

    Raises:
        InputError: it is no copy.
    """
    model = load_model(folder)
    dtype = str(model.transformer.wte.weight.dtype).removeprefix("torch.")
    difference = compare_logits(expected, logits_of(model, Tokenizer(folder)))
    print(f"Read back in {dtype}: {difference}.")
    if not difference.is_within(EXACT):
        raise InputError(
            f"What was written is not the model: {difference}. Nothing was kept. Please report this, with the model's"
            " name."
        )
