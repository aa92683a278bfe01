"""What a server does around its answers: its address, errors in words, the key, and clients that go."""

import asyncio
import base64
import contextlib
import copy
import hashlib
import hmac
import json
import re
import socket
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from lit_gpt.errors import InputError
from lit_gpt.generate.engine import Answer
from lit_gpt.generate.engine_thread import Busy, Call, EngineFailed

OPEN_TO_ALL = ("/", "/health")
RETRY_LATER = {"Retry-After": "1"}  # seconds
TOO_LONG = "The answer took longer than this server allows. Ask for fewer tokens."


class ClientGone(Exception):
    """Nobody waits for the response any more."""


# ---- the address


def open_address(host: str, port: int) -> socket.socket:
    """A socket bound to an address, on which nobody listens yet. Port 0 is a free one.

    Raises:
        InputError: the address is taken, or none of this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    address = socket.socket(family)
    address.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        address.bind((host, port))
    except OSError as error:
        address.close()
        raise InputError(f"{host}:{port} cannot be used ({error.strerror}). Choose another --port or --host.") from None
    return address


def url_of(address: socket.socket) -> str:
    host, port = address.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def run_app(app: FastAPI, address: socket.socket) -> None:
    """Answers requests until SIGTERM or Ctrl-C, then those that it has taken. A second Ctrl-C ends it at once.

    Raises:
        BaseException: what has ended the thread of the engine, app.state.engine.
    """
    import uvicorn

    log_config = copy.deepcopy(uvicorn.config.LOGGING_CONFIG)
    log_config["handlers"]["access"]["stream"] = "ext://sys.stderr"
    server = uvicorn.Server(uvicorn.Config(app, log_config=log_config, server_header=False))
    app.state.end = lambda: setattr(server, "should_exit", True)
    with contextlib.suppress(KeyboardInterrupt):  # uvicorn raises the signals again that it has obeyed
        server.run(sockets=[address])
    if app.state.engine.failure is not None:
        raise app.state.engine.failure


# ---- errors


def error_body(status: int, message: str, param: str | None = None) -> dict[str, Any]:
    """An error in OpenAI's form."""
    kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
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


# ---- the key


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

    def __init__(self, call: Call, parts: AsyncIterator[dict[str, Any]]) -> None:
        self.call = call
        super().__init__(events(parts), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.call.close()


async def events(parts: AsyncIterator[dict[str, Any]]) -> AsyncIterator[str]:
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


def event(part: dict[str, Any]) -> str:
    return f"data: {json.dumps(part, ensure_ascii=False)}\n\n"
