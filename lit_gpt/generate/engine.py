"""The engine: requests in, answers out, many at a time.

    engine = Engine(model, tokenizer)
    answer = engine.add(Request(prompt, max_new_tokens=100))
    while answer.finish_reason is None:
        engine.step()               answers under way get a token each, waiting ones the places of those that ended
    print(answer.text)

generate/, chat, server, evaluation and the reports of training all ask this one. What an answer says depends on its
request alone, and not on who else is in the batch: it is sampled with a random state of its own, and the tokens of a
greedy one are those of a batch of one (in float32; in bfloat16 two tokens of one rounded logit may change places).
"""

import math
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from lit_gpt.data.tokenizer import Tokenizer
from lit_gpt.errors import InputError
from lit_gpt.generate.batch import Batch, Text
from lit_gpt.generate.json_schema import Grammar
from lit_gpt.generate.lookup import Lookup
from lit_gpt.generate.sampling import Sampling, choose, logprobs_of
from lit_gpt.generate.text_stream import TextStream
from lit_gpt.model.gpt import GPT
from lit_gpt.sharding import agreed_by_all


@dataclass(frozen=True)
class Request:
    """A prompt, and what is asked about it."""

    prompt: Sequence[int]
    max_new_tokens: int
    """0 asks for no answer, but with `prompt_logprobs` for what the model thinks of the prompt."""
    sampling: Sampling = Sampling()
    stop_ids: Collection[int] = ()
    """Tokens that end the answer."""
    stop: Sequence[str] = ()
    """Strings that end it, wherever they begin and end within tokens; for an engine with a tokenizer."""
    logprobs: int | None = None
    """Log-probabilities by the model itself, before temperature and filters: of each new token, and of so many of the
    likeliest. None: of none."""
    prompt_logprobs: bool = False
    """The same of the tokens of the prompt; with `logprobs` None, of these tokens alone."""
    logprobs_from: int = 1
    """Which token of the prompt is the first to get one. What stands before may be shared with other requests."""
    model: str = ""
    """One of the engine's models, by its name; "" is the first."""
    generator: torch.Generator | None = None
    """The random state to draw from, if not one by the seed of `sampling`."""
    grammar: Grammar | None = None
    """What the answer has to be: JSON by a schema, see `json_schema.py`. None: any text. A stop string may cut it, and
    so may `max_new_tokens`."""


@dataclass(frozen=True)
class Logprob:
    """What the model thought of a token: its log-probability, and tokens that were likelier, with theirs."""

    token: int
    logprob: float
    top: list[tuple[int, float]]


@dataclass(eq=False)
class Answer:
    """A request, and what has come of it so far."""

    request: Request
    tokens: list[int] = field(default_factory=list)
    """The new ones, a stop token included."""
    text: str = ""
    """What is certain so far, without stop token and stop string; for an engine with a tokenizer."""
    finish_reason: str | None = None
    """None as long as it goes on; then "stop", "length" (as long as asked for), "cancelled", or "error" (what its
    grammar allows has become too complex to be found out)."""
    logprobs: list[Logprob] = field(default_factory=list)
    prompt_logprobs: list[Logprob] = field(default_factory=list)
    """From the token `logprobs_from` on."""
    n_reused: int = 0
    """Tokens of the prompt whose keys and values were there already."""


