"""Checkpoints from the Hugging Face hub, or a mirror of it (HF_ENDPOINT or HF_HUB_ENDPOINT)."""

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lit_gpt import families
from lit_gpt.checkpoint.save import COMPANIONS
from lit_gpt.config import Config, read_json
from lit_gpt.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator

# in this order: the first kind of which there is a file is taken. Not what other libraries put beside it
WEIGHTS = (
    ("model-*.safetensors", "model.safetensors.index.json"),
    ("model.safetensors", "model.safetensors.index.json"),
    ("pytorch_model-*.bin", "pytorch_model.bin.index.json"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json"),
)
LARGEST = 50e9  # bytes of a file that the hub hands out over plain HTTP


class File(NamedTuple):
    name: str
    size: int
    sha256: str | None = None
    """What the hub says of large files."""
    blob_id: str | None = None
    """git's name of the content, for the small ones."""


def download(repo_id: str, folder: Path, revision: str | None, token: str | None, tokenizer_only: bool) -> list[File]:
    """Puts a repository's weights, tokenizer and settings into `folder`, and nothing else of it.

    Files appear under their names when they are whole; what is there already, byte for byte, is not fetched again,
    what was cut off goes on where it ended. config.json comes first: a model that no family knows costs nothing more.
    All files are those of one commit, whatever is pushed meanwhile.

    Raises:
        InputError: no such repository or revision, no permission, an unknown architecture, too little space, no
            network, a file that is not what the hub says, or a folder with other weights.
    """
    from huggingface_hub import HfApi, hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    api = HfApi(endpoint=os.environ.get("HF_HUB_ENDPOINT"), token=token)
    with explained(repo_id, revision):
        info = api.model_info(repo_id, revision=revision, files_metadata=True)
    lfs = {file.rfilename: file.lfs.sha256 for file in info.siblings if file.lfs}
    files = [File(file.rfilename, file.size or 0, lfs.get(file.rfilename), file.blob_id) for file in info.siblings]
    wanted = choose(files, tokenizer_only)

    def partial(file: File) -> Path:
        """Where its parts wait, for a second run too: hf_hub_download begins again."""
        path = folder / file.name
        return path.with_name(f".{path.name}.{(file.sha256 or file.blob_id or str(file.size))[:12]}.partial")

    def fetch(file: File) -> None:
        partial(file).parent.mkdir(exist_ok=True)
        url = hf_hub_url(repo_id, file.name, revision=info.sha or revision, endpoint=api.endpoint)
        with explained(repo_id, revision), open(partial(file), "ab") as temp:
            http_get(
                url,
                temp,
                resume_size=temp.tell(),
                headers=build_hf_headers(token=token),
                expected_size=file.size,
                displayed_filename=file.name,
            )
        check(partial(file), file)
        partial(file).replace(folder / file.name)

    config = next((file for file in wanted if file.name == "config.json"), None)
    if not tokenizer_only:
        if config is None:
            raise InputError(f"{repo_id} has no config.json, so that nothing says what its weights are.")
        check_weights(repo_id, folder, wanted)
    folder.mkdir(parents=True, exist_ok=True)
    if config is not None:
        fetch(config)
        complete_config(folder / "config.json", repo_id)
    if not tokenizer_only:
        Config.from_checkpoint(folder)
        if not any(fnmatch(file.name, kind) for file in wanted for kind, _ in WEIGHTS):
            raise InputError(f"{repo_id} has no model.safetensors and no pytorch_model.bin, whole or in parts.")
    if any(file.size > 1e7 and (folder / file.name).is_file() for file in wanted):
        print(f"Comparing the files in {folder} with the hub's.", file=sys.stderr)
    missing = [file for file in wanted if file is not config and difference(folder / file.name, file)]
    here = sum(partial(file).stat().st_size for file in missing if partial(file).is_file())
    left, free = sum(file.size for file in missing) - here, shutil.disk_usage(folder).free
    if left > free:
        raise InputError(f"{repo_id} takes {left / 1e9:.1f} GB, and {folder} has {free / 1e9:.1f} GB free.")
    for file in missing:  # parts of two commits must not stand side by side, should this end early
        (folder / file.name).unlink(missing_ok=True)
    for file in missing:
        fetch(file)
    return wanted


def check_weights(repo_id: str, folder: Path, wanted: Sequence[File]) -> None:
    """Raises InputError where the weights cannot be fetched, or others in the folder would be read in their place."""
    if huge := [file for file in wanted if file.size > LARGEST]:
        raise InputError(
            f"{huge[0].name} holds {huge[0].size / 1e9:.0f} GB; over plain HTTP the hub gives {LARGEST / 1e9:.0f}. Use"
            f" its own client: pip install hf_xet, then hf download {repo_id} --local-dir {folder}"
        )
    names = {file.name for file in wanted}
    kinds = ("lit_model*", *(pattern for kind in WEIGHTS for pattern in kind))
    if others := sorted({path.name for kind in kinds for path in folder.glob(kind)} - names):
        raise InputError(
            f"{folder} holds {others[0]}, which is not among the files of {repo_id}: it would be read in their place."
            " Delete it, or name another --checkpoint_dir."
        )


def complete_config(path: Path, repo_id: str) -> None:
    """Writes into config.json what only the model's name says, so that the folder may have any name."""
    hf = read_json(path)
    if found := families.exceptions(hf, repo_id.split("/")[-1]):
        hf |= {"rope_scaling": found["rope_scaling"], "max_position_embeddings": found["block_size"]}
        path.write_text(json.dumps(hf, indent=2) + "\n", encoding="utf-8")


def choose(files: Sequence[File], tokenizer_only: bool) -> list[File]:
    """The weights in one format, the tokenizer and the settings."""
    names = [file.name for file in files]
    patterns = list(COMPANIONS)
    if not tokenizer_only:
        patterns += next((kind for kind in WEIGHTS if any(fits(name, kind[0]) for name in names)), ())
    return [file for file in files if any(fits(file.name, pattern) for pattern in patterns)]


def fits(name: str, pattern: str) -> bool:
    """Whether a path is of this pattern, in which * stays in its folder."""
    return fnmatch(name, pattern) and name.count("/") == pattern.count("/")


def difference(path: Path, file: File) -> str | None:
    """What is at `path` where it is not what the hub says: None is the file itself."""
    if not path.is_file():
        return "nothing"
    if (size := path.stat().st_size) != file.size:
        return f"{size:,} bytes"
    expected = file.sha256 or file.blob_id
    if expected is None:  # a mirror that knows sizes alone
        return None
    digest = hashlib.sha256() if file.sha256 else hashlib.sha1(b"blob %d\0" % size)
    with open(path, "rb") as content:
        while part := content.read(2**24):
            digest.update(part)
    return None if digest.hexdigest() == expected else digest.hexdigest()


def check(path: Path, file: File) -> None:
    """Raises InputError, and deletes the file, where it is not what the hub says."""
    if found := difference(path, file):
        path.unlink(missing_ok=True)
        expected = file.sha256 or file.blob_id if len(found) in (40, 64) else f"{file.size:,} bytes"
        raise InputError(f"{path} arrived as {found}, expected {expected}. Run it again.")


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
        advice = "Check --access_token and its permissions." if status in (401, 403) else "Try again later."
        raise InputError(f"{here} answered {status} for {repo_id}: {first_words(error)} {advice}") from None
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
