"""Fetch a checkpoint from the Hugging Face hub.

    python scripts/download.py                                     # lists the published models that are known by name
    python scripts/download.py --repo_id EleutherAI/pythia-160m
    python scripts/download.py --repo_id meta-llama/Llama-3.2-1B --access_token hf_...

The folder can be used as it is. HF_ENDPOINT or HF_HUB_ENDPOINT names a mirror, HF_TOKEN a token for all runs.
"""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from lit_gpt import Config, InputError, families
from lit_gpt.checkpoint.hub import WEIGHTS, download
from lit_gpt.checkpoint.save import convert_checkpoint
from lit_gpt.checkpoint.weight_files import read_tensors
from lit_gpt.cli import run
from lit_gpt.device import DType, as_dtype
from lit_gpt.display.words import counted
from lit_gpt.model.gpt import count_parameters

if TYPE_CHECKING:
    import torch


def main(
    repo_id: str | None = None,
    revision: str | None = None,
    access_token: str | None = None,
    tokenizer_only: bool = False,
    dtype: DType | None = None,
    checkpoint_dir: Path | None = None,
) -> None:
    """Fetch a checkpoint from the Hugging Face hub.

    Args:
        repo_id: org/name. None lists the models that are known by name; any other of a known family works as well.
        revision: A branch, a tag or a commit. None is the main branch.
        access_token: For gated and private repositories. None uses HF_TOKEN, or what `hf auth login` has stored.
        tokenizer_only: Leave out the weights, for preparing data.
        dtype: Convert the weights to this dtype. None keeps what the files hold.
        checkpoint_dir: Where it goes. None is checkpoints/org/name.
    """
    if repo_id is None:
        list_published()
        return
    folder = checkpoint_dir or Path("checkpoints") / repo_id
    # beside the folder: what is fetched and yet to be converted, and the result. A second run goes on with the first
    name = folder.resolve()
    waiting = name.with_name(f".{name.name}.download")
    converted = name.with_name(f".{name.name}.converted")
    shutil.rmtree(converted, ignore_errors=True)

    if dtype is None or tokenizer_only:
        files = download(repo_id, folder, revision, access_token, tokenizer_only)
    elif has_weights(folder, as_dtype(dtype)) and not waiting.exists():
        print(f"{folder} holds weights in {dtype} already. Delete it to fetch them again, or those of a --revision.")
        return
    else:
        files = download(repo_id, waiting, revision, access_token, tokenizer_only)
        convert_checkpoint(waiting, converted, hugging_face=True, dtype=as_dtype(dtype))
        move_into(folder, waiting, converted)
    print(f"{folder}: {counted(len(files), 'file')}, {sum(file.size or 0 for file in files) / 1e9:.2f} GB.")


def list_published() -> None:
    """Prints the models that are known by name, the smallest first."""
    sizes = {repo: count_parameters(Config.from_name(repo)) for repo in families.published()}
    for repo, n in sorted(sizes.items(), key=lambda item: item[1]):
        print(f"{n / 1e9:8.2f} B parameters  {2 * n / 1e9:7.1f} GB in 16 bits   {repo}")


def move_into(folder: Path, waiting: Path, converted: Path) -> None:
    """Moves the converted files into the folder, then deletes what they were made of.

    Killed on the way, `waiting` is still whole, and the next run goes on with it.
    """
    folder.mkdir(exist_ok=True)
    for path in converted.iterdir():
        path.replace(folder / path.name)
    converted.rmdir()
    # deleting takes a while: under a name that every run clears away first
    waiting.rename(converted)
    shutil.rmtree(converted)


def has_weights(folder: Path, dtype: "torch.dtype") -> bool:
    """Whether its weights are of this dtype; False if there are none.

    Raises:
        InputError: they are of another.
    """
    files: list[Path] = []
    for weights_pattern, _ in WEIGHTS:
        files += folder.glob(weights_pattern)
    dtypes = {tensor.dtype for _, tensor in read_tensors(files)}
    if dtypes - {dtype}:
        names = sorted(str(other).removeprefix("torch.") for other in dtypes)
        listed = ", ".join(names)
        raise InputError(f"{folder} holds weights in {listed}. Delete them, or name another --checkpoint_dir.")
    return bool(dtypes)


if __name__ == "__main__":
    run(main)
