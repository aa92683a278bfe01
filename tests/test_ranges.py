"""Numbers and texts that no script can use: `pytest tests/test_ranges.py`, about 10 s

Every number that a flag of any script takes is in the table below, with values outside of its range.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from helpers.scripts import SCRIPTS, load
from helpers.shell import python

from lit_gpt import InputError, Tokenizer
from lit_gpt.cli import make_parser, parse
from lit_gpt.generate.sampling import LEAST_TEMPERATURE, sample

NOT_A_COUNT = "0 -1"
NOT_POSITIVE = "0 -1 .nan .inf"
NOT_A_SEED = f"-1 {2**32} {2**70}"
OUT_OF_RANGE = {
    # generate/
    "--num_samples": NOT_A_COUNT,
    "--max_new_tokens": "0 -5",
    "--temperature": "1e-40 -1 .nan .inf",
    "--top_k": NOT_A_COUNT,
    "--scale": "-0.1 .nan .inf",
    "--top_p": "0 -1 1.5 .nan .inf",
    "--min_p": "-0.1 1.5 .nan .inf",
    "--repetition_penalty": "0 0.001 101 -1 .nan .inf",
    "--logprobs": "-1",
    "--draft_tokens": "-1",
    "--batch_size": NOT_A_COUNT,
    "--limit": "1 0 -1",
    "--n_shots": "-1",
    "--shots_seed": NOT_A_SEED,
    "--port": "-1 65536",
    "--max_batch": NOT_A_COUNT,
    "--max_waiting": "-1",
    "--max_seconds": NOT_POSITIVE,
    # finetune/
    "--seed": NOT_A_SEED,
    "--activation_checkpointing": NOT_A_COUNT,
    "--devices": NOT_A_COUNT,
    "--timeout_minutes": NOT_POSITIVE,
    "--num_nodes": NOT_A_COUNT,
    "--n_answers": "-1",
    "--train_only": NOT_A_COUNT,
    "--adapter.prompt_length": NOT_A_COUNT,
    "--adapter.start_layer": "-1",
    "--lora.r": NOT_A_COUNT,
    "--lora.alpha": NOT_POSITIVE,
    "--lora.dropout": "-0.1 1 1.5 .nan",
    "--lora.layers": NOT_A_COUNT,
    "--lora.rank_pattern": '{"attn.q":0} {"attn.q":-1}',
    "--lora.alpha_pattern": '{"attn.q":0} {"attn.q":.nan}',
    "--train.learning_rate": NOT_POSITIVE,
    "--train.min_learning_rate": "-1 .nan .inf",
    "--train.warmup_steps": "-1",
    "--train.weight_decay": "-1 .nan .inf",
    "--train.beta1": "-0.1 1 .nan",
    "--train.beta2": "-0.1 1 .nan",
    "--train.max_norm": NOT_POSITIVE,
    "--train.global_batch_size": NOT_A_COUNT,
    "--train.micro_batch_size": NOT_A_COUNT,
    "--train.micro_batch_tokens": NOT_A_COUNT,
    "--train.epochs": NOT_A_COUNT,
    "--train.max_steps": NOT_A_COUNT,
    "--train.max_hours": NOT_POSITIVE,
    "--train.eval_interval": NOT_A_COUNT,
    "--train.eval_records": NOT_A_COUNT,
    "--train.metric_records": NOT_A_COUNT,
    "--train.max_forgetting": NOT_POSITIVE,
    "--train.patience": NOT_A_COUNT,
    "--train.save_minutes": NOT_POSITIVE,
    "--train.save_interval": NOT_A_COUNT,
    "--train.seed": NOT_A_SEED,
    "--k": NOT_A_COUNT,
    "--head_layers": "-1",
    "--sweep_seeds": NOT_A_COUNT,
    "--labels_curve": "[0] [8,-1]",
    # scripts/
    "--max_seq_length": NOT_A_COUNT,
    "--val_fraction": "-0.1 1.1 .nan",
    "--minutes": NOT_POSITIVE,
    "--steps": NOT_A_COUNT,
    "--tokens": NOT_A_COUNT,
    "--card_gb": NOT_POSITIVE,
    "--host_gb": NOT_POSITIVE,
    "--max_shard_size": f"{NOT_POSITIVE} 1e300",
    "--samples": "-1",
    "--n_worst": "-1",
    "--scales": "[-0.1] [.nan]",
    "--max_forgetting": "-0.1 .nan .inf",
    "--n_records": NOT_A_COUNT,
    "--n_mails": "1 -5",
}
TOGETHER = {"--sweep_seeds": ["--sweep"]}  # a flag that is read only beside another one
ELSEWHERE = ("--sources",)  # weights of data, which data are read with: tests/test_sources.py


def numbers_of(path: Path) -> set[str]:
    """The flags of a script that take a number, or several."""
    flags = set()
    for action in make_parser(load(path).main)._actions:
        kind = str(getattr(action, "_typehint", None) or action.type)
        if re.search(r"\b(int|float)\b", kind):
            flags.add(action.option_strings[-1])
    return flags


def test_every_number_has_a_range() -> None:
    flags = set().union(*map(numbers_of, SCRIPTS)) - {*ELSEWHERE}
    assert flags == set(OUT_OF_RANGE)


@pytest.mark.parametrize(
    "path", [path for path in SCRIPTS if numbers_of(path)], ids=lambda path: str(path.relative_to(ROOT))
)
def test_a_number_out_of_its_range_is_refused_by_its_flag(path: Path, tmp_path, monkeypatch) -> None:
    """Before anything is looked at: no path of these commands is there. And nothing is written."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(path)])
    main = load(path).main
    required = [
        f"{action.option_strings[-1]}={'{nowhere: 1}' if action.dest == 'sources' else 'nowhere'}"
        for action in make_parser(main)._actions
        if getattr(action, "required", False)
    ]
    for flag in sorted(numbers_of(path) - {*ELSEWHERE}):
        for value in OUT_OF_RANGE[flag].split():
            with pytest.raises(InputError, match=rf"^{flag}\b.* is .+, expected "):
                main(**parse(main, [*required, *TOGETHER.get(flag, []), f"{flag}={value}"]))
    assert list(tmp_path.iterdir()) == []


