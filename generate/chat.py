"""Talk to a model, turn by turn, through its chat template.

    python generate/chat.py
    python generate/chat.py --finetuned out/lora/docstrings

An empty line or Ctrl-D ends the conversation, /new begins another.
"""

import sys

import torch

from lit_gpt.cli import Flags, run
from lit_gpt.data.prompts import render, resolve_style
from lit_gpt.device import default_device
from lit_gpt.generate.decode import stream
from lit_gpt.runs.load_finetuned import UseArgs, load_for_use


def main(
    system: str | None = None,
    max_new_tokens: int = 500,
    temperature: float = 0.7,
    top_k: int | None = 50,
    args: Flags[UseArgs] = UseArgs(),
) -> None:
    """Talk to a model.

    Args:
        system: The system prompt. None is the template's own.
        max_new_tokens: The longest answer.
        temperature: 0 takes the likeliest token each time; 1 samples from what the model says.
        top_k: Sample from the k likeliest tokens only.
        args: With which model, such as --finetuned, and how; see lit_gpt/runs/load_finetuned.py.
    """
    device = default_device()
    model, tokenizer, trained_style = load_for_use(args, device)
    style = resolve_style("auto", tokenizer, trained_style)
    generator = torch.Generator(device).manual_seed(args.seed)

    # a conversation begins with the system prompt, if there is one
    opening = []
    if system is not None:
        opening.append({"role": "system", "content": system})
    messages = list(opening)
    while question := read_line():
        if question == "/new":
            messages = list(opening)
            continue

        # the whole conversation so far is the prompt, each time
        messages.append({"role": "user", "content": question})
        rendered = render(style, {"messages": messages}, tokenizer)
        idx = tokenizer.encode(rendered.text, device, rendered.bos)
        max_length = min(len(idx) + max_new_tokens, model.config.block_size)
        if max_length <= len(idx):
            print(f"The conversation fills the model's {max_length} tokens. /new begins another.", file=sys.stderr)
            messages.pop()
            continue

        # the answer, shown as it is made
        tokens = stream(
            model,
            idx,
            max_length,
            temperature=temperature,
            top_k=top_k,
            top_p=args.top_p,
            eos_id=tokenizer.stop_ids,
            generator=generator,
        )
        answer = ""
        for text in tokenizer.stream(tokens):
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
