"""Fetch a checkpoint from the Hugging Face hub.

    python scripts/download.py                                     # lists the published models that are known by name
    python scripts/download.py --repo_id EleutherAI/pythia-160m
    python scripts/download.py --repo_id meta-llama/Llama-3.2-1B --access_token hf_...

The folder can be used as it is. HF_ENDPOINT names a mirror, HF_TOKEN a token for all runs.
"""

import shutil
from pathlib import Path

from lit_gpt import Config, families
from lit_gpt.checkpoint import build_model, convert
from lit_gpt.cli import run
from lit_gpt.device import DType, as_dtype
from lit_gpt.hub import download


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
        dtype: Convert the weights. None keeps what the files hold.
        checkpoint_dir: Where it goes. None is checkpoints/org/name.
    """
    if repo_id is None:
        for repo in families.published():
            n = sum(param.numel() for param in build_model(Config.from_name(repo)).parameters())
            print(f"{n / 1e9:8.2f} B parameters  {2 * n / 1e9:7.1f} GB in 16 bits   {repo}")
        return
    folder = checkpoint_dir or Path("checkpoints") / repo_id
    # what is yet to be converted waits beside it, and a second run goes on with it
    target = folder if dtype is None else folder.with_name(f".{folder.name}.download")
    target.mkdir(parents=True, exist_ok=True)
    files = download(repo_id, target, revision, access_token, tokenizer_only)
    if dtype is not None:
        convert(target, folder, hugging_face=True, dtype=as_dtype(dtype))
        shutil.rmtree(target)
    print(f"{folder}: {len(files)} files, {sum(file.size for file in files) / 1e9:.2f} GB.")


if __name__ == "__main__":
    run(main)
