"""The server's description of itself, GET /openapi.json: the errors of its routes, streams, and the key.

The rest is FastAPI's, from the types of `protocol.py` and `response_types.py`.
"""

from typing import Any

from fastapi import FastAPI
from pydantic import TypeAdapter

from lit_gpt.generate.response_types import ErrorBody, Problems

Described = dict[int | str, dict[str, Any]]
"""Responses by their status, as FastAPI's routes take them."""
REFERENCE = "#/components/schemas/{model}"
MEANINGS = {
    400: "The request is wrong.",
    401: "The key of this server is missing.",
    403: "The request is that of a web page from elsewhere.",
    404: "There is no such model.",
    408: "The request came too slowly.",
    413: "The body is too large.",
    422: "The request is wrong.",
    429: "Too many requests wait already.",
    503: "The engine has failed, or there are too many connections.",
    504: "The answer took longer than this server allows.",
}


def errors(*statuses: int) -> Described:
    """Errors in OpenAI's form, but 422, which has that of the challenge."""
    described: Described = {}
    for status in statuses:
        described[status] = {"description": MEANINGS[status], "model": Problems if status == 422 else ErrorBody}
    return described


def stream_of(part: Any) -> Described:
    """A response in parts, as server-sent events. The last one is [DONE], or an error."""
    contents = TypeAdapter(part | ErrorBody).json_schema(ref_template=REFERENCE)
    data = {"type": "string", "contentMediaType": "application/json", "contentSchema": contents}
    last = {"type": "string", "const": "[DONE]"}
    event = {"type": "object", "required": ["data"], "properties": {"data": {"anyOf": [data, last]}}}
    return {200: {"content": {"text/event-stream": {"itemSchema": event}}}}


class DescribedApp(FastAPI):
    """An app whose description is that of its responses as they are."""

    has_key: bool = False
    """Whether requests need a key, but for /health."""

    def openapi(self) -> dict[str, Any]:
        if self.openapi_schema is not None:
            return self.openapi_schema
        description = super().openapi()
        schemas = description["components"]["schemas"]
        for operations in description["paths"].values():
            for operation in operations.values():
                responses = operation["responses"]
                if "HTTPValidationError" in str(responses.get("422")):
                    del responses["422"]  # FastAPI's own form, in place of which there is 400
                # the parts of a stream are defined where all is
                stream = responses["200"]["content"].get("text/event-stream")
                if stream is not None:
                    part, _ = stream["itemSchema"]["properties"]["data"]["anyOf"]
                    schemas.update(part["contentSchema"].pop("$defs"))
        for unused in ("HTTPValidationError", "ValidationError"):
            schemas.pop(unused, None)
        if self.has_key:
            description["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
            description["security"] = [{"key": []}]
            health = description["paths"]["/health"]["get"]
            health["security"] = []
            del health["responses"]["401"]
        return description
