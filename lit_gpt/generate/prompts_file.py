"""Prompts from a file, and their answers in another one.

    questions.jsonl                        answers.jsonl
    {"instruction": "Who?"}                {"instruction": "Who?", "answer": "Ada.", "finish_reason": "stop", ...}
    {"instruction": "Where?"}              ...

Each line of the answers is the record that was asked, and what came of it, in the order of the questions, written as
soon as it is there. A file that was interrupted goes on after its last whole line.
"""

import json
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from lit_gpt.data.read_files import is_table, open_text, read_records
from lit_gpt.data.reader_keys import own_keys
from lit_gpt.data.records import Keys, in_our_form
from lit_gpt.data.tokenizer import Tokenizer
from lit_gpt.errors import InputError
from lit_gpt.files import not_there
from lit_gpt.generate.engine import Answer, Engine, Logprob, Request

ADDED = ("answer", "finish_reason", "n_tokens", "sample", "logprobs", "choices")
"""Keys that an answer adds to its record."""


class Record(NamedTuple):
    """A record of the file of prompts, and what it asks."""

    where: str
    """What it is called in errors."""
    values: Mapping[str, Any]
    question: Mapping[str, Any]
    """As `prompts.render` takes it."""
    sample: int
    """Which of several answers to it is wanted, from 0 on."""
    n_samples: int

    def as_asked(self) -> dict[str, Any]:
        """What the answer's line has of it."""
        return {**self.values, "sample": self.sample} if self.n_samples > 1 else dict(self.values)


class Job(NamedTuple):
    """A record, and what the engine is asked about it."""

    record: Record
    requests: Sequence[Request]


# ---- prompts


def read_questions(path: Path, prompt_key: str | None, n_samples: int = 1) -> Iterator[Record]:
    """The records of a file, each `n_samples` times.

    Args:
        path: A table, .jsonl, .json, .csv, .tsv or .parquet; or any other file, each of whose lines is a prompt, but
            for blank ones.
        prompt_key: The key of the prompts: texts, or lists of messages. None: records are as for training, and their
            answers, if they have them, are not shown to the model.
        n_samples: How many answers are wanted to each.

    Raises:
        InputError: there is no such file, or a record that asks nothing, or one that has a key of ADDED.
    """
    if not path.is_file():
        raise not_there(path, path.parent.glob("*"), "Name a file with --prompts.")
    if is_table(path):
        records = table_records(path, prompt_key)
    elif prompt_key is None:
        records = line_records(path)
    else:
        raise InputError(f"{path} has a prompt in each line and no keys: leave out --prompt_key {prompt_key}.")
    for where, values, question in records:
        for sample in range(n_samples):
            yield Record(where, values, question, sample, n_samples)


Asked = tuple[str, dict[str, Any], dict[str, Any]]


def line_records(path: Path) -> Iterator[Asked]:
    """The lines of a text, which are prompts."""
    with open_text(path) as file:
        for number, line in enumerate(file, 1):
            prompt = line.removesuffix("\n")
            if prompt.strip():
                yield f"{path}, line {number}", {"prompt": prompt}, {"instruction": prompt, "input": ""}


def table_records(path: Path, prompt_key: str | None) -> Iterator[Asked]:
    """The records of a table, with what each is called and what it asks."""
    for number, record in enumerate(read_records(path), 1):
        where = f"{path}, record {number}"
        taken = [key for key in ADDED if key in record]
        if taken:
            raise InputError(f"{where} has the key {taken[0]}, which its answer is written to. Rename it.")
        yield where, {key: record[key] for key in own_keys(record)}, question_of(record, where, prompt_key)


def question_of(record: Mapping[str, Any], where: str, prompt_key: str | None) -> dict[str, Any]:
    """What a record asks. Raises InputError if it is nothing."""
    if prompt_key is not None:
        if prompt_key not in record:
            keys = ", ".join(map(str, record)) or "nothing"
            raise InputError(f"{where} has no {prompt_key}; it has {keys}. Name the key of the prompts: --prompt_key.")
        prompt = record[prompt_key]
        record = {"messages": prompt} if isinstance(prompt, list) else {"prompt": prompt}

    # a question alone is one whose answer is empty
    for question_key, answer_key in (("instruction", "output"), ("prompt", "completion")):
        if question_key in record and answer_key not in record:
            empty = [] if isinstance(record[question_key], list) else ""
            record = {**record, answer_key: empty}
    asked = in_our_form(record, where, Keys())
    if "text" in asked:
        raise InputError(f"{where} is a text, and asks nothing. If it is to be asked: --prompt_key text.")
    messages = list(asked["messages"])
    while messages and messages[-1]["role"] == "assistant":
        messages.pop()
    if not any(message["role"] != "system" and message["content"] for message in messages):
        raise InputError(f"{where} asks nothing: there is no question in it.")
    return {"messages": messages, "tools": asked["tools"]} if "tools" in asked else {"messages": messages}


