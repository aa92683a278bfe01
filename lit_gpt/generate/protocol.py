"""What may be asked of the server, as it comes: OpenAI's requests, and those of the NeurIPS LLM efficiency challenge.

A field that is null is not there. What OpenAI has and this server has not is refused in words, unless it asks for
nothing. All of this, the fields' ranges and defaults stand in the server's own description, GET /openapi.json.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    FailFast,
    Field,
    GetJsonSchemaHandler,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import CoreSchema

from lit_gpt.data.messages import check_is_unicode
from lit_gpt.errors import InputError
from lit_gpt.generate.json_schema import ANY_OBJECT
from lit_gpt.generate.sampling import LEAST_TEMPERATURE, Sampling
from lit_gpt.ranges import LARGEST_PENALTY, LARGEST_SEED, LEAST_PENALTY

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
    "tool_choice": ["auto", "none"],
    "functions": [[]],
    "function_call": ["auto", "none"],
    "audio": [],
    "prediction": [],
    "reasoning_effort": [],
    "verbosity": [],
    "web_search_options": [],
}
MAX_CHOICES = 128
MAX_PROMPTS = 2048
MAX_TOP_LOGPROBS = 20
MAX_STOP = 16
MAX_BIASES = 1024
"""A tensor is made of them for each new token."""
MAX_FIELDS = 100
MAX_DEPTH = 100
"""The most lists and objects within each other. Schemas of tools have 20 levels or so, and what walks through them
calls itself for each."""


def as_list(stop: Any) -> Any:
    """A single stop string may stand without a list around it."""
    return [stop] if isinstance(stop, str) else stop


def as_biases(biases: Any) -> Any:
    """Not more of them than there may be: each one that is wrong would be told."""
    if isinstance(biases, dict) and len(biases) > MAX_BIASES:
        raise ValueError(f"there are {len(biases)}, expected {MAX_BIASES} at most")
    return biases


def check_depth(body: Any) -> None:
    """Raises ValueError if there are lists and objects in each other more than MAX_DEPTH deep."""
    level = [body]
    for _ in range(MAX_DEPTH):
        inner: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                inner += value.values()
            elif isinstance(value, list):
                inner += value
        level = inner
    if level:
        raise ValueError(f"it has lists or objects in each other, expected {MAX_DEPTH} levels of them at most")


def as_prompts(prompt: Any) -> list[str] | list[list[int]]:
    """The prompts of a completion, of which there may be one or several, as texts or as tokens."""
    if isinstance(prompt, str):
        return [prompt]
    if isinstance(prompt, list) and prompt:
        if len(prompt) > MAX_PROMPTS and isinstance(prompt[0], str | list):
            raise ValueError(f"there are {len(prompt)}, expected {MAX_PROMPTS} at most")
        if all(isinstance(text, str) for text in prompt):
            return prompt
        if are_tokens(prompt):
            return [prompt]
        if all(are_tokens(tokens) for tokens in prompt):
            return prompt
    raise ValueError("it is none, expected a text, a list of texts, a list of tokens, or a list of such lists")


def are_tokens(tokens: Any) -> bool:
    """Whether it is a list of whole numbers, of which 1.0 is one in JSON, and true is none."""
    if not isinstance(tokens, list):
        return False
    return all(type(token) in (int, float) and 0 <= token < 2**31 and token == int(token) for token in tokens)


Token = Annotated[int, Field(ge=0, lt=2**31)]
Texts = Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS)]
Tokens = Annotated[list[Token], Field(min_length=1)]
Prompts = Annotated[
    list[str] | list[list[int]],
    BeforeValidator(
        as_prompts, str | Texts | Tokens | Annotated[list[Tokens], Field(min_length=1, max_length=MAX_PROMPTS)]
    ),
]
StopString = Annotated[str, Field(min_length=1, max_length=1000)]
StopStrings = Annotated[list[StopString], Field(max_length=MAX_STOP)]
Stop = Annotated[StopStrings, BeforeValidator(as_list, StopString | StopStrings)]
Bias = Annotated[float, Field(ge=-100, le=100)]
Biases = Annotated[
    dict[Token, Bias],
    BeforeValidator(as_biases, dict[Token, Bias]),
    Field(max_length=MAX_BIASES, json_schema_extra={"propertyNames": {"pattern": "^[0-9]{1,9}$"}}),
]
Message = Annotated[
    dict[str, Any],
    WithJsonSchema(
        {
            "title": "Message",
            "type": "object",
            "required": ["role", "content"],
            "properties": {
                "role": {"type": "string", "examples": ["system", "user", "assistant", "tool"]},
                "content": {
                    "anyOf": [
                        {"type": "string"},
                        {
                            "type": "array",
                            "items": {
                                "type": "object",
                                "required": ["type", "text"],
                                "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
                            },
                        },
                        {"type": "null"},
                    ]
                },
            },
            "description": "Whatever else it has is for the chat template of the model.",
        }
    ),
]
"""What can be read is said by lit_gpt/data/messages.py, and is more than what the description of the server says."""


class Body(BaseModel):
    """The body of a request."""

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        """What `read` reads besides: a field that need not be there may be null."""
        described = handler.resolve_ref_schema(handler(schema))
        for name, form in described["properties"].items():
            forms = form.get("anyOf", [form])
            if name not in described.get("required", []) and {"type": "null"} not in forms:
                outer = {key: form.pop(key) for key in ("title", "default", "description") if key in form}
                described["properties"][name] = {"anyOf": [*forms, {"type": "null"}], **outer}
        return described

    @model_validator(mode="before")
    @classmethod
    def read(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            raise ValueError("expected a JSON object")
        if len(body) > MAX_FIELDS:
            raise ValueError(f"expected {MAX_FIELDS} fields at most, found {len(body)}")
        check_depth(body)
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
    temperature: float = Field(1.0, ge=0, allow_inf_nan=False)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=1)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, ge=LEAST_PENALTY, le=LARGEST_PENALTY)
    seed: int | None = None
    stop: Stop = []
    logit_bias: Biases = {}
    response_format: ResponseFormat = ResponseFormat(type="text")
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        """With the fields of OpenAI that ask for nothing here, or may."""
        described = super().__get_pydantic_json_schema__(schema, handler)
        for name in WITHOUT_EFFECT:
            described["properties"][name] = {"description": "It has no effect on the answer."}
        for name, harmless in NOT_SUPPORTED.items():
            described["properties"][name] = {"enum": [None, *harmless], "description": "It is not supported."}
        return described

    @classmethod
    def read_fields(cls, body: dict[str, Any]) -> dict[str, Any]:
        for name in WITHOUT_EFFECT:
            body.pop(name, None)
        for name, harmless in NOT_SUPPORTED.items():
            if name in body and body.pop(name) not in harmless:
                raise ValueError(f"{name} is not supported here. Leave it out")
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

    prompt: Prompts
    """One or several; a single one may stand without a list around it. Tokens are read as they are."""
    max_tokens: int = Field(16, ge=0)
    echo: bool = False
    logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)


class ChatBody(OpenAIBody):
    """POST /v1/chat/completions: https://platform.openai.com/docs/api-reference/chat"""

    messages: Annotated[list[Message], FailFast()] = Field(min_length=1)
    tools: Annotated[list[dict[str, Any]], FailFast()] = []
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
    temperature: float = Field(0.8, ge=0, allow_inf_nan=False)
    seed: int | None = None
    echo_prompt: bool = False
    top_p: float | None = Field(None, gt=0, le=1)
    top_k_per_token: int = Field(1, ge=0, le=MAX_TOP_LOGPROBS)
    stop_sequences: Stop = []

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        """With HELM's name of num_samples."""
        described = super().__get_pydantic_json_schema__(schema, handler)
        described["properties"]["num_return_sequences"] = described["properties"]["num_samples"]
        return described

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

    tokens: Annotated[list[Token], FailFast()]


def as_temperature(temperature: float) -> float:
    """0 for what others send in its place: HELM sends 1e-7."""
    return 0.0 if 0 <= temperature < LEAST_TEMPERATURE else temperature


def as_seed(seed: int | None) -> int | None:
    """A seed in the range of ours: others have 64 bits, and a sign."""
    return None if seed is None else seed % (LARGEST_SEED + 1)
