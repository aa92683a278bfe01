"""Continue a prompt, or answer it with what was fine-tuned.

    python generate/base.py --prompt "What is the capital of France?"
    python generate/base.py --finetuned out/lora/docstrings --prompt 'What does the function `textwrap.dedent` do?'

The answer goes to stdout as it is made, everything else to stderr.
"""

import sys
import time

from lit_gpt import InputError
from lit_gpt.cli import Flags, run
from lit_gpt.data.conversation_tokens import encode_question
from lit_gpt.data.embedding_rows import check_prompt
from lit_gpt.data.prompts import render, resolve_style
from lit_gpt.device import peak_memory_gb
from lit_gpt.distributed import devices_for_answers, is_first
from lit_gpt.generate.decode import collected, is_cut, stream
from lit_gpt.generate.sampling import check_sampling, seeded_generator
from lit_gpt.ranges import check_range
from lit_gpt.runs.load_finetuned import UseArgs, load_model_for_use, read_for_use


def main(
    prompt: str,
    input: str = "",
    prompt_style: str = "auto",
    num_samples: int = 1,
    max_new_tokens: int = 200,
    temperature: float = 0.0,
    top_k: int | None = None,
    devices: int = 1,
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
        max_new_tokens: The longest answer, in tokens. A line on stderr says if one was cut.
        temperature: 0 takes the likeliest token each time; 1 samples from what the model says.
        top_k: Sample from the k likeliest tokens only.
        devices: Split the model among so many GPUs, or processes where there is none: for one that is larger than a
            device. Each token then waits until all weights have been sent, so that it is slow.
        args: With which model, such as --finetuned, and how; see lit_gpt/runs/load_finetuned.py.
    """
    check_sampling(temperature, top_k, args.top_p)
    check_range("--num_samples", num_samples, at_least=1)
    check_range("--devices", devices, at_least=1)
    check_range("--max_new_tokens", max_new_tokens, at_least=1)
    if temperature == 0 and (num_samples > 1 or top_k is not None or args.top_p is not None):
        raise InputError(
            "At --temperature 0 all answers are the same: --num_samples, --top_k and --top_p need a higher one."
        )

    # the prompt, as it was written in training; it is looked at before a weight is read
    tokenizer, config, trained_style = read_for_use(args)
    style = resolve_style(prompt_style, tokenizer, trained_style)
    rendered = render(style, {"instruction": prompt, "input": input}, tokenizer)
    idx = encode_question(rendered, tokenizer)
    check_prompt(idx.tolist(), tokenizer, config)

    # devices: with --devices 2 two processes of this command are started here, and the first one prints
    device, mesh = devices_for_answers(devices, args.precision, args.seed)
    speaks = is_first()

    # the model, as it was loaded or fine-tuned
    began = time.perf_counter()
    model = load_model_for_use(args, device, mesh)
    if speaks:
        print(f"Loaded in {time.perf_counter() - began:.1f} s.", file=sys.stderr)
    generator = seeded_generator(args.seed, device)

    # the answers; all draw from one generator, so that they differ
    for _ in range(num_samples):
        began = time.perf_counter()
        tokens: list[int] = []
        new_tokens = stream(
            model,
            idx.to(device),
            len(idx) + max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=args.top_p,
            eos_id=tokenizer.stop_ids,
            generator=generator,
        )
        for text in tokenizer.stream(collected(new_tokens, tokens)):
            if speaks:
                print(text, end="", flush=True)
        if not speaks:
            continue
        print()
        if is_cut(tokens, tokenizer.stop_ids):
            print(f"Cut at --max_new_tokens {max_new_tokens}.", file=sys.stderr)
        seconds = time.perf_counter() - began
        print(
            f"{len(tokens)} tokens in {seconds:.2f} s ({len(tokens) / seconds:.1f} tokens/s),"
            f" {peak_memory_gb(device):.2f} GB at most.",
            file=sys.stderr,
        )


if __name__ == "__main__":
    run(main)
