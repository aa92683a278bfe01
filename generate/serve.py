"""Serve models over HTTP: OpenAI's API, that of the NeurIPS LLM efficiency challenge, and a page to talk to them.

    python generate/serve.py
    python generate/serve.py --finetuned out/lora/docstrings --port 8080
    python generate/serve.py --finetuned out/lora/docstrings --with_base
    curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' \\
        -d '{"messages": [{"role": "user", "content": "What is the capital of France?"}]}'

Ctrl-C or SIGTERM ends it, once the requests that were sent before are answered. What it says goes to stderr.
"""

import asyncio
import random
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lit_gpt import InputError
from lit_gpt.cli import Flags, run
from lit_gpt.config import SAMPLE
from lit_gpt.data.prompts import resolve_style, switch_thinking
from lit_gpt.device import default_device
from lit_gpt.generate.engine import Engine
from lit_gpt.generate.engine import Request as EngineRequest
from lit_gpt.generate.sampling import Sampling
from lit_gpt.packages import require
from lit_gpt.ranges import check_range
from lit_gpt.runs.load_finetuned import UseArgs
from lit_gpt.runs.side_by_side import load_models_for_use

if TYPE_CHECKING:
    from fastapi import FastAPI

    from lit_gpt.generate.make_requests import RequestMaker

MAX_BODY_BYTES = 2 * 2**20  # a text of half a million tokens
N_ENCODERS = 4  # texts of this size at once, each of which takes 150 MB on its way to tokens
SCHEMAS_AT_ONCE = 2  # each may take a core for some seconds, and some 100 MB
LOCAL = ("127.0.0.1", "::1", "localhost")


def main(
    finetuned: list[Path] = [],  # noqa: B006 # jsonargparse makes a copy
    with_base: bool = False,
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key: str | None = None,
    model_name: str | None = None,
    prompt_style: str = "auto",
    think: Literal["auto", "on", "off"] = "auto",
    max_batch: int = 16,
    max_waiting: int = 64,
    max_new_tokens: int = 2048,
    max_seconds: float = 600,
    args: Flags[UseArgs] = UseArgs(),
) -> None:
    """Serve models over HTTP, and at / a page to talk to them.

    Args:
        finetuned: The folder that a fine-tuning script wrote: an out_dir (its best), or one folder of it. Several are
            served side by side, on one copy of the weights that they were trained on.
        with_base: Serve the model, too, as it was before it was fine-tuned, by the name base.
        host: The address to listen at. The default is for programs on this machine alone; 0.0.0.0 is for all that
            reach it.
        port: The port to listen at. 0 takes a free one.
        api_key: A secret that each request has to have in its header "Authorization: Bearer ...".
        model_name: The name of a single model in the API. None is that of its folder.
        prompt_style: The text around a question, as in generate/base.py. auto is what the fine-tuned weights were
            trained with, else chat where there is a template.
        think: Have a model that can do both think before it answers, or not, as in generate/chat.py.
        max_batch: The most answers of a model that are made at once.
        max_waiting: The most that wait for their turn. More are refused with status 429.
        max_new_tokens: The most tokens that an answer may have.
        max_seconds: The longest time for a request. One that takes longer is ended with status 504.
        args: With which model, and how; see lit_gpt/runs/load_finetuned.py. --top_p, --min_p, --repetition_penalty and
            --seed are for requests that have none.
    """
    check_range("--port", port, at_least=0, at_most=65535)
    check_range("--max_batch", max_batch, at_least=1)
    check_range("--max_waiting", max_waiting, at_least=0)
    check_range("--max_new_tokens", max_new_tokens, at_least=1)
    check_range("--max_seconds", max_seconds, above=0)
    if api_key == "":
        raise InputError("--api_key is empty, expected a secret. Leave it out for a server without one.")
    for package in ("fastapi", "uvicorn"):
        require(package, "serve", "The server")
    from lit_gpt.generate.connections import open_address, run_app, url_of
    from lit_gpt.generate.make_requests import RequestMaker

    # the address, before anything is read
    address = open_address(host, port)
    if host not in LOCAL and api_key is None:
        print(f"Whoever reaches {host} may ask: there is no --api_key.", file=sys.stderr)

    # the models, and how they are asked
    models, tokenizer, trained_style = load_models_for_use(args, finetuned, default_device(), with_base, max_batch)
    if len(models) == 1:
        (model,) = models.values()
        folder = (*finetuned, args.finetuned, args.checkpoint_dir, SAMPLE)
        models = {model_name or folder_name(next(path for path in folder if path)): model}
    elif model_name is not None:
        raise InputError(f"--model_name is for one model, and there are {len(models)}: {', '.join(models)}.")
    engine = Engine(models, tokenizer, max_batch=max_batch, draft_tokens=args.draft_tokens)
    style = resolve_style(prompt_style, tokenizer, trained_style)
    maker = RequestMaker(
        tokenizer=tokenizer,
        style=style,
        block_size=min(model.config.block_size for model in models.values()),
        max_new_tokens=max_new_tokens,
        defaults=Sampling(top_p=args.top_p, min_p=args.min_p, repetition_penalty=args.repetition_penalty),
        seeds=random.Random(args.seed),
        switches={} if think == "auto" else switch_thinking(style, tokenizer, think == "on"),
    )

    # until a signal comes
    app = make_app(engine, maker, max_batch * len(models) + max_waiting, max_seconds, api_key, host in LOCAL)
    address.listen()  # whoever comes from now on waits, and is not refused
    print(f"Serving {', '.join(models)} at {url_of(address)}.", file=sys.stderr)
    run_app(app, address)


