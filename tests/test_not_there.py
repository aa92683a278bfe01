"""Folders that are not there, or are others than meant: `pytest tests/test_not_there.py`, about 5 s"""

import shutil
from pathlib import Path

import pytest
from helpers.models import make_checkpoint

from lit_gpt import Config, InputError, Tokenizer
from lit_gpt.checkpoint.load import load_model
from lit_gpt.checkpoint.weight_files import weight_files
from lit_gpt.config import SAMPLE
from lit_gpt.data.dataset import Dataset
from lit_gpt.files import CLONE
from lit_gpt.runs.header import read_header
from lit_gpt.runs.load_finetuned import load_finetuned

READERS = (Tokenizer, Config.from_checkpoint, load_model, weight_files)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a checkpoint, prepared data, and runs in the places where they usually are."""
    make_checkpoint(tmp_path / "checkpoints/org/name")
    for run in ("a", "b", "c", "d", "e", "f", "docstrings"):
        (tmp_path / "out/lora" / run / "best").mkdir(parents=True)
    (tmp_path / "out/lora/a/hyperparameters.yaml").touch()
    (tmp_path / "data/mine").mkdir(parents=True)
    (tmp_path / "data/mine/meta.json").touch()
    (tmp_path / "model.gguf").touch()
    make_checkpoint(tmp_path / "trl/merged")
    for name in ("checkpoint-10", "checkpoint-20"):
        (tmp_path / "trl" / name).mkdir()
        (tmp_path / "trl" / name / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("name", "messages"),
    [
        ("org/name", ("org/name is not there, as seen from {here}. Did you mean checkpoints/org/name?",)),
        ("name", ("Did you mean checkpoints/org/name?",)),
        ("checkpoints/org/nam", ("Did you mean checkpoints/org/name? ", "download.py --repo_id org/nam`")),
        ("Qwen/Qwen3-0.6B", ("Qwen3-0.6B is not there", "`python scripts/download.py --repo_id Qwen/Qwen3-0.6B`")),
        ("checkpoints/Qwen/Qwen3-0.6B", ("`python scripts/download.py --repo_id Qwen/Qwen3-0.6B`",)),
        ("/nowhere/at/all", ("/nowhere/at/all is not there. `python scripts/download_sample.py`",)),
        ("checkpoints", ("checkpoints is no checkpoint, but holds some. Name one: checkpoints/org/name.",)),
        ("checkpoints/org", ("Name one: checkpoints/org/name.",)),
        ("model.gguf", ("model.gguf is a file, expected the folder", "scripts/convert_gguf_checkpoint.py")),
        ("out/lora/a", ("out/lora/a holds a run, expected a checkpoint", "--finetuned")),
    ],
)
@pytest.mark.parametrize("read", READERS)
def test_a_checkpoint(here: Path, read, name: str, messages: tuple[str, ...]) -> None:
    with pytest.raises(InputError) as error:
        read(Path(name))
    for message in messages:
        assert message.format(here=here) in str(error.value)


def test_an_adapter_in_the_place_of_a_checkpoint(here: Path) -> None:
    for read in (Config.from_checkpoint, load_model):
        with pytest.raises(InputError, match="checkpoint-10 holds an adapter of peft, expected a checkp.* --finetuned"):
            read(Path("trl/checkpoint-10"))


def test_what_is_in_the_clone_is_named(here: Path) -> None:
    """A copy of a script that is run from its own folder asks for checkpoints/sample/..., which is in the clone."""
    if not (CLONE / SAMPLE).is_dir():
        pytest.skip("no sample model in the clone")
    with pytest.raises(InputError, match=f"Run the command in {CLONE}, or name {CLONE / SAMPLE}."):
        Tokenizer(SAMPLE)


def test_the_sample_is_fetched_by_its_own_script(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lit_gpt.files.CLONE", here / "clone")
    shutil.rmtree(here / "checkpoints")
    with pytest.raises(InputError, match="`python scripts/download_sample.py` fetches it"):
        Tokenizer(SAMPLE)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("data/mein", r"data/mein is not there, as seen from .*\. Did you mean data/mine\? Run one of "),
        ("mine", r"mine is not there.* Did you mean data/mine\?"),
        ("data", r"data holds no prepared data\. Name one of those in it: data/mine\."),
        ("out", r"out holds no prepared data\. Run one of scripts/prepare_.* --data_dir out\."),
    ],
)
def test_prepared_data(here: Path, name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Dataset(Path(name), "train")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("out/lora", "out/lora holds runs, expected one of .*: .*/a, .*/b, .*/c, .*/d, .*/docstrings and 2 more"),
        ("out/lora/docstring", r"docstring is not there, as seen from .*\. Did you mean out/lora/docstrings\?"),
        ("lora/docstrings", r"lora/docstrings is not there.* Did you mean out/lora/docstrings\?"),
        ("data", "data holds nothing trained: expected lora.safetensors"),
        ("trl", "trl holds adapters of peft, expected one of them. Name it: trl/checkpoint-10, trl/checkpoint-20"),
        ("trl/merged", "trl/merged is a whole model that was not trained here, or a copy. .* with --checkpoint_dir"),
    ],
)
@pytest.mark.parametrize("read", [read_header, lambda folder: load_finetuned(None, folder)])
def test_a_run(here: Path, read, name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read(Path(name))


@pytest.mark.parametrize("read", [read_header, lambda folder: load_finetuned(None, folder)])
def test_a_run_that_was_killed_before_its_best(here: Path, read) -> None:
    """Without validation records `best` is saved at the end."""
    (here / "out/killed/last").mkdir(parents=True)
    with pytest.raises(InputError, match="out/killed has no best: its run has not ended.* weights, out/killed/last"):
        read(Path("out/killed"))
