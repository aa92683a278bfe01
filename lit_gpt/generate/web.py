"""What a server does around its answers: errors in words, who may ask, and clients that go."""

import asyncio
import base64
import hashlib
import hmac
import json
import re
from collections.abc import AsyncIterator, Collection, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lit_gpt.display.words import shortened
from lit_gpt.errors import InputError
from lit_gpt.generate.engine import Answer
from lit_gpt.generate.engine_thread import Busy, Call, EngineFailed
from lit_gpt.generate.response_types import ErrorBody, ErrorKind

OPEN_TO_ALL = ("/", "/health")
RETRY_LATER = {"Retry-After": "1"}  # seconds
TOO_LONG = "The answer took longer than this server allows. Ask for fewer tokens."


class ClientGone(Exception):
    """Nobody waits for the response any more."""


# ---- errors


def error_body(status: int, message: str, param: str | None = None) -> ErrorBody:
    """An error in OpenAI's form."""
    kinds: dict[int, ErrorKind] = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": None}}


def of_challenge(request: Request) -> bool:
    """Whether a request is one of the challenge's, which have FastAPI's form of errors."""
    return request.url.path in ("/process", "/tokenize", "/decode")


def add_error_handlers(app: FastAPI) -> None:
    """Makes every error a response in words."""

    @app.exception_handler(RequestValidationError)
    async def body_is_wrong(request: Request, error: RequestValidationError) -> Response:
        problems = error.errors()
        if of_challenge(request):
            detail = [{key: problem[key] for key in ("loc", "msg", "type")} for problem in problems]
            return JSONResponse({"detail": detail}, 422)
        messages = []
        for problem in problems:
            place = place_of(problem)
            message = problem["msg"].removeprefix("Value error, ")
            found = problem.get("input")
            if place and isinstance(found, int | float | str) and problem["type"] != "value_error":
                place += f" is {shortened(json.dumps(found), 40)}"
            messages.append(f"{place}: {message}" if place else message)
        return JSONResponse(error_body(400, f"{'; '.join(messages)}.", place_of(problems[0]) or None), 400)

    @app.exception_handler(InputError)
    async def cannot_be_answered(request: Request, error: InputError) -> Response:
        message = re.sub(r"(?<!\S)--(?=[a-z])", "", str(error))  # a field of a request is no flag
        if of_challenge(request):
            return JSONResponse({"detail": [{"loc": ["body"], "msg": message, "type": "value_error"}]}, 422)
        return JSONResponse(error_body(400, message), 400)

    @app.exception_handler(HTTPException)
    async def no_such_route(request: Request, error: HTTPException) -> Response:
        return JSONResponse(error_body(error.status_code, str(error.detail)), error.status_code, error.headers)

    @app.exception_handler(Busy)
    async def too_many(request: Request, error: Busy) -> Response:
        return JSONResponse(error_body(429, "Too many requests wait already. Try again later."), 429, RETRY_LATER)

    @app.exception_handler(TimeoutError)
    async def too_long(request: Request, error: TimeoutError) -> Response:
        return JSONResponse(error_body(504, TOO_LONG), 504)

    @app.exception_handler(EngineFailed)
    async def failed(request: Request, error: EngineFailed) -> Response:
        return JSONResponse(error_body(503, str(error)), 503)

    @app.exception_handler(Exception)
    async def not_foreseen(request: Request, error: Exception) -> Response:
        return JSONResponse(error_body(500, "The server has made a mistake, which is in its log."), 500)

    @app.exception_handler(ClientGone)
    async def gone(request: Request, error: ClientGone) -> Response:
        return Response(status_code=499)


def place_of(problem: Mapping[str, Any]) -> str:
    """The field that is wrong. Empty for the body as a whole."""
    if problem["type"] == "json_invalid":
        return ""
    return ".".join(str(part) for part in problem["loc"] if part != "body")


# ---- the page


