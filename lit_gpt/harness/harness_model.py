"""A model as lm-evaluation-harness asks it: log-likelihoods by a tree of tokens, answers by the engine.

What it says is what the harness' own backend for transformers says, item by item: the same tokens (a BOS if and only if
the tokenizer adds one), the same windows of a long text, prompts cut from the left alike.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from lit_gpt.data.chat_template import choose_template, fill_template
from lit_gpt.data.tokenizer import Tokenizer
from lit_gpt.display.words import counted, shortened
from lit_gpt.errors import InputError
from lit_gpt.evaluation.kept import Kept
from lit_gpt.evaluation.record_losses import eval_mode
from lit_gpt.generate.engine import Engine, Request
from lit_gpt.generate.sampling import Sampling
from lit_gpt.harness.loglikelihoods import BATCH_TOKENS, Continuation, likelihoods
from lit_gpt.model.gpt import GPT
from lit_gpt.ranges import LARGEST_SEED

MAX_GEN_TOKS = 256  # the harness' default for a task that does not say how long an answer may be
TEXTS_AT_ONCE = 1024  # that are encoded: the places of all their tokens are in memory meanwhile
N_PROBED = 64  # tokens of the text by which a model is known
END_OF_PREFILL = "\N{END OF TEXT} "

Progress = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]
"""Shows work with so many parts, and is told how many of them have just been done."""


class HarnessModel(TemplateLM):
    """A model and its tokenizer, for `lm_eval.evaluator.evaluate`."""

    def __init__(
        self,
        model: GPT,
        tokenizer: Tokenizer,
        kept: Kept,
        progress: Progress,
        *,
        batch_tokens: int = BATCH_TOKENS,
        max_batch: int = 16,
        seed: int = 0,
    ) -> None:
        """A model, of which what is in `kept` is not asked again.

        Args:
            model: Any; it may be quantized, or have an adapter.
            tokenizer: That of the model.
            kept: Answers of this and of other models.
            progress: Shows how far it is.
            batch_tokens: The most tokens of a pass that computes log-likelihoods.
            max_batch: The most answers that are generated at once.
            seed: Seed of answers that are drawn.
        """
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.kept = kept
        self.progress = progress
        self.batch_tokens = batch_tokens
        self.max_batch = max_batch
        self.seed = seed
        self.fingerprint = probe_fingerprint(model)
        self.n_cut = 0
        """How many prompts were longer than what the model reads, and lost their beginnings."""

    # ---- what the harness asks about it

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """The token that stands before a text without a context."""
        return self.tokenizer.eos_id if self.tokenizer.bos_id is None else self.tokenizer.bos_id

    @property
    def max_length(self) -> int:
        return self.model.config.block_size

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.fingerprint

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **others: Any) -> list[int]:
        """Tokens; `add_special_tokens` False leaves out the BOS that the tokenizer may add."""
        return self.encode([string], add_special_tokens)[0]

    def encode(self, texts: Sequence[str], add_special_tokens: bool | None = None) -> list[list[int]]:
        """The tokens of each text, as `tok_encode` has them."""
        bos = self.tokenizer.use_bos if add_special_tokens else add_special_tokens
        ids = []
        for first in range(0, len(texts), TEXTS_AT_ONCE):
            encoded = self.tokenizer.encode_batch(texts[first : first + TEXTS_AT_ONCE], bos)
            ids += [tokens.ids for tokens in encoded]
        return ids

    def chat_template(self, chat_template: bool | str = False) -> str:
        return self.tokenizer.chat_template or ""

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The text of a conversation; without a generation prompt its last message is one that goes on.

        A template that knows no system prompt gets the conversation without it, as in the harness.

        Raises:
            InputError: the tokenizer has no template, or it refuses the conversation.
        """
        source = choose_template(self.tokenizer.chat_templates, None)
        messages = [dict(message) for message in chat_history]
        if not add_generation_prompt:
            messages[-1]["content"] += END_OF_PREFILL
        try:
            text = fill_template(source, messages, add_generation_prompt, None, self.tokenizer.special_tokens)
        except InputError:
            others = [message for message in messages if message["role"] != "system"]
            if len(others) == len(messages):
                raise
            text = fill_template(source, others, add_generation_prompt, None, self.tokenizer.special_tokens)
        if add_generation_prompt:
            return text
        before, mark, _ = text.rpartition(END_OF_PREFILL)
        if mark:
            return before
        return text.rpartition(END_OF_PREFILL.strip())[0].rstrip()  # this template trims messages

    # ---- log-likelihoods

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """The log-likelihood of each continuation, and whether it is what greedy decoding says.

        Raises:
            InputError: a continuation has no token, or more than the model reads.
        """
        pairs = self.encode_pairs([request.args for request in requests])
        for request, (_, continuation) in zip(requests, pairs, strict=True):
            if not 0 < len(continuation) <= self.max_length:
                raise InputError(
                    f"The task {request.task_name} asks how likely {shortened(request.args[1])!r} is, which is"
                    f" {counted(len(continuation), 'token')} behind its prompt, expected 1 to {self.max_length:,}."
                )
        asked = [(request.args, *pair) for request, pair in zip(requests, pairs, strict=True)]
        return self._loglikelihood_tokens(asked)

    def encode_pairs(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[list[int], list[int]]]:
        """The tokens of contexts and continuations: a text is encoded as a whole, and parted where its context ends.

        Space at the end of a context goes to the continuation, whose first token most tokenizers give a space.
        """
        parted = []
        for context, continuation in pairs:
            text = context.rstrip()
            parted.append((text, context[len(text) :] + continuation))
        texts = list(dict.fromkeys(text for context, end in parted for text in (context, context + end) if context))
        tokens = dict(zip(texts, self.encode(texts), strict=True))

        encoded = []
        for context, continuation in parted:
            if context:
                n = len(tokens[context])
                encoded.append((tokens[context], tokens[context + continuation][n:]))
                continue
            # nothing comes before it, which a token says
            ids = self.tok_encode(continuation, add_special_tokens=False)
            n = int(ids[:1] == [self.prefix_token_id])
            encoded.append(([self.prefix_token_id], ids[n:]))
        return encoded

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **others: Any
    ) -> list[tuple[float, bool]]:
        """The log-likelihoods of texts that are encoded: (the texts, the context's tokens, the continuation's)."""
        asked = [Continuation(tuple(context), tuple(tokens)) for _, context, tokens in requests]
        for one in asked:
            self.n_cut += len(one.context) + len(one.tokens) > self.max_length + 1
        keys = [key_of(self.fingerprint, [one.context, one.tokens]) for one in asked]
        new = {key: one for key, one in zip(keys, asked, strict=True) if key not in self.kept}
        new_keys = list(new)
        with self.progress("log-likelihoods", len(new)) as done:
            for part in likelihoods(self.model, list(new.values()), self.batch_tokens):
                for i, found in part.items():
                    self.kept.add(new_keys[i], [found.logprob, found.is_greedy])
                done(len(part))
        return [tuple(self.kept[key]) for key in keys]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of each text; a long one is read in windows, each token of it once."""
        windows = []
        counts = []
        for ids in self.encode([request.args[0] for request in requests]):
            of_text = get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, context_len=1)
            pairs = [make_disjoint_window(window) for window in of_text]
            windows += [(("", ""), context, tokens) for context, tokens in pairs]
            counts.append(len(pairs))
        found = iter(self._loglikelihood_tokens(windows))
        return [sum(next(found)[0] for _ in range(n)) for n in counts]

    # ---- answers

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The answer to each prompt, up to the first of its stop strings.

        Raises:
            InputError: a task asks for something that the engine cannot do, or leaves no room for a prompt.
        """
        asked = [self.request(request, seed) for seed, request in enumerate(requests, self.seed)]
        keys = [key_of(self.fingerprint, question_of(request)) for request, _ in asked]
        new = {key: one for key, one in zip(keys, asked, strict=True) if key not in self.kept}
        # prompts that begin alike follow each other: the engine computes what they share once
        in_order = sorted(new.items(), key=lambda item: list(item[1][0].prompt))
        engine = Engine(self.model, self.tokenizer, max_batch=self.max_batch)
        with eval_mode(self.model), self.progress("answers", len(new)) as done:
            answers = engine.run(request for _, (request, _) in in_order)
            for (key, (_, until)), answer in zip(in_order, answers, strict=True):
                text = self.tokenizer.decode(answer.tokens)
                self.kept.add(key, postprocess_generated_text(text, until, think_end_token=None))
                done(1)
        return [self.kept[key] for key in keys]

    def request(self, asked: Instance, seed: int) -> tuple[Request, list[str]]:
        """What the engine is asked, and the stop strings that are cut off its answer."""
        context, settings = asked.args
        try:
            kwargs: dict[str, Any] = dict(normalize_gen_kwargs(settings, MAX_GEN_TOKS))
            until = handle_stop_sequences(kwargs.pop("until"), self.tokenizer.id_to_token(self.eot_token_id))
            n = kwargs.pop("max_gen_toks")
            sampling = sampling_of(kwargs, seed % (LARGEST_SEED + 1))
        except (TypeError, ValueError) as error:
            raise InputError(f"The task {asked.task_name} has generation_kwargs of a wrong type: {error}.") from None
        except InputError as error:
            raise InputError(f"The task {asked.task_name} has generation_kwargs that cannot be used: {error}") from None
        check_room(asked.task_name, n, self.max_length)

        room = self.max_length - n
        ids = self.tok_encode(context) or [self.prefix_token_id]
        self.n_cut += len(ids) > room
        specials = self.tokenizer.library.special_tokens()  # an answer never spells these out: they are stop tokens
        return (
            Request(
                prompt=ids[-room:],
                max_new_tokens=n,
                sampling=sampling,
                stop_ids=self.tokenizer.stop_ids | {specials[text] for text in until if text in specials},
                stop=[text for text in until if text and text not in specials],
            ),
            until,
        )


