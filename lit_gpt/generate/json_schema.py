"""Answers that are JSON by a schema: before each token, those that cannot go on with it are forbidden.

    schema      {"type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"]}
    answer      {"age": 4                 may go on with digits, a space, }     may not with a letter, or end

    schemas = JsonSchemas(tokenizer)
    engine.add(Request(prompt, 200, grammar=schemas.grammar(schema)))

What may come next is found out by llguidance (MIT): https://github.com/guidance-ai/llguidance. It needs no other
package, has wheels for Linux, macOS and Windows that fit every Python, takes microseconds for a token, reads most of
JSON schema, and says in words what it does not read. xgrammar needs transformers, triton and apache-tvm-ffi.
outlines-core makes a regular expression of a schema, which therefore has no minimum and maximum, and cannot contain
itself.
"""

import functools
import json
import subprocess
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from lit_gpt.data.tokenizer import Tokenizer
from lit_gpt.errors import InputError
from lit_gpt.files import expand_home, not_there
from lit_gpt.generate.token_texts import TokenTexts
from lit_gpt.packages import require

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

ANY_OBJECT: Mapping[str, Any] = {"type": "object"}
WHITESPACE = r" |\n[ \t]{0,20}"
"""What may stand between two parts of JSON, if anything: a space, or a line break with an indent. It has a bound since
a model that does not know how to go on may say spaces until it is cut. Few write a space before a colon, but the sample
model says " :" there, which is one token, and loses its way if it may not."""
LARGEST_SCHEMA = 100_000
"""Characters. The time to read a schema grows with the square of its properties: 3,000 of them, which are 60,000
characters, take 2 s."""
MAX_SECONDS = 5
"""The longest time to read a schema, the start of a process included, which takes a tenth of a second. Most schemas
take less than 10 ms."""
LIMITS: Mapping[str, Any] = {
    "max_lexer_states": 20_000,
    "max_grammar_size": 100_000,
    "step_lexer_fuel": 100_000,
    "step_max_items": 20_000,
}
"""llguidance's, for each answer: about 40 MB, and some 10 ms for a token. They are lower than its own. Not everything
is bounded by them: patterns in an allOf take time that doubles with each, hence MAX_SECONDS."""
N_REMEMBERED = 256
"""So many schemas are remembered to have no problem, or which one: 25 MB at most."""
TRIAL = """
import json, sys
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
schema, limits = json.load(sys.stdin)
grammar = LLMatcher.grammar_from_json_schema(schema)
matcher = LLMatcher(LLTokenizer("byte"), grammar, log_level=0, limits=LLParserLimits(**limits, verbose_errors=False))
matcher.compute_bitmask()
print(json.dumps(matcher.get_error()))
"""
TOO_COMPLEX = "what --json_schema allows has become too complex. Simplify its patterns."
"""What is said of an answer that ends with the reason "error"."""
NOT_A_TOKEN = b"\xff"  # no byte of any text; llguidance begins its special tokens with it


class JsonSchemas:
    """Reads schemas for the answers of a tokenizer's models."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer

    def grammar(self, schema: Mapping[str, Any]) -> "Grammar":
        """The grammar of one answer, or of several to one prompt.

        It is made anew each time, which takes about a millisecond, since it grows with what is asked of it.

        Raises:
            InputError: llguidance is not installed, or it cannot read the schema, or not within its limits, or no
                JSON is valid by it.
        """
        text = as_text(schema)
        check_schema(text)
        return Grammar(self.vocabulary, text, self.opening)

    @functools.cached_property
    def vocabulary(self) -> "LLTokenizer":
        """The tokens as llguidance knows them: by their bytes."""
        from llguidance import LLTokenizer

        stop_ids = sorted(self.tokenizer.stop_ids)
        wrapper: Any = Vocabulary(self.tokenizer)  # it has what is read of their class
        return LLTokenizer(wrapper, eos_token=stop_ids, slices=LLTokenizer.json_slices())

    @functools.cached_property
    def opening(self) -> str:
        """A space with which answers of some models begin, and which is none of their text: sentencepiece adds it."""
        first = self.tokenizer.encode("{", bos=False).tolist()[0]
        return " " if TokenTexts(self.tokenizer).bytes_of(first).startswith(b" ") else ""


class Vocabulary:
    """What llguidance reads of a tokenizer."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer) -> None:
        texts = TokenTexts(tokenizer)
        stop_ids = tokenizer.stop_ids
        self.eos_token_id = min(stop_ids)
        self.tokens: list[bytes] = []
        self.special_token_ids: list[int] = []
        no_text = tokenizer.special_ids | stop_ids | {tokenizer.unk_id}
        for token in range(max(tokenizer.vocab_size, 1 + max(stop_ids))):
            is_text = token not in no_text and tokenizer.library.id_to_token(token) is not None
            spelled = texts.bytes_of(token) if is_text else b""
            self.tokens.append(spelled)
            if not spelled or spelled.startswith(NOT_A_TOKEN):
                self.special_token_ids.append(token)

    def __call__(self, text: str) -> list[int]:
        raise AssertionError("A grammar without forcing asks for no tokens of texts.")


