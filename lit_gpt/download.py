"""Downloads: files from the web that are whole or not there.

`download` puts one address into one file. `fetch` keeps what it fetches in data/downloads, for scripts/prepare_*.py.
"""

import hashlib
import http.client
import os
import re
import ssl
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from email.message import Message
from http.client import HTTPMessage
from pathlib import Path
from typing import IO, TYPE_CHECKING
from urllib.parse import urlsplit

from lit_gpt.errors import InputError
from lit_gpt.lock import only_writer

if TYPE_CHECKING:
    from rich.progress import Progress

DOWNLOADS = Path("data/downloads")  # where `fetch` keeps files
BLOCK = 2**20  # bytes that are read and written at once
BUSY = (408, 429, 500, 502, 503, 504)  # answers of a server that may give the file a little later

RANGE_REFUSED = http.client.REQUESTED_RANGE_NOT_SATISFIABLE


class DownloadError(InputError):
    """A download that failed. The message names the address and what to do."""

    def __init__(self, message: str, may_pass: bool = False) -> None:
        super().__init__(message)
        self.may_pass = may_pass
        """Whether another try may succeed: the connection broke, or the server was busy."""


class DownloadRefused(DownloadError):
    """The server answered with an error. `status` is its number; `headers` may hold the server's own explanation."""

    def __init__(self, message: str, status: int, headers: Message) -> None:
        super().__init__(message, may_pass=status in BUSY)
        self.status = status
        self.headers = headers


@dataclass(frozen=True)
class Expected:
    """The content that a file should have, as far as it is known before the file is there."""

    size: int | None = None
    """In bytes."""
    sha256: str | None = None
    git_blob_id: str | None = None
    """The name that git gives to the content: the Hugging Face hub tells it of small files."""

    def difference(self, path: Path) -> tuple[str, str] | None:
        """(what `path` holds, what was expected), as two short phrases; None if the file is as expected."""
        if not path.is_file():
            return "nothing", "a file"
        size = path.stat().st_size
        if self.size is not None and size != self.size:
            return f"{size:,} bytes", f"{self.size:,} bytes"

        if self.sha256 is not None:
            digest = hashlib.sha256()
            expected = self.sha256
        elif self.git_blob_id is not None:
            digest = hashlib.sha1(b"blob %d\0" % size)
            expected = self.git_blob_id
        else:
            return None
        with open(path, "rb") as file:
            while block := file.read(2**24):
                digest.update(block)
        return None if digest.hexdigest() == expected else (digest.hexdigest(), expected)


def fetch(url: str, sha256: str | None = None, token: str | None = None) -> Path:
    """Downloads `url` into data/downloads, unless it is there already, and returns the file's path.

    Raises:
        InputError: another process fetches it.
        DownloadError: see `download`.
    """
    with explained(url):
        name = urlsplit(url).path.rsplit("/", 1)[-1]  # without ?download=true
    path = DOWNLOADS / f"{hashlib.sha256(url.encode()).hexdigest()[:8]}-{name}"
    if path.is_file():
        return path
    headers = {"Authorization": f"Bearer {token}"} if token else None
    with only_writer(path):
        print(f"Fetching {url}", flush=True)
        download(url, path, expected=Expected(sha256=sha256), headers=headers)
    return path


def read_token(token: str | None) -> str | None:
    """An access token of the hub as it was pasted, or that of HF_TOKEN in the place of an empty one; None without any.

    Raises:
        InputError: it has characters that no token has.
    """
    token = (token or "").strip() or os.environ.get("HF_TOKEN", "").strip()
    if not re.fullmatch(r"[!-~]*", token):
        raise InputError("--access_token (or HF_TOKEN) has a space or a letter that no token has. Copy it anew.")
    return token or None


def download(
    url: str,
    path: Path,
    *,
    expected: Expected | None = None,
    headers: Mapping[str, str] | None = None,
    partial: Path | None = None,
    tries: int = 1,
    timeout: float = 60,
) -> None:
    """Downloads `url` to `path`, where the file appears when it is complete and has the expected content.

    Args:
        expected: What the file should hold. None accepts what the server announces.
        headers: Sent with the request. An Authorization is kept from other hosts, see `SameHostOnly`.
        partial: Where the content waits until it is complete. A file that is there is continued, if the server can, and
            what has arrived stays there if the connection breaks. None begins anew and leaves nothing.
        tries: How many tries to make if the connection breaks or the server is busy. A try in which something arrives
            is the first of a new count. Each goes on where the one before ended.
        timeout: Seconds to wait for the server at any moment.

    Raises:
        DownloadRefused: the server answers with an error.
        DownloadError: no address, no connection, a web page in place of a file, or other content than expected.
    """
    expected = expected or Expected()
    waiting = partial or path.with_name(f".{path.name}.partial")
    if partial is None:
        waiting.unlink(missing_ok=True)
    try:
        receive_patiently(url, waiting, expected, headers or {}, tries=tries, timeout=timeout)
        if difference := expected.difference(waiting):
            waiting.unlink()
            raise other_content(url, *difference)
        waiting.replace(path)
    finally:
        if partial is None:
            waiting.unlink(missing_ok=True)


