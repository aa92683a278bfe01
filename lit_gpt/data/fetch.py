"""Files from the web, whole or not at all."""

import hashlib
import http.client
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

from lit_gpt.errors import InputError

DOWNLOADS = Path("data/downloads")


def fetch(url: str, sha256: str | None = None, token: str | None = None) -> Path:
    """The file at `url`, in data/downloads. It appears there when it has arrived whole, and is not fetched again.

    Raises:
        InputError: the server refuses, the connection breaks, or what arrived is not what was announced.
    """
    try:
        name = urlsplit(url).path.rsplit("/", 1)[-1]  # without ?download=true
    except ValueError as error:
        raise InputError(f"{url} is no address: {error}.") from None
    path = DOWNLOADS / f"{hashlib.sha256(url.encode()).hexdigest()[:8]}-{name}"
    if path.is_file():
        return path
    DOWNLOADS.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    print(f"Fetching {url}", flush=True)
    headers = {"User-Agent": "lit-gpt"} | ({"Authorization": f"Bearer {token}"} if token else {})
    digest, size = hashlib.sha256(), 0
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=60) as answer:
            if answer.headers.get_content_type() == "text/html" and not name.endswith((".html", ".htm")):
                raise InputError(f"{url} answered with a web page, expected a file. Name another --url.")
            expected = answer.headers.get("Content-Length")
            with open(partial, "wb") as file:
                while block := answer.read(2**20):
                    file.write(block)
                    digest.update(block)
                    size += len(block)
        found = f"{size:,} bytes" if sha256 is None else digest.hexdigest()
        if (expected and int(expected) != size) or (sha256 and sha256 != found):
            wanted = sha256 or f"{int(expected):,} bytes"
            raise InputError(f"{url} arrived as {found}, expected {wanted}. Run it again, or name another --url.")
        partial.replace(path)
    except urllib.error.HTTPError as error:
        hint = " Accept its conditions there and pass --access_token." if error.code in (401, 403) else ""
        raise InputError(f"{url} answered {error.code} {error.reason}.{hint}") from None
    except (ValueError, http.client.InvalidURL) as error:
        raise InputError(f"{url} is no address: {error}.") from None
    except (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError) as error:
        why = getattr(error, "reason", None) or str(error) or type(error).__name__
        raise InputError(f"{url} could not be fetched: {why}. Check the network and run again.") from None
    finally:
        partial.unlink(missing_ok=True)
    return path
