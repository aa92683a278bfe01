"""Talk to a model, turn by turn, through its chat template.

    python generate/chat.py
    python generate/chat.py --finetuned out/lora/docstrings
    python generate/chat.py --temperature 0.7 --top_k 50

What you type is a question, but for /help, /new and /quit.
"""

import sys

from lit_gpt import InputError
from lit_gpt.cli import Flags, check_text, run
from lit_gpt.data.conversation_tokens import encode_question
from lit_gpt.data.embedding_rows import check_prompt
from lit_gpt.data.prompts import answer_message, render, resolve_style
from lit_gpt.device import default_device
from lit_gpt.generate.decode import collected, is_cut, stream
from lit_gpt.generate.sampling import check_sampling, seeded_generator
from lit_gpt.ranges import check_range
from lit_gpt.runs.load_finetuned import UseArgs, load_for_use

COMMANDS = "/new begins another conversation; /quit or Ctrl-D ends; Ctrl-C ends an answer; /help says this again."
QUIT = ("/quit", "/exit", "quit", "exit")


def main(
    system: str | None = None,
    prompt_style: str = "auto",
    max_new_tokens: int = 500,
    temperature: float = 0.0,
    top_k: int | None = None,
    args: Flags[UseArgs] = UseArgs(),
) -> None:
    """Talk to a model. What you type is a question, but for these: /new begins another conversation, /quit (or quit,
    exit, Ctrl-D) ends, /help lists them. Ctrl-C ends an answer, and the conversation goes on.

    Args:
        system: The system prompt. None is the template's own.
        prompt_style: The text around a question, as in generate/base.py. auto is what the fine-tuned weights were
            trained with, else chat where there is a template.
        max_new_tokens: The longest answer, in tokens. A line on stderr says if one was cut.
        temperature: 0 takes the likeliest token each time; 1 samples from what the model says.
        top_k: Sample from the k likeliest tokens only.
        args: With which model, such as --finetuned, and how; see lit_gpt/runs/load_finetuned.py.
    """
    check_sampling(temperature, top_k, args.top_p)
    check_range("--max_new_tokens", max_new_tokens, at_least=1)
    if temperature == 0 and (top_k is not None or args.top_p is not None):
        raise InputError(
            "At --temperature 0 the likeliest token is taken: --top_k and --top_p need a higher one, such as 0.7."
        )
    device = default_device()
    model, tokenizer, trained_style = load_for_use(args, device)
    style = resolve_style(prompt_style, tokenizer, trained_style)
    generator = seeded_generator(args.seed, device)
    if sys.stdin.isatty():
        print(COMMANDS, file=sys.stderr)

    # a conversation begins with the system prompt, if there is one
    opening = []
    if system is not None:
        opening.append({"role": "system", "content": system})
    messages = list(opening)
    while True:
        # a question, or a command
        question = read_line()
        if question is None or question in QUIT:
            break
        if question == "/new":
            messages = list(opening)
        if question == "/help":
            print(COMMANDS, file=sys.stderr)
        if question in ("", "/new", "/help"):
            continue
        if question.startswith("/") and " " not in question:
            print(f"There is no command {question}. {COMMANDS}", file=sys.stderr)
            continue

        # the whole conversation so far is the prompt, each time
        messages.append({"role": "user", "content": question})
        rendered = render(style, {"messages": messages}, tokenizer)
        idx = encode_question(rendered, tokenizer, device)
        try:
            check_prompt(idx.tolist(), tokenizer, model.config)
        except InputError as error:
            print(error, file=sys.stderr)
            messages.pop()
            continue
        max_length = min(len(idx) + max_new_tokens, model.config.block_size)
        if max_length <= len(idx):
            messages.pop()
            what, advice = "The conversation", "/new begins another."
            if messages == opening:
                what = "This question" if system is None else "This question, with --system,"
                advice = "Ask a shorter one." if system is None else "Shorten one of them."
            print(f"{what} fills the model's {max_length} tokens. {advice}", file=sys.stderr)
            continue

        # the answer, shown as it is made
        new_tokens = stream(
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
        tokens: list[int] = []
        is_interrupted = False
        try:
            for text in tokenizer.stream(collected(new_tokens, tokens)):
                print(text, end="", flush=True)
                answer += text
        except KeyboardInterrupt:
            is_interrupted = True
        print()
        messages.append(answer_message(style, messages, answer, tokenizer))

        # did it come to its end?
        if is_interrupted:
            print("Ended by Ctrl-C.", file=sys.stderr)
        elif is_cut(tokens, tokenizer.stop_ids):
            limit = f"--max_new_tokens {max_new_tokens}"
            if max_length == model.config.block_size:
                limit = f"the {max_length} tokens that the model can read"
            print(f"Cut at {limit}.", file=sys.stderr)


def read_line() -> str | None:
    """What is typed next, without space around it; None at the end of the input, or if Ctrl-C ends it.

    Raises:
        InputError: it is not UTF-8.
    """
    try:
        line = input("> " if sys.stdin.isatty() else "").strip()
        check_text("The standard input", line)
        return line
    except UnicodeDecodeError as error:
        raise InputError(f"The standard input is not UTF-8 ({error.reason}). Type it as UTF-8.") from None
    except (EOFError, KeyboardInterrupt):
        if sys.stdin.isatty():
            print()
        return None


if __name__ == "__main__":
    run(main)
