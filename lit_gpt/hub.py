"""Checkpoints from the Hugging Face hub, or a mirror of it (HF_ENDPOINT)."""

import hashlib
import os
import shutil
from collections.abc import Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lit_gpt.checkpoint import COMPANIONS
from lit_gpt.config import Config
from lit_gpt.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator

# in this order: the first kind of which there is a file is taken. Not what other libraries put beside it
WEIGHTS = (
    ("model*.safetensors", "model.safetensors.index.json"),
    ("pytorch_model*.bin", "pytorch_model.bin.index.json"),
)


class File(NamedTuple):
    name: str
    size: int
    sha256: str | None
    """What the hub says of large files."""


def download(repo_id: str, folder: Path, revision: str | None, token: str | None, tokenizer_only: bool) -> list[File]:
    """Puts a repository's weights, tokenizer and settings into `folder`, and nothing else of it.

    Files appear under their names when they are whole; what is there already is not fetched again, what was cut off
    goes on where it ended. config.json comes first: a model that no family knows costs nothing more.

    Raises:
        InputError: no such repository or revision, no permission, an unknown architecture, too little space, no
            network, or a file that is not what the hub says.
    """
    from huggingface_hub import HfApi, hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    api = HfApi(endpoint=os.environ.get("HF_HUB_ENDPOINT"), token=token)
    with explained(repo_id, revision):
        siblings = api.model_info(repo_id, revision=revision, files_metadata=True).siblings
    files = [File(file.rfilename, file.size or 0, file.lfs.sha256 if file.lfs else None) for file in siblings]
    wanted = choose(files, tokenizer_only)

    def fetch(file: File) -> None:
        """Its parts wait under a name of their own, for a second run too: hf_hub_download begins again."""
        partial = folder / f".{file.name}.{(file.sha256 or str(file.size))[:12]}.partial"
        url = hf_hub_url(repo_id, file.name, revision=revision, endpoint=api.endpoint)
        with explained(repo_id, revision), open(partial, "ab") as temp:
            http_get(
                url,
                temp,
                resume_size=temp.tell(),
                headers=build_hf_headers(token=token),
                expected_size=file.size,
                displayed_filename=file.name,
            )
        check(partial, file)
        partial.replace(folder / file.name)

    if not tokenizer_only:
        if not any(file.name == "config.json" for file in wanted):
            raise InputError(f"{repo_id} has no config.json, so that nothing says what its weights are.")
        fetch(next(file for file in wanted if file.name == "config.json"))
        Config.from_checkpoint(folder)
        if not any(fnmatch(file.name, kind) for file in wanted for kind, _ in WEIGHTS):
            raise InputError(f"{repo_id} has no model.safetensors and no pytorch_model.bin, whole or in parts.")
    missing = [file for file in wanted if not is_whole(folder / file.name, file)]
    total, free = sum(file.size for file in missing), shutil.disk_usage(folder.parent).free
    if total > free:
        raise InputError(f"{repo_id} takes {total / 1e9:.1f} GB, and {folder.parent} has {free / 1e9:.1f} GB free.")
    for file in missing:
        fetch(file)
    return wanted


def choose(files: Sequence[File], tokenizer_only: bool) -> list[File]:
    """The weights in one format, the tokenizer and the settings."""
    names = [file.name for file in files]
    patterns = list(COMPANIONS)
    if not tokenizer_only:
        kinds = (kind for kind in WEIGHTS if any(fnmatch(name, kind[0]) for name in names))
        patterns += next(kinds, ())
    return [file for file in files if any(fnmatch(file.name, pattern) for pattern in patterns)]


def is_whole(path: Path, file: File) -> bool:
    return path.is_file() and path.stat().st_size == file.size


def check(path: Path, file: File) -> None:
    """Raises InputError, and deletes the file, where it is not what the hub says."""
    if not is_whole(path, file):
        found = f"{path.stat().st_size:,} bytes" if path.is_file() else "nothing"
    elif file.sha256 is None:
        return
    else:
        with open(path, "rb") as content:
            found = hashlib.file_digest(content, "sha256").hexdigest()
        if found == file.sha256:
            return
    path.unlink(missing_ok=True)
    raise InputError(f"{path} arrived as {found}, expected {file.sha256 or f'{file.size:,} bytes'}. Run it again.")


@contextmanager
def explained(repo_id: str, revision: str | None) -> "Iterator[None]":
    """The hub's refusals in one line each."""
    from huggingface_hub import errors

    here = os.environ.get("HF_HUB_ENDPOINT") or os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    try:
        yield
    except errors.GatedRepoError:
        raise InputError(
            f"{repo_id} is gated: accept its conditions on {here}/{repo_id}, then pass --access_token (made on"
            f" {here}/settings/tokens) or set HF_TOKEN."
        ) from None
    except errors.RepositoryNotFoundError:
        raise InputError(
            f"{here} has no model {repo_id}, or it is private. Look at the spelling, org/name, or pass --access_token."
        ) from None
    except errors.RevisionNotFoundError:
        raise InputError(f"{repo_id} has no revision {revision}.") from None
    except errors.HFValidationError as error:
        raise InputError(f"--repo_id {repo_id}: {error}") from None
    except errors.HfHubHTTPError as error:
        status = getattr(getattr(error, "response", None), "status_code", "an error")
        raise InputError(f"{here} answered {status} for {repo_id}: {first_words(error)} Try again later.") from None
    except OSError as error:
        if isinstance(error, ConnectionError | TimeoutError) or error.filename is None:
            raise InputError(f"{here} cannot be reached: {first_words(error)} What has arrived is kept.") from None
        raise
    except Exception as error:  # the errors of its HTTP library, whose name has changed
        if "http" not in type(error).__module__:
            raise
        raise InputError(f"The connection to {here} broke: {first_words(error)} Run it again to go on.") from None


def first_words(error: Any) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text[:160].rstrip(".") + "."
