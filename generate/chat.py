"""Talk to a model, turn by turn, through its chat template.

    python generate/chat.py
    python generate/chat.py --finetuned out/lora/docstrings

An empty line or Ctrl-D ends the conversation, /new begins another.
"""

import sys
from pathlib import Path

import torch

from lit_gpt.cli import run
from lit_gpt.device import Precision, default_device, inference_dtype
from lit_gpt.finetuned import QuantizeAs, load_for_use
from lit_gpt.generate import stream
from lit_gpt.prompts import render, resolve_style


def main(
    checkpoint_dir: Path | None = None,
    finetuned: Path | None = None,
    system: str | None = None,
    max_new_tokens: int = 500,
    temperature: float = 0.7,
    top_k: int | None = 50,
    top_p: float | None = None,
    precision: Precision = "auto",
    quantize: QuantizeAs = "auto",
    seed: int = 1337,
) -> None:
    """Talk to a model.

    Args:
        checkpoint_dir: The model. None is the sample model, or the base of what was fine-tuned.
        finetuned: What a fine-tuning script wrote: an out_dir (its best), or one folder of it. It is not merged.
        system: The system prompt. None is the template's own.
        max_new_tokens: The longest answer.
        temperature: 0 takes the likeliest token each time; 1 samples from what the model says.
        top_k: Sample from the k likeliest tokens only.
        top_p: Sample from the fewest likeliest tokens that together have this probability.
        precision: Of the weights and the arithmetic.
        quantize: Keep the linears in 4 or 8 bits: a smaller model, and on a CPU a slower one. auto is what the
            fine-tuned weights were trained on, none the weights as they are.
        seed: Of the sampling.
    """
    device = default_device()
    dtype = inference_dtype(precision)
    model, tokenizer, trained_style = load_for_use(checkpoint_dir, finetuned, dtype, device, quantize)
    style = resolve_style("auto", tokenizer, trained_style)
    generator = torch.Generator(device).manual_seed(seed)
    options = dict(temperature=temperature, top_k=top_k, top_p=top_p, eos_id=tokenizer.stop_ids, generator=generator)

    opening = [{"role": "system", "content": system}] if system is not None else []
    messages = list(opening)
    while question := read_line():
        if question == "/new":
            messages = list(opening)
            continue
        messages.append({"role": "user", "content": question})
        rendered = render(style, {"messages": messages}, tokenizer)
        idx = tokenizer.encode(rendered.text, device, rendered.bos)
        room = min(len(idx) + max_new_tokens, model.config.block_size)
        if room <= len(idx):
            print(f"The conversation fills the model's {room} tokens. /new begins another.", file=sys.stderr)
            messages.pop()
            continue
        answer = ""
        for text in tokenizer.stream(stream(model, idx, room, **options)):
            print(text, end="", flush=True)
            answer += text
        print()
        messages.append({"role": "assistant", "content": answer})


def read_line() -> str:
    """The next question, or nothing at the end of the input."""
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return ""


if __name__ == "__main__":
    run(main)