class Grammar:
    """The texts that an answer may be."""

    def __init__(self, vocabulary: "LLTokenizer", schema: str, opening: str = "") -> None:
        """Reads a schema that `check_schema` has found to be good. Before its JSON an `opening` may stand.

        Raises:
            InputError: the tokens of this vocabulary cannot say it.
        """
        from llguidance import LLMatcher, LLParserLimits

        start = f"body | {json.dumps(opening)} body" if opening else "body"
        # without forcing, all tokens that fit may come, and not just those that the tokenizer would make of a text
        rules = f'%llguidance {{"no_forcing": true}}\nstart: {start}\nbody: %json {schema}'
        limits = LLParserLimits(**LIMITS, verbose_errors=False)
        self.matcher = LLMatcher(vocabulary, rules, log_level=0, limits=limits)
        self.matcher.compute_bitmask()
        check_no_problem(in_words(self.matcher.get_error()))

    def begin(self, stop_ids: Collection[int]) -> "Constraint":
        """What may come in an answer, at its beginning. `stop_ids` are the tokens that end it."""
        return Constraint(self.matcher.deep_copy(), stop_ids)


class Constraint:
    """What may come next in one answer. It is always one token ahead."""

    def __init__(self, matcher: "LLMatcher", stop_ids: Collection[int]) -> None:
        self.matcher = matcher
        self.stop_ids = list(stop_ids)
        self.look_ahead()

    def look_ahead(self) -> None:
        """Finds the tokens that may come next: `allowed`, of bool, (V,) with V of the tokenizer."""
        bits = np.frombuffer(self.matcher.compute_bitmask(), dtype=np.uint8)
        self.allowed = torch.from_numpy(np.unpackbits(bits, bitorder="little")).bool()
        known = [stop_id for stop_id in self.stop_ids if stop_id < len(self.allowed)]
        self.allowed[known] = self.matcher.is_accepting()

    def forbid_others(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits (V,) with minus infinity for all tokens that may not come next. V is the model's, which may have more
        tokens than the tokenizer."""
        n = min(len(logits), len(self.allowed))
        forbidden = torch.ones(len(logits), dtype=torch.bool)
        forbidden[:n] = ~self.allowed[:n]
        return logits.masked_fill(forbidden.to(logits.device), -torch.inf)

    def append(self, token: int) -> str | None:
        """Takes the next token, and says why the answer ends with it: "stop" if nothing may follow, "error" if to find
        out what may follow takes more than LIMITS. None: it goes on."""
        self.matcher.consume_token(token)
        if not self.matcher.is_stopped():
            self.look_ahead()
        if self.matcher.is_error():
            return "error"
        return "stop" if self.matcher.is_stopped() else None


# ---- schemas


def read_schema(given: str) -> dict[str, Any]:
    """A schema from the command line: JSON, or the name of a file with it.

    Raises:
        InputError: there is no such file, or it is no JSON object, or no schema that `JsonSchemas` reads.
    """
    where = "--json_schema"
    text = given
    if not given.lstrip().startswith("{"):
        path = Path(expand_home(given))
        if not path.is_file():
            raise not_there(path, path.parent.glob("*"), "Name a file with --json_schema, or write JSON: '{...}'.")
        where = str(path)
        text = path.read_text(encoding="utf-8", errors="replace")
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} is no JSON: {error}.") from None
    if not isinstance(schema, dict):
        raise InputError(f"{where} is {text.strip()[:30]}, expected an object, such as {json.dumps(ANY_OBJECT)}.")
    check_schema(as_text(schema))
    return schema


def as_text(schema: Mapping[str, Any]) -> str:
    """A schema as llguidance is given it. How it is to be read is ours to say, and not the schema's."""
    schema = {key: value for key, value in schema.items() if key != "x-guidance"}
    return json.dumps({**schema, "x-guidance": {"whitespace_pattern": WHITESPACE}})


def check_schema(text: str) -> None:
    """Raises InputError if llguidance is not installed, or cannot read a schema."""
    require("llguidance", "json", "An answer by a JSON schema")
    check_no_problem(find_problem(text))


@functools.lru_cache(N_REMEMBERED)
def find_problem(text: str) -> str:
    """Why a schema cannot be read; empty if it can. A process of its own tries it, which can be ended.

    Raises:
        InputError: it takes too long. This is not remembered, since the machine may have been busy.
    """
    if len(text) > LARGEST_SCHEMA:
        return f"it has {len(text):,} characters, expected {LARGEST_SCHEMA:,} at most"
    command = [sys.executable, "-P", "-c", TRIAL]
    asked = json.dumps([text, dict(LIMITS)])
    try:
        trial = subprocess.run(command, input=asked, capture_output=True, text=True, timeout=MAX_SECONDS)
    except subprocess.TimeoutExpired:
        raise cannot_be_used(f"to read it takes more than {MAX_SECONDS} s") from None
    if trial.returncode:
        last_line = trial.stderr.strip().splitlines()[-1:]
        return f"its reader ended with status {trial.returncode}. {one_line(''.join(last_line))}"
    return in_words(json.loads(trial.stdout))


def check_no_problem(problem: str) -> None:
    """Raises InputError if there is one."""
    if problem:
        raise cannot_be_used(problem)


def cannot_be_used(problem: str) -> InputError:
    return InputError(f"The JSON schema cannot be used: {problem}. Change it.")


def in_words(message: str) -> str:
    """What llguidance says of a grammar, for those who have a schema."""
    if "NoExtensionBias" in message:
        return "no JSON is valid by it"
    return one_line(message.split(" Enable 'coerce_one_of'")[0])


def one_line(message: str) -> str:
    return " ".join(message.split())[:300].removesuffix(".")
