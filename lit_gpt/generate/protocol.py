"""What may be asked of the server, as it comes: OpenAI's requests, and those of the NeurIPS LLM efficiency challenge.

A field that is null is not there. What OpenAI has and this server has not is refused in words, unless it asks for
nothing.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from lit_gpt.data.messages import check_is_unicode
from lit_gpt.errors import InputError
from lit_gpt.generate.json_schema import ANY_OBJECT
from lit_gpt.generate.sampling import LEAST_TEMPERATURE, Sampling
from lit_gpt.ranges import LARGEST_SEED

WITHOUT_EFFECT = (  # on the answer
    "user",
    "store",
    "metadata",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
    "parallel_tool_calls",
)
NOT_SUPPORTED: Mapping[str, list[Any]] = {  # but for these values, which ask for nothing
    "frequency_penalty": [0],
    "presence_penalty": [0],
    "best_of": [1],
    "suffix": [""],
    "modalities": [["text"]],
    "tool_choice": ["auto"],
    "functions": [[]],
    "function_call": ["auto", "none"],
    "audio": [],
    "prediction": [],
    "reasoning_effort": [],
    "verbosity": [],
    "web_search_options": [],
}
MAX_CHOICES = 128
MAX_TOP_LOGPROBS = 20
MAX_STOP = 16
Token = Annotated[int, Field(ge=0, lt=2**31)]
Stop = Annotated[list[Annotated[str, Field(min_length=1, max_length=1000)]], Field(max_length=MAX_STOP)]
Bias = Annotated[float, Field(ge=-100, le=100)]


class Body(BaseModel):
    """The body of a request."""

    @model_validator(mode="before")
    @classmethod
    def read(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            raise ValueError("expected a JSON object")
        try:
            check_is_unicode(body, "the request")
        except InputError as error:
            raise ValueError(str(error).removesuffix(".")) from None
        return cls.read_fields({name: value for name, value in body.items() if value is not None})

    @classmethod
    def read_fields(cls, body: dict[str, Any]) -> dict[str, Any]:
        return body


# ---- OpenAI


class StreamOptions(BaseModel):
    """What a stream has besides the answer."""

    include_usage: bool = False
    include_obfuscation: bool = False  # of which there is none anyway


class NamedSchema(BaseModel):
    """The schema of an answer. `name` and `description` are for models that are told of it: this server tells none."""

    name: str = Field("schema", pattern="^[a-zA-Z0-9_-]{1,64}$")
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None
    """Answers are always by the schema."""


class ResponseFormat(BaseModel):
    """What an answer has to be: https://platform.openai.com/docs/guides/structured-outputs"""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: NamedSchema | None = None

    @model_validator(mode="after")
    def has_schema(self) -> "ResponseFormat":
        if self.type == "json_schema" and self.json_schema is None:
            raise ValueError("expected a json_schema, with a name and a schema")
        return self

    def schema_of_answer(self) -> Mapping[str, Any] | None:
        """None if it may be any text."""
        if self.json_schema is not None and self.type == "json_schema":
            return self.json_schema.schema_
        return ANY_OBJECT if self.type == "json_object" else None


class OpenAIBody(Body):
    """What OpenAI's two kinds of requests have in common, and what other servers have in both: three settings of
    sampling, and the format of an answer, which OpenAI knows in chats alone."""

    model_config = ConfigDict(extra="forbid")

    model: str = ""
    n: int = Field(1, ge=1, le=MAX_CHOICES)
    temperature: float = 1.0
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: Stop = []
    logit_bias: dict[Token, Bias] = {}
    response_format: ResponseFormat = ResponseFormat(type="text")
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()

    @classmethod
    def read_fields(cls, body: dict[str, Any]) -> dict[str, Any]:
        for name in WITHOUT_EFFECT:
            body.pop(name, None)
        for name, harmless in NOT_SUPPORTED.items():
            if name in body and body.pop(name) not in harmless:
                raise ValueError(f"{name} is not supported here. Leave it out")
        if isinstance(body.get("stop"), str):
            body["stop"] = [body["stop"]]
        return body

    def sampling(self, defaults: Sampling) -> Sampling:
        """How the first choice is sampled. What the request does not say is as in `defaults`."""
        given = {name: getattr(self, name) for name in ("top_p", "top_k", "min_p", "repetition_penalty")}
        return replace(
            defaults,
            temperature=as_temperature(self.temperature),
            logit_bias=self.logit_bias,
            seed=as_seed(self.seed),
            **{name: value for name, value in given.items() if value is not None},
        )


