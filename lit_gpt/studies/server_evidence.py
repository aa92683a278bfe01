"""Gathers what a server does beside what the models here would do: the evidence that server_check.py judges."""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from lit_gpt.checkpoint.load import build_model, load_model, load_weights, quantize_empty_model
from lit_gpt.cli import read_hyperparameters
from lit_gpt.cpu_codes import CPU_KINDS, CpuQuantize
from lit_gpt.data.chat_template import choose_template, fill_template
from lit_gpt.data.conversation_tokens import encode_question
from lit_gpt.data.dataset import Dataset
from lit_gpt.data.prompts import Rendered, render, resolve_style, style_label, style_names
from lit_gpt.device import inference_dtype
from lit_gpt.errors import InputError
from lit_gpt.generate.answers import bare_question
from lit_gpt.generate.engine import Engine, Request
from lit_gpt.generate.token_texts import TokenTexts
from lit_gpt.lora import DoRALinear, LoRALinear
from lit_gpt.model.gpt import GPT
from lit_gpt.model.rope import Rope
from lit_gpt.quantize import Quantize
from lit_gpt.runs.header import finetuned_file, read_header
from lit_gpt.runs.load_finetuned import UseArgs, put_trained_on, read_base, read_for_use
from lit_gpt.runs.methods import METHODS
from lit_gpt.studies import ask_server
from lit_gpt.studies.ask_server import Ask, Said
from lit_gpt.studies.server_check import (
    EXACT,
    NO_ADAPTER,
    NO_BOS,
    ROUNDED,
    SECOND_BOS,
    TRAINED,
    Answered,
    Chat,
    Evidence,
    TextPrompt,
    Weighed,
)

FACTORS = (0.125, 0.25, 0.5, 0.75, 1.5, 2.0, 3.0, 4.0, 8.0)
ROPE_BASES = (10_000, 100_000, 500_000, 1_000_000)  # what programs fall back to, and what models have
ROPE_FACTORS = (0.1, 0.5, 2.0, 10.0)
POSITION_FACTORS = (0.25, 0.5, 2.0, 4.0)
LONGEST_PROBE = 512  # tokens of a record that are sent
SYSTEM = "You are a helpful assistant."  # what many templates say by themselves
REPEATS = "one two three four, one two three four, one two three four, one two three"
"""A text that goes on with what was in it, unless this is penalized."""
N_PLACES = 4  # places of an answer that are asked for one by one, of a server that echoes no prompt


@dataclass(frozen=True)
class Probe:
    """A validation record that the server is asked about."""

    tokens: list[int]
    """All of it, as it was trained."""
    n_prompt: int
    question: str | None
    """The user's words, if they alone make this prompt; None for longer conversations."""

    @property
    def prompt(self) -> list[int]:
        return self.tokens[: self.n_prompt]


@dataclass(frozen=True)
class Point:
    """A token in its place."""

    before: tuple[int, ...]
    token: int


