"""Continue a prompt, or answer it with what was fine-tuned.

    python generate/base.py --prompt "What is the capital of France?"
    python generate/base.py --finetuned out/lora/docstrings --prompt 'What does the function `textwrap.dedent` do?'

The answer goes to stdout as it is made, everything else to stderr.
"""

import sys
import time

import torch

from lit_gpt import InputError
from lit_gpt.cli import Flags, run
from lit_gpt.data.prompts import render, resolve_style
from lit_gpt.device import default_device, peak_memory_gb
from lit_gpt.generate.decode import stream
from lit_gpt.runs.load_finetuned import UseArgs, load_for_use


def main(
    prompt: str,
    input: str = "",
    prompt_style: str = "auto",
    num_samples: int = 1,
    max_new_tokens: int = 200,
    temperature: float = 0.0,
    top_k: int | None = None,
    args: Flags[UseArgs] = UseArgs(),
) -> None:
    """Answer a prompt.

    Args:
        prompt: The instruction; with --prompt_style none the text to continue.
        input: Further text for the instruction to work on.
        prompt_style: The text around the prompt: chat (the checkpoint's template), alpaca, one of
            lit_gpt/data/styles/, a .jinja file, or none. auto is what the fine-tuned weights were trained with, else
            chat where there is one.
        num_samples: How many answers.
        max_new_tokens: The longest answer.
        temperature: 0 takes the likeliest token each time; 1 samples from what the model says.
        top_k: Sample from the k likeliest tokens only.
        args: With which model, such as --finetuned, and how; see lit_gpt/runs/load_finetuned.py.
    """
    device = default_device()
    if temperature == 0 and (num_samples > 1 or top_k is not None or args.top_p is not None):
        raise InputError(
            "At --temperature 0 all answers are the same: --num_samples, --top_k and --top_p need a higher one."
        )
    since = time.perf_counter()
    model, tokenizer, trained_style = load_for_use(args, device)
    print(f"Loaded in {time.perf_counter() - since:.1f} s.", file=sys.stderr)

    style = resolve_style(prompt_style, tokenizer, trained_style)
    rendered = render(style, {"instruction": prompt, "input": input}, tokenizer)
    idx = tokenizer.encode(rendered.text, device, rendered.bos)
    generator = torch.Generator(device).manual_seed(args.seed)
    options = dict(
        temperature=temperature, top_k=top_k, top_p=args.top_p, eos_id=tokenizer.stop_ids, generator=generator
    )
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
