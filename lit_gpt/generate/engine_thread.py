"""The engine in a thread of its own, and asyncio code that asks it: what a server needs.

    asyncio             a call: some requests          --- inbox --->   the thread: takes what has come, then a step of
                                                                        the engine, as long as there is work
                        progress of each answer        <--- loop ----   what each answer got in that step

The engine itself is used by its thread alone.
"""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from queue import SimpleQueue

from lit_gpt.errors import InputError
from lit_gpt.generate.engine import Answer, Engine, Logprob, Request


class Busy(Exception):
    """As many requests are under way as may be."""


class EngineFailed(Exception):
    """The engine's thread has ended with an error, which is the cause of this one."""


@dataclass(frozen=True)
class Progress:
    """What an answer has got in a step."""

    index: int
    """Which of the call's requests it answers."""
    text: str
    """What has become certain, which may be none."""
    tokens: list[int]
    """The new ones."""
    logprobs: list[Logprob]
    """Theirs, if the request asks for them."""
    whole: Answer | None
    """The answer if it is complete; nothing changes it any more."""


class Call:
    """Some requests that are asked together, as seen from asyncio. `close` it, whatever happens."""

    def __init__(self, thread: "EngineThread", requests: Sequence[Request]) -> None:
        self.thread = thread
        self.requests = list(requests)
        self.news: asyncio.Queue[Progress | Exception] = asyncio.Queue()
        self.deadline = thread.loop.time() + thread.max_seconds
        self.is_open = True

    async def progress(self) -> AsyncIterator[Progress]:
        """What the answers get, step by step, until all of them are complete.

        Raises:
            EngineFailed: the engine's thread has ended.
            TimeoutError: the answers take longer than `max_seconds`, the time that they wait included.
        """
        n_going_on = len(self.requests)
        while n_going_on:
            async with asyncio.timeout_at(self.deadline):
                news = await self.news.get()
            if isinstance(news, Exception):
                raise news
            if news.whole is not None:
                n_going_on -= 1
            yield news

    async def answers(self) -> list[Answer]:
        """The whole answers, in the order of the requests. Raises what `progress` raises."""
        whole: dict[int, Answer] = {}
        async for progress in self.progress():
            if progress.whole is not None:
                whole[progress.index] = progress.whole
        return [whole[index] for index in range(len(self.requests))]

    def close(self) -> None:
        """Ends the answers that are not complete."""
        if self.is_open:
            self.is_open = False
            self.thread.forget(self)


@dataclass
class Told:
    """How much of an answer its call has been told."""

    call: Call
    index: int
    n_characters: int = 0
    n_tokens: int = 0

    def news(self, answer: Answer) -> Progress:
        """What is new."""
        text = answer.text[self.n_characters :]
        tokens = answer.tokens[self.n_tokens :]
        logprobs = answer.logprobs[self.n_tokens :]
        self.n_characters = len(answer.text)
        self.n_tokens = len(answer.tokens)
        return Progress(self.index, text, tokens, logprobs, answer if answer.finish_reason is not None else None)


@dataclass
class EngineThread:
    """Runs an engine. All but `run` and what it calls belongs to the asyncio loop in which it was made."""

    engine: Engine
    max_open: int
    """The most requests at once, be they running or waiting."""
    max_seconds: float
    """The longest time that a call may take."""
    loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)

    def __post_init__(self) -> None:
        self.calls: set[Call] = set()
        self.failure: BaseException | None = None
        self.on_failure: Callable[[], None] = lambda: None  # what else is to be done if the engine fails
        self.inbox: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self.told: dict[Answer, Told] = {}  # the thread's own
        self.is_stopped = False
        self.thread = threading.Thread(target=self.run, name="engine", daemon=True)
        self.thread.start()

    # ---- in asyncio

    @property
    def n_open(self) -> int:
        """How many requests are under way, complete ones of open calls included."""
        return sum(len(call.requests) for call in self.calls)

    def check_room(self, n: int) -> None:
        """Raises what `ask` would for any n requests. To know it before they are made saves their making."""
        self.check_alive()
        if n > self.max_open:
            raise InputError(f"{n} answers are asked for at once, expected {self.max_open} at most.")
        if self.n_open + n > self.max_open:
            raise Busy

    def ask(self, requests: Sequence[Request]) -> Call:
        """Takes requests, all of them or none.

        Raises:
            InputError: one of them can never be answered, or there are more than ever fit.
            Busy: they are too many for now.
            EngineFailed: the engine's thread has ended.
        """
        self.check_room(len(requests))
        for request in requests:
            self.engine.check(request)  # it reads what never changes
        call = Call(self, requests)
        self.calls.add(call)
        self.inbox.put(lambda: self.take(call))
        return call

    def check_alive(self) -> None:
        """Raises EngineFailed if the engine's thread has ended."""
        if self.failure is not None:
            raise EngineFailed("The engine has failed. Start the server again.") from self.failure

    def forget(self, call: Call) -> None:
        """Ends what is left of a call."""
        self.calls.discard(call)
        self.inbox.put(lambda: self.drop(call))

    async def stop(self) -> None:
        """Ends the thread, after the step that it is in."""
        self.inbox.put(self.end)
        await asyncio.to_thread(self.thread.join)

    def deliver(self, news: Sequence[tuple[Call, Progress]]) -> None:
        for call, progress in news:
            call.news.put_nowait(progress)

    def fail(self, error: BaseException) -> None:
        """Tells all calls that there will be no answer."""
        self.failure = error
        for call in self.calls:
            failed = EngineFailed("The engine has failed.")
            failed.__cause__ = error
            call.news.put_nowait(failed)
        self.on_failure()

    # ---- in the thread

    def run(self) -> None:
        """What the thread does: what it is told, then a step, again and again; without work it waits."""
        try:
            while True:
                while not self.told or not self.inbox.empty():
                    self.inbox.get()()
                    if self.is_stopped:
                        return
                self.report(self.engine.step())
        except BaseException as error:
            self.tell(self.fail, error)

    def tell(self, function: Callable[..., None], *arguments: object) -> None:
        """Has asyncio call a function."""
        if not self.loop.is_closed():
            self.loop.call_soon_threadsafe(function, *arguments)

    def take(self, call: Call) -> None:
        """Adds the requests of a call to the engine."""
        for index, request in enumerate(call.requests):
            self.told[self.engine.add(request)] = Told(call, index)

    def drop(self, call: Call) -> None:
        """Cancels the answers of a call that are not complete."""
        for answer in [answer for answer, told in self.told.items() if told.call is call]:
            del self.told[answer]
            self.engine.cancel(answer)

    def end(self) -> None:
        self.is_stopped = True

    def report(self, changed: Sequence[Answer]) -> None:
        """Tells the calls what their answers got."""
        news = []
        for answer in changed:
            if answer not in self.told:  # told already that it is complete
                continue
            told = self.told[answer]
            progress = told.news(answer)
            if progress.whole is not None:
                del self.told[answer]
            if progress.tokens or progress.whole is not None:
                news.append((told.call, progress))
        if news:
            self.tell(self.deliver, news)
