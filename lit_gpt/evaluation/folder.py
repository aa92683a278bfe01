"""The folder of an evaluation: whose it is, and what it found, so that the same command goes on.

out/evaluate/lora-docstrings/evaluation.json        what is evaluated: settings, and fingerprints of all files
out/evaluate/lora-docstrings/found-base.jsonl       see kept.py
"""

import hashlib
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lit_gpt import failures
from lit_gpt.cli import command, plain, read_hyperparameters
from lit_gpt.config import SAMPLE
from lit_gpt.errors import InputError
from lit_gpt.evaluation.kept import Kept
from lit_gpt.evaluation.report import file_name
from lit_gpt.files import has_content, write_whole
from lit_gpt.lock import hold
from lit_gpt.runs.load_finetuned import read_base
from lit_gpt.runs.side_by_side import model_names

IDENTITY = "evaluation.json"
FOUND = "found-"
FOUND_TASKS = "found-of-tasks.jsonl"  # of all models: see kept_answers.py
WITHOUT_EFFECT = ("out_dir", "batch_size", "n_worst", "overwrite", "harness", "keys", "args")
"""Flags on which nothing that is found depends, and those that stand here one by one."""


def default_out_dir(finetuned: Sequence[Path], checkpoint_dir: Path | None) -> Path:
    """out/evaluate/NAME, by the names of the models."""
    names = model_names(finetuned) if finetuned else [(checkpoint_dir or SAMPLE).resolve().name]
    return Path("out/evaluate") / file_name("+".join(names))


def data_of_run(finetuned: Sequence[Path]) -> Path:
    """The data that the first of the models was trained on.

    Raises:
        InputError: there is none, or it does not say.
    """
    if not finetuned:
        raise InputError("There is nothing to evaluate on. Name --data_dir, --records, --texts or --tasks.")
    folder = finetuned[0]
    for run_dir in (folder, folder.parent):
        file = run_dir / "hyperparameters.yaml"
        if file.is_file():
            data_dir = read_hyperparameters(file).get("data_dir")
            if data_dir is not None:
                return Path(data_dir)
    read_base(None, folder)  # the better reason, if nothing trained is there
    raise InputError(
        f"{folder} does not say on what data it was trained. Name what to evaluate on: --data_dir, --records, --texts"
        " or --tasks."
    )


def identity_of(
    settings: Mapping[str, Any], checkpoint_dir: Path | None, finetuned: Sequence[Path], files: Iterable[Path]
) -> dict[str, Any]:
    """What is evaluated: the settings that decide what is found, and the state of all weights and files.

    Weights are told by the size and the time of their files, other files by their content.
    """
    folders = [read_base(checkpoint_dir, folder)[1] for folder in finetuned] or [checkpoint_dir or SAMPLE]
    weights = [state_of_folder(folder) for folder in (*finetuned, *folders)]
    settings = {name: value for name, value in settings.items() if name not in WITHOUT_EFFECT}
    contents = {str(file): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
    return json.loads(json.dumps({"settings": plain(settings), "weights": weights, "files": contents}))


def state_of_folder(folder: Path) -> list[str]:
    """The weights in a folder, or in `best` of a run's: names, sizes and times of their files."""
    best = folder / "best"
    state = []
    for file in sorted((best if best.is_dir() else folder).glob("*.*")):
        if file.suffix in (".safetensors", ".bin"):
            stat = file.stat()
            state.append(f"{file.resolve()} {stat.st_size} {stat.st_mtime_ns}")
    return state


def claim_evaluation(out_dir: Path, identity: dict[str, Any], overwrite: bool) -> None:
    """Makes the folder this evaluation's, and keeps other processes from writing there until this one ends.

    Raises:
        InputError: it holds another evaluation, or something else; or another process writes there.
    """
    if out_dir.exists() and not out_dir.is_dir():
        raise InputError(f"{out_dir} is a file, expected a folder. Name another --out_dir.")
    file = out_dir / IDENTITY
    if has_content(out_dir) and not file.is_file():
        raise InputError(f"{out_dir} is not empty, and holds no evaluation. Name another --out_dir.")
    hold(out_dir)
    failures.HOW_TO_GO_ON[:] = [command(without_overwrite(sys.argv[1:]))]  # for who presses Ctrl-C
    if file.is_file() and not overwrite:
        there = json.loads(file.read_text(encoding="utf-8"))
        changed = changes(there, identity)
        if changed:
            raise InputError(
                f"{out_dir} holds an evaluation with {', '.join(changed)}. Name another --out_dir, or replace it:"
                " --overwrite true."
            )
        return
    for old in (*out_dir.glob(f"{FOUND}*.jsonl"), *out_dir.glob("scores-*.csv")):
        old.unlink()
    write_whole(file, json.dumps(identity, indent=2) + "\n")


def without_overwrite(words: Sequence[str]) -> list[str]:
    """The words of a command line that begins nothing anew."""
    others: list[str] = []
    before = ""
    for word in words:
        is_value = before == "--overwrite" and not word.startswith("--")
        if not is_value and word.partition("=")[0] != "--overwrite":
            others.append(word)
        before = word
    return others


def changes(there: Mapping[str, Any], identity: Mapping[str, Any]) -> list[str]:
    """What is not the same, in words."""
    before = there.get("settings", {})
    now = identity["settings"]
    changed = [f"another --{name}" for name in now if before.get(name) != now[name]]
    if there.get("weights") != identity["weights"]:
        changed.append("other weights")
    if there.get("files") != identity["files"]:
        changed.append("other files of records")
    return changed


def found_so_far(out_dir: Path, model: str) -> Kept:
    """What is known of a model."""
    return Kept(out_dir / f"{FOUND}{file_name(model)}.jsonl")
