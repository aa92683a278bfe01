"""Continue a prompt, or answer it with what was fine-tuned.

    python generate/base.py --prompt "What is the capital of France?"
    python generate/base.py --finetuned out/lora/docstrings --prompt 'What does the function `textwrap.dedent` do?'

The answer goes to stdout as it is made, everything else to stderr.
"""

import sys
import time
from pathlib import Path

import torch

from lit_gpt import InputError
from lit_gpt.cli import run
from lit_gpt.device import Precision, default_device, inference_dtype, peak_memory_gb
from lit_gpt.finetuned import QuantizeAs, load_for_use
from lit_gpt.generate import stream
from lit_gpt.prompts import render, resolve_style


def main(
    prompt: str,
    checkpoint_dir: Path | None = None,
    finetuned: Path | None = None,
    input: str = "",
    prompt_style: str = "auto",
    num_samples: int = 1,
    max_new_tokens: int = 200,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    precision: Precision = "auto",
    quantize: QuantizeAs = "auto",
    seed: int = 1337,
) -> None:
    """Answer a prompt.

    Args:
        prompt: The instruction; with --prompt_style none the text to continue.
        checkpoint_dir: The model. None is the sample model, or the base of what was fine-tuned.
        finetuned: What a fine-tuning script wrote: an out_dir (its best), or one folder of it. It is not merged.
        input: Further text for the instruction to work on.
        prompt_style: The text around the prompt: chat (the checkpoint's template), alpaca, one of lit_gpt/styles/, a
            .jinja file, or none. auto is what the fine-tuned weights were trained with, else chat where there is one.
        num_samples: How many answers.
        max_new_tokens: The longest answer.
        temperature: 0 takes the likeliest token each time; 1 samples from what the model says.
        top_k: Sample from the k likeliest tokens only.
        top_p: Sample from the fewest likeliest tokens that together have this probability.
        precision: Of the weights and the arithmetic.
        quantize: Keep the linears in 4 or 8 bits: a smaller model, and on a CPU a slower one. auto is what the
            fine-tuned weights were trained on, none the weights as they are.
        seed: Of the sampling.
    """
    if temperature == 0 and (num_samples > 1 or top_k is not None or top_p is not None):
        raise InputError(
            "At --temperature 0 all answers are the same: --num_samples, --top_k and --top_p need a higher one."
        )
    device = default_device()
    since = time.perf_counter()
    dtype = inference_dtype(precision)
    model, tokenizer, trained_style = load_for_use(checkpoint_dir, finetuned, dtype, device, quantize)
    print(f"Loaded in {time.perf_counter() - since:.1f} s.", file=sys.stderr)

    style = resolve_style(prompt_style, tokenizer, trained_style)
    rendered = render(style, {"instruction": prompt, "input": input}, tokenizer)
    idx = tokenizer.encode(rendered.text, device, rendered.bos)
    generator = torch.Generator(device).manual_seed(seed)
    options = dict(temperature=temperature, top_k=top_k, top_p=top_p, eos_id=tokenizer.stop_ids, generator=generator)
    for _ in range(num_samples):
        since, new = time.perf_counter(), []
        tokens = stream(model, idx, len(idx) + max_new_tokens, **options)
        for text in tokenizer.stream(token for token in tokens if not new.append(token)):
            print(text, end="", flush=True)
        seconds = time.perf_counter() - since
        print()
        print(
            f"{len(new)} tokens in {seconds:.2f} s ({len(new) / seconds:.1f} tokens/s),"
            f" {peak_memory_gb(device):.2f} GB at most.",
            file=sys.stderr,
        )


if __name__ == "__main__":
    run(main)
