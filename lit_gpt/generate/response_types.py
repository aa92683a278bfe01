"""What the server says, in types: OpenAI's responses, and those of the NeurIPS LLM efficiency challenge.

`responses.py` fills them in, mypy checks that it does, and GET /openapi.json hands them on to generators of clients.
"""

from typing import Annotated, Literal, NotRequired

from pydantic import Field
from typing_extensions import TypedDict  # pydantic reads that of typing from Python 3.12 on

ErrorKind = Literal[
    "invalid_request_error", "authentication_error", "not_found_error", "rate_limit_error", "server_error"
]
FinishReason = Annotated[str | None, Field(json_schema_extra={"enum": ["stop", "length", "error", None]})]
"""None as long as the answer goes on; error if its grammar became too complex."""


# ---- OpenAI


class Head(TypedDict):
    """What each of OpenAI's responses has."""

    id: str
    created: int
    """In seconds since 1970."""
    model: str


class CachedTokens(TypedDict):
    cached_tokens: int


class Usage(TypedDict):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class CompletionLogprobs(TypedDict):
    """Four lists that are equally long. The first token of a prompt has no log-probability."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(TypedDict):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason


class Completion(Head):
    object: Literal["text_completion"]
    choices: list[CompletionChoice]
    usage: Usage


class CompletionChunk(Head):
    """An event of a stream."""

    object: Literal["text_completion"]
    choices: list[CompletionChoice]
    usage: NotRequired[Usage | None]


class ChatToken(TypedDict):
    token: str
    logprob: float
    bytes: list[int]


class ChosenChatToken(ChatToken):
    top_logprobs: list[ChatToken]


class ChatLogprobs(TypedDict):
    content: list[ChosenChatToken]
    refusal: None


class ChatMessage(TypedDict):
    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(TypedDict):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


class ChatCompletion(Head):
    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    usage: Usage


class ChatDelta(TypedDict):
    role: NotRequired[Literal["assistant"]]
    content: NotRequired[str]


class ChatChunkChoice(TypedDict):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


class ChatChunk(Head):
    """An event of a stream."""

    object: Literal["chat.completion.chunk"]
    choices: list[ChatChunkChoice]
    usage: NotRequired[Usage | None]


class Model(TypedDict):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class Models(TypedDict):
    object: Literal["list"]
    data: list[Model]


class ErrorDetail(TypedDict):
    message: str
    type: ErrorKind
    param: str | None
    """The field that is wrong."""
    code: None


class ErrorBody(TypedDict):
    error: ErrorDetail


# ---- the challenge


class ProcessedToken(TypedDict):
    text: str
    logprob: float
    top_logprob: dict[str, float]


class Sample(TypedDict):
    text: str
    tokens: list[ProcessedToken]
    logprob: float


class Processed(Sample):
    request_time: float
    """In seconds."""
    samples: NotRequired[list[Sample]]
    """All of them, if several are asked for."""


class Tokenized(TypedDict):
    tokens: list[int]
    request_time: float


class Decoded(TypedDict):
    text: str
    request_time: float


class Problem(TypedDict):
    loc: list[str | int]
    msg: str
    type: str


class Problems(TypedDict):
    """What is wrong with a request, in FastAPI's form."""

    detail: list[Problem]


# ---- both


class Health(TypedDict):
    status: Literal["ok"]
    open_requests: int
