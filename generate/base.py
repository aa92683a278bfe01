"""Continue a prompt, or answer it with what was fine-tuned.

    python generate/base.py --prompt "What is the capital of France?"
    python generate/base.py --finetuned out/lora/docstrings --prompt 'What does the function `textwrap.dedent` do?'
    python generate/base.py --prompt "Is Paris in France?" --choices '["Yes", "No"]'
    python generate/base.py --prompt "Ada is 36." --json_schema '{"type": "object"}'

The answer goes to stdout as it is made, everything else to stderr. For many prompts, see generate/file.py.
"""

import sys
import time
from collections.abc import Iterable
from dataclasses import replace

from lit_gpt import InputError, Tokenizer
from lit_gpt.cli import Flags, run
from lit_gpt.data.conversation_tokens import encode_question
from lit_gpt.data.embedding_rows import check_prompt
from lit_gpt.data.prompts import render, resolve_style
from lit_gpt.device import peak_memory_gb
from lit_gpt.distributed import devices_for_answers, is_first
from lit_gpt.generate.choices import requests_for_choices, weigh
from lit_gpt.generate.engine import Engine, Logprob, Request
from lit_gpt.generate.json_schema import TOO_COMPLEX, JsonSchemas, read_schema
from lit_gpt.generate.sampling import Sampling
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
    stop: list[str] | None = None,
    choices: list[str] | None = None,
    json_schema: str | None = None,
    logprobs: int | None = None,
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
        stop: Strings that end an answer, and are no part of it.
        choices: The answers that are possible, such as ["Yes", "No"]: the one that the model finds likeliest is given.
        json_schema: A file with a JSON schema, or the schema itself: the answer is JSON by it, whole unless it is cut.
        logprobs: List how likely the model found each token, and so many of the likeliest in its place.
        devices: Split the model among so many GPUs, or processes where there is none: for one that is larger than a
            device. Each token then waits until all weights have been sent, so that it is slow.
        args: With which model, such as --finetuned, and how; see lit_gpt/runs/load_finetuned.py.
    """
    sampling = Sampling(temperature, top_k, args.top_p, args.min_p, args.repetition_penalty)
    sampling.check()
    sampling.check_not_greedy(num_samples)
    check_range("--num_samples", num_samples, at_least=1)
    check_range("--devices", devices, at_least=1)
    check_range("--max_new_tokens", max_new_tokens, at_least=1)
    check_range("--logprobs", logprobs, at_least=0)

    if choices and json_schema is not None:
        raise InputError("--choices and --json_schema both say what an answer has to be. Leave one of them out.")

    # the prompt, as it was written in training; it is looked at before a weight is read
    tokenizer, config, trained_style = read_for_use(args)
    style = resolve_style(prompt_style, tokenizer, trained_style)
    question = {"instruction": prompt, "input": input}
    idx = encode_question(render(style, question, tokenizer), tokenizer).tolist()
    check_prompt(idx, tokenizer, config)
    of_choices = requests_for_choices(question, choices, style, tokenizer) if choices else []
    grammar = JsonSchemas(tokenizer).grammar(read_schema(json_schema)) if json_schema is not None else None

    # devices: with --devices 2 two processes of this command are started here, and the first one prints
    device, mesh = devices_for_answers(devices, args.precision, args.seed)

    # the model, as it was loaded or fine-tuned
    began = time.perf_counter()
    model = load_model_for_use(args, device, mesh)
    if is_first():
        print(f"Loaded in {time.perf_counter() - began:.1f} s.", file=sys.stderr)
    engine = Engine(model, tokenizer, draft_tokens=args.draft_tokens)

    # one of the given answers
    if choices:
        weighed = weigh(choices, list(engine.run(of_choices)))
        if is_first():
            print(max(weighed, key=lambda choice: choice.logprob).text)
            for choice in weighed:
                print(f"{choice.share:7.1%}  {choice.text!r}  (logprob {choice.logprob:.3f})", file=sys.stderr)
        return

    # or free ones; each has a random state of its own, so that they differ
    for number in range(num_samples):
        began = time.perf_counter()
        seeded = replace(sampling, seed=args.seed + number)
        request = Request(idx, max_new_tokens, seeded, tokenizer.stop_ids, stop or (), logprobs, grammar=grammar)
        answer = engine.add(request)
        for text in engine.texts(answer):
            if is_first():
                print(text, end="", flush=True)
        if not is_first():
            continue
        print()
        if answer.finish_reason == "length":
            print(f"Cut at --max_new_tokens {max_new_tokens}.", file=sys.stderr)
        elif answer.finish_reason == "error":
            print(f"Cut: {TOO_COMPLEX}", file=sys.stderr)
        print_logprobs(answer.logprobs, tokenizer)
        seconds = time.perf_counter() - began
        n_tokens = len(answer.tokens)
        print(
            f"{n_tokens} tokens in {seconds:.2f} s ({n_tokens / seconds:.1f} tokens/s),"
            f" {peak_memory_gb(device):.2f} GB at most.",
            file=sys.stderr,
        )


def print_logprobs(logprobs: Iterable[Logprob], tokenizer: Tokenizer) -> None:
    """A line on stderr for each token: its probability by the model itself, and the likeliest ones in its place."""
    for entry in logprobs:
        others = [f"{tokenizer.decode_with_special([token])!r} {logprob:.3f}" for token, logprob in entry.top]
        spelled = tokenizer.decode_with_special([entry.token])
        print(f"{entry.logprob:9.3f}  {spelled!r:20} {'  '.join(others)}".rstrip(), file=sys.stderr)


if __name__ == "__main__":
    run(main)