class Here:
    """The trained model, and what it takes to make others of it."""

    def __init__(self, args: UseArgs, device: torch.device) -> None:
        """Raises InputError for what `read_for_use` and `load_finetuned` refuse."""
        assert args.finetuned is not None, "a run is checked"
        self.args = args
        self.device = device
        self.tokenizer, self.config, trained_style = read_for_use(args)
        self.style = resolve_style("auto", self.tokenizer, trained_style)
        self.header, self.base_dir = read_base(args.checkpoint_dir, args.finetuned)
        self.trains_base = METHODS[self.header.method].trains_base
        self.model = self.load(args, self.header.quantize)
        self.texts = TokenTexts(self.tokenizer)
        self.lora = [module for module in self.model.modules() if isinstance(module, LoRALinear)]
        self.ropes = [module for module in self.model.modules() if isinstance(module, Rope)]

    def load(self, args: UseArgs, quantize: Quantize | CpuQuantize | None) -> GPT:
        """The trained model with its base in another dtype, or in codes."""
        assert args.finetuned is not None, "a run is checked"
        model = build_model(self.config)
        quantize_empty_model(model, quantize, self.device)
        base = load_weights(model, self.base_dir, inference_dtype(args.precision), self.device)
        model, _ = put_trained_on(model, base, self.base_dir, self.header, args.finetuned)
        return model.eval()

    def variants(self) -> Iterator[tuple[str, Callable[[], Any]]]:
        """Models that are wrong or rounded, by the names that server_check.py knows, each as a context that makes it.

        The rounded ones come first: they say how far off the right one may be.
        """
        in_bfloat16 = replace(self.args, precision="bf16-true")
        yield ROUNDED[0], lambda: self.rounded(in_bfloat16, self.header.quantize)
        if self.header.quantize is None:
            kinds: list[Quantize | CpuQuantize] = ["bnb.nf4"]
            if self.device.type == "cpu":
                kinds = [*CPU_KINDS, *kinds]
            for kind in kinds:
                yield f"in {kind}", lambda kind=kind: self.rounded(self.args, kind)  # type: ignore[misc]
        yield NO_ADAPTER, self.base
        for factor in FACTORS if self.lora else ():
            yield f"adapter x {factor:g}", lambda factor=factor: self.scaled(factor)  # type: ignore[misc]
        bases = [*ROPE_BASES, *(self.config.rope_base * factor for factor in ROPE_FACTORS)]
        for base in sorted({round(base) for base in bases} - {round(self.config.rope_base)}):
            yield f"rope base {base}", lambda base=base: self.rotated(base)  # type: ignore[misc]
        for factor in POSITION_FACTORS:
            yield f"positions x {factor:g}", lambda factor=factor: self.stretched(factor)  # type: ignore[misc]

    @contextmanager
    def rounded(self, args: UseArgs, quantize: Quantize | CpuQuantize | None) -> Iterator[GPT | None]:
        """The trained model with rounded weights. None if it has none of this kind, for the shape of its linears."""
        try:
            model = self.load(args, quantize)
        except InputError:
            model = None
        yield model

    @contextmanager
    def base(self) -> Iterator[GPT | None]:
        """The model before it was fine-tuned. None if it is not there."""
        only_lora = self.lora and not any(isinstance(module, DoRALinear) for module in self.lora)
        if only_lora:
            with self.scaled(0) as model:
                yield model
            return
        folder = self.base_dir
        if self.trains_base:
            folder = Path(read_header(self.args.finetuned).checkpoint_dir)  # type: ignore[arg-type]
        if not folder.is_dir():
            yield None
            return
        yield load_model(folder, inference_dtype(self.args.precision), self.device, self.header.quantize)

    @contextmanager
    def scaled(self, factor: float) -> Iterator[GPT]:
        before = [module.scaling for module in self.lora]
        for module in self.lora:
            module.scaling *= factor
        try:
            yield self.model
        finally:
            for module, scaling in zip(self.lora, before, strict=True):
                module.scaling = scaling

    @contextmanager
    def rotated(self, base: float) -> Iterator[GPT]:
        """The trained model with another rope base."""
        before = [(rope.base, rope.theta) for rope in self.ropes]
        for rope in self.ropes:
            rope.base = base
            rope.theta = rope.frequencies(length=1)[0].to(rope.theta)
        try:
            yield self.model
        finally:
            for rope, (base_before, theta) in zip(self.ropes, before, strict=True):
                rope.base, rope.theta = base_before, theta

    @contextmanager
    def stretched(self, factor: float) -> Iterator[GPT]:
        """The trained model whose positions are multiplied."""
        before = [rope.theta for rope in self.ropes]
        for rope in self.ropes:
            rope.theta = rope.theta * factor
        try:
            yield self.model
        finally:
            for rope, theta in zip(self.ropes, before, strict=True):
                rope.theta = theta


