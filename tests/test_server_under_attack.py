"""Hostile, slow and lost clients, and SIGTERM: `pytest tests/test_server_under_attack.py`, about 60 s"""

import json
import signal
import socket
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPResponse
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, make_tiny
from helpers.server import BATCH, CHAT, COMPLETIONS, WAITING, Server, endless, request_bytes

from lit_gpt import Tokenizer

GOOD = {"prompt": "Once upon a time", "max_tokens": 10, "temperature": 0}
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
BODY = json.dumps(GOOD).encode()
# patience and buffers as small as a test needs them
IMPATIENT = """
import runpy, socket, sys
from lit_gpt.generate import connections

connections.READ_SECONDS, connections.WRITE_SECONDS, connections.MAX_CONNECTIONS = 2, 2, 40
opened = connections.open_address

def with_small_buffers(host, port):
    address = opened(host, port)
    address.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    return address

connections.open_address = with_small_buffers
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def start(checkpoint: Path) -> Server:
    flags = ["--checkpoint_dir", checkpoint, "--port", "0", "--precision", "32-true", "--max_batch", BATCH]
    flags += ["--max_waiting", WAITING, "--max_new_tokens", 50_000, "--model_name", "tiny"]
    return Server(checkpoint, command=[sys.executable, "-c", IMPATIENT, ROOT / "generate/serve.py", *flags])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, sample_dir: Path) -> Path:
    """A tiny model that can read so much that it never comes to the end of an answer by itself."""
    return make_tiny(tmp_path_factory.mktemp("long") / "tiny", sample_dir, max_position_embeddings=60_000)


@pytest.fixture(scope="module")
def server(checkpoint: Path) -> Iterator[Server]:
    server = start(checkpoint)
    yield server
    server.end()
    assert "Traceback" not in server.log.result() and "ERROR" not in server.log.result()


@pytest.fixture(scope="module")
def good(server: Server) -> Any:
    """What the server says to a good request."""
    return said(server)


def said(server: Server) -> Any:
    status, result, _ = server.ask("POST", COMPLETIONS, GOOD)
    assert status == 200
    return result["choices"]


@pytest.fixture(autouse=True)
def is_as_before(server: Server, good: Any) -> Iterator[None]:
    """After each of these tests nothing is under way, and a good request is answered as ever."""
    yield
    server.wait_until_idle()
    assert said(server) == good


def connect(server: Server, data: bytes = b"") -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=60)
    connection.sendall(data)
    return connection


def rest(connection: socket.socket) -> bytes:
    """All that comes until the server closes the connection."""
    received = b""
    while True:
        try:
            part = connection.recv(65536)
        except ConnectionResetError:
            part = b""
        if not part:
            connection.close()
            return received
        received += part


def response(connection: socket.socket) -> tuple[int, bytes]:
    """Status and body of the next response."""
    answer = HTTPResponse(connection)
    answer.begin()
    return answer.status, answer.read()


# ---- bodies


def nested(path: str) -> bytes:
    inner = b'{"a":' * 900 + b"1" + b"}" * 900
    return b'{"prompt": %b}' % inner if path == COMPLETIONS else b'{"messages": [{"role": "user", "x": %b}]}' % inner


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        (COMPLETIONS, nested(COMPLETIONS), 400),
        (CHAT, nested(CHAT), 400),
        (COMPLETIONS, b'{"prompt": "a", "top_k": -' + b"9" * 400 + b"}", 400),
        (COMPLETIONS, b'{"prompt": "a", "seed": ' + b"9" * 10_000 + b"}", 400),
        (COMPLETIONS, b'{"prompt": "a", "temperature": 1e400}', 400),
        (CHAT, b'{"messages": [{"role": "user", "content": "a", "weight": ' + b"9" * 400 + b"}]}", 400),
        (COMPLETIONS, b'{"prompt": "a", "repetition_penalty": 1e-300, "max_tokens": 2}', 400),
        (COMPLETIONS, b'{"prompt": "\xff"}', 400),
        (COMPLETIONS, b'{"prompt": ["a"], "n": 1000000000}', 400),
        (COMPLETIONS, b'{"prompt": [' + b'"",' * 300_000 + b'""]}', 400),
        (COMPLETIONS, b'{"prompt": "a", "stop": [' + b'"b",' * 300_000 + b'"b"]}', 400),
        (COMPLETIONS, json.dumps({"prompt": "a", "logit_bias": {f"x{i}": 1 for i in range(50_000)}}).encode(), 400),
        (COMPLETIONS, json.dumps({"prompt": "a", **{f"x{i}": 1 for i in range(50_000)}}).encode(), 400),
        (CHAT, b'{"messages": [' + b"0," * 300_000 + b"0]}", 400),
        (COMPLETIONS, b" " * (2 * 2**20 + 1), 413),
    ],
    ids=lambda value: "" if isinstance(value, bytes) else str(value),
)
def test_a_hostile_body_is_refused_in_a_few_words(server: Server, path: str, body: bytes, status: int) -> None:
    found, result, _ = server.ask("POST", path, body)
    assert found == status and len(result["error"]["message"]) < 1000 and server.n_open() == 0


def test_a_body_without_an_end_is_refused(server: Server) -> None:
    connection = connect(server, HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
    for _ in range(33):
        connection.sendall(b"10000\r\n" + b" " * 2**16 + b"\r\n")
    status, body = response(connection)
    assert status == 413 and json.loads(body)["error"]["message"] == "The body has more than 2,097,152 bytes."
    connection.close()


def test_requests_behind_each_other_are_answered_in_their_order(server: Server, good: Any) -> None:
    one = request_bytes(COMPLETIONS, GOOD)
    answers = rest(connect(server, one * 2 + b"GET /v1/models HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n" * 2))
    first, second, refused = answers.split(b"HTTP/1.1 ")[1:]
    assert [json.loads(answer.splitlines()[-1])["choices"] for answer in (first, second)] == [good] * 2
    assert refused.startswith(b"403")


# ---- web pages


@pytest.mark.parametrize(
    ("host", "origin", "status"),
    [
        ("localhost", None, 200),
        ("127.0.0.1:8000", "http://localhost:3000", 200),
        ("[::1]:8000", None, 200),
        ("LocalHost", None, 200),
        ("evil.example", None, 403),
        ("evil.example", "http://localhost", 403),
        ("localhost", "https://evil.example", 403),
        ("localhost", "null", 403),
        ("localhost.evil.example", None, 403),
        ("localhost@evil.example", None, 403),
        ("[", None, 403),
    ],
)
def test_a_page_from_elsewhere_is_refused(server: Server, host: str, origin: str | None, status: int) -> None:
    headers = {"Host": host} | ({} if origin is None else {"Origin": origin})
    for method, path, body in (("GET", "/v1/models", None), ("POST", COMPLETIONS, GOOD), ("GET", "/", None)):
        found, result, _ = server.ask(method, path, body, **headers)
        assert found == status and (status == 200 or "may be that of a web page from elsewhere" in str(result))


@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""])
def test_what_a_page_may_send_without_asking_is_no_request(server: Server, content_type: str) -> None:
    status, result, headers = server.ask("POST", COMPLETIONS, BODY, **{"Content-Type": content_type})
    assert status == 400 and result["error"]["message"] == "expected a JSON object."
    preflight = {"Origin": "http://localhost:3000", "Access-Control-Request-Method": "POST"}
    status, _, headers = server.ask("OPTIONS", COMPLETIONS, **preflight)
    assert status == 405 and not any("access-control" in name.lower() for name in headers)


# ---- slow ones


@pytest.mark.parametrize(
    ("begins", "goes_on", "ends"),
    [
        (b"", b"", b""),
        (b"GET /health HTTP/1.1\r\nX: ", b"a", b""),
        (HEAD + b"Content-Length: 1000000\r\n\r\n", b"", b"408"),
        (HEAD + b"Content-Length: 1000000\r\n\r\n{", b" ", b"408"),
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\nGET /health HTTP/1.1\r\nX: ", b"a", b""),
    ],
    ids=["nothing", "headers", "no body", "a slow body", "headers of the second request"],
)
def test_a_request_that_does_not_come(server: Server, good: Any, begins: bytes, goes_on: bytes, ends: bytes) -> None:
    connection = connect(server, begins)
    assert said(server) == good
    if goes_on:
        with pytest.raises(OSError):
            while True:
                connection.sendall(goes_on)
                time.sleep(0.1)
    received = rest(connection)
    assert (b"HTTP/1.1 408" in received) == bool(ends)
    if ends and not goes_on:
        assert json.loads(received.splitlines()[-1])["error"]["message"] == "The request took more than 2 s."


def test_too_many_connections(server: Server) -> None:
    connections = [connect(server) for _ in range(60)]
    answers = [rest(connection) for connection in connections]
    refused = [answer for answer in answers if answer.startswith(b"HTTP/1.1 503")]
    assert len(refused) >= 20 and answers.count(b"") <= 40


def test_a_stream_that_nobody_reads_ends(server: Server, checkpoint: Path) -> None:
    """It does not keep its place, and what it has made does not pile up."""
    body = endless(Tokenizer(checkpoint)) | {"stream": True, "logprobs": 20}
    connections = []
    for _ in range(BATCH + WAITING):
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", server.port))
        connection.sendall(request_bytes(COMPLETIONS, body))
        connections.append(connection)
    while server.n_open() == 0:
        time.sleep(0.05)
    server.wait_until_idle()
    for connection in connections:
        connection.close()


def test_clients_that_go_leave_the_others_alone(server: Server, checkpoint: Path) -> None:
    body = endless(Tokenizer(checkpoint)) | {"max_tokens": 200, "stream": True}
    alone = rest(connect(server, request_bytes(COMPLETIONS, body, Connection="close")))
    assert alone.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
    texts = texts_of(alone)
    connections = [connect(server, request_bytes(COMPLETIONS, body, Connection="close")) for _ in range(BATCH + 2)]
    for connection in connections[::2]:
        connection.recv(10)
        connection.close()
    for connection in connections[1::2]:
        assert texts_of(rest(connection)) == texts


def texts_of(stream: bytes) -> str:
    """The text of a stream's events."""
    events = [line.removeprefix("data: ") for line in stream.decode().splitlines() if line.startswith("data: {")]
    return "".join(json.loads(event)["choices"][0]["text"] for event in events)


