"""Answer all the prompts of a file, many at a time.

    python generate/file.py --prompts questions.jsonl --out answers.jsonl
    python generate/file.py --prompts mails.csv --prompt_key text --choices '["spam", "ham"]' --out labels.jsonl
    python generate/file.py --prompts questions.jsonl --out answers.jsonl --finetuned out/lora/docstrings

Each line of the answers is the record that was asked, and what came of it. An interrupted run goes on with --resume
true. For one prompt, see generate/base.py.
"""

import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from lit_gpt import InputError
from lit_gpt.cli import Flags, run
from lit_gpt.data.conversation_tokens import encode_question
from lit_gpt.data.prompts import render, resolve_style
from lit_gpt.device import default_device, peak_memory_gb
from lit_gpt.display.words import counted, duration
from lit_gpt.generate.choices import requests_for_choices, weigh
from lit_gpt.generate.engine import Engine, Request
from lit_gpt.generate.json_schema import TOO_COMPLEX, JsonSchemas, read_schema
from lit_gpt.generate.prompts_file import AnswersFile, Job, answer_jobs, as_values, read_questions
from lit_gpt.generate.sampling import Sampling
from lit_gpt.ranges import check_range
from lit_gpt.runs.load_finetuned import UseArgs, load_for_use


def main(
    prompts: Path,
    out: Path,
    prompt_key: str | None = None,
    prompt_style: str = "auto",
    num_samples: int = 1,
    max_new_tokens: int = 200,
    temperature: float = 0.0,
    top_k: int | None = None,
    stop: list[str] | None = None,
    choices: list[str] | None = None,
    json_schema: str | None = None,
    logprobs: int | None = None,
    batch_size: int = 16,
    resume: bool = False,
    overwrite: bool = False,
    args: Flags[UseArgs] = UseArgs(),
) -> None:
    """Answer the prompts of a file.

    Args:
        prompts: A .jsonl, .json, .csv, .tsv or .parquet file with records as for training, whose own answers are not
            looked at; of any other file, each line is a prompt.
        out: The file of the answers, a line of JSON for each, in the order of the prompts.
        prompt_key: The key of the prompts, if records are not as for training: texts, or lists of messages.
        prompt_style: The text around a prompt, as in generate/base.py.
        num_samples: How many answers to each prompt.
        max_new_tokens: The longest answer, in tokens. One that was cut has the finish_reason length.
        temperature: 0 takes the likeliest token each time; 1 samples from what the model says.
        top_k: Sample from the k likeliest tokens only.
        stop: Strings that end an answer, and are no part of it.
        choices: The answers that are possible, such as ["Yes", "No"]: the one that the model finds likeliest is given.
        json_schema: A file with a JSON schema, or the schema itself: each answer is JSON by it, whole unless it is cut.
        logprobs: Write how likely the model found each token, and so many of the likeliest in its place.
        batch_size: How many answers at once. What an answer says does not depend on it.
        resume: Go on with an --out that was interrupted.
        overwrite: Replace an --out that is there.
        args: With which model, such as --finetuned, and how; see lit_gpt/runs/load_finetuned.py.
    """
    sampling = Sampling(temperature, top_k, args.top_p, args.min_p, args.repetition_penalty)
    sampling.check()
    sampling.check_not_greedy(num_samples)
    check_range("--num_samples", num_samples, at_least=1)
    check_range("--max_new_tokens", max_new_tokens, at_least=1)
    check_range("--logprobs", logprobs, at_least=0)
    check_range("--batch_size", batch_size, at_least=1)
    if choices and json_schema is not None:
        raise InputError("--choices and --json_schema both say what an answer has to be. Leave one of them out.")
    schema = read_schema(json_schema) if json_schema is not None else None

    # what is there already, and what is still to be asked
    answers_file = AnswersFile(out, resume, overwrite)
    records = read_questions(prompts, prompt_key, num_samples)
    answers_file.skip_answered(records)

    # the model, as it was loaded or fine-tuned
    device = default_device()
    model, tokenizer, trained_style = load_for_use(args, device, n_rows=batch_size)
    style = resolve_style(prompt_style, tokenizer, trained_style)
    engine = Engine(model, tokenizer, max_batch=batch_size, draft_tokens=args.draft_tokens)
    schemas = JsonSchemas(tokenizer)

    def jobs() -> Iterator[Job]:
        """What the engine is asked for each answer: a request, or one for each choice."""
        for record in records:
            if choices:
                yield Job(record, requests_for_choices(record.question, choices, style, tokenizer))
                continue
            idx = encode_question(render(style, record.question, tokenizer), tokenizer).tolist()
            seeded = replace(sampling, seed=args.seed + record.sample)
            grammar = schemas.grammar(schema) if schema is not None else None
            stop_ids = tokenizer.stop_ids
            request = Request(idx, max_new_tokens, seeded, stop_ids, stop or (), logprobs, grammar=grammar)
            yield Job(record, [request])

    # the answers, each written as soon as those before it are
    began = time.perf_counter()
    n_answers = n_tokens = 0
    ended: Counter[str] = Counter()  # how many for which reason
    said_at = began
    for job, answers in answer_jobs(engine, jobs()):
        values = as_values(answers, tokenizer)
        if choices:
            weighed = weigh(choices, answers)
            values = {
                "answer": max(weighed, key=lambda choice: choice.logprob).text,
                "choices": {choice.text: choice.share for choice in weighed},
            }
        answers_file.write(job.record, values)
        n_answers += 1
        n_tokens += sum(len(answer.tokens) for answer in answers)
        ended[str(values.get("finish_reason"))] += 1
        if time.perf_counter() - said_at > 10:
            said_at = time.perf_counter()
            print(f"{counted(n_answers, 'answer')}, {n_tokens / (said_at - began):.1f} tokens/s", file=sys.stderr)

    seconds = time.perf_counter() - began
    print(
        f"{counted(n_answers, 'answer')} in {out}, {n_tokens:,} tokens in {duration(seconds)}"
        f" ({n_tokens / seconds:.1f} tokens/s), {peak_memory_gb(device):.2f} GB at most.",
        file=sys.stderr,
    )
    if ended["length"]:
        print(f"{counted(ended['length'], 'answer')} cut at --max_new_tokens {max_new_tokens}.", file=sys.stderr)
    if ended["error"]:
        print(f"{counted(ended['error'], 'answer')} cut: {TOO_COMPLEX}", file=sys.stderr)


if __name__ == "__main__":
    run(main)
