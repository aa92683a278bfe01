"""What needs an NVIDIA device: `bash scripts/test.sh --gpu`, some minutes; it prints a page of results to paste.

bf16-true is what users run, and the rest of the suite only sees it on tiny models on a CPU.
"""

import subprocess
import sys
from typing import get_args

import pytest
import torch
from conftest import ROOT

from lit_gpt import Config
from lit_gpt.checkpoint.load import build_model, load_model, load_weights
from lit_gpt.lora import LoRA
from lit_gpt.make_optimizer import make_optimizer
from lit_gpt.memory.plan import Setup, adapt, batch_of, plan
from lit_gpt.quantize import Quantize, QuantizedLinear, quantize_linears
from lit_gpt.train import TrainArgs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA device"),
]


def say(line: str) -> None:
    print(f"\n  {line}")


@pytest.fixture(scope="module", autouse=True)
def machine() -> None:
    if torch.cuda.is_available():
        names = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
        say(f"torch {torch.__version__}, CUDA {torch.version.cuda}, {names}")


def test_bf16_logits_are_as_good_as_those_of_transformers(sample_dir) -> None:
    from transformers import AutoModelForCausalLM

    idx = torch.randint(0, 49152, (1, 2000), device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    device = torch.device("cuda")
    with torch.no_grad():
        exact = load_model(sample_dir, torch.float32, device)(idx)
        ours = load_model(sample_dir, torch.bfloat16, device)(idx).float()
        theirs = AutoModelForCausalLM.from_pretrained(sample_dir, dtype=torch.bfloat16).to(device)(idx).logits.float()
    errors = [(logits - exact)[:, 1000:].abs().mean().item() for logits in (ours, theirs)]
    say(f"mean error of bf16 logits beyond position 1,000: ours {errors[0]:.4f}, transformers {errors[1]:.4f}")
    assert errors[0] < 1.5 * errors[1]


@pytest.mark.parametrize("kind", get_args(Quantize))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_quantized_linear(kind: Quantize, dtype: torch.dtype) -> None:
    """One token, a few and many take different kernels; all agree with the dequantized weight, and so does backward."""
    layer = QuantizedLinear(1024, 2048, None, kind)
    layer.load_weight(torch.randn(2048, 1024, device="cuda", dtype=dtype))
    weight = layer.dequantize(torch.float32)
    errors = []
    for tokens in (1, 8, 100, 2000):
        x = torch.randn(1, tokens, 1024, device="cuda", dtype=dtype, requires_grad=True)
        y = layer(x)
        y.backward(torch.ones_like(y))
        expected = x.detach().float() @ weight.T, weight.sum(0).expand_as(x)
        errors += [((a - b).norm() / b.norm()).item() for a, b in zip((y, x.grad), expected)]
    say(f"{kind}, {dtype}: relative errors of y and of x's gradient up to {max(errors):.1e}")
    assert max(errors) < 0.02 and y.dtype == dtype


@pytest.mark.parametrize("how", ["none", "block"])
@pytest.mark.parametrize("kind", [None, "bnb.nf4", "bnb.nf4-dq"])
def test_a_step_takes_what_was_planned(sample_dir, kind: Quantize | None, how: str) -> None:
    """LoRA and QLoRA on the sample model. What the plan cannot see is said in lit_gpt/memory.py."""
    config = Config.from_checkpoint(sample_dir)
    lengths = (512,) * 4
    setup = Setup(config, settings=LoRA(), quantize=kind, activation_checkpointing=how, lengths=lengths)
    model, (idx, layout) = build_model(config), batch_of(lengths)
    quantize_linears(model, kind)
    load_weights(model, sample_dir, torch.bfloat16, torch.device("cuda"))
    optimizer = make_optimizer(adapt(model, setup), TrainArgs())
    idx, layout = idx.cuda(), layout.to(torch.device("cuda"))
    torch.cuda.reset_peak_memory_stats()
    for _ in range(2):
        loss = model(idx, layout=layout)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    found, planned = torch.cuda.max_memory_allocated() / 1e9, plan(setup).gb
    say(f"{kind or 'bf16'}, activation checkpointing {how}: planned {planned:.2f} GB, took {found:.2f} GB")
    assert loss.isfinite() and found == pytest.approx(planned, rel=0.3)


@pytest.fixture(scope="module")
def docstrings(tmp_path_factory, sample_dir):
    data_dir = tmp_path_factory.mktemp("data") / "docstrings"
    command = [sys.executable, ROOT / "scripts/prepare_docstrings.py"]
    subprocess.run([*command, "--checkpoint_dir", sample_dir, "--data_dir", data_dir], check=True, capture_output=True)
    return data_dir


@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed", "16-true", "16-mixed", "32-true"])
def test_lora_learns(sample_dir, docstrings, tmp_path, devices: int, precision: str) -> None:
    if devices > torch.cuda.device_count():
        pytest.skip(f"{devices} GPUs")
    command = [sys.executable, ROOT / "finetune/lora.py", "--checkpoint_dir", sample_dir, "--data_dir", docstrings]
    command += ["--out_dir", tmp_path / "out", "--precision", precision, "--devices", str(devices), "--n_answers", "1"]
    command += ["--train.max_steps", "30", "--train.learning_rate", "2e-3"]
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    from lit_gpt.runs.log import read_metrics

    rows = read_metrics(tmp_path / "out/metrics.csv")
    vals = [row["val_loss"] for row in rows if row["val_loss"] is not None]
    steps = [row for row in rows if row["loss"] is not None][5:]
    speed = sum(row["tokens"] for row in steps) / sum(row["seconds"] for row in steps)
    say(
        f"LoRA, {precision}, {devices} GPU: first step loss {rows[1]['loss']:.4f}, validation {vals[0]:.4f} ->"
        f" {vals[-1]:.4f}, {speed:,.0f} tokens/s, peak {max(row['memory_gb'] for row in steps):.2f} GB"
    )
    assert vals[-1] < vals[0] - 0.5