def read_page() -> tuple[str, dict[str, str]]:
    """The page on which models can be talked to, and its headers: its one script runs, and it asks this server alone.

    A script that came into the page with an answer would have another hash: https://www.w3.org/TR/CSP3/.
    """
    page = (Path(__file__).parent / "talk.html").read_text(encoding="utf-8")
    script = page.partition("<script>")[2].partition("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = {
        "default-src": "'none'",
        "script-src": f"'sha256-{digest}'",
        "style-src": "'unsafe-inline'",
        "img-src": "data:",  # its icon, which is empty
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    return page, {"Content-Security-Policy": "; ".join(f"{name} {value}" for name, value in policy.items())}


# ---- who may ask


class KeyGuard:
    """Refuses requests without the key, before anything of them is read."""

    def __init__(self, app: ASGIApp, api_key: str) -> None:
        self.app = app
        self.expected = f"Bearer {api_key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in OPEN_TO_ALL:
            await self.app(scope, receive, send)
            return
        given = dict(scope["headers"]).get(b"authorization", b"")
        if hmac.compare_digest(given, self.expected):
            await self.app(scope, receive, send)
        else:
            message = "The key of this server is missing. Send it in the header Authorization: Bearer KEY."
            await JSONResponse(error_body(401, message), 401)(scope, receive, send)


class LocalGuard:
    """Refuses what a web page from elsewhere asks a server that is for this machine alone.

    Any page can have the browser of its reader ask this machine, though not by JSON: for that the browser asks for
    leave first (CORS), which nobody gives. But a page whose own name is made to lead here while it is read (DNS
    rebinding) is taken to be this server's, and may ask and read what it likes. Its name is in the header Host then.
    """

    def __init__(self, app: ASGIApp, names: Collection[str]) -> None:
        """`names` are those of this machine."""
        self.app = app
        self.names = names

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope) if scope["type"] == "http" else Headers()
        addresses = [f"//{headers['host']}"] if "host" in headers else []
        addresses += headers.getlist("origin")
        strangers = [address for address in addresses if name_in(address) not in self.names]
        if not strangers:
            await self.app(scope, receive, send)
        else:
            message = (
                f"A request for {strangers[0].removeprefix('//')} may be that of a web page from elsewhere, expected"
                f" one for {' or '.join(self.names)}. A server with an --api_key answers by any name."
            )
            await JSONResponse(error_body(403, message), 403)(scope, receive, send)


def name_in(address: str) -> str | None:
    """The name of the machine in an address such as http://localhost:8000. None if there is none."""
    try:
        return urlsplit(address).hostname
    except ValueError:
        return None


class SizeGuard:
    """Refuses bodies that are too large: those that say so before they are read, others when they are."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self.app = app
        self.max_bytes = max_bytes
        self.message = f"The body has more than {max_bytes:,} bytes."

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        length = Headers(scope=scope).get("content-length", "0") if scope["type"] == "http" else "0"
        if int(length) > self.max_bytes:
            await JSONResponse(error_body(413, self.message), 413)(scope, receive, send)
            return
        n_bytes = 0

        async def receive_some() -> Message:
            nonlocal n_bytes
            message = await receive()
            n_bytes += len(message.get("body", b""))
            if n_bytes > self.max_bytes:
                raise HTTPException(413, self.message)
            return message

        await self.app(scope, receive_some, send)


# ---- clients that go


async def answers_unless_gone(call: Call, request: Request) -> list[Answer]:
    """The whole answers of a call. If the client goes they are cancelled.

    Raises:
        ClientGone: nobody waits for them.
        EngineFailed, TimeoutError: see `Call.progress`.
    """
    answering = asyncio.ensure_future(call.answers())
    leaving = asyncio.ensure_future(until_gone(request))
    try:
        await asyncio.wait([answering, leaving], return_when=asyncio.FIRST_COMPLETED)
        if not answering.done():
            raise ClientGone
        return answering.result()
    finally:
        answering.cancel()
        leaving.cancel()
        call.close()


async def until_gone(request: Request) -> None:
    """Returns when the client closes the connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


class EventStream(StreamingResponse):
    """Parts of a response as server-sent events. When it ends, however it does, the call is closed."""

    def __init__(self, call: Call, parts: AsyncIterator[Mapping[str, Any]]) -> None:
        self.call = call
        super().__init__(events(parts), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.call.close()


async def events(parts: AsyncIterator[Mapping[str, Any]]) -> AsyncIterator[str]:
    """Each part as an event, then [DONE]; or an error as the last event."""
    try:
        async for part in parts:
            yield event(part)
    except TimeoutError:
        yield event(error_body(504, TOO_LONG))
    except EngineFailed as error:
        yield event(error_body(503, str(error)))
    else:
        yield "data: [DONE]\n\n"


def event(part: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(part, ensure_ascii=False)}\n\n"
