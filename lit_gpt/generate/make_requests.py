"""From what is asked of the server to requests of the engine. Prompts are encoded as in training."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from lit_gpt.data.answer_spans import unprinted
from lit_gpt.data.conversation_tokens import encode_question
from lit_gpt.data.messages import read_messages
from lit_gpt.data.prompts import render
from lit_gpt.data.tokenizer import Tokenizer
from lit_gpt.data.tool_calls import read_tools
from lit_gpt.errors import InputError
from lit_gpt.generate.engine import Request
from lit_gpt.generate.json_schema import Grammar, JsonSchemas
from lit_gpt.generate.protocol import ChatBody, CompletionBody, OpenAIBody, ProcessBody
from lit_gpt.generate.sampling import Sampling
from lit_gpt.ranges import LARGEST_SEED


@dataclass
class RequestMaker:
    """Makes requests, within the limits of a server."""

    tokenizer: Tokenizer
    style: str
    """The text around a question, as `resolve_style` gives it."""
    block_size: int
    """The most tokens that the model can read."""
    max_new_tokens: int
    """The most tokens of an answer."""
    defaults: Sampling
    """The top_p, min_p and repetition_penalty of requests that have none."""
    seeds: random.Random
    """Where requests without a seed get one."""
    switches: Mapping[str, Any] = field(default_factory=dict)
    """Variables for the template of the style, see `switch_thinking`."""

    def __post_init__(self) -> None:
        self.schemas = JsonSchemas(self.tokenizer)

    def of_completion(self, body: CompletionBody) -> list[Request]:
        """The n requests of the first prompt, then those of the second."""
        if body.echo and body.stream and body.logprobs is not None:
            raise InputError("A stream has no log-probabilities of the prompt. Leave out stream, echo or logprobs.")
        requests = []
        for prompt in self.encode(body.prompt):
            echoes_logprobs = body.echo and body.logprobs is not None and len(prompt) > 1
            request = self.request(
                prompt,
                body.max_tokens,
                body.sampling(self.defaults),
                body.stop,
                body.logprobs,
                echoes_logprobs,
                body.model,
                self.grammar(body),
            )
            requests += self.choices(request, body.n)
        return requests

    def of_chat(self, body: ChatBody) -> list[Request]:
        """The n requests of a conversation."""
        messages = read_messages(body.messages, "The request")
        if messages[-1]["role"] == "assistant":
            raise InputError("The last message is the assistant's, expected one that it is to answer.")
        tools = read_tools(body.tools, "The request: tools") if body.tools else None
        rendered = render(self.style, {"messages": messages, "tools": tools}, self.tokenizer, self.switches)
        if unprinted("tools") in rendered.remarks:
            raise InputError("The chat template of this model takes no tools. Leave tools out.")
        prompt = encode_question(rendered, self.tokenizer).tolist()
        logprobs = body.top_logprobs if body.logprobs else None
        asked = body.max_completion_tokens or body.max_tokens
        if asked is None:
            asked = self.room(prompt)
        sampling = body.sampling(self.defaults)
        grammar = self.grammar(body)
        request = self.request(prompt, asked, sampling, body.stop, logprobs, model=body.model, grammar=grammar)
        return self.choices(request, body.n)

    def of_process(self, body: ProcessBody) -> list[Request]:
        """The requests of the challenge's /process. An answer ends where the model's window does."""
        (prompt,) = self.encode([body.prompt])
        n_new = min(body.max_new_tokens, self.room(prompt))
        request = self.request(
            prompt,
            n_new,
            body.sampling(self.defaults),
            body.stop_sequences,
            logprobs=body.top_k_per_token,
            prompt_logprobs=body.echo_prompt and len(prompt) > 1,
        )
        return self.choices(request, body.num_samples)

    def request(
        self,
        prompt: Sequence[int],
        max_new_tokens: int,
        sampling: Sampling,
        stop: Sequence[str],
        logprobs: int | None,
        prompt_logprobs: bool = False,
        model: str = "",
        grammar: Grammar | None = None,
    ) -> Request:
        """A request. Raises InputError if it asks for more tokens than the server gives."""
        if max_new_tokens > self.max_new_tokens:
            raise InputError(f"{max_new_tokens} new tokens are asked for, expected {self.max_new_tokens} at most.")
        if sampling.seed is None and sampling.temperature > 0:
            sampling = replace(sampling, seed=self.seeds.randint(0, LARGEST_SEED))
        return Request(
            prompt=prompt,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            stop_ids=self.tokenizer.stop_ids,
            stop=stop,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            model=model,
            grammar=grammar,
        )

    def grammar(self, body: OpenAIBody) -> Grammar | None:
        """What the answers to a prompt have to be. Raises InputError if the schema cannot be used."""
        schema = body.response_format.schema_of_answer()
        return None if schema is None else self.schemas.grammar(schema)

    def choices(self, request: Request, n: int) -> list[Request]:
        """The same request n times, with seeds that follow each other."""
        requests = [request]
        for i in range(1, n):
            seed = request.sampling.seed
            next_seed = None if seed is None else (seed + i) % (LARGEST_SEED + 1)
            requests.append(replace(request, sampling=replace(request.sampling, seed=next_seed)))
        return requests

    def encode(self, prompts: Sequence[str] | Sequence[Sequence[int]]) -> list[list[int]]:
        """Texts as tokens, with BOS if the tokenizer adds one; tokens stay as they are."""
        return [
            self.tokenizer.encode(prompt).tolist() if isinstance(prompt, str) else list(prompt) for prompt in prompts
        ]

    def room(self, prompt: Sequence[int]) -> int:
        """How many tokens an answer can have at most. Raises InputError if there is no room for one."""
        room = min(self.max_new_tokens, self.block_size - len(prompt))
        if room < 1:
            raise InputError(f"The prompt has {len(prompt)} tokens, and the model can read {self.block_size} in all.")
        return room