def data_dir_of(finetuned: Path) -> Path:
    """The folder of the data that a run was trained on.

    Raises:
        InputError: the run does not say, or the data are not there.
    """
    folder = finetuned_file(finetuned).parent
    for path in (folder / "hyperparameters.yaml", folder.parent / "hyperparameters.yaml"):
        if path.is_file():
            data_dir = Path(read_hyperparameters(path)["data_dir"])
            if data_dir.is_dir():
                return data_dir
            raise InputError(f"{path} names the data {data_dir}, which are not there. Name them: --data_dir.")
    raise InputError(f"{finetuned} does not say on which data it was trained. Name them: --data_dir.")


def read_probes(data: Dataset, here: Here, n_records: int) -> list[Probe]:
    """The first validation records. Raises InputError if there are none, or they are for another tokenizer."""
    data.check_fits(here.tokenizer, here.config)
    probes = []
    for i in range(min(n_records, len(data))):
        prompt, answer = data.question(i)
        tokens = [*prompt.tolist(), *answer.tolist()][: min(LONGEST_PROBE, here.config.block_size - 1)]
        if len(prompt) >= len(tokens):
            continue
        question = bare_question(prompt, here.tokenizer, data)
        asked = prompt_tokens(here, question_messages(question))
        probes.append(Probe(tokens, len(prompt), question if asked == prompt.tolist() else None))
    if not probes:
        raise InputError(f"{data.data_dir} has no validation record that fits. Prepare it with --val_fraction 0.05.")
    return probes


def question_messages(question: str, system: str | None = None) -> list[dict[str, Any]]:
    messages = [{"role": "user", "content": question}]
    return messages if system is None else [{"role": "system", "content": system}, *messages]


def prompt_tokens(here: Here, messages: Sequence[Mapping[str, Any]], style: str | None = None) -> list[int] | None:
    """Messages as the tokens of a prompt in a style, None being that of the training; None if it refuses them."""
    try:
        rendered = render(style or here.style, {"messages": messages}, here.tokenizer)
    except InputError:
        return None
    return encode_question(rendered, here.tokenizer).tolist()


# ---- all of it


def gather(
    ask: Ask, name: str, listed: dict[str, Any], here: Here, data: Dataset, n_records: int, n_new: int
) -> Evidence:
    """Asks the server `ask` about its model `name`, for which `listed` is its entry among the models."""
    probes = read_probes(data, here, n_records)
    unknown: list[str] = []

    # its weights
    print(f"Asking about {len(probes)} validation records ...", file=sys.stderr)
    points, values = ask_points(ask, name, here, probes, unknown)
    weighed = None
    if points:
        weighed = weigh(here, points, values)

    # its prompts and answers
    texts = ask_texts(ask, name, here, probes, unknown)
    n_new, refused = room_for(ask, name, probes[0], here, n_new)
    answers = ask_answers(ask, name, here, probes, n_new)
    chats, chat_answers = ask_chats(ask, name, here, probes, n_new, weighed, unknown)
    return Evidence(
        weighed=weighed,
        texts=texts,
        chats=chats,
        answers=[*answers, *chat_answers],
        refused=refused,
        n_context=ask_server.context_of(ask, listed),
        longest=min(int(data.meta["longest"]), here.config.block_size),
        unknown=unknown,
    )


# ---- the weights