def check_room(task: str, max_gen_toks: int, block_size: int) -> None:
    """Raises InputError if answers as long as a task asks for leave no room for a prompt."""
    if not 0 < max_gen_toks < block_size:
        raise InputError(
            f"The task {task} asks for answers of up to {counted(max_gen_toks, 'token')}, but the model reads"
            f" {block_size:,}, prompt and answer together. Leave the task out, or lower max_gen_toks in its file."
        )


def sampling_of(kwargs: Mapping[str, Any], seed: int) -> Sampling:
    """How the tokens of an answer are chosen, by `generation_kwargs` as transformers names them.

    Raises:
        InputError: one of them is unknown, or out of its range.
    """
    known = {"do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "num_beams"}
    unknown = sorted(kwargs.keys() - known)
    if unknown:
        raise InputError(f"{' and '.join(unknown)}, expected none but {', '.join(sorted(known))}.")
    if kwargs.get("num_beams", 1) != 1:
        raise InputError(f"num_beams is {kwargs['num_beams']}, expected 1: there is no beam search.")
    sampling = Sampling(repetition_penalty=kwargs.get("repetition_penalty", 1.0))
    temperature = float(kwargs.get("temperature", 1.0))
    if kwargs["do_sample"] and temperature > 0:
        filters: dict[str, Any] = {name: kwargs.get(name) for name in ("top_k", "top_p", "min_p")}
        sampling = replace(sampling, temperature=temperature, seed=seed, **filters)
    sampling.check()
    return sampling


def question_of(request: Request) -> list[Any]:
    """All that an answer depends on, besides the model."""
    sampling = request.sampling
    return [
        list(request.prompt),
        request.max_new_tokens,
        sorted(request.stop_ids),
        list(request.stop),
        [sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p, sampling.repetition_penalty],
        sampling.seed,
    ]


# ---- which model it is, and which question


def key_of(model: str, question: Any) -> str:
    """The key of the answer of a model, given by its `probe_fingerprint`, to a question, which JSON can hold."""
    return hashlib.sha256(json.dumps([model, question]).encode()).hexdigest()[:32]


def probe_fingerprint(model: GPT) -> str:
    """A sha256 over how much text a model reads, and what it says about a fixed one, bit by bit.

    On a CPU another number of threads may round otherwise, so that it counts as another model.
    """
    n = min(N_PROBED, model.config.block_size)
    step = max(1, model.config.vocab_size // n)
    device = next(model.parameters()).device
    idx = torch.arange(n, device=device) * step % model.config.vocab_size
    with eval_mode(model), torch.inference_mode():
        logits = model(idx[None])
    said = logits.float().cpu().numpy().tobytes()
    return hashlib.sha256(str(model.config.block_size).encode() + said).hexdigest()
