"""Talk to a model, turn by turn, through its chat template; or to several, side by side.

    python generate/chat.py
    python generate/chat.py --finetuned out/lora/docstrings
    python generate/chat.py --finetuned out/lora/docstrings --with_base
    python generate/chat.py --temperature 0.7 --top_k 50

What you type is a question, but for commands: /help lists them.
"""

import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal

from lit_gpt import InputError
from lit_gpt.cli import Flags, run
from lit_gpt.data.prompts import resolve_style, switch_thinking
from lit_gpt.device import default_device
from lit_gpt.display.words import counted
from lit_gpt.generate.commands import Chat
from lit_gpt.generate.conversation import Conversation, mark_thoughts
from lit_gpt.generate.engine import Engine, Request
from lit_gpt.generate.sampling import Sampling
from lit_gpt.generate.terminal import dimmed, read_message, without_ctrl_c
from lit_gpt.ranges import check_range
from lit_gpt.runs.load_finetuned import UseArgs
from lit_gpt.runs.side_by_side import load_models_for_use

GREETING = "/help lists what can be typed besides questions. Ctrl-C ends an answer, Ctrl-D the conversation."
QUIT = ("/quit", "/exit", "quit", "exit")


def main(
    finetuned: list[Path] = [],  # noqa: B006 # jsonargparse makes a copy
    with_base: bool = False,
    system: str | None = None,
    prompt_style: str = "auto",
    think: Literal["auto", "on", "off"] = "auto",
    max_new_tokens: int = 500,
    temperature: float = 0.0,
    top_k: int | None = None,
    args: Flags[UseArgs] = UseArgs(),
) -> None:
    """Talk to a model, or to several side by side. What you type is a question, but for commands such as /new, which
    begins another conversation, and /quit; /help lists them. Ctrl-C ends an answer, and the conversation goes on.

    Args:
        finetuned: The folder that a fine-tuning script wrote: an out_dir (its best), or one folder of it. Several
            answer side by side, on one copy of the weights that they were trained on.
        with_base: Have the model answer, too, as it was before it was fine-tuned.
        system: The system prompt. None is the template's own.
        prompt_style: The text around a question, as in generate/base.py. auto is what the fine-tuned weights were
            trained with, else chat where there is a template.
        think: Have a model that can do both think before it answers, or not, by its template's own switch. auto is the
            template's default. A terminal shows thoughts dim.
        max_new_tokens: The longest answer, in tokens. A line on stderr says if one was cut.
        temperature: 0 takes the likeliest token each time; 1 samples from what the model says.
        top_k: Sample from the k likeliest tokens only.
        args: With which model, and how; see lit_gpt/runs/load_finetuned.py.
    """
    sampling = Sampling(temperature, top_k, args.top_p, args.min_p, args.repetition_penalty)
    sampling.check()
    sampling.check_not_greedy()
    check_range("--max_new_tokens", max_new_tokens, at_least=1)

    # the models, and a conversation with each of them
    device = default_device()
    models, tokenizer, trained_style = load_models_for_use(args, finetuned, device, with_base)
    style = resolve_style(prompt_style, tokenizer, trained_style)
    switches = {} if think == "auto" else switch_thinking(style, tokenizer, think == "on")
    conversations = {
        name: Conversation(style, tokenizer, model.config, system, switches) for name, model in models.items()
    }
    chat = Chat(conversations, answering=list(models), is_greedy=temperature == 0)
    new_engine = partial(Engine, models, tokenizer, draft_tokens=args.draft_tokens)
    engine = new_engine()  # it keeps what it has read: of a conversation that goes on only what is new
    generator = replace(sampling, seed=args.seed).new_generator()
    if sys.stdin.isatty():
        print(GREETING, file=sys.stderr)

    while True:
        # a question, or a command
        typed = read_message()
        if typed is None or typed in QUIT:
            break
        try:
            questions = chat.obey(typed)
        except InputError as error:
            print(error, file=sys.stderr)
            continue

        if questions:
            chat.is_interrupted = False
        for name, question in questions.items():
            # the prompt: the whole conversation so far, each time, or as much of it as there is room for
            model = models[name]
            conversation = conversations[name]
            if len(models) > 1:
                print(f"{name}:", flush=True)
            try:
                with without_ctrl_c():
                    prompt = conversation.ask(question, max_new_tokens)
            except InputError as error:
                print(error, file=sys.stderr)
                continue
            if prompt.n_forgotten:
                left_out = counted(prompt.n_forgotten, "turn")
                limit = f"{model.config.block_size:,} tokens"
                print(f"The model can read {limit}: from here on without the oldest {left_out}.", file=sys.stderr)

            # the answer, shown as it is made
            n_room = model.config.block_size - len(prompt.idx)
            answer = engine.add(
                Request(
                    prompt.idx.tolist(),
                    min(max_new_tokens, n_room),
                    sampling,
                    tokenizer.stop_ids,
                    model=name,
                    generator=generator,
                )
            )
            said = ""
            is_interrupted = False
            try:
                for text, is_thought in mark_thoughts(engine.texts(answer), prompt.is_thinking):
                    said += text  # before it is shown: whatever was shown when Ctrl-C comes has been said
                    print(dimmed(text) if is_thought else text, end="", flush=True)
            except KeyboardInterrupt:
                is_interrupted = True
            with without_ctrl_c():
                if is_interrupted:
                    engine = new_engine()  # the old one may have been stopped in the middle of anything
                print()
                conversation.add_answer(said, prompt.is_thinking)

            # did it come to its end?
            if is_interrupted:
                chat.is_interrupted = True
                print("Ended by Ctrl-C.", file=sys.stderr)
            elif answer.finish_reason == "length":
                limit = f"--max_new_tokens {max_new_tokens}"
                if n_room <= max_new_tokens:
                    limit = f"the {model.config.block_size} tokens that the model can read"
                print(f"Cut at {limit}.", file=sys.stderr)


if __name__ == "__main__":
    run(main)