class CompletionBody(OpenAIBody):
    """POST /v1/completions: https://platform.openai.com/docs/api-reference/completions"""

    prompt: list[str] | list[list[int]]
    """One or several; a single one may stand without a list around it. Tokens are read as they are."""
    max_tokens: int = Field(16, ge=0)
    echo: bool = False
    logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)

    @classmethod
    def read_fields(cls, body: dict[str, Any]) -> dict[str, Any]:
        if "prompt" in body:
            body["prompt"] = as_prompts(body["prompt"])
        return super().read_fields(body)


def as_prompts(prompt: Any) -> list[str] | list[list[int]]:
    """The prompts of a completion, of which there may be one or several, as texts or as tokens."""
    if isinstance(prompt, str):
        return [prompt]
    if isinstance(prompt, list) and prompt:
        if all(isinstance(text, str) for text in prompt):
            return prompt
        if are_tokens(prompt):
            return [prompt]
        if all(are_tokens(tokens) for tokens in prompt):
            return prompt
    raise ValueError("prompt is none, expected a text, a list of texts, a list of tokens, or a list of such lists")


def are_tokens(tokens: Any) -> bool:
    return isinstance(tokens, list) and all(type(token) is int and 0 <= token < 2**31 for token in tokens)


class ChatBody(OpenAIBody):
    """POST /v1/chat/completions: https://platform.openai.com/docs/api-reference/chat"""

    messages: list[dict[str, Any]] = Field(min_length=1)
    tools: list[dict[str, Any]] = []
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=MAX_TOP_LOGPROBS)

    @classmethod
    def read_fields(cls, body: dict[str, Any]) -> dict[str, Any]:
        if body.get("tool_choice") == "none":
            body.pop("tool_choice")
            body.pop("tools", None)
        if body.get("top_logprobs") and not body.get("logprobs"):
            raise ValueError("top_logprobs needs logprobs: true")
        return super().read_fields(body)


# ---- the challenge


class ProcessBody(Body):
    """POST /process, with the names of the published schema and with those that HELM sends.

    HELM's top_k_per_token is the number of likely tokens to report, and no filter.
    """

    prompt: str
    num_samples: int = Field(1, ge=1, le=MAX_CHOICES)
    max_new_tokens: int = Field(50, ge=0)
    top_k: int | None = Field(200, ge=1)
    temperature: float = 0.8
    seed: int | None = None
    echo_prompt: bool = False
    top_p: float | None = None
    top_k_per_token: int = Field(1, ge=0, le=MAX_TOP_LOGPROBS)
    stop_sequences: Stop = []

    @classmethod
    def read_fields(cls, body: dict[str, Any]) -> dict[str, Any]:
        if "num_return_sequences" in body:
            body.setdefault("num_samples", body.pop("num_return_sequences"))
        # the default of the schema is not HELM's, which has its own names
        if "top_p" in body or "top_k_per_token" in body:
            body.setdefault("top_k", None)
        return body

    def sampling(self, defaults: Sampling) -> Sampling:
        """How the first sample is made. What the request does not say is as in `defaults`."""
        sampling = replace(defaults, top_k=self.top_k, seed=as_seed(self.seed))
        top_p = defaults.top_p if self.top_p is None else self.top_p
        return replace(sampling, temperature=as_temperature(self.temperature), top_p=top_p)


class TokenizeBody(Body):
    """POST /tokenize"""

    text: str
    truncation: bool = True
    max_length: int = Field(2048, ge=0)


class DecodeBody(Body):
    """POST /decode"""

    tokens: list[Token]


def as_temperature(temperature: float) -> float:
    """0 for what others send in its place: HELM sends 1e-7."""
    return 0.0 if 0 <= temperature < LEAST_TEMPERATURE else temperature


def as_seed(seed: int | None) -> int | None:
    """A seed in the range of ours: others have 64 bits, and a sign."""
    return None if seed is None else seed % (LARGEST_SEED + 1)
