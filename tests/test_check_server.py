"""Servers that are right, and wrong in many ways: `pytest tests/test_check_server.py`, about 90 s"""

import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, make_tiny
from fastapi.testclient import TestClient
from helpers.methods import TRAIN, finetune
from helpers.scripts import load
from safetensors import safe_open
from safetensors.torch import save_file

from lit_gpt import InputError, Tokenizer
from lit_gpt.data.dataset import Dataset
from lit_gpt.data.prepare import DataArgs, prepare
from lit_gpt.data.prompts import resolve_style
from lit_gpt.generate.engine import Engine
from lit_gpt.generate.make_requests import RequestMaker
from lit_gpt.generate.sampling import Sampling
from lit_gpt.lora import LoRA
from lit_gpt.runs.load_finetuned import UseArgs, load_for_use
from lit_gpt.studies.ask_server import Ask, over_http
from lit_gpt.studies.server_check import judge
from lit_gpt.studies.server_evidence import Here, gather

THINGS = "apple table river horse cloud stone lamp chair garden window letter bridge coat spoon ship clock".split()
COLOURS = "red green blue".split()
# words that are one token each: what the check finds wrong depends on what the model has learnt of them
SHAPE = dict(hidden_size=64, num_attention_heads=4, vocab_size=49152)


def records() -> list[dict[str, str]]:
    """Questions whose answers a tiny model learns in some seconds, with words that come twice."""
    questions = [f"What colour is the {a} beside the {b}?" for a in THINGS for b in THINGS[:4] if a != b]
    answers = [f"It is {colour}, and as {colour} as it was." for colour in COLOURS]
    rows = [{"instruction": q, "output": answers[i % 3], "split": "train"} for i, q in enumerate(questions)]
    for row in rows[::9]:
        row["split"] = "val"
    return rows


class Trained:
    """A LoRA on a tiny model, and what may go wrong with it."""

    def __init__(self, folder: Path, sample_dir: Path) -> None:
        self.folder = folder
        self.base = make_tiny(folder / "base", sample_dir, **SHAPE)
        self.data = folder / "data"
        prepare(records(), DataArgs(checkpoint_dir=self.base, data_dir=self.data))
        self.run = folder / "mine"
        train = replace(TRAIN, max_steps=60, epochs=9, global_batch_size=8, micro_batch_size=8)
        finetune("lora", self.base, self.data, self.run, train=replace(train, eval_interval=60, save_interval=60))

    def other(self) -> Path:
        """Another run on other answers."""
        data = self.folder / "other_data"
        rows = [row | {"output": row["output"][::-1]} for row in records()]
        prepare(rows, DataArgs(checkpoint_dir=self.base, data_dir=data))
        finetune("lora", self.base, data, self.folder / "other", train=replace(TRAIN, max_steps=7, seed=1))
        return self.folder / "other"

    def another_base(self, sample_dir: Path) -> Path:
        """A model of the same shape with other random weights."""
        return make_tiny(self.folder / "base2", sample_dir, **SHAPE, initializer_range=0.1)

    def scaled(self, factor: float) -> Path:
        """A copy of the run that says another alpha."""
        copy = shutil.copytree(self.run / "best", self.folder / f"alpha{factor:g}")
        with safe_open(copy / "lora.safetensors", "pt") as file:
            metadata, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}
        header = json.loads(metadata["lit_gpt"])
        header["settings"]["alpha"] *= factor
        save_file(tensors, copy / "lora.safetensors", metadata | {"lit_gpt": json.dumps(header)})
        return copy

    def changed_base(self, name: str, file: str, change: Callable[[dict[str, Any]], None]) -> Path:
        """A copy of the base in which a JSON file is another."""
        copy = shutil.copytree(self.base, self.folder / name)
        settings = json.loads((copy / file).read_text()) if (copy / file).is_file() else {}
        change(settings)
        (copy / file).write_text(json.dumps(settings))
        return copy


@pytest.fixture(scope="module")
def trained(tmp_path_factory, sample_dir: Path) -> Trained:
    return Trained(tmp_path_factory.mktemp("served"), sample_dir)


@pytest.fixture(scope="module")
def here(trained: Trained) -> Here:
    return Here(UseArgs(finetuned=trained.run, precision="32-true"), torch.device("cpu"))