def make_app(
    engine: Engine,
    maker: "RequestMaker",
    max_open: int,
    max_seconds: float,
    api_key: str | None = None,
    is_local: bool = False,
) -> "FastAPI":
    """All that can be asked for. No request reads or writes a file. `is_local`: it is for this machine alone."""
    from anyio.to_thread import current_default_thread_limiter
    from fastapi import HTTPException, Request
    from fastapi.concurrency import run_in_threadpool
    from fastapi.responses import HTMLResponse, JSONResponse, Response

    from lit_gpt.generate.engine_thread import EngineThread
    from lit_gpt.generate.openapi import DescribedApp, errors, stream_of
    from lit_gpt.generate.protocol import (
        ChatBody,
        CompletionBody,
        DecodeBody,
        OpenAIBody,
        ProcessBody,
        TokenizeBody,
    )
    from lit_gpt.generate.response_types import (
        ChatChunk,
        ChatCompletion,
        Completion,
        CompletionChunk,
        Decoded,
        Health,
        Model,
        Models,
        Processed,
        Tokenized,
    )
    from lit_gpt.generate.responses import Responses
    from lit_gpt.generate.web import (
        EventStream,
        KeyGuard,
        LocalGuard,
        SizeGuard,
        add_error_handlers,
        answers_unless_gone,
        read_page,
    )

    page, page_headers = read_page()
    tokenizer = maker.tokenizer
    responses = Responses(tokenizer)
    thread: EngineThread
    reading_schemas = asyncio.Semaphore(SCHEMAS_AT_ONCE)
    began = int(time.time())

    @asynccontextmanager
    async def engine_runs(app: DescribedApp) -> AsyncIterator[None]:
        nonlocal thread
        thread = app.state.engine = EngineThread(engine, max_open, max_seconds)
        thread.on_failure = app.state.end
        current_default_thread_limiter().total_tokens = N_ENCODERS
        yield
        await thread.stop()

    app = DescribedApp(title="lit-gpt", lifespan=engine_runs, docs_url=None, redoc_url=None)
    app.state.end = lambda: None  # `run_app` has one that ends the server
    add_error_handlers(app)
    app.add_middleware(SizeGuard, max_bytes=MAX_BODY_BYTES)
    if api_key is not None:
        app.has_key = True
        app.add_middleware(KeyGuard, api_key=api_key)
        refused = [401]
    elif is_local:
        app.add_middleware(LocalGuard, names=LOCAL)
        refused = [403]
    else:
        refused = []
    of_models = errors(*refused, 404)
    of_answers = errors(400, *refused, 404, 408, 413, 429, 503, 504)
    of_challenge = errors(400, *refused, 408, 413, 422)

    @app.get("/", include_in_schema=False)
    async def talk() -> Response:
        return HTMLResponse(page, headers=page_headers)

    @app.get("/health", responses=errors(*refused, 503))
    async def health() -> Health:
        thread.check_alive()
        return {"status": "ok", "open_requests": thread.n_open}

    # ---- OpenAI

    def name_of(model: str) -> str:
        names = list(engine.models)
        if model and model not in names:
            raise HTTPException(404, f"There is no model {model!r} here, expected one of {', '.join(names)}.")
        return model or names[0]

    def describe(name: str) -> Model:
        return {"id": name, "object": "model", "created": began, "owned_by": "lit-gpt"}

    @app.get("/v1/models", responses=errors(*refused))
    async def models() -> Models:
        return {"object": "list", "data": [describe(name) for name in engine.models]}

    @app.get("/v1/models/{name:path}", responses=of_models)
    async def model(name: str) -> Model:
        return describe(name_of(name))

    async def make_requests(make: Callable[[Any], list[EngineRequest]], body: OpenAIBody) -> list[EngineRequest]:
        """What is asked of the engine. Schemas wait for each other, so that hostile ones hold up no other request."""
        if body.response_format.type == "text":
            return await run_in_threadpool(make, body)
        async with reading_schemas:
            return await run_in_threadpool(make, body)

    @app.post("/v1/completions", response_model=Completion, responses=of_answers | stream_of(CompletionChunk))
    async def completions(body: CompletionBody, request: Request) -> Response:
        name = name_of(body.model)
        thread.check_room(len(body.prompt) * body.n)
        call = thread.ask(await make_requests(maker.of_completion, body))
        if body.stream:
            return EventStream(call, responses.completion_chunks(call, body, name))
        answers = await answers_unless_gone(call, request)
        return JSONResponse(responses.completion(answers, body, name))

    @app.post("/v1/chat/completions", response_model=ChatCompletion, responses=of_answers | stream_of(ChatChunk))
    async def chat_completions(body: ChatBody, request: Request) -> Response:
        name = name_of(body.model)
        thread.check_room(body.n)
        call = thread.ask(await make_requests(maker.of_chat, body))
        if body.stream:
            return EventStream(call, responses.chat_chunks(call, body, name))
        answers = await answers_unless_gone(call, request)
        return JSONResponse(responses.chat(answers, body, name))

    # ---- the challenge

    @app.post("/process", response_model=Processed, responses=of_challenge | errors(429, 503, 504))
    async def process(body: ProcessBody, request: Request) -> Response:
        start = time.perf_counter()
        thread.check_room(body.num_samples)
        call = thread.ask(await run_in_threadpool(maker.of_process, body))
        answers = await answers_unless_gone(call, request)
        return JSONResponse(responses.processed(answers, body, time.perf_counter() - start))

    @app.post("/tokenize", responses=of_challenge)
    def tokenize(body: TokenizeBody) -> Tokenized:
        start = time.perf_counter()
        tokens = tokenizer.encode(body.text, max_length=body.max_length if body.truncation else -1).tolist()
        return {"tokens": tokens, "request_time": time.perf_counter() - start}

    @app.post("/decode", responses=of_challenge)
    def decode(body: DecodeBody) -> Decoded:
        start = time.perf_counter()
        text = tokenizer.decode(body.tokens)
        return {"text": text, "request_time": time.perf_counter() - start}

    return app


def folder_name(folder: Path) -> str:
    """A name for what a folder holds: of a run's best or last, the name of the run."""
    path = folder.resolve()
    return path.parent.name if path.name in ("best", "last") else path.name


if __name__ == "__main__":
    run(main)
