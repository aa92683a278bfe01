"""Fixtures of several test files: the sample model, and tiny random models made with transformers."""

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from lit_gpt.interruption import SIGNALS

ROOT = Path(__file__).parents[1]
SAMPLE_DIR = ROOT / "checkpoints/sample/SmolLM2-135M-Instruct-Q4_1"
os.environ["HF_HUB_OFFLINE"] = "1"  # no test may ask the hub for anything
torch.set_num_threads(1)  # tiny models; several workers share the cores
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # the tests run in the background of a script: the commands that they start would not hear a Ctrl-C either
    signal.signal(signal.SIGINT, signal.default_int_handler)
settings.register_profile("fixed", derandomize=True, database=None)  # a change is judged by the same examples each time
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))  # default: others each time

# The tokens of a tiny model. With all 49,152 of the sample most of its time went into the head and into reading the
# tokenizer: 4 steps of finetune/lora.py took twice as long
VOCAB_SIZE = 4096

# files of a minute and more
SLOWEST = "documented_commands devices resume machines sharding memory fit compare check_server families".split()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The slowest files come first, so that at the end no worker waits for another one that has just begun with one."""

    def order(item: pytest.Item) -> int:
        name = item.path.stem.removeprefix("test_")
        return SLOWEST.index(name) if name in SLOWEST else len(SLOWEST)

    items.sort(key=order)


@pytest.fixture(autouse=True)
def signals_stay() -> Iterator[None]:
    """A test that left a signal ignored would make the next one's commands deaf to Ctrl-C."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    assert {number: signal.getsignal(number) for number in SIGNALS} == before


@pytest.fixture(scope="session")
def sample_dir() -> Path:
    """The real sample checkpoint, as `scripts/download_sample.py` writes it."""
    if not (SAMPLE_DIR / "model.safetensors").is_file():
        script = [sys.executable, str(ROOT / "scripts/download_sample.py"), "--checkpoint_dir", str(SAMPLE_DIR)]
        subprocess.run(script, check=True)
    return SAMPLE_DIR


@functools.cache
def first_tokens(tokenizer_json: Path, n: int) -> str:
    """A tokenizer.json with the first n tokens: the special ones, the bytes, and what was merged first."""
    tokenizer = json.loads(tokenizer_json.read_text(encoding="utf-8"))
    bpe = tokenizer["model"]
    bpe["vocab"] = {token: i for token, i in bpe["vocab"].items() if i < n}
    bpe["merges"] = [(left, right) for left, right in bpe["merges"] if left + right in bpe["vocab"]]
    return json.dumps(tokenizer)


def make_tiny(folder: Path, sample_dir: Path, **changes) -> Path:
    """A random two-layer Llama with the sample's first tokens, as transformers saves it. Weights of a useful size.

    `changes` are those of its config.json.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = dict(
        vocab_size=VOCAB_SIZE,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    config = LlamaConfig(**settings | changes)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer = first_tokens(sample_dir / "tokenizer.json", config.vocab_size)
    (folder / "tokenizer.json").write_text(tokenizer, encoding="utf-8")
    shutil.copy(sample_dir / "tokenizer_config.json", folder)
    return folder


@pytest.fixture(scope="session")
def tiny_dir(tmp_path_factory, sample_dir) -> Path:
    """An untied tiny checkpoint. Treat it as read-only."""
    return make_tiny(tmp_path_factory.mktemp("tiny") / "checkpoint", sample_dir)


@pytest.fixture(scope="session")
def tied_dir(tmp_path_factory, sample_dir) -> Path:
    """A tiny checkpoint whose head is its embedding. Treat it as read-only."""
    return make_tiny(tmp_path_factory.mktemp("tied") / "checkpoint", sample_dir, tie_word_embeddings=True)