def test_the_least_temperature_is_one_that_works() -> None:
    """With logits as large as models have them: the likeliest token, and nothing that is not finite."""
    logits = torch.tensor([[30.0, -1e4, 1e4, 9.9e3]])
    for temperature in (LEAST_TEMPERATURE, 1.0, 1e6):
        assert sample(logits, temperature, generator=torch.Generator().manual_seed(0)).item() in range(4)
    assert sample(logits, LEAST_TEMPERATURE).item() == 2


# ---- texts


NOT_UTF8 = os.fsdecode(b"caf\xe9")


@pytest.mark.parametrize(
    "command",
    [
        "generate/base.py --prompt TEXT",
        "generate/base.py --prompt=TEXT",
        "generate/base.py --prompt hi --input TEXT",
        "generate/base.py --prompt hi --prompt_style TEXT.jinja",
        "generate/chat.py --system TEXT",
        "generate/base.py --prompt hi --checkpoint_dir TEXT",
        "scripts/prepare_json.py --json_path TEXT",
        "scripts/plan_memory.py --data_dir TEXT",
        "finetune/lora.py --out_dir TEXT",
    ],
)
def test_a_word_that_is_not_utf8_is_refused_by_its_flag(command: str, tmp_path) -> None:
    script, *words = shlex.split(command)
    result = python(ROOT / script, *[word.replace("TEXT", NOT_UTF8) for word in words], cwd=tmp_path)
    flag = [word.partition("=")[0] for word in words if word.startswith("--")][-1]
    assert result.returncode == 2 and result.stdout == ""
    assert re.fullmatch(rf"error: {flag} is not UTF-8: '.*caf\\udce9.*'\. Type it as UTF-8\.\n", result.stderr)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("ids", [-1, [2, -1], True, 2.0, "2", 10**30])
def test_token_ids_that_are_none_are_refused(ids, tmp_path, tiny_dir) -> None:
    """Also where nothing else names the token."""
    folder = shutil.copytree(tiny_dir, tmp_path / "tiny")
    settings_file = folder / "tokenizer_config.json"
    settings = json.loads(settings_file.read_text())
    del settings["eos_token"]
    settings_file.write_text(json.dumps(settings))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    with pytest.raises(InputError, match=r"token_id is .+, expected one number or several, of the model's tokens"):
        Tokenizer(folder)


def test_an_unreadable_file_is_named(tiny_dir, tmp_path) -> None:
    """safetensors says of a file without permission that it is not there; a folder in its place is the same to it."""
    folder = shutil.copytree(tiny_dir, tmp_path / "tiny")
    (folder / "model.safetensors").chmod(0)
    words = ["generate/base.py", "--checkpoint_dir", folder, "--prompt", "hi"]
    if os.geteuid() == 0:  # root reads everything, unless it gives that up
        if shutil.which("setpriv") is None:
            pytest.skip("needs setpriv to be refused as root")
        without = "-dac_override,-dac_read_search"
        words = ["setpriv", f"--bounding-set={without}", f"--inh-caps={without}", sys.executable, *map(str, words)]
        result = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    else:
        result = python(*words, cwd=ROOT)
    assert result.returncode == 2 and result.stderr == f"error: Permission denied: {folder}/model.safetensors\n"