class Engine:
    """Answers requests with one model, or with several of one tokenizer, each of which has a batch of its own."""

    def __init__(
        self,
        models: GPT | Mapping[str, GPT],
        tokenizer: Tokenizer | None = None,
        *,
        max_batch: int = 16,
        prefill_tokens: int = 1024,
        draft_tokens: int = 0,
    ) -> None:
        """An engine without requests. It takes memory for keys and values when they come.

        Args:
            models: In eval mode, by the names that requests give.
            tokenizer: Makes texts of answers. Without it there are tokens, and no stop strings.
            max_batch: The most answers of a model at once. More requests wait.
            prefill_tokens: The most tokens of prompts that are read in a step.
            draft_tokens: The most tokens that are looked up in the texts of a model and read at once, in case they
                follow again; see `lookup.py`. Each text has its share of them: it pays for few texts at once.
        """
        if isinstance(models, GPT):
            models = {"": models}
        self.models = dict(models)
        self.tokenizer = tokenizer
        self.draft_tokens = draft_tokens
        self.waiting: deque[UnderWay] = deque()
        self.under_way: dict[Answer, UnderWay] = {}  # waiting or running
        self.batches: dict[str, Batch[UnderWay]] = {}
        for name, model in self.models.items():
            self.batches[name] = Batch(model, max_batch, prefill_tokens)

    # ---- requests

    def add(self, request: Request) -> Answer:
        """Takes a request, which waits until the next step.

        Raises:
            InputError: it can never be answered; see `check`.
        """
        self.check(request)
        answer = Answer(request)
        under_way = UnderWay(answer, self.name_of(request), self.tokenizer)
        self.waiting.append(under_way)
        self.under_way[answer] = under_way
        return answer

    def check(self, request: Request) -> None:
        """Raises InputError for a request that can never be answered, whatever else there is to do."""
        name = self.name_of(request)
        if name not in self.models:
            raise InputError(f"There is no model {name}, expected one of {', '.join(self.models)}.")
        check_request(request, self.models[name], self.tokenizer)

    def name_of(self, request: Request) -> str:
        """The name of the model that a request asks."""
        return request.model or next(iter(self.models))

    def cancel(self, answer: Answer) -> None:
        """Ends an answer before it is complete; nothing if it is."""
        under_way = self.under_way.get(answer)
        if under_way is not None:
            self.finish(under_way, "cancelled")

    @property
    def n_waiting(self) -> int:
        return len(self.waiting)

    @property
    def n_running(self) -> int:
        return len(self.under_way) - len(self.waiting)

    def run(self, requests: Iterable[Request]) -> Iterator[Answer]:
        """Whole answers, in the order of the requests, which are taken as places become free."""
        answers: deque[Answer] = deque()  # asked for and not yet given
        coming = iter(requests)
        is_end = False
        try:
            while answers or not is_end:
                while not is_end and not self.waiting:
                    request = next(coming, None)
                    if request is None:
                        is_end = True
                    else:
                        answers.append(self.add(request))
                        self.admit()
                self.step()
                while answers and answers[0].finish_reason is not None:
                    yield answers.popleft()
        finally:
            # whoever stops listening leaves nothing behind
            for answer in answers:
                self.cancel(answer)

    def texts(self, answer: Answer) -> Iterator[str]:
        """The text of an answer as it becomes certain, a piece for each step, which may be empty.

        Whoever stops listening ends the answer. Others that are under way go on meanwhile.
        """
        n_given = 0
        try:
            while answer.finish_reason is None:
                self.step()
                yield answer.text[n_given:]
                n_given = len(answer.text)
        finally:
            self.cancel(answer)

    # ---- a step

    def step(self) -> list[Answer]:
        """Each answer under way gets its next token, unless its prompt is longer than what is read in a step.

        Returns:
            The answers that have got something or have ended.
        """
        self.admit()
        changed = []
        for name, batch in self.batches.items():
            for under_way in batch.texts:
                under_way.look_up(self.draft_tokens // len(batch.texts))
            complete = []
            for under_way, logits in batch.step():
                under_way.judge_prompt(logits)
                changed.append(under_way.answer)
                if under_way.n_unread == 0:
                    # of the last token, and of each of the draft
                    complete.append((under_way, logits[-1 - len(under_way.draft) :]))
            self.append_tokens(complete, self.models[name])
        return changed

    def admit(self) -> None:
        """Waiting requests, in their order, take the free places."""
        still_waiting: deque[UnderWay] = deque()
        for under_way in self.waiting:
            if self.batches[under_way.model].join(under_way):
                under_way.answer.n_reused = under_way.n_reused
            else:
                still_waiting.append(under_way)
        self.waiting = still_waiting

    def append_tokens(self, complete: Sequence[tuple["UnderWay", torch.Tensor]], model: GPT) -> None:
        """Chooses what follows texts that have been read to their end, by the logits (n, V) of the last token and, if
        there is a draft, of each token in it."""
        asked = []
        for under_way, logits in complete:
            if under_way.answer.request.max_new_tokens:
                asked.append((under_way, logits))
            else:
                self.finish(under_way, "length")
        while asked:
            # all at once: on a GPU each number would wait for it
            chosen = torch.stack([under_way.choose(logits[0]) for under_way, logits in asked])
            still_asked = []
            for (under_way, logits), token in zip(asked, agreed_by_all(model, chosen).tolist(), strict=True):
                reason = under_way.append(token, logits[0])
                if reason is not None:
                    self.finish(under_way, reason)
                elif under_way.accept(token):
                    still_asked.append((under_way, logits[1:]))
            asked = still_asked

    def finish(self, under_way: "UnderWay", reason: str) -> None:
        """An answer ends, and its place is free."""
        under_way.end_text()
        under_way.answer.finish_reason = reason
        del self.under_way[under_way.answer]
        if under_way.row >= 0:
            self.batches[under_way.model].leave(under_way)
        else:
            self.waiting.remove(under_way)


class UnderWay(Text):
    """An answer as long as it is not complete: its text in a batch, and what chooses and shows its tokens."""

    def __init__(self, answer: Answer, model: str, tokenizer: Tokenizer | None) -> None:
        request = answer.request
        prompt = list(request.prompt)
        super().__init__(
            # what comes after the last token is asked for by those alone who want an answer
            tokens=prompt if request.max_new_tokens else prompt[:-1],
            max_length=len(prompt) + request.max_new_tokens,
            logits_from=request.logprobs_from - 1 if request.prompt_logprobs else None,
        )
        self.answer = answer
        self.model = model
        self.lookup = Lookup()
        self.generator = request.generator
        if self.generator is None and request.sampling.temperature > 0:
            self.generator = request.sampling.new_generator()
        self.stream = TextStream(tokenizer, request.stop) if tokenizer is not None else None
        self.constraint = request.grammar.begin(request.stop_ids) if request.grammar is not None else None

    def judge_prompt(self, logits: torch.Tensor) -> None:
        """Notes the log-probabilities of tokens of the prompt, from the logits (n, V) before them."""
        request = self.answer.request
        n_known = request.logprobs_from + len(self.answer.prompt_logprobs)
        tokens = request.prompt[n_known : n_known + len(logits)]
        if request.prompt_logprobs and tokens:
            self.answer.prompt_logprobs += judged(logits[: len(tokens)], tokens, request.logprobs or 0)

    def choose(self, logits: torch.Tensor) -> torch.Tensor:
        """The next token, a tensor of no dimensions, from logits (V,)."""
        if self.constraint is not None:
            logits = self.constraint.forbid_others(logits)
        return choose(logits, self.answer.request.sampling, self.tokens, self.generator).to(logits.device)

    def look_up(self, n: int) -> None:
        """Puts tokens that may follow into the draft, n at most, if the text has been read but for its last token."""
        self.draft = []
        if n and self.n_unread == 1:
            room = self.max_length - len(self.tokens) - 1
            self.draft = self.lookup.draft(self.tokens, min(n, room))

    def accept(self, token: int) -> bool:
        """Whether the token that was just appended is the next one of the draft, so that it has been read already."""
        if not self.draft:
            return False
        is_next = self.draft[0] == token
        self.draft = self.draft[1:] if is_next else []
        self.n_read += is_next
        return is_next

    def append(self, token: int, logits: torch.Tensor) -> str | None:
        """Takes the next token, which came from logits (V,), and says why the answer ends with it; None: it goes on."""
        request = self.answer.request
        self.answer.tokens.append(token)
        self.tokens.append(token)
        if request.logprobs is not None:
            self.answer.logprobs += judged(logits[None], [token], request.logprobs)
        if token in request.stop_ids:
            return "stop"
        if self.stream is not None:
            self.answer.text += self.stream.push(token)
            if self.stream.stopped:
                return "stop"
        if self.constraint is not None:
            reason = self.constraint.append(token)
            if reason is not None:
                return reason
        return "length" if len(self.answer.tokens) == request.max_new_tokens else None

    def end_text(self) -> None:
        """No more tokens come."""
        if self.stream is not None:
            self.answer.text += self.stream.end()


def judged(logits: torch.Tensor, tokens: Sequence[int], n: int) -> list[Logprob]:
    """What a model thought of tokens (N,), and of the n likeliest at each place, by its logits (N, V)."""
    found = logprobs_of(logits, torch.tensor(tokens, device=logits.device), n)
    tops = zip(found.top_tokens.tolist(), found.top_logprobs.tolist(), strict=True)
    return [
        Logprob(token, logprob, list(zip(*top, strict=True)))
        for token, logprob, top in zip(tokens, found.logprobs.tolist(), tops, strict=True)
    ]


def check_request(request: Request, model: GPT, tokenizer: Tokenizer | None) -> None:
    """Raises InputError if a request can never be answered: something is out of its range, or the prompt too long."""
    request.sampling.check()
    n_prompt = len(request.prompt)
    block_size = model.config.block_size
    if n_prompt == 0:
        raise InputError("The prompt has 0 tokens, expected one at least: no room for an answer.")
    if request.max_new_tokens < 0:
        raise InputError(f"{request.max_new_tokens} new tokens are asked for, expected 0 or more.")
    if n_prompt + request.max_new_tokens > block_size:
        raise InputError(
            f"The prompt's {n_prompt} tokens and {request.max_new_tokens} new ones exceed what the model can read,"
            f" {block_size}. Shorten the prompt or lower --max_new_tokens."
        )
    if request.max_new_tokens == 0 and (n_prompt == 1 or not request.prompt_logprobs):
        raise InputError("No new tokens are asked for, and no log-probabilities of a prompt of two tokens or more.")
    if request.prompt_logprobs and not 1 <= request.logprobs_from < n_prompt:
        raise InputError(
            f"Log-probabilities are asked for from token {request.logprobs_from} of the prompt on, expected 1 to"
            f" {n_prompt - 1}: nothing stands before the first one that could tell its probability."
        )
    n_rows = model.config.padded_vocab_size
    if not 0 <= min(request.prompt) <= max(request.prompt) < n_rows:
        raise InputError(f"A token of the prompt is not one of the model's: expected 0 to {n_rows - 1}.")
    if max(request.sampling.logit_bias, default=0) >= n_rows:
        raise InputError(f"--logit_bias has token {max(request.sampling.logit_bias)}, expected 0 to {n_rows - 1}.")
    if request.grammar is not None and -math.inf in request.sampling.logit_bias.values():
        raise InputError("--logit_bias is -inf, expected a number, such as -100: a grammar may allow no other token.")
    if request.logprobs is not None and not 0 <= request.logprobs <= n_rows:
        raise InputError(f"{request.logprobs} log-probabilities are asked for, expected 0 to {n_rows}.")
    if request.stop and tokenizer is None:
        raise InputError("Stop strings need an engine with a tokenizer.")
