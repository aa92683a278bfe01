"""Answers to choose from: how likely the model finds each, as a whole and with the token that ends it.

    p(choice) = product of p(token | all tokens before)        over the tokens of the choice and its stop token

and of these the shares. That an answer ends is part of it: without it "no" would always be likelier than "not at all",
of which it is the beginning. The choices share the prompt, which is read once.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from lit_gpt.data.conversation_tokens import ConversationEncoder
from lit_gpt.data.loss_mask import mark_trained
from lit_gpt.data.prompts import render
from lit_gpt.data.tokenizer import Tokenizer
from lit_gpt.errors import InputError
from lit_gpt.generate.engine import Answer, Request


class Choice(NamedTuple):
    """An answer that the model may give."""

    text: str
    logprob: float
    """The natural logarithm of its probability among all texts."""
    share: float
    """Its probability among the choices."""


def requests_for_choices(
    question: Mapping[str, Any], choices: Sequence[str], style: str, tokenizer: Tokenizer
) -> list[Request]:
    """A request for each choice, by the tokens with which it would be trained as the answer to a question.

    Args:
        question: What `prompts.render` takes: an instruction and its input, or messages.
        choices: Texts, each another one.
        style: The prompt style.
        tokenizer: The model's.

    Raises:
        InputError: there are no two choices, or two are the same, or one is empty.
    """
    if len(set(choices)) < 2 or len(set(choices)) < len(choices) or not all(choices):
        raise InputError(f"--choices are {list(choices)}, expected two or more, each another one and none empty.")
    requests = []
    for choice in choices:
        answered = {**question, "output": choice}
        if "messages" in question:
            answered = {**question, "messages": [*question["messages"], {"role": "assistant", "content": choice}]}
        rendered = render(style, answered, tokenizer)
        (encoding,) = ConversationEncoder(tokenizer).encode_batch([rendered])
        ids, marks = mark_trained(rendered, encoding.encoded, tokenizer)
        # the last answer of the conversation: the tokens after the last one that is none of it
        first = 1 + max(i for i, mark in enumerate(marks) if not mark)
        requests.append(Request(ids, 0, prompt_logprobs=True, logprobs_from=first))
    return requests


def weigh(choices: Sequence[str], answers: Sequence[Answer]) -> list[Choice]:
    """The choices in their order, from the answers to `requests_for_choices`."""
    logprobs = [math.fsum(entry.logprob for entry in answer.prompt_logprobs) for answer in answers]
    largest = max(logprobs)
    weights = [math.exp(logprob - largest) for logprob in logprobs]
    total = math.fsum(weights)
    return [Choice(*parts) for parts in zip(choices, logprobs, (weight / total for weight in weights), strict=True)]
