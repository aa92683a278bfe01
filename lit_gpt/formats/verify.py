"""Whether a model that was written is the one in memory: its logits on sample texts, read back from the files."""

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
# how far logits may be apart, as a share of the largest: those of a copy, and those of weights that were rounded anew
EXACT = 1e-4
ROUNDING = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 0.03, torch.bfloat16: 0.15}
Logits = list[torch.Tensor]


class Difference(NamedTuple):
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


@torch.inference_mode()
def logits_of(model: GPT, tokenizer: Tokenizer) -> Logits:
    """(T, V) float32 for each of TEXTS."""
    device = next(model.parameters()).device
    rows = [tokenizer.encode(text, device)[: model.config.block_size] for text in TEXTS]
    return [model(ids[None])[0].float().cpu() for ids in rows]


def difference(ours: Logits, theirs: Logits) -> Difference:
    gaps = [(a - b).abs() for a, b in zip(ours, theirs, strict=True)]
    same = torch.cat([a.argmax(-1) == b.argmax(-1) for a, b in zip(ours, theirs, strict=True)])
    mean = sum(gap.sum().item() for gap in gaps) / sum(gap.numel() for gap in gaps)
    largest = max(gap.max().item() for gap in gaps)
    return Difference(largest, mean, same.float().mean().item(), max(a.abs().max().item() for a in ours))


def prove(expected: Logits, folder: Path, device: torch.device | None = None) -> None:
    """Reads the model in `folder` back, prints how its logits differ from `expected`: those of the same weights,
    rounded before to the dtype of the files.

    Raises:
        InputError: it is no copy.
    """
    model = load_model(folder, device=device)
    dtype = model.transformer.wte.weight.dtype
    found = difference(expected, logits_of(model, Tokenizer(folder)))
    print(f"Read back in {str(dtype).removeprefix('torch.')}: {found}.")
    if not found.largest <= EXACT * found.scale:
        raise InputError(
            f"What was written is not the model: {found}. Nothing was kept. Please report this, with the model's name."
        )