@contextmanager
def served(
    style: str = "auto",
    max_new_tokens: int = 100,
    penalty: float = 1.0,
    stop_ids: frozenset[int] | None = None,
    tokenizer_dir: Path | None = None,
    **args: Any,
) -> Iterator[Ask]:
    """The app of generate/serve.py, in this process."""
    model, tokenizer, trained_style = load_for_use(UseArgs(**{"precision": "32-true", **args}), torch.device("cpu"))
    if tokenizer_dir is not None:
        tokenizer = Tokenizer(tokenizer_dir)
    if stop_ids is not None:
        tokenizer.stop_ids = stop_ids
    maker = RequestMaker(
        tokenizer=tokenizer,
        style=resolve_style(style, tokenizer, trained_style),
        block_size=model.config.block_size,
        max_new_tokens=max_new_tokens,
        defaults=Sampling(repetition_penalty=penalty),
        seeds=random.Random(0),
    )
    app = load(ROOT / "generate/serve.py").make_app(Engine({"mine": model}, tokenizer), maker, 8, 60)
    app.state.end = lambda: None
    with TestClient(app) as client:

        def ask(method: str, path: str, body: Any) -> tuple[int, Any]:
            response = client.request(method, path, json=body)
            return response.status_code, response.json()

        yield ask


def check(
    ask: Ask, here: Here, trained: Trained, name: str = "mine", data: Path | None = None
) -> tuple[list[str], list[str], list[str]]:
    """What is wrong, what is normal, and what is unknown."""
    evidence = gather(ask, name, {}, here, Dataset(data or trained.data, "val"), n_records=2, n_new=20)
    findings = judge(evidence)
    print(*findings, sep="\n")
    wrong = [finding.what for finding in findings if finding.is_wrong]
    return wrong, [finding.what for finding in findings if not finding.is_wrong], list(evidence.unknown)


# ---- another model, or the same one rounded


def test_a_right_server_raises_no_alarm(trained: Trained, here: Here) -> None:
    with served(finetuned=trained.run) as ask:
        assert check(ask, here, trained) == ([], [], [])


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"precision": "bf16-true"}, "weights in bfloat16"),
        ({"quantize": "cpu.int8"}, "weights in cpu.int8"),
        ({"quantize": "bnb.nf4"}, "weights in bnb.nf4"),
    ],
)
def test_rounded_weights_are_normal_and_said(flags: dict[str, str], said: str, trained: Trained, here: Here) -> None:
    with served(finetuned=trained.run, **flags) as ask:
        wrong, normal, unknown = check(ask, here, trained)
    assert (wrong, normal[:1], unknown) == ([], [said], [])


def test_another_base_is_none_that_is_known(trained: Trained, here: Here, sample_dir: Path) -> None:
    with served(checkpoint_dir=trained.another_base(sample_dir)) as ask:
        assert check(ask, here, trained)[0] == ["other weights"]


def test_another_rope_base_is_named(trained: Trained, here: Here) -> None:
    def change(config: dict[str, Any]) -> None:
        settings = config.get("rope_parameters") or config
        settings["rope_theta"] = settings["rope_theta"] / 10

    with served(finetuned=trained.run, checkpoint_dir=trained.changed_base("rope", "config.json", change)) as ask:
        assert check(ask, here, trained)[0] == ["positions"]


@pytest.mark.parametrize(
    ("method", "flags"),
    [("lora", {"lora": LoRA(dora=True)}), ("adapter", {}), ("full", {})],
    ids=["dora", "adapter", "full"],
)
def test_what_another_method_has_trained(method: str, flags: dict[str, Any], trained: Trained) -> None:
    """What is right raises no alarm, and the base alone is not it."""
    run = trained.folder / f"by_{method}"
    finetune(method, trained.base, trained.data, run, **flags)
    here = Here(UseArgs(finetuned=run, precision="32-true"), torch.device("cpu"))
    with served(finetuned=run) as ask:
        assert check(ask, here, trained) == ([], [], [])
    with served(checkpoint_dir=trained.base) as ask:
        assert check(ask, here, trained)[0] == ["adapter not applied"]


# ---- other prompts


def test_another_style_is_named(trained: Trained, here: Here) -> None:
    with served(finetuned=trained.run, style="alpaca") as ask:
        assert check(ask, here, trained)[0] == ["prompt style"]


def test_another_chat_template_is_named(trained: Trained, here: Here) -> None:
    def change(settings: dict[str, Any]) -> None:
        settings["chat_template"] = settings["chat_template"].replace("SmolLM", "Somebody Else")

    folder = trained.changed_base("template", "tokenizer_config.json", change)
    with served(finetuned=trained.run, checkpoint_dir=folder) as ask:
        assert check(ask, here, trained)[0] == ["chat template"]


