"""Questions to a server that speaks OpenAI's API, whatever of it that server knows."""

import json
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lit_gpt.errors import InputError

Json = dict[str, Any]
Ask = Callable[[str, str, Json | None], tuple[int, Any]]
"""Method, path and body of a request; the status and the JSON of its response, None if it has none."""
LEAST_TOP = 5  # likeliest tokens that are asked for. vLLM gives 20 at most, OpenAI's completions 5


@dataclass(frozen=True)
class ShownToken:
    """A token as a server shows it."""

    text: str
    logprob: float | None
    """In nats. None for the first of a text, which has none."""
    top: Mapping[str, float]
    """The likeliest tokens in its place, by their texts."""


@dataclass(frozen=True)
class Said:
    """An answer, or what a server thinks of a prompt."""

    text: str
    finish: str
    n_prompt: int | None
    n_new: int | None
    tokens: Sequence[ShownToken]
    """Empty if the server shows none."""


def over_http(url: str, api_key: str | None, max_seconds: float) -> Ask:
    """Asks the server at `url`, with or without /v1 at its end. What cannot be reached raises InputError."""
    root = url.rstrip("/").removesuffix("/v1")
    if not root.startswith(("http://", "https://")):
        raise InputError(f"--url is {url}, expected one such as http://127.0.0.1:8000.")
    headers = {"Content-Type": "application/json"}
    if api_key:
        headers["Authorization"] = f"Bearer {api_key}"

    def ask(method: str, path: str, body: Json | None) -> tuple[int, Any]:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(root + path, data, headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=max_seconds) as response:
                return response.status, as_json(response.read())
        except urllib.error.HTTPError as error:
            return error.code, as_json(error.read())
        except (OSError, ValueError) as error:
            reason = getattr(error, "reason", None) or error
            raise InputError(
                f"No server answers at {root}{path} ({reason}). Start it, or name another --url."
            ) from None

    return ask


def as_json(data: bytes) -> Any:
    try:
        return json.loads(data)
    except ValueError:
        return None


def choose_model(ask: Ask, name: str | None, run_name: str) -> tuple[str, Json]:
    """The name of the model to ask, and what the server says of it: `name`, or the only one, or that of the run.

    Raises:
        InputError: the server lists no models, or not this one, or several and none is named.
    """
    status, listed = ask("GET", "/v1/models", None)
    if status == 401:
        raise InputError("The server wants a key. Name it with --api_key.")
    entries = listed.get("data") if isinstance(listed, dict) else None
    if status != 200 or not entries:
        raise InputError(f"The server lists no models: GET /v1/models gives status {status}. Name another --url.")
    models = {entry["id"]: entry for entry in entries}
    if name is None and len(models) == 1:
        (name,) = models
    if name is None and run_name in models:
        name = run_name
    if name is None or name not in models:
        found = "one of them" if name is None else f"not {name}"
        raise InputError(f"The server has the models {', '.join(models)}, and {found} is meant. Choose: --model_name.")
    return name, models[name]


def complete(ask: Ask, model: str, prompt: str | list[int], n_new: int, **more: Any) -> Said | str:
    """The likeliest continuation of a text or of tokens; or why there is none, in the server's words."""
    body = {"model": model, "prompt": prompt, "max_tokens": n_new, "temperature": 0, **more}
    return read_answer(*ask("POST", "/v1/completions", body))


def chat(ask: Ask, model: str, messages: list[Json], n_new: int, **more: Any) -> Said | str:
    """The likeliest answer to messages; or why there is none, in the server's words."""
    body = {"model": model, "messages": messages, "max_tokens": n_new, "temperature": 0, **more}
    return read_answer(*ask("POST", "/v1/chat/completions", body))


def read_answer(status: int, response: Any) -> Said | str:
    """The first choice of a response."""
    if status != 200 or not isinstance(response, dict) or not response.get("choices"):
        return f"status {status}: {error_message(response)}"
    choice = response["choices"][0]
    usage = response.get("usage") or {}
    text = choice["message"].get("content") if "message" in choice else choice.get("text")
    return Said(
        text=text or "",
        finish=choice.get("finish_reason") or "",
        n_prompt=usage.get("prompt_tokens"),
        n_new=usage.get("completion_tokens"),
        tokens=shown_tokens(choice.get("logprobs")),
    )


def error_message(response: Any) -> str:
    """What a server says in place of an answer."""
    error = response.get("error", response) if isinstance(response, dict) else response
    message = error.get("message", error) if isinstance(error, dict) else error
    return str(message)[:200]


def shown_tokens(logprobs: Any) -> list[ShownToken]:
    """Log-probabilities in one of OpenAI's two forms, that of completions and that of chats."""
    if not isinstance(logprobs, dict):
        return []
    if "content" in logprobs:
        content = logprobs["content"] or []
        return [
            ShownToken(
                entry["token"],
                entry["logprob"],
                {top["token"]: top["logprob"] for top in entry.get("top_logprobs") or []},
            )
            for entry in content
        ]
    texts = logprobs.get("tokens") or []
    values = logprobs.get("token_logprobs") or []
    tops = logprobs.get("top_logprobs") or [None] * len(values)
    return [ShownToken(text, value, top or {}) for text, value, top in zip(texts, values, tops)]


def template_text(ask: Ask, messages: list[Json]) -> str | None:
    """The prompt that llama.cpp's server makes of messages; None from a server that does not show it."""
    status, response = ask("POST", "/apply-template", {"messages": messages})
    return response.get("prompt") if status == 200 and isinstance(response, dict) else None


def template_tokens(ask: Ask, model: str, messages: list[Json]) -> list[int] | None:
    """The tokens that vLLM makes of messages; None from a server that does not show them."""
    body = {"model": model, "messages": messages, "add_generation_prompt": True}
    status, response = ask("POST", "/tokenize", body)
    tokens = response.get("tokens") if status == 200 and isinstance(response, dict) else None
    are_ids = isinstance(tokens, list) and bool(tokens) and all(isinstance(token, int) for token in tokens)
    return tokens if are_ids else None


def context_of(ask: Ask, listed: Json) -> int | None:
    """How many tokens the server reads in all: vLLM lists it, llama.cpp says it among its properties."""
    if isinstance(listed.get("max_model_len"), int):
        return listed["max_model_len"]
    status, properties = ask("GET", "/props", None)
    if status == 200 and isinstance(properties, dict):
        return (properties.get("default_generation_settings") or {}).get("n_ctx")
    return None