# ---- answers


def answer_jobs(engine: Engine, jobs: Iterable[Job]) -> Iterator[tuple[Job, list[Answer]]]:
    """Each job in its order, with the answers to its requests.

    Raises:
        InputError: a request can never be answered; it says of which record.
    """
    waiting: deque[Job] = deque()

    def requests() -> Iterator[Request]:
        for job in jobs:
            waiting.append(job)
            for request in job.requests:
                try:
                    engine.check(request)
                except InputError as error:
                    raise InputError(f"{job.record.where}: {error}") from None
                yield request

    answers: list[Answer] = []
    for answer in engine.run(requests()):
        answers.append(answer)
        if len(answers) == len(waiting[0].requests):
            yield waiting.popleft(), answers
            answers = []


def as_values(answers: Sequence[Answer], tokenizer: Tokenizer) -> dict[str, Any]:
    """What is written of an answer: of the first one, where there is no choice among several."""
    answer = answers[0]
    values: dict[str, Any] = {
        "answer": answer.text,
        "finish_reason": answer.finish_reason,
        "n_tokens": len(answer.tokens),
    }
    if answer.request.logprobs is not None:
        values["logprobs"] = [logprob_as_values(entry, tokenizer) for entry in answer.logprobs]
    return values


def logprob_as_values(entry: Logprob, tokenizer: Tokenizer) -> dict[str, Any]:
    """A token, its log-probability, and of the likeliest ones in its place both as well."""
    values: dict[str, Any] = {"token": tokenizer.decode_with_special([entry.token]), "logprob": entry.logprob}
    if entry.top:
        values["top"] = [[tokenizer.decode_with_special([token]), logprob] for token, logprob in entry.top]
    return values


class AnswersFile:
    """The file of the answers: lines of JSON, of which those of an interrupted run are kept."""

    def __init__(self, path: Path, resume: bool, overwrite: bool) -> None:
        """Reads what is there. Nothing is written or replaced before there is an answer.

        Raises:
            InputError: it is there, and neither to be continued nor to be replaced; or it is none of this script.
        """
        self.path = path
        self.file: BinaryIO | None = None
        self.there: list[dict[str, Any]] = []
        self.n_bytes = 0  # of whole lines
        if path.exists() and not overwrite:
            lines = path.read_bytes().splitlines(keepends=True)
            if lines and not resume:
                raise InputError(
                    f"{path} is there, with {len(lines)} lines. --resume true goes on after the last one, --overwrite"
                    " true begins anew."
                )
            for line in lines:
                if not line.endswith(b"\n"):  # the process was killed in the middle of it
                    break
                self.there.append(self.parsed(line))
                self.n_bytes += len(line)

    def parsed(self, line: bytes) -> dict[str, Any]:
        """The answer in a line. Raises InputError if it is none."""
        try:
            answer = json.loads(line)
        except ValueError:
            answer = None
        if not isinstance(answer, dict) or "answer" not in answer:
            raise InputError(
                f"{self.path}, line {len(self.there) + 1} is no answer of this script. Name another --out."
            )
        return answer

    def skip_answered(self, records: Iterator[Record]) -> None:
        """Takes the records that were answered. Raises InputError if they are not those of the file."""
        for number, answer in enumerate(self.there, 1):
            record = next(records, None)
            asked = {key: value for key, value in answer.items() if key not in ADDED or key == "sample"}
            if record is None or as_json(record.as_asked()) != as_json(asked):
                raise InputError(
                    f"{self.path}, line {number} answers another question than the one that --prompts has there. It was"
                    " written for another file, or with another --num_samples: name another --out, or begin anew with"
                    " --overwrite true."
                )

    def write(self, record: Record, values: Mapping[str, Any]) -> None:
        """Adds an answer. It is in the file before the next one is made."""
        if self.file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.file = self.path.open("r+b" if self.path.exists() else "wb")
            self.file.truncate(self.n_bytes)
            self.file.seek(self.n_bytes)
        self.file.write(as_json({**record.as_asked(), **values}) + b"\n")
        self.file.flush()


def as_json(values: Mapping[str, Any]) -> bytes:
    """An object in one line. What JSON does not know, such as a date of a parquet file, becomes its text."""
    return json.dumps(values, ensure_ascii=False, default=str).encode()
