"""finetune/lora.py from the command line to a merged checkpoint: `pytest tests/test_finetune.py`, about 1 min"""

import io
import json
import shutil
import sys
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import VOCAB_SIZE, make_tiny
from helpers.runs import FROZEN, column, equal, rows_of, write_data
from helpers.scripts import ROOT, lora, script
from helpers.shell import python
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lit_gpt import InputError, Tokenizer, cli
from lit_gpt.checkpoint.load import build_model, load_model, load_weights
from lit_gpt.config import Config
from lit_gpt.data.dataset import Dataset
from lit_gpt.device import weight_dtype
from lit_gpt.distributed import launch
from lit_gpt.generate.decode import generate
from lit_gpt.lora import LoRA, lora_learning_rate
from lit_gpt.runs.load_finetuned import load_finetuned
from lit_gpt.train import TrainArgs

TRAIN = TrainArgs(learning_rate=0.01, global_batch_size=8, epochs=6, warmup_steps=3, eval_interval=5)
SHORT = TrainArgs(learning_rate=0.01, global_batch_size=8, micro_batch_size=4, max_steps=3, warmup_steps=1)
ALL = LoRA(r=8, alpha=16.0, query=True, key=True, value=True, projection=True, mlp=True)


def finetune(checkpoint_dir: Path, data_dir: Path, out_dir: Path, **settings: Any) -> None:
    lora.main(checkpoint_dir=checkpoint_dir, data_dir=data_dir, out_dir=out_dir, **settings)


def run_script(*command: Any, cwd: Path) -> None:
    python(*command, cwd=cwd, check=True)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory, tiny_dir: Path) -> Path:
    return write_data(tmp_path_factory.mktemp("data") / "str", tiny_dir)


@pytest.fixture(scope="module")
def out_dir(tmp_path_factory, tiny_dir: Path, data_dir: Path) -> Path:
    """A run of some length, with something of everything."""
    out_dir = tmp_path_factory.mktemp("out") / "lora"
    finetune(tiny_dir, data_dir, out_dir, lora=ALL, train=TRAIN, precision="32-true", n_answers=2)
    return out_dir


@pytest.fixture(scope="module")
def merged_dir(tmp_path_factory, out_dir: Path) -> Path:
    folder = tmp_path_factory.mktemp("merged") / "model"
    script("scripts/merge_lora.py").main(out_dir, folder)
    return folder