def ask_points(
    ask: Ask, name: str, here: Here, probes: Sequence[Probe], unknown: list[str]
) -> tuple[list[Point], list[float]]:
    """Tokens in their places, and their log-probabilities by the server: of whole records, or of the likeliest tokens
    at some places if it echoes no prompt. Empty if it shows none.
    """
    points: list[Point] = []
    values: list[float] = []
    for probe in probes:
        said = ask_server.complete(ask, name, probe.tokens, 1, echo=True, logprobs=1)
        if isinstance(said, str) or len(said.tokens) < len(probe.tokens):
            break
        for i in range(1, len(probe.tokens)):
            value = said.tokens[i].logprob
            if value is not None:
                points.append(Point(tuple(probe.tokens[:i]), probe.tokens[i]))
                values.append(value)
    if points:
        return points, values

    # the next token alone
    for probe in probes:
        n_answer = len(probe.tokens) - probe.n_prompt
        for place in range(min(N_PLACES, n_answer)):
            before = probe.tokens[: probe.n_prompt + place * n_answer // N_PLACES]
            said = ask_server.complete(ask, name, before, 1, logprobs=ask_server.LEAST_TOP)
            if isinstance(said, str):
                text = sendable_text(here, before)
                said = ask_server.complete(ask, name, text, 1, logprobs=ask_server.LEAST_TOP) if text else said
            if isinstance(said, str) or not said.tokens or not said.tokens[0].top:
                unknown.append("Its log-probabilities: it shows none.")
                return [], []
            for token, value in known_tokens(here, before, said.tokens[0].top):
                points.append(Point(tuple(before), token))
                values.append(value)
    return points, values


def known_tokens(here: Here, before: list[int], top: Mapping[str, float]) -> list[tuple[int, float]]:
    """Those of the likeliest tokens of a server that are among the likeliest here, by their texts."""
    likeliest = logits_of(here.model, before)[-1].topk(200).indices.tolist()
    found: dict[str, int] = {}
    for token in likeliest:
        found.setdefault(here.texts.text_of(token), token)
    return [(found[text], value) for text, value in top.items() if text in found]


def logits_of(model: GPT, tokens: Sequence[int]) -> torch.Tensor:
    """The logits of what follows each token, (T, V)."""
    device = model.transformer.wte.weight.device
    with torch.no_grad():
        return model(torch.tensor([list(tokens)], device=device))[0]


def score(model: GPT, points: Sequence[Point]) -> list[float]:
    """The log-probability of each token, in nats. Points of one text are read at once."""
    values = [0.0 for _ in points]
    waiting = sorted(range(len(points)), key=lambda i: len(points[i].before))
    while waiting:
        # the longest text, and all points that are in it
        longest = points[waiting[-1]].before
        inside = [i for i in waiting if longest[: len(points[i].before)] == points[i].before]
        logprobs = logits_of(model, longest).float().log_softmax(-1)  # (T, V)
        for i in inside:
            values[i] = float(logprobs[len(points[i].before) - 1, points[i].token])
        done = set(inside)
        waiting = [i for i in waiting if i not in done]
    return values


def weigh(here: Here, points: Sequence[Point], values: Sequence[float]) -> Weighed:
    """The server's log-probabilities beside those of the models here.

    The trained one is the first, and if it is exactly the server's no other is asked.
    """
    models = {TRAINED: score(here.model, points)}
    positions = [len(point.before) for point in points]
    weighed = Weighed(values, positions, models)
    if weighed.distances()[TRAINED] > EXACT:
        print("It is not exactly the trained model. Comparing with others ...", file=sys.stderr)
        for name, variant in here.variants():
            with variant() as model:
                if model is not None:
                    models[name] = score(model, points)
    return weighed


@contextmanager
def model_called(here: Here, name: str) -> Iterator[GPT]:
    """The model of `Here.variants` of this name."""
    variant = dict(here.variants()).get(name)
    if name == TRAINED or variant is None:
        yield here.model
        return
    with variant() as model:
        yield model


# ---- prompts and answers


def sendable_text(here: Here, tokens: Sequence[int]) -> str | None:
    """The text that has these tokens for the tokenizer as it is, without a BOS that it adds; None if there is none."""
    tokenizer = here.tokenizer
    shown = list(tokens)
    if tokenizer.use_bos and shown[:1] == [tokenizer.bos_id]:
        shown = shown[1:]
    text = tokenizer.decode_with_special(shown)
    return text if tokenizer.encode(text).tolist() == list(tokens) else None


def ask_texts(ask: Ask, name: str, here: Here, probes: Sequence[Probe], unknown: list[str]) -> list[TextPrompt]:
    """Prompts that are sent as texts."""
    tokenizer = here.tokenizer
    bos = None if tokenizer.bos_id is None else tokenizer.id_to_token(tokenizer.bos_id)
    prompts: list[TextPrompt] = []
    for probe in probes:
        text = sendable_text(here, probe.prompt)
        if text is None:
            continue
        said = ask_server.complete(ask, name, text, 1, echo=True, logprobs=1)
        n_least = len(probe.prompt) - 1
        shown: list[str] | None = None
        if not isinstance(said, str) and len(said.tokens) > n_least and said.n_prompt is not None:
            shown = [token.text for token in said.tokens[: said.n_prompt]]
        elif isinstance(said, str) or said.n_prompt is None:
            said = ask_server.complete(ask, name, text, 1)
        if isinstance(said, str) or said.n_prompt is None:
            unknown.append("The tokens of a text: it does not count them.")
            return prompts
        here_texts = [here.texts.text_of(token) for token in probe.prompt]
        prompts.append(TextPrompt(here_texts, said.n_prompt, shown, bos))
    return prompts


def room_for(ask: Ask, name: str, probe: Probe, here: Here, n_new: int) -> tuple[int, str | None]:
    """How many new tokens the server gives, `n_new` at most, and what it says if these are too many."""
    refused = None
    n_new = min(n_new, here.config.block_size - len(probe.prompt))
    while n_new > 1:
        said = complete_prompt(ask, name, here, probe, n_new)
        if not isinstance(said, str):
            break
        refused = refused or said
        n_new //= 2
    return n_new, refused


def complete_prompt(ask: Ask, name: str, here: Here, probe: Probe, n_new: int) -> Said | str:
    """The answer to the tokens of a prompt, or to its text from a server that takes no tokens."""
    said = ask_server.complete(ask, name, probe.prompt, n_new, logprobs=1)
    if isinstance(said, str):
        text = sendable_text(here, probe.prompt)
        if text is not None:
            said = ask_server.complete(ask, name, text, n_new)
    return said


def greedy(here: Here, model: GPT, prompts: Sequence[Sequence[int]], n_new: int) -> list[tuple[str, str]]:
    """The likeliest answers of a model, and why each ended."""
    requests = []
    for prompt in prompts:
        room = min(n_new, model.config.block_size - len(prompt))
        requests.append(Request(list(prompt), room, stop_ids=here.tokenizer.stop_ids))
    engine = Engine(model, here.tokenizer)
    return [(answer.text, answer.finish_reason or "") for answer in engine.run(requests)]


def ask_answers(ask: Ask, name: str, here: Here, probes: Sequence[Probe], n_new: int) -> list[Answered]:
    """Answers to prompts, twice each, beside those of the trained model and of its base."""
    prompts = [probe.prompt for probe in probes]
    expected = greedy(here, here.model, prompts, n_new)
    of_base: list[str | None] = [None for _ in probes]
    with here.base() as base:
        if base is not None:
            of_base = [text for text, _ in greedy(here, base, prompts, n_new)]
    answers = []
    for probe, expected_answer, base_text in zip(probes, expected, of_base, strict=True):
        said = complete_prompt(ask, name, here, probe, n_new)
        again = complete_prompt(ask, name, here, probe, n_new)
        if isinstance(said, str) or isinstance(again, str):
            continue
        one = beside(here, "prompt", probe.prompt, expected_answer, said, again, n_new)
        answers.append(replace(one, base=base_text))
    return [*answers, *ask_repeats(ask, name, here, n_new)]


def beside(
    here: Here, asked_as: str, prompt: Sequence[int], expected: tuple[str, str], said: Said, again: Said, n_new: int
) -> Answered:
    """What the server said to a prompt, twice, beside the text that is expected and how that ends."""
    text, finish = expected
    before = [here.texts.text_of(token) for token in prompt]
    return Answered(
        asked_as=asked_as,
        expected=text,
        expected_finish=finish,
        server=said.text,
        finish=said.finish,
        again=again.text,
        n_asked=n_new,
        n_server=said.n_new,
        unlikely=unlikely_tokens(said, before),
    )


def ask_repeats(ask: Ask, name: str, here: Here, n_new: int) -> list[Answered]:
    """The answer to a text that repeats itself, for what a penalty does to it; nothing is expected of it."""
    said = ask_server.complete(ask, name, REPEATS, n_new, logprobs=1)
    if isinstance(said, str):
        return []
    before = [here.texts.text_of(token) for token in here.tokenizer.encode(REPEATS).tolist()]
    unlikely = unlikely_tokens(said, before)
    return [Answered("repeats", "", "", said.text, said.finish, said.text, n_new, said.n_new, unlikely=unlikely)]


def unlikely_tokens(said: Said, before: Sequence[str]) -> list[tuple[str, str, bool]]:
    """See `Answered.unlikely`. `before` are the texts of the prompt's tokens."""
    found = []
    seen = set(before)
    for token in said.tokens:
        if token.top and token.logprob is not None:
            likeliest = max(token.top, key=token.top.__getitem__)
            if likeliest != token.text and token.top[likeliest] > token.logprob + EXACT:
                found.append((token.text, likeliest, likeliest in seen))
        seen.add(token.text)
    return found


# ---- conversations


def ask_chats(
    ask: Ask, name: str, here: Here, probes: Sequence[Probe], n_new: int, weighed: Weighed | None, unknown: list[str]
) -> tuple[list[Chat], list[Answered]]:
    """Conversations as messages: the questions, and two of them with a system message."""
    questions = [probe.question for probe in probes if probe.question is not None]
    if not questions:
        unknown.append("What it makes of messages: no validation record is a single question.")
        return [], []
    conversations = [question_messages(question) for question in questions]
    with_system = [question_messages(question, "Answer in one short sentence.") for question in questions[:2]]
    conversations += [messages for messages in with_system if prompt_tokens(here, messages) is not None]
    expected = greedy(here, here.model, [prompt_tokens(here, m) or [] for m in conversations], n_new)

    chats = []
    answers = []
    nearest, normal = weighed.nearest() if weighed is not None else (TRAINED, 0.0)
    with model_called(here, nearest) as model:
        for messages, expected_answer in zip(conversations, expected, strict=True):
            said = ask_server.chat(ask, name, messages, n_new, logprobs=True, top_logprobs=1)
            if isinstance(said, str):
                said = ask_server.chat(ask, name, messages, n_new)
            again = ask_server.chat(ask, name, messages, n_new)
            if isinstance(said, str) or isinstance(again, str):
                unknown.append(f"What it makes of messages: {said if isinstance(said, str) else again}")
                break
            chats.append(compare_chat(ask, name, here, model, messages, said, normal))
            # with no system message in training there may be none here that is right
            if len(messages) == 1:
                prompt = prompt_tokens(here, messages) or []
                answers.append(beside(here, "chat", prompt, expected_answer, said, again, n_new))
    return chats, answers


def compare_chat(
    ask: Ask, name: str, here: Here, model: GPT, messages: list[dict[str, Any]], said: Said, normal: float
) -> Chat:
    """What a conversation has become, beside what it might have."""
    prompts = candidates(here, messages)
    n_here = {candidate: len(tokens) for candidate, tokens in prompts.items()}
    has_system = messages[0]["role"] == "system"
    text = here.tokenizer.decode_with_special(prompts[TRAINED])

    # the prompt itself, of a server that shows it
    server_text = ask_server.template_text(ask, messages)
    if server_text is not None and here.tokenizer.use_bos and prompts[TRAINED][:1] == [here.tokenizer.bos_id]:
        bos = here.tokenizer.id_to_token(prompts[TRAINED][0])  # which llama.cpp puts there later
        server_text = bos + server_text.removeprefix(bos)
    tokens = ask_server.template_tokens(ask, name, messages) if server_text is None else None
    if tokens is not None:
        server_text = here.tokenizer.decode_with_special(tokens)

    # what it says of its answer
    values = None
    by_candidate = {}
    logprobs = [token.logprob for token in said.tokens]
    answer = here.tokenizer.encode("".join(token.text for token in said.tokens), bos=False).tolist()
    is_same = [here.texts.text_of(token) for token in answer] == [token.text for token in said.tokens]
    if answer and is_same and None not in logprobs:
        values = [float(value) for value in logprobs if value is not None]
        for candidate, prompt in prompts.items():
            # as long as the server's, or the one of the training, which is compared with
            if candidate == TRAINED or said.n_prompt in (None, len(prompt)):
                by_candidate[candidate] = score(model, points_of(prompt, answer))
    return Chat(has_system, n_here, said.n_prompt, values, by_candidate, normal, text, server_text)


def points_of(prompt: Sequence[int], answer: Sequence[int]) -> list[Point]:
    return [Point((*prompt, *answer[:i]), token) for i, token in enumerate(answer)]


def candidates(here: Here, messages: Sequence[Mapping[str, Any]]) -> dict[str, list[int]]:
    """A conversation as the tokens of prompts: of the training's, and of others by what they do otherwise."""
    tokenizer = here.tokenizer
    trained = prompt_tokens(here, messages)
    assert trained is not None, "it was rendered before"
    prompts = {TRAINED: trained}
    if tokenizer.bos_id is not None:
        prompts[SECOND_BOS] = [tokenizer.bos_id, *trained]
        if trained[:1] == [tokenizer.bos_id]:
            prompts[NO_BOS] = trained[1:]

    # another system message
    question = [message for message in messages if message["role"] != "system"]
    others: dict[str, Sequence[Mapping[str, Any]]] = {"with an empty system message": question_messages("", "")[:1]}
    others = {name: [*system, *question] for name, system in others.items()}
    if len(question) < len(messages):
        others["without the system message"] = question
    else:
        others["with a system message of the template"] = [{"role": "system", "content": SYSTEM}, *question]
    for name, changed in others.items():
        tokens = prompt_tokens(here, changed)
        if tokens is not None:
            prompts.setdefault(name, tokens)
    without = without_first_turn(here, messages)
    if without is not None:
        prompts["without the system message of the template"] = without

    # another template
    for style in style_names():
        if style == here.style:
            continue
        tokens = prompt_tokens(here, messages, style)
        if tokens is not None:
            prompts[f"in the style {style_label(style)}"] = tokens
    if here.style == "chat":
        template = choose_template(tokenizer.chat_templates, None)
        text = fill_template(template, messages, False, None, tokenizer.special_tokens)
        prompts["without the beginning of an answer"] = encode_question(Rendered(text, [], False), tokenizer).tolist()
    return {name: tokens for name, tokens in prompts.items() if name == TRAINED or tokens != trained}


def without_first_turn(here: Here, messages: Sequence[Mapping[str, Any]]) -> list[int] | None:
    """A prompt without the system message that its template writes by itself; None if there is none."""
    if messages[0]["role"] == "system":
        return None
    tokens = prompt_tokens(here, messages) or []
    with_empty = prompt_tokens(here, question_messages(messages[0]["content"], ""))
    begins = [i for i, token in enumerate(tokens) if token == tokens[0]]
    # where the default is written, an empty message in its place makes the prompt shorter
    is_written = with_empty is not None and len(with_empty) < len(tokens) and len(begins) > 2
    return tokens[begins[1] :] if is_written else None
