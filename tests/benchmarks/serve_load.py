"""Requests a second and latencies of generate/serve.py under load, and whether any is lost.

    python tests/benchmarks/serve_load.py                                             # 1, 8, 32 and 128 clients
    python tests/benchmarks/serve_load.py --clients 32 --requests 10000 --max_tokens 4
    python tests/benchmarks/serve_load.py --clients 128 --flags '--max_waiting 32'    # some are refused, and ask again

Every client asks one question after the other, each another one, at temperature 0. The answer to the first question is
asked for alone before, and has to be the same in the crowd. Who is refused with status 429 asks again after the time
that the response names, as OpenAI's client does; the seconds of a request are those until it has its answer. It is
lost if anything else comes than an answer. Memory is that of the server's process.
"""

import argparse
import http.client
import json
import statistics
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, SimpleQueue

ROOT = Path(__file__).parents[2]
FIRST = "What is the capital of France?"


@dataclass
class Load:
    """What came of some requests."""

    seconds: list[float] = field(default_factory=list)
    """Of each request that was answered."""
    n_tokens: int = 0
    n_refused: int = 0
    """Responses with status 429."""
    errors: list[str] = field(default_factory=list)
    """Of each request that was lost."""
    first_answers: set[str] = field(default_factory=set)
    early_mb: int = 0
    """The server's memory after a tenth of the requests."""


@dataclass
class Said:
    """An answer."""

    text: str
    n_tokens: int
    n_refused: int
    """How often the request was refused before."""


def ask(port: int, question: str, max_tokens: int) -> Said:
    """Asks until there is an answer. Raises RuntimeError for an error, and OSError or HTTPException for none."""
    body = {"messages": [{"role": "user", "content": question}], "max_tokens": max_tokens, "temperature": 0}
    n_refused = 0
    while True:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
        connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        content = json.loads(response.read())
        connection.close()
        if response.status != 429:
            break
        n_refused += 1
        time.sleep(float(response.headers["Retry-After"]))
    if response.status != 200:
        raise RuntimeError(f"{response.status}: {content}")
    return Said(content["choices"][0]["message"]["content"], content["usage"]["completion_tokens"], n_refused)


def load(port: int, pid: int, n_clients: int, n_requests: int, max_tokens: int) -> Load:
    """Sends requests from so many clients at once to the server that has this port and process id."""
    questions: SimpleQueue[str] = SimpleQueue()
    for i in range(n_requests):
        questions.put(FIRST if i % 50 == 0 else f"What is special about the number {i}?")
    result = Load()
    lock = threading.Lock()

    def client() -> None:
        while True:
            try:
                question = questions.get_nowait()
            except Empty:
                return
            began = time.perf_counter()
            try:
                said = ask(port, question, max_tokens)
            except Exception as error:
                with lock:
                    result.errors.append(str(error))
                continue
            with lock:
                result.seconds.append(time.perf_counter() - began)
                result.n_tokens += said.n_tokens
                result.n_refused += said.n_refused
                if question == FIRST:
                    result.first_answers.add(said.text)
                if len(result.seconds) == n_requests // 10:
                    result.early_mb = memory_mb(pid)

    threads = [threading.Thread(target=client) for _ in range(n_clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return result


def memory_mb(pid: int) -> int:
    """What a process holds at this moment. 0 where there is no /proc."""
    status = Path(f"/proc/{pid}/status")
    if not status.is_file():
        return 0
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) // 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", default="1,8,32,128", help="how many at once")
    parser.add_argument("--requests", type=int, help="in all; 4 for each client, and 16 at least, unless it says so")
    parser.add_argument("--max_tokens", type=int, default=32, help="of an answer")
    parser.add_argument("--port", type=int, default=8199)
    parser.add_argument("--flags", default="", help="more flags of generate/serve.py")
    args = parser.parse_args()
    flags = f"--port {args.port} --max_batch 32 --max_waiting 200 {args.flags}".split()
    server = subprocess.Popen([sys.executable, "generate/serve.py", *flags], cwd=ROOT, stderr=subprocess.DEVNULL)
    try:
        for _ in range(600):
            time.sleep(0.1)
            try:
                alone = ask(args.port, FIRST, args.max_tokens).text
                break
            except OSError:
                continue
        print(
            "| clients | requests | lost | refused | requests/s | tokens/s | median s | 99th s | same answer |"
            " MB after a tenth | MB at the end |"
        )
        print("|---:|---:|---:|---:|---:|---:|---:|---:|---|---:|---:|")
        for n_clients in map(int, args.clients.split(",")):
            n_requests = args.requests or max(16, 4 * n_clients)
            began = time.perf_counter()
            found = load(args.port, server.pid, n_clients, n_requests, args.max_tokens)
            seconds = time.perf_counter() - began
            times = sorted(found.seconds)
            last = times[min(len(times) - 1, round(0.99 * len(times)))]
            print(
                f"| {n_clients} | {n_requests} | {len(found.errors)} | {found.n_refused} |"
                f" {len(times) / seconds:.2f} | {found.n_tokens / seconds:.0f} |"
                f" {statistics.median(times):.2f} | {last:.2f} |"
                f" {'yes' if found.first_answers == {alone} else 'NO'} |"
                f" {found.early_mb} | {memory_mb(server.pid)} |",
                flush=True,
            )
            for error in found.errors[:3]:
                print(error, file=sys.stderr)
    finally:
        server.terminate()
        server.wait(60)


if __name__ == "__main__":
    main()
