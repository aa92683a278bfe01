"""Where the server listens, how long its connections may say nothing, and how it ends.

uvicorn waits without end for a request to come, and for a response to be read. Whoever opens some hundred connections
and says nothing ("slowloris") would keep all others out.
"""

import asyncio
import contextlib
import copy
import json
import socket
from collections.abc import Iterator

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from lit_gpt.errors import InputError
from lit_gpt.generate.web import error_body
from lit_gpt.interruption import Interruption

MAX_CONNECTIONS = 500
"""Half of the files that systems let a process open."""
READ_SECONDS = 60.0
"""The longest time in which a request comes, to the last byte of its body. 2 MiB in it are 280 kbit/s."""
WRITE_SECONDS = 30.0
"""The longest time in which a client reads nothing of what has been written, or less than 1 MiB of more than that."""
LAST_SECONDS = 0.5
"""How long requests are taken after the signal to end: those that were sent before it may not have been read yet."""
PROMISE = b"\nStopping: what has been asked is answered. Once more ends at once.\n"


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


# ---- a connection


class Connection(H11Protocol):
    """A connection that ends if it keeps the server waiting."""

    until_read: asyncio.TimerHandle | None = None
    until_written: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > MAX_CONNECTIONS:
            transport.write(refusal("503 Service Unavailable", "There are too many connections. Try again later."))
            transport.close()
        else:
            self.await_request()

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self.until_read, self.until_written):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        self.await_reading()
        self.await_request()
        super().on_response_complete()

    def await_request(self) -> None:
        """The next request has to come from now on."""
        if self.until_read is not None:
            self.until_read.cancel()
        self.until_read = self.loop.call_later(READ_SECONDS, self.end_unless_asked)

    def end_unless_asked(self) -> None:
        """Ends the connection if no request has come to its last byte."""
        if self.conn.their_state not in (h11.IDLE, h11.SEND_BODY):
            return
        if self.conn.our_state is h11.SEND_RESPONSE:
            self.transport.write(refusal("408 Request Timeout", f"The request took more than {READ_SECONDS:g} s."))
        self.transport.close()

    def await_reading(self) -> None:
        """What is to be written has to be read from now on."""
        if self.until_written is not None:
            self.until_written.cancel()
        n_bytes = self.transport.get_write_buffer_size()
        if n_bytes:
            seconds = WRITE_SECONDS * max(1, n_bytes / 2**20)
            self.until_written = self.loop.call_later(seconds, self.end_unless_read)

    def end_unless_read(self) -> None:
        if self.transport.get_write_buffer_size():
            self.transport.abort()

    def pause_writing(self) -> None:
        """More than 64 KiB are to be written."""
        super().pause_writing()
        self.await_reading()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self.until_written is not None:
            self.until_written.cancel()


def refusal(status: str, message: str) -> bytes:
    """A response to what is no whole request."""
    body = json.dumps(error_body(int(status[:3]), message)).encode()
    head = (
        f"HTTP/1.1 {status}\r\nConnection: close\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
    )
    return head.encode() + b"\r\n" + body


# ---- the server


class Server(uvicorn.Server):
    """Serves until SIGTERM or Ctrl-C, and then answers what has been asked."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        # uvicorn's own hears no second SIGTERM, and at the end raises the signals again
        with Interruption(self.end, PROMISE):
            yield

    def end(self) -> None:
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        # uvicorn resets connections that it has not taken yet, and closes those of which it has read no request
        await asyncio.sleep(LAST_SECONDS)
        await super().shutdown(sockets)


def run_app(app: FastAPI, address: socket.socket) -> None:
    """Answers requests until SIGTERM or Ctrl-C, then those that were sent before. A second one ends it at once.

    Raises:
        BaseException: what has ended the thread of the engine, app.state.engine.
        KeyboardInterrupt: a second Ctrl-C.
    """
    log_config = copy.deepcopy(uvicorn.config.LOGGING_CONFIG)
    log_config["handlers"]["access"]["stream"] = "ext://sys.stderr"
    server = Server(uvicorn.Config(app, http=Connection, ws="none", log_config=log_config, server_header=False))
    app.state.end = server.end
    server.run(sockets=[address])
    if app.state.engine.failure is not None:
        raise app.state.engine.failure
