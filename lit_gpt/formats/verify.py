"""Checks that written files hold the model in memory: they are read back, and the logits on sample texts compared."""

from pathlib import Path
from typing import NamedTuple

import torch

from lit_gpt.checkpoint.load import load_model
from lit_gpt.data.tokenizer import Tokenizer
from lit_gpt.errors import InputError
from lit_gpt.model.gpt import GPT

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
Logits = list[torch.Tensor]  # (T, V) float32 for each of TEXTS


class Difference(NamedTuple):
    """How far the logits of two models are apart."""

    largest: float
    mean: float
    agreement: float
    """Share of the positions at which both find the same token the likeliest."""
    scale: float
    """The largest logit."""

    def __str__(self) -> str:
        return (
            f"logits (up to {self.scale:.1f}) differ by at most {self.largest:.2e}, by {self.mean:.2e} on average;"
            f" the likeliest token is the same at {100 * self.agreement:.1f} % of the positions"
        )

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
        logits.append(model(ids[None])[0].float().cpu())
    return logits


def compare_logits(expected: Logits, actual: Logits) -> Difference:
    """The difference between two models. The scale is that of the first."""
    gaps = [(a - b).abs() for a, b in zip(expected, actual, strict=True)]
    same_token = [a.argmax(-1) == b.argmax(-1) for a, b in zip(expected, actual, strict=True)]
    n_values = sum(gap.numel() for gap in gaps)
    return Difference(
        largest=max(gap.max().item() for gap in gaps),
        mean=sum(gap.sum().item() for gap in gaps) / n_values,
        agreement=torch.cat(same_token).float().mean().item(),
        scale=max(logits.abs().max().item() for logits in expected),
    )


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