def test_loss_falls_and_files_are_there(out_dir: Path) -> None:
    losses, val_losses = column(out_dir, "loss"), column(out_dir, "val_loss")
    assert len(losses) == 30 and losses[-1] < losses[0] - 3 and val_losses[-1] < val_losses[0] - 1.5
    names = {path.relative_to(out_dir).as_posix() for path in out_dir.rglob("*") if path.is_file()}
    weights = {"best/lora.safetensors", "last/lora.safetensors", "last/state.safetensors"}
    assert names == weights | {"hyperparameters.yaml", "metrics.csv", "val_losses.csv", "report.md", "loss.png"}
    report = (out_dir / "report.md").read_text()
    assert "| Optimizer steps | 30 |" in report and "What does str.strip do?" in report and "warmup_steps: 3" in report
    assert (out_dir / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_hyperparameters_repeat_the_run(out_dir: Path, tmp_path, monkeypatch) -> None:
    copy = shutil.copytree(out_dir, tmp_path / "copy")
    settings = (copy / "hyperparameters.yaml").read_text()
    (copy / "hyperparameters.yaml").write_text(settings.replace(str(out_dir), str(copy)))
    (copy / "last/lora.safetensors").write_bytes(b"replaced")
    flags = ["--config", str(copy / "hyperparameters.yaml"), "--overwrite", "true"]
    monkeypatch.setattr(sys, "argv", [str(ROOT / "finetune/lora.py"), *flags])
    cli.run(lora.main)
    assert rows_of(copy) == rows_of(out_dir)
    for file in ("best/lora", "last/lora", "last/state"):
        assert equal(*(load_file(folder / f"{file}.safetensors") for folder in (copy, out_dir)))
    again = (copy / "hyperparameters.yaml").read_text().split("\n", 1)[1].replace(str(copy), str(out_dir))
    assert again == settings.split("\n", 1)[1], "but for the command in the first line"


def test_merged_and_unmerged_answers_agree(tiny_dir, data_dir, out_dir, merged_dir) -> None:
    """Token for token; and they are not the base's."""
    models = load_finetuned(None, out_dir)[0], load_model(merged_dir), load_model(tiny_dir)
    val_data = Dataset(data_dir, "val")
    for i in range(len(val_data)):
        prompt, _ = val_data.question(i)
        ours, merged, base = (generate(model, prompt, len(prompt) + 30, temperature=0.0).tolist() for model in models)
        assert ours == merged != base


def test_generate_script_takes_either(out_dir, merged_dir) -> None:
    answers = []
    for source in ({"finetuned": out_dir}, {"checkpoint_dir": merged_dir}):
        with redirect_stdout(io.StringIO()) as stdout:
            script("generate/base.py").main("What does str.upper do?", max_new_tokens=30, **source)
        answers.append(stdout.getvalue())
    assert answers[0] == answers[1] and len(answers[0].strip()) > 10


def test_transformers_takes_the_merged_folder(out_dir, merged_dir) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    theirs, report = AutoModelForCausalLM.from_pretrained(merged_dir, output_loading_info=True)
    assert not any(report.values()), "no key is missing, unexpected or of another shape"
    ids = Tokenizer(merged_dir).encode("What does str.upper do?")
    assert AutoTokenizer.from_pretrained(merged_dir)("What does str.upper do?").input_ids == ids.tolist()
    with torch.no_grad():
        logits = [
            theirs(ids[None]).logits,
            *(m(ids[None]) for m in (load_model(merged_dir), load_finetuned(None, out_dir)[0])),
        ]
    assert logits[0].shape == (1, len(ids), VOCAB_SIZE)
    assert all((other - logits[0]).abs().max() < 1e-5 * logits[0].abs().max() for other in logits[1:])


def test_two_devices_learn_the_same(tiny_dir, data_dir, tmp_path) -> None:
    """With 9 records a step, the second process now and then has an empty pass."""
    train = TrainArgs(learning_rate=0.01, global_batch_size=9, micro_batch_size=1, max_steps=3)
    finetune(tiny_dir, data_dir, tmp_path / "1", train=train, n_answers=0)
    hyperparameters = (tmp_path / "1/hyperparameters.yaml").read_text()
    (tmp_path / "two.yaml").write_text(hyperparameters.replace(str(tmp_path / "1"), str(tmp_path / "2")))
    run_script(ROOT / "finetune/lora.py", "--config", tmp_path / "two.yaml", "--devices", 2, cwd=tmp_path)
    for name in ("loss", "val_loss", "grad_norm", "trained_tokens", "learning_rate"):
        one, two = (column(tmp_path / devices, name) for devices in "12")
        assert len(one) >= 2 and one == pytest.approx(two, rel=1e-5)
    one, two = (load_finetuned(None, tmp_path / devices)[0].state_dict() for devices in "12")
    assert all(torch.allclose(one[key], two[key], rtol=0, atol=1e-3) for key in one)


# ---- precision


@pytest.fixture(scope="module")
def wide_dir(tmp_path_factory, tiny_dir: Path, data_dir: Path) -> Path:
    out_dir = tmp_path_factory.mktemp("wide") / "lora"
    finetune(tiny_dir, data_dir, out_dir, train=SHORT, precision="32-true", n_answers=0)
    return out_dir


@pytest.mark.parametrize("precision", sorted(FROZEN.keys() - {"32-true"}))
def test_every_precision_learns_as_float32_does(precision: str, tiny_dir, data_dir, wide_dir, tmp_path) -> None:
    finetune(tiny_dir, data_dir, tmp_path, train=SHORT, precision=precision, n_answers=0)
    for name, tolerance in (("loss", 2e-3), ("val_loss", 2e-3), ("grad_norm", 2e-2)):
        wide, narrow = column(wide_dir, name), column(tmp_path, name)
        assert len(wide) >= 2 and narrow == pytest.approx(wide, rel=tolerance) and narrow != wide
    weights = load_file(tmp_path / "last/lora.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}


@pytest.mark.parametrize("precision", ["16-true", "16-mixed"])
def test_loss_scale_survives_and_skips_what_overflows(precision: str, tiny_dir, data_dir, tmp_path) -> None:
    """A scale far too large: the next step leaves the weights alone and halves it."""
    one_step = replace(SHORT, max_hours=1e-9)
    run = dict(train=one_step, precision=precision, n_answers=0)
    finetune(tiny_dir, data_dir, tmp_path, **run)
    before, state = load_file(tmp_path / "last/lora.safetensors"), tmp_path / "last/state.safetensors"
    progress = progress_of(tmp_path)
    assert progress["scaler"]["scale"] == 2.0**16
    progress["scaler"]["scale"] = 2.0**120
    save_file(load_file(state), state, {"progress": json.dumps(progress)})
    finetune(tiny_dir, data_dir, tmp_path, **run, resume=True)
    assert progress_of(tmp_path)["step"] == 2 and progress_of(tmp_path)["scaler"]["scale"] == 2.0**119
    assert equal(before, load_file(tmp_path / "last/lora.safetensors"))


def progress_of(out_dir: Path) -> dict[str, Any]:
    with safe_open(out_dir / "last/state.safetensors", "pt") as file:
        return json.loads(file.metadata()["progress"])


def test_bf16_is_right_at_far_positions(tmp_path_factory, sample_dir) -> None:
    """Beyond position 1,000, through the real setup: as near to the float32 logits as transformers' bf16 logits are."""
    from transformers import AutoModelForCausalLM

    changes = dict(vocab_size=512, max_position_embeddings=2048, initializer_range=0.1)
    folder = make_tiny(tmp_path_factory.mktemp("far") / "checkpoint", sample_dir, **changes)
    fabric = launch(1, "bf16-true")
    model = build_model(Config.from_checkpoint(folder))
    load_weights(model, folder, weight_dtype("bf16-true"))
    model = fabric.setup(model)
    ids = torch.randint(512, (1, 1500))
    with torch.no_grad():
        exact = load_model(folder, torch.float32)(ids)[:, 1000:]
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)(ids).logits[:, 1000:]
        ours = model(ids)[:, 1000:]
    assert ours.dtype == theirs.dtype == torch.bfloat16
    errors = [((logits.float() - exact).square().mean() / exact.square().mean()).sqrt() for logits in (ours, theirs)]
    assert 0 < errors[0] < 1.1 * errors[1] < 0.05


def test_a_wider_model_learns_slower_and_the_rate_is_written_down(tiny_dir, data_dir, tmp_path) -> None:
    rates = [lora_learning_rate(width) for width in (48, 576, 2048, 4096)]
    assert rates == [2e-3, 2e-3, 7.4e-4, 4.3e-4]

    for given, rate in ((None, 2e-3), (0.25, 0.25)):
        out_dir = tmp_path / str(given)
        finetune(tiny_dir, data_dir, out_dir, train=replace(SHORT, learning_rate=given, max_steps=1), n_answers=0)
        assert cli.read_hyperparameters(out_dir / "hyperparameters.yaml")["train"]["learning_rate"] == rate
        assert column(out_dir, "learning_rate") == [rate]

    # a method that has none of its own
    with pytest.raises(InputError, match="train.learning_rate is null, expected a number"):
        train = replace(SHORT, learning_rate=None)
        script("finetune/full.py").main(
            checkpoint_dir=tiny_dir, data_dir=data_dir, out_dir=tmp_path / "full", train=train
        )


# ---- it is hackable


def test_two_changed_lines_make_another_method(tiny_dir, data_dir, tmp_path) -> None:
    """A copy of the script elsewhere: other matrices, and another schedule."""
    source = (ROOT / "finetune/lora.py").read_text()
    schedule = "lit_gpt.train.learning_rate = lambda step, steps, args: args.learning_rate / (step + 1)\n"
    for old, new in (
        ("dropout=0.0)", "modules=['attn.k'], layers=[1])"),
        ("import TrainArgs, check_run, fit\n", "import TrainArgs, check_run, fit\nimport lit_gpt.train\n" + schedule),
    ):
        assert source.count(old) == 1
        source = source.replace(old, new)
    (tmp_path / "mine.py").write_text(source)
    flags = ("--checkpoint_dir", tiny_dir, "--data_dir", data_dir, "--out_dir", "out", "--train.max_steps", 3)
    run_script("mine.py", *flags, cwd=tmp_path)
    keys = load_file(tmp_path / "out/best/lora.safetensors").keys()
    assert keys == {f"transformer.h.1.attn.k.lora_{matrix}" for matrix in "AB"}
    assert column(tmp_path / "out", "learning_rate") == [2e-3, 2e-3 / 2, 2e-3 / 3]