# ---- the end


def test_what_is_sent_before_the_signal_is_answered(checkpoint: Path) -> None:
    """Though it is sent a moment before, to the last body of a slow client. A stream that nobody reads ends, too."""
    server = start(checkpoint)
    try:
        body = endless(Tokenizer(checkpoint)) | {"max_tokens": 60}
        unread = socket.socket()
        unread.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        unread.connect(("127.0.0.1", server.port))
        unread.sendall(request_bytes(COMPLETIONS, body | {"max_tokens": 50_000, "stream": True, "logprobs": 20}))
        server.process.send_signal(signal.SIGSTOP)  # it reads nothing before it hears the other signal
        slow = connect(server, HEAD + b"Content-Length: %d\r\n\r\n" % len(BODY))
        requests = [request_bytes(COMPLETIONS, body | {"stream": i % 2 == 1}) for i in range(6)]
        connections = [connect(server, request) for request in requests]
        server.process.send_signal(signal.SIGTERM)
        server.process.send_signal(signal.SIGCONT)
        slow.sendall(BODY)
        with ThreadPoolExecutor(7) as threads:
            answers = list(threads.map(rest, [*connections, slow]))
        for i, answer in enumerate(answers):
            assert answer.startswith(b"HTTP/1.1 200 ")
            if i in (1, 3, 5):
                assert answer.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
            else:
                n_tokens = json.loads(answer.splitlines()[-1])["usage"]["completion_tokens"]
                assert n_tokens == (10 if i == 6 else 60)
        with pytest.raises(OSError):
            connect(server)
        assert server.process.wait(60) == 0
        assert "Traceback" not in server.log.result() and "Once more ends at once" in server.log.result()
        unread.close()
    finally:
        server.end()


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, -signal.SIGTERM), (signal.SIGINT, 130)])
def test_the_second_signal_ends_at_once(checkpoint: Path, number: int, status: int) -> None:
    server = start(checkpoint)
    try:
        connection = server.begin(COMPLETIONS, endless(Tokenizer(checkpoint)) | {"stream": True})
        connection.recv(100)
        server.process.send_signal(number)
        with pytest.raises(OSError):  # when the first one is heard, nobody is taken any more
            while True:
                connect(server).close()
                time.sleep(0.05)
        server.process.send_signal(number)
        assert server.process.wait(20) == status
        connection.close()
    finally:
        server.end()
