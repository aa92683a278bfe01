"""Peaks that others measured on a GPU, beside ours for the same step: a table with the mean error.

    python tests/benchmarks/published_peaks.py        # some minutes, on a CPU

The figures are fitcheck-llm's (version 0.3.1, MIT license, data/measurements in its source package on PyPI), 2026:
one Tesla T4, transformers 5.17 and peft 0.20 in float16, LoRA on queries, keys, values and the output, AdamW, every
block recomputed, attention by PyTorch's memory-efficient kernel; the peak of allocated tensors in a step. Left out are
its rows of eager attention, which holds scores of all pairs of tokens, and DeepSeek Coder, which no family here names.

Their program keeps more than ours, each of it known from its code. So there are two columns of ours: the plan as it
is, and the plan with what theirs keeps, which is what can be compared.

    logits          of all positions, and ours never holds them. In float16 14 bytes each: float16, the float32 copy,
                    the logarithms of its probabilities, their gradient. In float32 16: the copy is one of shifted ones
    over 4 bits     peft's prepare_model_for_kbit_training makes the embedding, the head and the norms float32, and with
                    them what goes from block to block: 2 bytes more for each of their values
"""

import argparse
from dataclasses import dataclass

import torch

from lit_gpt import Config
from lit_gpt.display.tables import markdown_table
from lit_gpt.lora import LoRA
from lit_gpt.memory.plan import Setup
from lit_gpt.memory.profile import HEAD, Profile, profile_of
from lit_gpt.memory.sharded import ANY_SPEED
from lit_gpt.quantize import Quantize

MIB = 2**20
LOGIT_BYTES = {"float16": 2 + 4 + 4 + 4, "float32": 4 + 4 + 4 + 4}
WIDER = 2  # bytes of a float32 value beyond those of a float16


@dataclass(frozen=True)
class Measured:
    """A row of theirs."""

    model: str
    quantize: Quantize | None
    rank: int
    records: int
    tokens: int
    """Of each record."""
    mib: int


MEASURED: tuple[Measured, ...] = (
    Measured("Llama-3.2-1B-Instruct", "bnb.nf4", 16, 1, 1024, 3723),
    Measured("Llama-3.2-3B-Instruct", "bnb.nf4", 16, 1, 1024, 5495),
    Measured("Mistral-7B-Instruct-v0.3", "bnb.nf4", 16, 1, 1024, 6056),
    Measured("Qwen2.5-1.5B-Instruct", "bnb.nf4", 32, 2, 1024, 6828),
    Measured("Qwen2.5-1.5B-Instruct", "bnb.nf4", 32, 1, 2048, 6831),
    Measured("Qwen2.5-1.5B-Instruct", None, 32, 2, 1024, 7402),
    Measured("Qwen2.5-1.5B-Instruct", None, 32, 1, 2048, 7402),
    Measured("Qwen2.5-7B-Instruct", "bnb.nf4", 16, 1, 1024, 10586),
    Measured("Qwen2.5-Coder-1.5B-Instruct", "bnb.nf4", 16, 1, 1024, 4235),
    Measured("SmolLM2-1.7B", "bnb.nf4", 32, 4, 1024, 5281),
    Measured("SmolLM2-1.7B", "bnb.nf4", 32, 1, 2048, 3346),
    Measured("SmolLM2-1.7B", None, 32, 4, 1024, 6529),
    Measured("SmolLM2-1.7B", None, 32, 1, 2048, 4977),
    Measured("SmolLM2-135M", "bnb.nf4", 32, 2, 512, 1064),
    Measured("SmolLM2-135M", "bnb.nf4", 32, 1, 4096, 3577),
    Measured("SmolLM2-135M", None, 32, 2, 512, 1027),
    Measured("SmolLM2-135M", None, 32, 1, 4096, 3148),
    Measured("SmolLM2-360M", "bnb.nf4", 32, 1, 4096, 4018),
    Measured("SmolLM2-360M", None, 32, 1, 4096, 3755),
    Measured("TinyLlama-1.1B-Chat-v1.0", "bnb.nf4", 32, 2, 512, 1849),
    Measured("TinyLlama-1.1B-Chat-v1.0", "bnb.nf4", 32, 1, 1024, 1843),
    Measured("TinyLlama-1.1B-Chat-v1.0", "bnb.nf4", 32, 2, 1024, 2530),
    Measured("TinyLlama-1.1B-Chat-v1.0", "bnb.nf4", 32, 4, 1024, 3896),
    Measured("TinyLlama-1.1B-Chat-v1.0", "bnb.nf4", 32, 8, 1024, 6632),
    Measured("TinyLlama-1.1B-Chat-v1.0", "bnb.nf4", 32, 12, 1024, 9372),
    Measured("TinyLlama-1.1B-Chat-v1.0", "bnb.nf4", 32, 2, 2048, 3896),
    Measured("TinyLlama-1.1B-Chat-v1.0", None, 32, 2, 512, 2756),
    Measured("TinyLlama-1.1B-Chat-v1.0", None, 32, 2, 1024, 3288),
    Measured("TinyLlama-1.1B-Chat-v1.0", None, 32, 2, 2048, 4354),
)


def profile_of_row(row: Measured) -> Profile:
    """Ours, of the same step."""
    setup = Setup(
        Config.from_name(row.model),
        settings=LoRA(r=row.rank, mlp=False),
        dtype=torch.float16,
        quantize=row.quantize,
        activation_checkpointing="block",
        lengths=(row.tokens,) * row.records,
    )
    _, profile = profile_of(setup, ANY_SPEED)
    return profile


def peak_of_theirs(row: Measured, profile: Profile) -> float:
    """The peak with what their program keeps."""
    config = Config.from_name(row.model)
    n_tokens = row.records * row.tokens
    dtype = "float16" if row.quantize is None else "float32"
    logits = LOGIT_BYTES[dtype] * n_tokens * config.vocab_size
    alive = profile.before
    highest = alive
    for section in profile.sections:
        rise = logits if section.kind == HEAD else section.rise
        highest = max(highest, alive + rise)
        alive += section.net
    if row.quantize is None:
        return highest
    n_embeddings = config.vocab_size * config.n_embd * (1 if config.tie_embeddings else 2)
    between_blocks = config.n_layer * n_tokens * config.n_embd
    return highest + WIDER * (n_embeddings + between_blocks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    cells = []
    errors = []
    for row in MEASURED:
        profile = profile_of_row(row)
        theirs = peak_of_theirs(row, profile) / MIB
        errors.append(theirs / row.mib - 1)
        what = f"{row.records} x {row.tokens:,}"
        kind = "nf4" if row.quantize else "float16"
        ours = f"{profile.peak / MIB:,.0f}"
        cells.append((row.model, kind, what, f"{row.mib:,}", ours, f"{theirs:,.0f}", f"{errors[-1]:+.1%}"))
        print(".", end="", flush=True)
    heads = ("model", "weights", "tokens", "measured MiB", "plan", "plan with theirs", "off by")
    print("", markdown_table(heads, cells, right=(2, 3, 4, 5, 6)), sep="\n")
    mean = sum(map(abs, errors)) / len(errors)
    print(f"\n{len(errors)} rows: mean error {mean:.1%}, largest {max(map(abs, errors)):.1%}.")


if __name__ == "__main__":
    main()