def receive_patiently(
    url: str, path: Path, expected: Expected, headers: Mapping[str, str], *, tries: int, timeout: float
) -> None:
    """Calls `receive` until the file is complete, or the tries are used up."""
    if expected.size is not None and size_of(path) > expected.size:
        path.unlink()  # it cannot be the beginning of this file
    failures = 0
    while not path.is_file() or size_of(path) != expected.size:
        size_before = size_of(path)
        try:
            return receive(url, path, headers, timeout=timeout)
        except DownloadError as error:
            # there is nothing after the end of what waits, which is thus all of the file or another one: begin anew
            if isinstance(error, DownloadRefused) and error.status == RANGE_REFUSED and size_before > 0:
                path.unlink()
                continue
            has_grown = size_of(path) > size_before
            failures = 1 if has_grown else failures + 1
            if not error.may_pass or failures >= tries:
                raise
            # the pauses are 1, 2, 4, ... seconds: a busy server asks for patience
            time.sleep(min(2 ** (failures - 1), 30))


def receive(url: str, path: Path, headers: Mapping[str, str], *, timeout: float) -> None:
    """Requests what `path` lacks of `url`, and appends it."""
    with explained(url):
        request = urllib.request.Request(url, headers={"User-Agent": "lit-gpt", **headers})
        start = size_of(path)
        if start:
            request.add_header("Range", f"bytes={start}-")
        with urllib.request.build_opener(SameHostOnly).open(request, timeout=timeout) as answer:
            check_is_no_page(url, answer)
            # a server that cannot continue a file sends all of it
            if answer.status != http.client.PARTIAL_CONTENT:
                start = 0
            length = answer.headers.get("Content-Length")
            total = None if length is None else start + int(length)

            with open(path, "ab") as file, progress_bar() as bar:
                file.truncate(start)
                task = bar.add_task(path.name.removeprefix(".").removesuffix(".partial"), total=total, completed=start)
                while block := answer.read(BLOCK):
                    file.write(block)
                    bar.advance(task, len(block))

    # urllib takes a connection that ends early for the end of the file
    if total is not None and size_of(path) != total:
        error = other_content(url, f"{size_of(path):,} bytes", f"{total:,} bytes")
        error.may_pass = True
        raise error


def other_content(url: str, arrived: str, expected: str) -> DownloadError:
    return DownloadError(f"{url} arrived as {arrived}, expected {expected}. Run it again, or fetch it from elsewhere.")


class SameHostOnly(urllib.request.HTTPRedirectHandler):
    """Follows redirects, and keeps the access token from other hosts.

    urllib sends all headers along (https://github.com/python/cpython/issues/77842). The Hugging Face hub redirects to
    addresses that are signed themselves, some of which refuse a request that brings a token, too.
    """

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> urllib.request.Request | None:
        redirected = super().redirect_request(req, fp, code, msg, headers, newurl)
        if redirected is not None and redirected.host != req.host:
            redirected.remove_header("Authorization")
        return redirected


def check_is_no_page(url: str, answer: http.client.HTTPResponse) -> None:
    """Raises DownloadError for a web page, such as one to log in, in place of a file."""
    is_page = answer.headers.get_content_type() == "text/html"
    if is_page and not urlsplit(url).path.endswith((".html", ".htm")):
        raise DownloadError(f"{url} answered with a web page, expected a file. Name another --url or server.")


@contextmanager
def explained(url: str) -> Iterator[None]:
    """Turns the errors of urllib into DownloadErrors of one line. Those of the disk pass."""
    try:
        yield
    except urllib.error.HTTPError as error:
        hint = " Accept its conditions there and pass --access_token." if error.code in (401, 403) else ""
        message = f"{url} answered {error.code} {error.reason}.{hint}"
        raise DownloadRefused(message, error.code, error.headers) from None
    except (ValueError, http.client.InvalidURL) as error:
        raise DownloadError(f"{url} is no address: {error}.") from None
    except (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError, ssl.SSLError) as error:
        reason = getattr(error, "reason", None) or str(error) or type(error).__name__
        message = f"{url} could not be fetched: {reason}. Check the network and run again."
        raise DownloadError(message, may_pass=True) from None


def progress_bar() -> "Progress":
    """A line on stderr that shows how much has arrived; nothing if stderr is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty())


def size_of(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0
