"""A server's process, asked by OpenAI's client, by HTTP, or byte by byte."""

import http.client
import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
from conftest import ROOT

from lit_gpt import Tokenizer

KEY = "a secret"
BATCH, WAITING = 4, 4
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


class Server:
    """A server's process."""

    def __init__(self, checkpoint_dir: Path, *flags: str, command: Sequence[str | Path] = ()) -> None:
        """Starts the script, or a command that does as it does."""
        script = [sys.executable, ROOT / "generate/serve.py", "--checkpoint_dir", checkpoint_dir, "--port", "0"]
        script += ["--precision", "32-true", "--max_batch", str(BATCH), "--max_waiting", str(WAITING), *flags]
        pipe = subprocess.PIPE
        words = [str(word) for word in command or script]
        path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
        environment = os.environ | {"PYTHONPATH": path}
        self.process = subprocess.Popen(words, stdout=pipe, stderr=pipe, text=True, cwd=ROOT, env=environment)
        line = self.process.stderr.readline()
        self.port = int(re.fullmatch(r"Serving .+ at http://127.0.0.1:(\d+)\.\n", line)[1])
        self.url = f"http://127.0.0.1:{self.port}/"
        self.reader = ThreadPoolExecutor(1)
        self.log = self.reader.submit(self.process.stderr.read)  # or the pipe would be full
        while not self.listens():
            assert self.process.poll() is None, self.log.result()
            time.sleep(0.05)

    def listens(self) -> bool:
        try:
            return self.ask("GET", "/health")[0] == 200
        except OSError:
            return False

    def client(self, api_key: str = KEY) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}v1", api_key=api_key, max_retries=0, timeout=60)

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any, http.client.HTTPMessage]:
        """Status, body and headers of a response. A body that is bytes is sent as it is."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json", **headers}
        connection.request(method, path, data, headers)
        response = connection.getresponse()
        text = response.read().decode()
        connection.close()
        is_json = response.headers.get_content_type() == "application/json"
        return response.status, json.loads(text) if is_json else text, response.headers

    def begin(self, path: str, body: dict[str, Any]) -> socket.socket:
        """Sends a request, and leaves the connection open."""
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=60)
        connection.sendall(request_bytes(path, body))
        return connection

    def n_open(self) -> int:
        return self.ask("GET", "/health")[1]["open_requests"]

    def wait_until_idle(self) -> None:
        end = time.monotonic() + 20
        while self.n_open() > 0:
            assert time.monotonic() < end, "Requests go on that nobody waits for."
            time.sleep(0.05)

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        self.reader.shutdown()


def request_bytes(path: str, body: dict[str, Any], **headers: str) -> bytes:
    """A request as it is sent."""
    data = json.dumps(body).encode()
    lines = [f"POST {path} HTTP/1.1", "Host: localhost", f"Authorization: Bearer {KEY}"]
    lines += ["Content-Type: application/json", f"Content-Length: {len(data)}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode() + data


def endless(tokenizer: Tokenizer) -> dict[str, Any]:
    """A request that takes minutes."""
    bias = {str(token): -100 for token in tokenizer.stop_ids}
    return {"prompt": "Once upon a time", "max_tokens": 50_000, "logit_bias": bias, "temperature": 1, "seed": 1}