def test_a_template_without_its_system_message_is_named(trained: Trained, here: Here) -> None:
    # chatml is the sample's template, but for the system message that this has by itself
    with served(finetuned=trained.run, style="chatml") as ask:
        (wrong,) = check(ask, here, trained)[0]
    assert wrong == "system message"


def test_a_system_message_that_is_dropped_is_named(trained: Trained, here: Here) -> None:
    with served(finetuned=trained.run) as ask:

        def dropping(method: str, path: str, body: Any) -> tuple[int, Any]:
            if path == "/v1/chat/completions":
                body = body | {"messages": [m for m in body["messages"] if m["role"] != "system"]}
            return ask(method, path, body)

        assert check(dropping, here, trained)[0] == ["system message"]


def add_bos(tokenizer: dict[str, Any]) -> None:
    """Has a tokenizer.json begin each text with a BOS."""
    bos = {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}
    single = [{"SpecialToken": {"id": bos["id"], "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    template = {"type": "TemplateProcessing", "single": single, "pair": single, "special_tokens": {bos["id"]: bos}}
    tokenizer["post_processor"] = template


def test_a_tokenizer_that_adds_a_bos_is_named(trained: Trained, here: Here) -> None:
    folder = trained.changed_base("bos", "tokenizer.json", add_bos)
    with served(finetuned=trained.run, checkpoint_dir=folder) as ask:
        assert check(ask, here, trained)[0] == ["second BOS"]


def test_a_tokenizer_that_leaves_the_bos_out_is_named(trained: Trained) -> None:
    """Trained with a BOS, as a style that is no chat template has it, and served without."""
    base = trained.changed_base("trained_with_bos", "tokenizer.json", add_bos)
    data = trained.folder / "data_with_bos"
    prepare(records(), DataArgs(checkpoint_dir=base, data_dir=data, prompt_style="alpaca"))
    run = trained.folder / "with_bos"
    finetune("lora", base, data, run, train=replace(TRAIN, max_steps=2))
    here = Here(UseArgs(finetuned=run, precision="32-true"), torch.device("cpu"))
    with served(finetuned=run) as ask:
        assert check(ask, here, trained, data=data)[:2] == ([], [])
    with served(finetuned=run, checkpoint_dir=trained.base) as ask:
        assert check(ask, here, trained, data=data)[0] == ["missing BOS"]


def test_another_tokenizer_is_named(trained: Trained, here: Here) -> None:
    def change(tokenizer: dict[str, Any]) -> None:
        del tokenizer["model"]["merges"][2000:]

    folder = trained.changed_base("merges", "tokenizer.json", change)
    with served(finetuned=trained.run, tokenizer_dir=folder) as ask:
        assert check(ask, here, trained)[0][0] == "other tokens"  # and what follows from it


# ---- too little room


def test_a_context_that_is_too_short_is_named(trained: Trained, here: Here, capsys) -> None:
    folder = trained.changed_base("short", "config.json", lambda s: s.update(max_position_embeddings=45))
    with served(finetuned=trained.run, checkpoint_dir=folder) as ask:
        assert check(ask, here, trained)[0] == ["answers are cut"]
    assert "exceed what the model can read, 45" in capsys.readouterr().out


@pytest.mark.parametrize("kept", [slice(24), slice(-24, None)], ids=["first", "last"])
def test_prompts_that_are_cut_are_named(kept: slice, trained: Trained, here: Here) -> None:
    """As Ollama cuts them. As llama.cpp's server it may tell how much it reads."""
    with served(finetuned=trained.run) as ask:

        def cutting(method: str, path: str, body: Any) -> tuple[int, Any]:
            if path == "/v1/completions":
                prompt = body["prompt"]
                tokens = here.tokenizer.encode(prompt).tolist() if isinstance(prompt, str) else prompt
                body = body | {"prompt": tokens[kept]}
            return ask(method, path, body)

        assert check(cutting, here, trained)[0] == ["context cut"]

        def telling(method: str, path: str, body: Any) -> tuple[int, Any]:
            if path == "/props":
                return 200, {"default_generation_settings": {"n_ctx": 24}}
            return cutting(method, path, body)

        assert check(telling, here, trained)[0] == ["context cut"]


# ---- other answers


def test_a_repetition_penalty_is_named(trained: Trained, here: Here) -> None:
    with served(finetuned=trained.run, penalty=1.5) as ask:
        assert check(ask, here, trained)[0] == ["repetition penalty"]


def test_a_temperature_is_named(trained: Trained, here: Here) -> None:
    with served(finetuned=trained.run) as ask:

        def heating(method: str, path: str, body: Any) -> tuple[int, Any]:
            return ask(method, path, body | {"temperature": 1.5} if body and "temperature" in body else body)

        assert check(heating, here, trained)[0] == ["sampling is on"]


def test_answers_that_run_on_are_named(trained: Trained, here: Here) -> None:
    with served(finetuned=trained.run, stop_ids=frozenset({5})) as ask:
        assert check(ask, here, trained)[0] == ["stop token"]


def test_answers_that_end_early_are_named(trained: Trained, here: Here) -> None:
    (comma,) = here.tokenizer.encode(",", bos=False).tolist()
    folder = trained.changed_base("eos", "generation_config.json", lambda s: s.update(eos_token_id=[2, comma]))
    with served(finetuned=trained.run, checkpoint_dir=folder) as ask:
        assert check(ask, here, trained)[0] == ["stop token"]


def test_few_new_tokens_are_named(trained: Trained, here: Here) -> None:
    with served(finetuned=trained.run, max_new_tokens=5) as ask:
        assert check(ask, here, trained)[0] == ["answers are cut"]


# ---- servers that show little


def without_logprobs(ask: Ask) -> Ask:
    """A proxy that knows no log-probabilities and no tokens, as Ollama's API."""

    def asked(method: str, path: str, body: Any) -> tuple[int, Any]:
        if body and isinstance(body.get("prompt"), list):
            return 400, {"error": {"message": "prompt: expected a string"}}
        kept = {key: value for key, value in (body or {}).items() if "logprobs" not in key and key != "echo"}
        return ask(method, path, kept if body else None)

    return asked


def test_without_logprobs_the_answers_tell(trained: Trained, here: Here) -> None:
    with served(finetuned=trained.run) as ask:
        wrong, normal, unknown = check(without_logprobs(ask), here, trained)
        assert (wrong, normal) == ([], []) and "log-probabilities" in unknown[0]
    with served(checkpoint_dir=trained.base) as ask:
        assert check(without_logprobs(ask), here, trained)[0] == ["adapter not applied"]


# ---- over HTTP


def wait_for(url: str) -> None:
    """Until a server that has said its address listens there."""
    end = time.monotonic() + 20
    while True:
        try:
            return over_http(url, None, 20)("GET", "/health", None)
        except InputError:
            assert time.monotonic() < end
            time.sleep(0.05)


@pytest.fixture(scope="module")
def url(trained: Trained) -> Iterator[str]:
    """A server's process: the right one, and four that are wrong, on one copy of the base."""
    folders = [trained.run, trained.scaled(2), trained.scaled(0.5), trained.other()]
    command = [sys.executable, ROOT / "generate/serve.py", "--port", "0", "--precision", "32-true", "--with_base"]
    command += ["--finetuned", json.dumps([str(folder) for folder in folders])]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [str(word) for word in command], stderr=subprocess.PIPE, text=True, cwd=ROOT, env=environment
    ) as process:
        lines = []
        for line in process.stderr:
            lines.append(line)
            if line.startswith("Serving "):
                break
        url = re.search(r"http://[\d.:]+\d", lines[-1])[0]
        wait_for(url)
        yield url
        process.kill()


@pytest.mark.parametrize(
    ("name", "wrong", "said"),
    [
        ("mine", [], ""),
        ("base", ["adapter not applied"], "the base's"),
        ("alpha2", ["adapter scaled"], "about 2 times"),
        ("alpha0.5", ["adapter scaled"], "about 0.5 times"),
        ("other", ["other weights"], "another adapter"),
    ],
)
def test_models_of_a_server(name: str, wrong: list[str], said: str, url: str, trained: Trained, here: Here, capsys):
    assert check(over_http(url, None, 60), here, trained, name)[0] == wrong
    assert said in capsys.readouterr().out


def test_the_script(url: str, trained: Trained, capsys) -> None:
    """Status 0, 1 and 2."""
    main = load(ROOT / "scripts/check_server.py").main
    flags = {"finetuned": trained.run, "url": url, "n_records": 2, "max_new_tokens": 20}
    main(**flags, model_name="mine")
    assert "serves what" in capsys.readouterr().out
    with pytest.raises(SystemExit) as end:
        main(**flags, model_name="base")
    assert end.value.code == 1 and capsys.readouterr().out.startswith("WRONG: adapter not applied.")
    with pytest.raises(InputError, match="has the models base, mine, alpha2, alpha0.5, other, and not theirs"):
        main(**flags, model_name="theirs")
    with pytest.raises(InputError, match=r"No server answers at http://127.0.0.1:9/v1/models"):
        main(**flags | {"url": "http://127.0.0.1:9"})
