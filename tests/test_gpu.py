"""What needs an NVIDIA device: `bash scripts/test.sh --gpu`, some minutes; it prints a page of results to paste.

The other tests see tiny models on a CPU. This page shows that the same code is right on a GPU: kernels, dtypes,
4-bit codes, memory, NCCL and the scripts. It needs no network. Without the sample model, tests of it are skipped.

    REHEARSE_ON_CPU=1 python -m pytest -m gpu -s tests/test_gpu.py      the same on a CPU, with smaller shapes
"""

import gc
import importlib.metadata
import inspect
import io
import os
import shutil
import statistics
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
from conftest import ROOT, SAMPLE_DIR
from helpers.fused_cases import CASES as FUSED
from helpers.fused_cases import inputs_of, results
from helpers.models import cached, make_checkpoint
from helpers.runs import write_data
from helpers.scripts import lora as lora_script
from helpers.tiny_tokenizers import SPECIAL, byte_level, write
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

import lit_gpt.quantize
import lit_gpt.sharding
import lit_gpt.train
from lit_gpt import GPT, Config
from lit_gpt.checkpoint.load import build_model, load_model, load_weights, parameter_shapes, replace_parameter
from lit_gpt.checkpoint.tensor_names import hf_name
from lit_gpt.device import accelerator, default_device, precision_plugin, resolve_precision
from lit_gpt.distributed import launch
from lit_gpt.full import Full
from lit_gpt.generate.engine import Engine, Request
from lit_gpt.lora import LoRA, apply_lora, lora_filter, mark_only_lora_as_trainable
from lit_gpt.make_optimizer import make_optimizer
from lit_gpt.memory.plan import Setup, adapt, batch_of, plan, watch_step
from lit_gpt.model.activation_checkpointing import recompute_blocks
from lit_gpt.model.attention import compute_attention, has_flash_attention
from lit_gpt.model.compile import compile_blocks, missing_for_compiling
from lit_gpt.model.fused import loss_and_gradient
from lit_gpt.model.packing import Layout
from lit_gpt.optimizer_in_backward import OptimizerInBackward
from lit_gpt.quantize import Quantize, QuantizedLinear, quantize_linears
from lit_gpt.runs.log import read_metrics
from lit_gpt.sharding import full_tensor, is_sharded, shard_weights
from lit_gpt.stream_blocks import stream_of
from lit_gpt.train import TrainArgs, clip_gradient

IS_REHEARSAL = os.environ.get("REHEARSE_ON_CPU") == "1"
DEVICE = torch.device("cpu" if IS_REHEARSAL else "cuda")
BEGAN = time.monotonic()

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not (IS_REHEARSAL or torch.cuda.is_available()), reason="no NVIDIA device"),
]
needs_cuda = pytest.mark.skipif(IS_REHEARSAL, reason="a rehearsal on the CPU")

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-4}  # of `error`, for one kernel
EVERYWHERE = LoRA(r=4, alpha=10, query=True, key=True, value=True, projection=True, mlp=True, head=True)


# ---- what all tests use


def say(line: str) -> None:
    """Prints a line of the page of results, with the seconds since the beginning."""
    print(f"\n  {time.monotonic() - BEGAN:5.1f} s  {line}", flush=True)


@contextmanager
def quietly() -> Iterator[None]:
    """Keeps what a script prints off the page."""
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        yield


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The norm of the difference, as a share of the norm of what is expected."""
    found = found.detach().double().cpu()
    expected = expected.detach().double().cpu()
    return ((found - expected).norm() / expected.norm()).item()


def random_tensor(*shape: int, seed: int = 0) -> torch.Tensor:
    """Normal random numbers, made on the CPU, so that every device gets the same."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def random_ids(*shape: int, below: int = 1000) -> torch.Tensor:
    return torch.randint(0, below, shape, generator=torch.Generator().manual_seed(1))


def version(package: str) -> str:
    """A package's version as its files say it; unpacked wheels have some that pip did not install."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


@pytest.fixture(scope="module")
def sample_dir() -> Path:
    """The sample model, if it is there: 540 MB are not fetched for this page."""
    if not (SAMPLE_DIR / "model.safetensors").is_file():
        pytest.skip("no sample model: python scripts/download_sample.py")
    return SAMPLE_DIR


@pytest.fixture(scope="module", autouse=True)
def quiet_transformers() -> None:
    """Keeps its progress bars off the page."""
    import transformers

    transformers.utils.logging.disable_progress_bar()


@pytest.fixture(autouse=True)
def without_plans_of_cudnn() -> Iterator[None]:
    """Turns cuDNN's attention off, which takes up to half a second for every new length.

    PyTorch prefers it on Hopper since 2.11. `test_a_new_length_is_as_fast_as_an_old_one` measures it.
    """
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    yield
    torch.backends.cuda.enable_cudnn_sdp(before)


@pytest.fixture(scope="module", autouse=True)
def early_runs(request: pytest.FixtureRequest, quiet_transformers: None) -> None:
    """Starts the scripts before the first test, if a test asks for them: they run beside the other tests."""
    if any("runs" in item.fixturenames for item in request.session.items):
        with suppress(Exception):  # pytest keeps it, and raises it in the tests that ask for the runs
            request.getfixturevalue("runs")


# ---- the machine


def test_machine() -> None:
    packages = ("transformers", "peft", "bitsandbytes", "lightning-fabric", "pytorch-lightning", "triton")
    say(f"Python {sys.version.split()[0]}, torch {torch.__version__}, CUDA {torch.version.cuda}")
    say(", ".join(f"{package} {version(package)}" for package in packages))
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
        say(subprocess.run(query, capture_output=True, text=True).stdout.strip())
    say(f"cuDNN {torch.backends.cudnn.version()}, gcc {shutil.which('gcc')}, {os.cpu_count()} cores")
    say(str(torch.ops.aten._flash_attention_forward.default._schema))

    precision = resolve_precision("auto")
    say(f"lit_gpt chooses {accelerator()}, --precision auto is {precision}")
    assert accelerator() == DEVICE.type
    if DEVICE.type == "cuda" and torch.cuda.get_device_capability() >= (8, 0):
        assert precision == "bf16-true"


# ---- attention


def test_a_new_length_is_as_fast_as_an_old_one() -> None:
    """Records have all lengths: no kernel may plan anew for each. See `without_plans_of_cudnn`."""
    torch.backends.cuda.enable_cudnn_sdp(True)  # as PyTorch begins
    default_device()  # lit_gpt may turn it off when it chooses a device

    def milliseconds(length: int) -> float:
        _, layout = batch_of((length,))
        q, k, v = (random_tensor(1, 8, length, 64, seed=i).to(DEVICE, torch.bfloat16) for i in range(3))
        q.requires_grad_()
        synchronize()
        began = time.perf_counter()
        compute_attention(q, k, v, layout.to(DEVICE)).sum().backward()
        synchronize()
        return 1000 * (time.perf_counter() - began)

    milliseconds(100)  # loads the kernels
    lengths = (101, 137, 155, 170, 193)
    first = [milliseconds(length) for length in lengths]
    again = [milliseconds(length) for length in lengths]
    state = "on" if torch.backends.cuda.cudnn_sdp_enabled() else "off"
    say(
        f"cuDNN's attention is {state}: {statistics.median(first):.1f} ms forward and backward at a new length, then"
        f" {statistics.median(again):.1f} ms"
    )
    # the least, since the scripts run beside this: on the two cores of a rehearsal they are in its way
    most = 500 if IS_REHEARSAL else 20
    assert min(first) < min(again) + most


def synchronize() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


LENGTHS = (120, 37, 200, 65)
ATTENTION: dict[str, dict[str, Any]] = {  # 8 heads of 64, of which 4 share keys and values, unless it says otherwise
    "records end to end": {},
    "heads of 128": {"head_size": 128},
    "heads of 256": {"head_size": 256},
    "heads of their own": {"n_query_groups": 8},
    "shared prefixes": {"prefix": 30},
    "a window": {"window": 50},
    "a window and shared prefixes": {"window": 50, "prefix": 30},
    "a soft cap": {"softcap": 5.0},
    "a soft cap and shared prefixes": {"softcap": 5.0, "prefix": 30},
}


@pytest.mark.parametrize("case", ATTENTION)
def test_attention_is_the_formula(case: str) -> None:
    """The output and the gradients of q, k and v, against float64 on the CPU."""
    settings = {"head_size": 64, "n_query_groups": 2, "prefix": 0} | ATTENTION[case]
    options = {name: settings.get(name) for name in ("window", "softcap")}
    layout = layout_of(LENGTHS, settings["prefix"])
    kernels = set()
    errors = {}
    for dtype in DTYPES:
        # q, k, v and the gradient of y
        shapes = []
        for n_heads in (8, settings["n_query_groups"], settings["n_query_groups"], 8):
            shapes.append((1, n_heads, layout.n_tokens, settings["head_size"]))
        inputs = [random_tensor(*shape, seed=seed).to(dtype) for seed, shape in enumerate(shapes)]

        on_device = [x.to(DEVICE) for x in inputs]
        in_float64 = [x.double() for x in inputs]
        found = with_gradients(compute_attention, on_device, layout.to(DEVICE), options)
        expected = with_gradients(formula, in_float64, layout, options)
        errors[dtype] = [error(a, b) for a, b in zip(found, expected, strict=True)]
        in_one_call = options["softcap"] is None and has_flash_attention(on_device[0])
        kernels.add("one call" if in_one_call else "by segment")
    texts = [f"{name_of(dtype)} {' '.join(f'{e:.0e}' for e in errors[dtype])}" for dtype in DTYPES]
    say(f"{' and '.join(sorted(kernels))}, {case}: y, dq, dk, dv off by {', '.join(texts)}")
    for dtype in DTYPES:
        assert max(errors[dtype]) < TOLERANCE[dtype], dtype


def with_gradients(
    function: Callable[..., torch.Tensor], inputs: list[torch.Tensor], layout: Layout, options: dict[str, Any]
) -> list[torch.Tensor]:
    """y, and the gradients of q, k and v; `inputs` are these three, and the gradient of y."""
    *qkv, y_grad = inputs
    qkv = [x.requires_grad_() for x in qkv]
    y = function(*qkv, layout, **options)
    return [y, *torch.autograd.grad(y, qkv, y_grad)]


def layout_of(lengths: Sequence[int], prefix: int = 0) -> Layout:
    """Records of these lengths in one row; all begin with the same `prefix` tokens, which they share."""
    ids = random_ids(len(lengths), max(lengths))
    ids[:, :prefix] = ids[0, :prefix]
    ids[:, prefix] = torch.arange(len(lengths))  # no two records share more
    records = [(row[:length], torch.ones(length)) for row, length in zip(ids, lengths, strict=True)]
    _, layout = Layout.end_to_end(records, share_prefixes=prefix > 0)
    assert any(segment.prefix_length for segment in layout.segments) == (prefix > 0)
    return layout


def formula(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: Layout, window: int | None, softcap: float | None
) -> torch.Tensor:
    """Attention as the textbook has it, over the whole row."""
    k = k.repeat_interleave(q.size(1) // k.size(1), dim=1)
    v = v.repeat_interleave(q.size(1) // v.size(1), dim=1)

    # which tokens (columns) each token (row) sees: those before it in its record, of which the prefix is a part
    T = layout.n_tokens
    same_record = torch.zeros(T, T, dtype=torch.bool)
    for segment in layout.segments:
        rows = slice(segment.start, segment.start + segment.length)
        same_record[rows, rows] = True
        same_record[rows, segment.prefix_start : segment.prefix_start + segment.prefix_length] = True
    distance = layout.pos[:, None] - layout.pos
    seen = same_record & (distance >= 0)
    if window is not None:
        seen &= distance < window

    scores = q @ k.transpose(2, 3) / q.size(-1) ** 0.5
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    return scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v


# ---- the small functions of a block, and compiled blocks


@pytest.mark.parametrize("name", FUSED)
def test_small_function_is_the_formula(name: str) -> None:
    """What it returns and all gradients, against float64 on the CPU; on CUDA most are one compiled kernel."""
    case = FUSED[name]
    errors = {}
    for dtype in DTYPES:
        inputs = [x.to(dtype) for x in inputs_of(case)]
        constants = [x.to(dtype) if isinstance(x, torch.Tensor) else x for x in case.constants]
        if name.startswith("rotations"):  # whose cosine and sine are float32
            constants = [x.float() for x in case.constants]
        on_device = [x.to(DEVICE) if isinstance(x, torch.Tensor) else x for x in constants]
        in_float64 = [x.double() if isinstance(x, torch.Tensor) else x for x in constants]
        found = results(case.function, [x.to(DEVICE) for x in inputs], on_device)
        expected = results(case.expected, [x.double() for x in inputs], in_float64)
        errors[dtype] = [error(a, b) for a, b in zip(found, expected, strict=True)]
    say(f"{name}: off by {', '.join(f'{name_of(dtype)} {max(errors[dtype]):.0e}' for dtype in DTYPES)}")
    for dtype in DTYPES:
        assert max(errors[dtype]) < TOLERANCE[dtype], dtype


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_loss_and_its_gradient(dtype: torch.dtype) -> None:
    """Of logits (N, V), against float64."""
    logits = (3 * random_tensor(50, 3000)).to(dtype)
    target = random_ids(50, below=3000)
    loss, grad = loss_and_gradient(logits.to(DEVICE), target.to(DEVICE))
    wide = logits.double().requires_grad_()
    expected = F.cross_entropy(wide, target, reduction="sum")
    (wanted,) = torch.autograd.grad(expected, wide)
    say(f"loss of {name_of(dtype)} logits off by {error(loss, expected):.0e}, its gradient {error(grad, wanted):.0e}")
    assert error(loss, expected) < 1e-5
    assert error(grad, wanted) < TOLERANCE[dtype]


# of three micro-batches; lengths as in training, since the compiler may make other programs for very few rows
OF_COMPILED = (LENGTHS, (33, 150), (90, 41, 77)) if IS_REHEARSAL else ((500, 240, 410), (330, 480), (450, 410, 380))


@pytest.mark.parametrize(("quantize", "recompute"), [(None, "none"), ("bnb.nf4", "none"), ("bnb.nf4-dq", "block")])
def test_compiled_blocks_compute_the_same(quantize: Quantize | None, recompute: str) -> None:
    """LoRA's gradients in float32 and bfloat16 beside those of the blocks as they are; records of many lengths."""
    from torch._dynamo.utils import counters

    if missing_for_compiling(DEVICE):
        pytest.skip(f"no {missing_for_compiling(DEVICE)}")
    torch._logging.set_logs(recompiles=True)  # says why, if there is one
    errors = []
    for dtype in (torch.float32, torch.bfloat16):
        torch._dynamo.reset()
        counters.clear()
        plain = small_lora(quantize, dtype)
        compiled = small_lora(quantize, dtype)
        compile_blocks(compiled)
        recompute_blocks(compiled, recompute)  # type: ignore[arg-type] # one of its words
        for lengths in OF_COMPILED:
            layout = layout_of(lengths).to(DEVICE)
            idx = random_ids(1, layout.n_tokens).to(DEVICE)
            wanted = [plain(idx, layout=layout), *gradients_of(plain, idx, layout)]
            found = [compiled(idx, layout=layout), *gradients_of(compiled, idx, layout)]
            errors.append(max(error(a, b) for a, b in zip(found, wanted, strict=True)))
        made = counters["stats"]["unique_graphs"]
        breaks = sum(counters["graph_break"].values())
        say(
            f"compiled {quantize}, recomputed {recompute}, {name_of(dtype)}: off by {max(errors):.0e}; {made} graphs,"
            f" {breaks} breaks"
        )
        assert max(errors) < (1e-4 if dtype == torch.float32 else 3e-2)
    torch._logging.set_logs()
    if has_flash_attention(torch.empty(1, 4, 1, 32, device=DEVICE, dtype=torch.bfloat16)):
        assert (made, breaks) == (2, 0)  # the block and the loss


def small_lora(quantize: Quantize | None, dtype: torch.dtype) -> GPT:
    """Two blocks with LoRA, the same in every call."""
    torch.manual_seed(0)
    sizes = dict(n_head=4, n_query_groups=2, n_embd=128, intermediate_size=256, vocab_size=1000, block_size=512)
    model = GPT(Config(n_layer=2, **sizes)).to(DEVICE, dtype)
    for rope in model.ropes.values():
        rope.theta = rope.theta.float()
    quantize_linears(model, quantize)
    apply_lora(model, LoRA(r=4))
    mark_only_lora_as_trainable(model)
    for name, param in model.named_parameters():
        if name.endswith("lora_B"):
            nn.init.normal_(param, std=0.1)
    return model


def gradients_of(model: GPT, idx: torch.Tensor, layout: Layout) -> tuple[torch.Tensor, ...]:
    params = [param for param in model.parameters() if param.requires_grad]
    return torch.autograd.grad(model(idx, layout=layout), params)


# ---- quantized linears

QUANTIZED_SHAPE = (128, 192) if IS_REHEARSAL else (2048, 1024)  # (out, in)
TOKENS = (1, 4, 8, 64) if IS_REHEARSAL else (1, 4, 8, 64, 600, 2000)  # 5 to 1,536 take different kernels
each_kind = pytest.mark.parametrize("kind", get_args(Quantize))


@each_kind
def test_quantized_linear(kind: Quantize) -> None:
    """One token, a few and many take different kernels; all agree with the dequantized weight, and so does backward."""
    errors = {}
    for dtype in DTYPES:
        layer = quantized(random_tensor(*QUANTIZED_SHAPE).to(DEVICE, dtype), kind)
        weight = layer.dequantize(torch.float32)
        errors[dtype] = []
        for tokens in TOKENS:
            x = random_tensor(1, tokens, layer.in_features, seed=1).to(DEVICE, dtype).requires_grad_()
            y_grad = random_tensor(1, tokens, layer.out_features, seed=2).to(DEVICE, dtype)
            y = layer(x)
            y.backward(y_grad)
            assert y.dtype == dtype
            errors[dtype].append(error(y, x.float() @ weight.T))
            errors[dtype].append(error(x.grad, y_grad.float() @ weight))
    texts = [f"{name_of(dtype)} {max(errors[dtype]):.0e}" for dtype in DTYPES]
    say(f"{kind}: y and dx of {', '.join(map(str, TOKENS))} tokens off by up to {', '.join(texts)}")
    for dtype in DTYPES:
        assert max(errors[dtype]) < TOLERANCE[dtype], dtype


@each_kind
def test_codes_are_those_of_bitsandbytes(kind: Quantize, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit, in one part and in many; and nearly those that a CPU makes."""
    different = {}
    for dtype in DTYPES:
        weight = random_tensor(*QUANTIZED_SHAPE).to(dtype)
        ours = quantized(weight.to(DEVICE), kind)
        codes, scales = codes_of_bitsandbytes(weight, kind)
        assert torch.equal(ours.codes.flatten(), codes.flatten())
        assert torch.equal(ours.scales.flatten(), scales.flatten())

        # another number of parts
        with monkeypatch.context() as patch:
            patch.setattr(lit_gpt.quantize, "values_at_once", lambda weight: 2**12)
            in_parts = quantized(weight.to(DEVICE), kind)
        for name in ours.layout():
            assert torch.equal(getattr(in_parts, name), getattr(ours, name)), name

        # made on a CPU: a value in the middle between two codes may get the other
        on_cpu = quantized(weight, kind)
        differ = single_codes(on_cpu) != single_codes(ours)
        different[dtype] = differ.double().mean().item()
    texts = [f"{name_of(dtype)} {different[dtype]:.0e}" for dtype in DTYPES]
    say(f"{kind}: codes are those of bitsandbytes; made on a CPU some differ, {', '.join(texts)} of them")
    # fp4 divides at fractions such as 5/6, where many values of few bits are
    assert max(different.values()) < (1e-2 if "fp4" in kind else 1e-4)


def quantized(weight: torch.Tensor, kind: Quantize) -> QuantizedLinear:
    layer = QuantizedLinear(weight.size(1), weight.size(0), None, kind)
    layer.load_weight(weight)
    return layer


def codes_of_bitsandbytes(weight: torch.Tensor, kind: Quantize) -> tuple[torch.Tensor, torch.Tensor]:
    """The codes and scales of bitsandbytes' own layer, which makes them as it moves to the device."""
    import bitsandbytes as bnb

    rows, columns = weight.shape
    if kind == "bnb.int8":
        layer = bnb.nn.Linear8bitLt(columns, rows, bias=False, has_fp16_weights=False)
        layer.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
        layer = layer.to(DEVICE)
        return layer.weight.data, layer.weight.SCB
    options = {"compress_statistics": kind.endswith("-dq"), "quant_type": kind[4:7]}
    layer = bnb.nn.Linear4bit(columns, rows, bias=False, compute_dtype=weight.dtype, **options)
    layer.weight = bnb.nn.Params4bit(weight, requires_grad=False, **options)
    layer = layer.to(DEVICE)
    return layer.weight.data, layer.weight.quant_state.absmax


def single_codes(layer: QuantizedLinear) -> torch.Tensor:
    """The code of each value, on the CPU; with 4 bits a byte holds two."""
    codes = layer.codes.cpu()
    if layer.format == "int8":
        return codes
    return torch.stack((codes >> 4, codes & 15))


# ---- whole models: logits and gradients

N_TOKENS = 100 if IS_REHEARSAL else 1000
SIZES: dict[str, Any] = dict(
    vocab_size=1000, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=8,
    num_key_value_heads=2, head_dim=64, max_position_embeddings=4096, bos_token_id=None, eos_token_id=None,
    pad_token_id=None,
)  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {  # transformers' config -> what it says besides
    "Llama": {},
    "Qwen3": {},
    "Gemma2": {"sliding_window": 60, "query_pre_attn_scalar": 64, "attn_logit_softcapping": 5.0},
    "Gemma3Text": {"sliding_window": 60, "query_pre_attn_scalar": 64},
}


def make_model(folder: Path, kind: str) -> Path:
    """A random model as transformers saves it. All numbers in it are about as large as those of a trained one."""
    import transformers

    config = getattr(transformers, f"{kind}Config")(**SIZES | MODELS[kind])
    model = transformers.AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(0)
    for param in model.parameters():
        is_vector = param.dim() == 1
        std = 0.2 if is_vector else param.size(-1) ** -0.5
        nn.init.normal_(param, mean=float(is_vector), std=std, generator=generator)
    model.save_pretrained(folder)
    return folder


def of_transformers(folder: Path, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """The same model in transformers. Only `eager` knows the soft cap of Gemma 2."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager")
    return model.to(device).eval()


@pytest.mark.parametrize("kind", MODELS)
@torch.no_grad()
def test_logits_are_as_good_as_those_of_transformers(kind: str, tmp_path: Path) -> None:
    """The mean error of both on the device, against transformers in float32 on the CPU."""
    folder = make_model(tmp_path / "model", kind)
    idx = random_ids(1, N_TOKENS)
    exact = of_transformers(folder, torch.float32, torch.device("cpu"))(idx).logits
    idx = idx.to(DEVICE)
    ratios = []
    texts = []
    for dtype in DTYPES:
        model = load_model(folder, dtype, DEVICE)
        ours = error(model(idx), exact)
        theirs = error(of_transformers(folder, dtype, DEVICE)(idx).logits, exact)
        with_cache = error(cached(model, idx, [N_TOKENS - 3, 1, 1, 1]), exact)
        texts.append(f"{name_of(dtype)} {ours:.1e} (transformers {theirs:.1e}, with a cache {with_cache:.1e})")
        if dtype != torch.float32:
            ratios += [ours / theirs, with_cache / theirs]
    say(f"logits of {kind} off by {', '.join(texts)}")
    assert max(ratios) < 1.5
    assert max(ours, with_cache) < 1e-4, "float32"


@needs_cuda
def test_bf16_logits_of_the_sample(sample_dir: Path) -> None:
    idx = random_ids(1, 2000, below=49152).to(DEVICE)
    with torch.no_grad():
        exact = load_model(sample_dir, torch.float32, DEVICE)(idx)[:, 1000:]
        ours = error(load_model(sample_dir, torch.bfloat16, DEVICE)(idx)[:, 1000:], exact)
        theirs = error(of_transformers(sample_dir, torch.bfloat16, DEVICE)(idx).logits[:, 1000:], exact)
    say(f"bfloat16 logits of the sample beyond position 1,000 off by {ours:.1e}, transformers by {theirs:.1e}")
    assert ours < 1.5 * theirs


def test_lora_gradients_are_those_of_peft(tmp_path: Path) -> None:
    """On the same weights, with the same A and B, which is not zero."""
    folder = make_model(tmp_path / "model", "Llama")
    ids = random_ids(2, N_TOKENS // 2)
    exact = gradients_of_peft(folder, torch.float32, ids)
    assert exact.any()
    errors = {}
    for dtype in DTYPES:
        ours = error(gradients(folder, dtype, ids), exact)
        theirs = error(gradients_of_peft(folder, dtype, ids), exact)
        errors[dtype] = (ours, theirs)
    texts = [f"{name_of(dtype)} {ours:.1e} (peft {theirs:.1e})" for dtype, (ours, theirs) in errors.items()]
    say(f"LoRA gradients off from those of peft in float32 by {', '.join(texts)}")
    for ours, theirs in (errors[torch.bfloat16], errors[torch.float16]):
        assert ours < 1.5 * theirs
    assert errors[torch.float32][0] < 1e-5


def with_lora(folder: Path, dtype: torch.dtype, device: torch.device, quantize: Quantize | None = None) -> GPT:
    """What finetune/lora.py trains, with a B that is not zero."""
    model = build_model(Config.from_checkpoint(folder))
    quantize_linears(model, quantize)
    load_weights(model, folder, dtype, device)
    apply_lora(model, EVERYWHERE)
    mark_only_lora_as_trainable(model)
    for seed, param in enumerate(trained(model).values()):
        param.data.copy_(0.1 * random_tensor(*param.shape, seed=seed))
    return model


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: param for name, param in model.named_parameters() if param.requires_grad}


def gradients(folder: Path, dtype: torch.dtype, ids: torch.Tensor) -> torch.Tensor:
    """Ours, all in one vector, of records (B, L) that lie end to end."""
    model = with_lora(folder, dtype, DEVICE)
    idx, layout = Layout.end_to_end([(row, torch.ones(len(row))) for row in ids])
    model(idx.to(DEVICE), layout=layout.to(DEVICE)).backward()
    return torch.cat([param.grad.flatten() for param in trained(model).values()])


def gradients_of_peft(folder: Path, dtype: torch.dtype, ids: torch.Tensor) -> torch.Tensor:
    """The same of peft, of a row for each record."""
    from peft import LoraConfig, get_peft_model

    linears = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]
    config = LoraConfig(r=EVERYWHERE.r, lora_alpha=EVERYWHERE.alpha, target_modules=linears)
    model = get_peft_model(of_transformers(folder, dtype, DEVICE), config)

    # our A and B, by peft's names
    ours = with_lora(folder, torch.float32, torch.device("cpu"))
    params = []
    for name, value in trained(ours).items():
        param = model.get_parameter(f"base_model.model.{hf_name(name, ours.config)[0]}.default.weight")
        param.data.copy_(value.data)
        params.append(param)
    assert len(params) == len(trained(model))

    ids = ids.to(DEVICE)
    logits = model(ids).logits[:, :-1]
    F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="sum").backward()
    return torch.cat([param.grad.flatten() for param in params])


# ---- memory

SHORT = (16,) * 2 if IS_REHEARSAL else (512,) * 8
SMALLER = dict(n_layer=1, n_embd=256, intermediate_size=512, vocab_size=1000) if IS_REHEARSAL else dict(n_layer=8)
PLANS: list[tuple[str, Quantize | None, str]] = [
    ("meta-llama/Llama-3.2-1B", None, "none"),
    ("meta-llama/Llama-3.2-1B", None, "block"),
    ("meta-llama/Llama-3.2-1B", "bnb.nf4", "selective"),
    ("Qwen/Qwen3-0.6B", "bnb.nf4-dq", "none"),
    ("google/gemma-3-270m", None, "none"),
]


@pytest.mark.parametrize(("name", "kind", "how"), PLANS)
def test_a_step_takes_what_was_planned(name: str, kind: Quantize | None, how: str) -> None:
    """LoRA and QLoRA on the first blocks of published shapes. lit_gpt/memory/plan.py says what a plan cannot see."""
    config = Config.from_name(name, **SMALLER)
    setup = Setup(config, settings=LoRA(), quantize=kind, activation_checkpointing=how, lengths=SHORT)
    began = time.perf_counter()
    planned = plan(setup).gb
    seconds = time.perf_counter() - began

    # models of other tests stay in reference cycles until they are collected
    gc.collect()
    torch.cuda.empty_cache()
    found = peak_of_a_step(setup)
    say(
        f"{name}, {config.n_layer} blocks, {kind or 'bfloat16'}, activation checkpointing {how}: planned"
        f" {planned:.3g} GB in {seconds:.1f} s, took {found:.3g} GB"
    )
    assert found == pytest.approx(planned, rel=0.3)


def peak_of_a_step(setup: Setup) -> float:
    """The GB that a step takes at most. In a rehearsal the ledger of the plans watches real tensors."""
    before = torch.cuda.memory_allocated() if DEVICE.type == "cuda" else 0
    model = build_model(setup.config)
    quantize_linears(model, setup.quantize)
    fill_with_random(model, setup.dtype)
    adapted = adapt(model, setup)
    idx, layout = batch_of(setup.lengths)
    if DEVICE.type != "cuda":
        return watch_step(adapted, batch_of(setup.lengths), setup).gb

    # the second step has the optimizer's memory from its beginning
    optimizer = make_optimizer(adapted, TrainArgs())
    idx = idx.to(DEVICE)
    layout = layout.to(DEVICE)
    torch.cuda.reset_peak_memory_stats()
    for _ in range(2):
        loss = adapted(idx, layout=layout)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.isfinite()
    return (torch.cuda.max_memory_allocated() - before) / 1e9


@pytest.mark.parametrize("max_norm", [None, 0.1])
def test_the_optimizer_in_backward_trains_the_same_in_less_memory(max_norm: float | None) -> None:
    """Full fine-tuning where gradients weigh more than activations: few tokens, and a small vocabulary."""
    config = Config.from_name("meta-llama/Llama-3.2-1B", **SMALLER | {"vocab_size": 1000})
    setup = Setup(config, method="full", settings=Full(), lengths=(16,))
    after_gb, after = trained_fully(setup, max_norm)
    setup = replace(setup, optimizer_in_backward=True)
    gb, weights = trained_fully(setup, max_norm)
    errors = [error(weights[name], after[name]) for name in after]
    n_equal = sum(torch.equal(weights[name], after[name]) for name in after)
    say(
        f"optimizer in backward, max_norm {max_norm}: {gb:.3g} GB (planned {plan(setup).gb:.3g}), not {after_gb:.3g};"
        f" {n_equal} of {len(after)} weights equal to the bit, at most {max(errors):.1e} off"
    )
    assert max(errors) < 1e-3 and gb < 0.9 * after_gb
    assert gb == pytest.approx(plan(setup).gb, rel=0.3)


def trained_fully(setup: Setup, max_norm: float | None) -> tuple[float, dict[str, torch.Tensor]]:
    """The peak of two steps, in GB, and the weights after them. In a rehearsal the ledger watches a step of its own."""
    gc.collect()
    torch.manual_seed(0)
    before = torch.cuda.memory_allocated() if DEVICE.type == "cuda" else 0
    model = build_model(setup.config)
    fill_with_random(model, setup.dtype)
    model = adapt(model, setup)
    optimizer = make_optimizer(model, TrainArgs(learning_rate=0.01))
    in_backward = OptimizerInBackward(optimizer, max_norm) if setup.optimizer_in_backward else None
    fabric: Any = SimpleNamespace(device=DEVICE, backward=torch.Tensor.backward)  # what the second pass asks of it
    idx, layout = batch_of(setup.lengths)
    idx = idx.to(DEVICE)
    layout = layout.to(DEVICE)
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for _ in range(2):
        loss = model(idx, layout=layout) / layout.n_targets
        loss.backward()
        if in_backward is not None:
            in_backward.step(fabric, model, (idx, layout), layout.n_targets)
            continue
        if max_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        optimizer.step()
        optimizer.zero_grad()
    weights = {name: param.detach().cpu() for name, param in model.named_parameters()}
    if DEVICE.type == "cuda":
        return (torch.cuda.max_memory_allocated() - before) / 1e9, weights
    return peak_of_a_step(setup), weights


def fill_with_random(model: GPT, dtype: torch.dtype) -> None:
    """Random weights, made on the device; quantized linears compute their codes from them."""
    for name, shape in parameter_shapes(model.config).items():
        weight = torch.empty(shape, dtype=dtype, device=DEVICE)
        weight.normal_(mean=float(len(shape) == 1), std=0.02)
        replace_parameter(model, name, weight, dtype)
    if model.config.tie_embeddings:
        model.lm_head.weight = model.transformer.wte.weight
    model.to(DEVICE)


# ---- answers


@pytest.mark.parametrize("kind", [None, "bnb.nf4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recorded_passes_say_the_same(kind: Quantize | None, dtype: torch.dtype) -> None:
    """Answers that come and go, by one graph for a pass and without: the same tokens, with drafts and reused rows."""
    config = Config(
        name="answers", n_layer=2, n_head=4, n_query_groups=2, n_embd=128, intermediate_size=256, vocab_size=512,
        block_size=1024,
    )  # fmt: skip
    model = build_model(config)
    quantize_linears(model, kind)
    fill_with_random(model, dtype)
    model.eval()
    ids = random_ids(12, 40, below=512).tolist()
    requests = [Request(ids[i][: 10 + 2 * i], 60 + 40 * (i % 3)) for i in range(12)]
    said = []
    for is_recorded in (False, True):
        engine = Engine(model, max_batch=5, draft_tokens=10)
        (batch,) = engine.batches.values()
        batch.is_recorded = is_recorded
        said.append([answer.tokens for _ in range(2) for answer in engine.run(requests)])
        assert batch.is_recorded == is_recorded and bool(batch.recordings) == is_recorded
    same = sum(a == b for a, b in zip(*said, strict=True))
    say(f"recorded passes, {kind or name_of(dtype)}: {same} of {len(said[0])} answers the same")
    if dtype == torch.float32 and kind is None:
        assert same == len(said[0])
    else:  # of two tokens that are equally likely in half precision, another number of rows may prefer the other
        assert same >= len(said[0]) // 2


# ---- streamed blocks

WIDE = dict(n_embd=64, intermediate_size=96) if IS_REHEARSAL else dict(n_embd=2048, intermediate_size=5632)
STREAMED = Config(n_layer=6, n_head=8, n_query_groups=4, vocab_size=1000, block_size=4096, **WIDE)
# with few tokens the card waits for copies, which must not be read too soon; with many, copies wait for the card
TOKENS_OF_STREAMS = ((40, 25), (30,)) if IS_REHEARSAL else ((40, 25), (30,), (3000, 2000, 4000), (20, 11))


@pytest.mark.parametrize(("kind", "compiled"), [(None, False), ("bnb.nf4-dq", False), ("bnb.nf4-dq", True)])
def test_streamed_blocks_are_resident_ones(kind: Quantize | None, compiled: bool) -> None:
    """Losses and gradients of passes that follow each other, a validation and an answer; and memory and pinning."""
    if compiled and missing_for_compiling(DEVICE):
        pytest.skip(f"no {missing_for_compiling(DEVICE)}")
    found = {}
    peaks = {}
    for stream in (False, True):
        gc.collect()
        if DEVICE.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() if DEVICE.type == "cuda" else 0
        model = streamed_or_resident(kind, compiled, stream)
        if DEVICE.type == "cuda":
            torch.cuda.reset_peak_memory_stats()  # the streamed model was built on the card
        found[stream] = results_of_passes(model)
        synchronize()
        peaks[stream] = (torch.cuda.max_memory_allocated() - before) / 1e9 if DEVICE.type == "cuda" else 0.0
    blocks = stream_of(model)
    assert blocks is not None
    size = blocks.device_bytes / 2e9
    errors = [error(a, b) for a, b in zip(found[True], found[False], strict=True)]
    say(
        f"streamed {kind}, compiled {compiled}: off by {max(errors):.0e}; {peaks[True]:.2f} GB, resident"
        f" {peaks[False]:.2f} GB; a block is {size:.3f} GB, pinned {blocks.blocks[0].buffer.is_pinned()}"
    )
    # flash attention adds in any order in backward; another block's weights would be off by 1
    assert max(errors) < 3e-2
    if DEVICE.type == "cuda":
        assert all(block.buffer.is_pinned() for block in blocks.blocks)
        assert peaks[False] - peaks[True] > 0.8 * (STREAMED.n_layer - 2) * size
    else:
        assert max(errors) == 0


def streamed_or_resident(kind: Quantize | None, compiled: bool, stream: bool) -> GPT:
    """A model with LoRA, the same in every call, whose blocks are computed again in backward."""
    torch.manual_seed(0)
    model = build_model(STREAMED)
    quantize_linears(model, kind)
    for seed, (name, shape) in enumerate(parameter_shapes(STREAMED).items()):
        weight = 0.02 * random_tensor(*shape, seed=seed) + float(len(shape) == 1)
        replace_parameter(model, name, weight.to(DEVICE), torch.bfloat16)
    model.to(DEVICE)
    if compiled:
        torch._dynamo.reset()
        compile_blocks(model)
    # without the MLP, whose linears then keep views of their weights
    settings = LoRA(r=4, mlp=False)
    setup = Setup(STREAMED, settings=settings, activation_checkpointing="block", stream_blocks=stream)
    model = adapt(model, setup)
    for seed, param in enumerate(trained(model).values()):
        param.data.copy_(0.05 * random_tensor(*param.shape, seed=seed))
    return model.train()


def results_of_passes(model: GPT) -> list[torch.Tensor]:
    """Losses and gradients; the host never waits in between, so that the device lags behind as far as it can."""
    results = []
    for lengths in TOKENS_OF_STREAMS:
        layout = layout_of(lengths).to(DEVICE)
        idx = random_ids(1, layout.n_tokens).to(DEVICE)
        with torch.no_grad():
            results.append(model(idx, layout=layout))
        loss = model(idx, layout=layout)
        loss.backward()
        results.append(loss.detach())
        results += [param.grad.clone() for param in trained(model).values()]
    with torch.inference_mode():
        results.append(model(random_ids(1, 30).to(DEVICE)).clone())
    return results


# ---- processes: as much of them as one device can show


@pytest.mark.parametrize(("strategy", "kind"), [("ddp", "bnb.nf4"), ("fsdp", None), ("fsdp", "bnb.nf4")])
def test_a_step_of_one_process_in_a_group(
    strategy: str, kind: Quantize | None, tmp_path: Path, restored_environment: None, codes_can_be_split: str
) -> None:
    """LoRA with NCCL, or gloo, and a mesh of one: the gradients and the step are those without a group."""
    folder = make_model(tmp_path / "model", "Llama")
    alone = launch(1, "32-true")
    in_group = group_of_one(strategy)
    # in float64 they are the same; in bfloat16 a card adds in any order, and 1.2e-2 has been seen
    tolerances = {torch.float64: 1e-10, torch.bfloat16: 3e-2}
    errors = {}
    for dtype in tolerances:
        expected = one_step(alone, folder, dtype, kind)
        found = one_step(in_group, folder, dtype, kind)
        assert found.keys() == expected.keys()
        errors[dtype] = max(error(found[name], expected[name]) for name in expected)
    texts = [f"{name_of(dtype)} {errors[dtype]:.0e}" for dtype in tolerances]
    backend = torch.distributed.get_backend()
    patched = codes_can_be_split if (strategy, kind) == ("fsdp", "bnb.nf4") else ""
    base = kind or "weights in the dtype"
    say(f"{strategy} over {backend}, LoRA on {base}: gradients and weights off by {', '.join(texts)}{patched}")
    for dtype, tolerance in tolerances.items():
        assert errors[dtype] < tolerance, dtype


@pytest.fixture
def codes_can_be_split(monkeypatch: pytest.MonkeyPatch) -> str:
    """Lets `fully_shard` split 4-bit codes in torch 2.11, as it does in 2.13; says so if it was needed.

    It makes each slice a parameter with a gradient, which integers cannot have, and only then asks whether the
    parameter has one: https://github.com/pytorch/pytorch/issues/177844
    """
    from torch.distributed.fsdp._fully_shard import _fsdp_param

    if "requires_grad=param.requires_grad" in inspect.getsource(_fsdp_param.FSDPParam._init_sharded_param):
        return ""

    def parameter(data: torch.Tensor, requires_grad: bool = True) -> nn.Parameter:
        return nn.Parameter(data, requires_grad and data.is_floating_point())

    monkeypatch.setattr(_fsdp_param, "nn", SimpleNamespace(Module=nn.Module, Parameter=parameter))
    monkeypatch.setattr(lit_gpt.sharding, "check_codes_can_be_split", lambda model: None)
    return "; torch had to be patched"


@pytest.fixture
def restored_environment() -> Iterator[None]:
    """Takes back what Fabric does to this process when it makes a group: scripts would take it for theirs."""
    before = dict(os.environ)
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    for name in os.environ.keys() - before.keys():
        del os.environ[name]


def group_of_one(strategy: str) -> Any:
    """The Fabric of `launch` with several devices, but for their number: of one, `launch` makes no group."""
    from lightning_fabric import Fabric
    from lightning_fabric.strategies import ModelParallelStrategy

    split = ModelParallelStrategy(shard_weights, data_parallel_size=1, tensor_parallel_size=1)
    fabric = Fabric(
        accelerator=DEVICE.type,
        devices=1,
        strategy=split if strategy == "fsdp" else "ddp",
        plugins=[precision_plugin("32-true", DEVICE.type)],
    )
    fabric.launch()
    return fabric


def one_step(fabric: Any, folder: Path, dtype: torch.dtype, kind: Quantize | None) -> dict[str, torch.Tensor]:
    """Gradients and trained weights of a step as `train.fit` takes it. Weights are read to the host, as for fsdp."""
    model = with_lora(folder, torch.bfloat16, torch.device("cpu"), kind)
    if dtype == torch.float64:
        model = model.double()
    wrapped = fabric.setup_module(model)
    assert all(hasattr(param, "device_mesh") == is_sharded(fabric) for param in model.parameters())
    optimizer = fabric.setup_optimizers(make_optimizer(wrapped, TrainArgs()))
    layout = layout_of((40, 25, 31), prefix=10)
    idx = random_ids(1, layout.n_tokens).to(fabric.device)
    loss = wrapped(idx, layout=layout.to(fabric.device)) / layout.n_targets
    fabric.backward(loss)
    found = {f"gradient of {name}": full_tensor(param.grad).clone() for name, param in trained(model).items()}
    clip_gradient(fabric, wrapped, optimizer, 1.0)
    optimizer.step()
    return found | {name: full_tensor(param).clone() for name, param in trained(model).items()}


# ---- whole runs

TIMEOUT = 400 if IS_REHEARSAL else 150  # seconds; compiling takes longer than all the rest
COMMON = "--n_answers 1 --train.learning_rate 0.02 --train.warmup_steps 1 --train.global_batch_size 4 --train.epochs 2"
CLASSIFIERS = ("last_k", "lora", "qlora")
RUNS = {  # the name of a run -> its script, and flags besides those in COMMON; a GPU compiles by default
    "LoRA bf16-true": "finetune/lora.py --precision bf16-true",
    "QLoRA nf4": "finetune/lora.py --precision bf16-true --quantize bnb.nf4 --compile false",
    "LoRA 16-true": "finetune/lora.py --precision 16-true --compile false",
    "full bf16-mixed": "finetune/full.py --precision bf16-mixed",
    "QLoRA, blocks streamed": (
        "finetune/lora.py --precision bf16-true --quantize bnb.nf4-dq --stream_blocks true --compile false"
    ),
    "LoRA, blocks computed again": "finetune/lora.py --activation_checkpointing block --compile false",
    "adapter v2": "finetune/adapter_v2.py --adapter.start_layer 1 --compile false",
    "LoRA, experts": "finetune/lora.py --precision bf16-true",
    "LoRA, paged optimizer": "finetune/lora.py --optimizer bitsandbytes.optim.PagedAdamW8bit --compile false",
    "LoRA compiled": "finetune/lora.py --precision bf16-true --compile true --n_answers 0",
}


class Runs:
    """The scripts of RUNS, each in a process, side by side; their folders, and what is done with their weights."""

    def __init__(self, tiny_dir: Path, experts_dir: Path, data_dir: Path, out_dir: Path) -> None:
        self.tiny_dir = tiny_dir
        self.experts_dir = experts_dir
        self.data_dir = data_dir
        self.out_dir = out_dir
        self.pool = ThreadPoolExecutor(os.cpu_count())
        self.env = environment()
        self.futures: dict[str, Future[str]] = {name: self.pool.submit(self.train, name) for name in RUNS}
        for method in CLASSIFIERS:
            self.futures[f"classifier, {method}"] = self.pool.submit(self.train_classifier, method)
        self.futures["answer"] = self.pool.submit(self.answer)
        self.futures["chat"] = self.pool.submit(self.chat)

    def train(self, name: str) -> str:
        checkpoint_dir = self.experts_dir if "experts" in name else self.tiny_dir
        folders = ["--checkpoint_dir", checkpoint_dir, "--data_dir", self.data_dir, "--out_dir", self.out_dir / name]
        script, *flags = RUNS[name].split()
        return self.python([script, *COMMON.split(), *flags, *folders])

    def train_classifier(self, method: str) -> str:
        """What generate/classify.py makes of two texts with a classifier, after it has been trained."""
        out_dir = self.out_dir / f"classifier, {method}"
        folders = ["--checkpoint_dir", self.tiny_dir, "--out_dir", out_dir, "--data_path", write_texts(out_dir)]
        flags = ["--method", method, "--train.epochs", "2", "--compile", "false"]
        self.python(["finetune/classifier.py", *flags, *folders])
        return self.python(["generate/classify.py", "--finetuned", out_dir], stdin="up up up up\ndown down down\n")

    def answer(self) -> str:
        """What generate/base.py says with the weights of a run, when that is over."""
        self.futures["LoRA bf16-true"].result()
        prompt = ["--prompt", "What does str.upper do?", "--max_new_tokens", "30"]
        return self.python(["generate/base.py", "--finetuned", self.out_dir / "LoRA bf16-true", *prompt])

    def chat(self) -> str:
        """What generate/chat.py says to two questions."""
        self.futures["QLoRA nf4"].result()
        command = ["generate/chat.py", "--finetuned", self.out_dir / "QLoRA nf4", "--max_new_tokens", "30"]
        return self.python(command, stdin="What does str.upper do?\nAnd str.lower?\n")

    def python(self, command: list[Any], stdin: str = "") -> str:
        """Runs a script, and returns what it prints on stdout and stderr."""
        argv = [sys.executable, *map(str, command)]
        result = subprocess.run(
            argv, cwd=ROOT, env=self.env, input=stdin, capture_output=True, text=True, timeout=TIMEOUT
        )
        assert result.returncode == 0, result.stderr[-3000:]
        return result.stdout + result.stderr


def write_texts(folder: Path) -> Path:
    """60 texts of up or down, with that as their label."""
    folder = folder.with_name(f"{folder.name} texts")
    folder.mkdir()
    lines = ["text,label"]
    for i in range(60):
        word = ("up", "down")[i % 2]
        lines.append(f"{' '.join([word] * (3 + i // 2))},{word}")
    path = folder / "texts.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


def environment() -> dict[str, str]:
    """The environment of a script."""
    return os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
        "TORCH_CUDNN_SDPA_DEPRIORITIZED": "1",  # see `without_plans_of_cudnn`
    }


@pytest.fixture(scope="module")
def tiny_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with a tokenizer of 300 tokens."""
    folder = tmp_path_factory.mktemp("tiny") / "checkpoint"
    sizes = dict(hidden_size=64, intermediate_size=128, num_attention_heads=4, max_position_embeddings=512)
    make_checkpoint(folder, vocab_size=300, bos_token_id=0, eos_token_id=1, **sizes)
    return write(folder, tokenizer_json=byte_level(), tokenizer_config_json=SPECIAL)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory, tiny_dir: Path) -> Path:
    with quietly():
        return write_data(tmp_path_factory.mktemp("data") / "str", tiny_dir)


@pytest.fixture(scope="module")
def experts_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Mixtral with the same tokenizer."""
    from transformers import MixtralConfig, MixtralForCausalLM

    folder = tmp_path_factory.mktemp("experts") / "checkpoint"
    sizes = dict(hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2)
    experts = dict(num_local_experts=4, num_experts_per_tok=2, num_hidden_layers=2, max_position_embeddings=512)
    torch.manual_seed(0)
    config = MixtralConfig(vocab_size=300, bos_token_id=0, eos_token_id=1, **sizes, **experts)
    MixtralForCausalLM(config).save_pretrained(folder)
    return write(folder, tokenizer_json=byte_level(), tokenizer_config_json=SPECIAL)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_dir: Path, experts_dir: Path, data_dir: Path) -> Iterator[Runs]:
    runs = Runs(tiny_dir, experts_dir, data_dir, tmp_path_factory.mktemp("runs"))
    yield runs
    runs.pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("name", [name for name in RUNS if name != "LoRA compiled"])
def test_a_run_learns(name: str, runs: Runs) -> None:
    runs.futures[name].result()
    assert fall_of_loss(name, runs.out_dir / name) > 0.1


def fall_of_loss(name: str, out_dir: Path) -> float:
    """By how much the validation loss of a run fell; says it, and what else metrics.csv has."""
    rows = read_metrics(out_dir / "metrics.csv")
    losses = [row["val_loss"] for row in rows if row["val_loss"] is not None]
    steps = [row for row in rows if row["loss"] is not None]
    later = steps[len(steps) // 2 :]
    speed = sum(row["tokens"] for row in later) / sum(row["seconds"] for row in later)
    peak = max(row["memory_gb"] for row in steps)
    say(
        f"{name}: first step's loss {steps[0]['loss']:.4f}, validation {losses[0]:.4f} -> {losses[-1]:.4f} in"
        f" {len(steps)} steps, {speed:,.0f} tokens/s, peak {peak:.2f} GB"
    )
    return losses[0] - losses[-1]


def test_a_run_is_used(runs: Runs) -> None:
    """generate/base.py --finetuned"""
    *_, last_line = runs.futures["answer"].result().strip().splitlines()
    say(f"generate: {last_line}")
    assert "tokens/s" in last_line


def test_a_chat(runs: Runs) -> None:
    """generate/chat.py --finetuned, with quantized weights and two questions."""
    said = runs.futures["chat"].result()
    say(f"chat: {len(said)} characters in answer to two questions")
    assert said.strip()


@pytest.mark.parametrize("method", CLASSIFIERS)
def test_a_classifier(method: str, runs: Runs) -> None:
    """finetune/classifier.py, then generate/classify.py."""
    said = runs.futures[f"classifier, {method}"].result()
    say(f"classifier, {method}: {said.strip().splitlines()[-1]}")
    assert "up" in said and "down" in said


class Stopped(Exception):
    """Ends a run from outside."""


def test_a_run_goes_on_where_it_stopped(
    tiny_dir: Path, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Six steps; three and three; and six again, which says how much a run repeats itself: kernels add in any order."""

    def run(name: str, **flags: Any) -> dict[str, torch.Tensor]:
        train = TrainArgs(learning_rate=0.02, warmup_steps=1, global_batch_size=4, max_steps=6, save_interval=3)
        folders = {"checkpoint_dir": tiny_dir, "data_dir": data_dir, "out_dir": tmp_path / name}
        with quietly():
            lora_script.main(**folders, train=train, precision="bf16-true", n_answers=0, **flags)
        return load_file(tmp_path / name / "last/lora.safetensors")

    whole = run("whole")
    again = run("again")
    save_progress = lit_gpt.train.save_progress

    def save_and_stop(*args: Any, **kwargs: Any) -> None:
        save_progress(*args, **kwargs)
        raise Stopped

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(lit_gpt.train, "save_progress", save_and_stop)
        run("resumed")
    assert len([row for row in read_metrics(tmp_path / "resumed/metrics.csv") if row["loss"] is not None]) == 3
    resumed = run("resumed", resume=True)

    noise = largest_difference(whole, again)
    difference = largest_difference(whole, resumed)
    moved = max(tensor.abs().max().item() for name, tensor in whole.items() if name.endswith("lora_B"))
    say(f"resumed after 3 of 6 steps: {difference:.1e} off, a second whole run {noise:.1e}; B is up to {moved:.2f}")
    assert difference <= 10 * noise + 1e-3


def largest_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys() and all(map(lora_filter, a))
    return max((a[name] - b[name]).abs().max().item() for name in a)


# ---- the sample model, where it is


@pytest.fixture(scope="module")
def docstrings(tmp_path_factory: pytest.TempPathFactory, sample_dir: Path) -> Path:
    data_dir = tmp_path_factory.mktemp("data") / "docstrings"
    command = [sys.executable, ROOT / "scripts/prepare_docstrings.py"]
    command += ["--checkpoint_dir", sample_dir, "--data_dir", data_dir]
    subprocess.run(command, check=True, capture_output=True, env=environment())
    return data_dir


@needs_cuda
@pytest.mark.parametrize("devices", [1, 2])
def test_lora_learns(sample_dir: Path, docstrings: Path, tmp_path: Path, devices: int) -> None:
    """All precisions side by side, so that the tokens/s say little."""
    if devices > torch.cuda.device_count():
        pytest.skip(f"{devices} GPUs")
    processes = {}
    for precision in ("bf16-true", "bf16-mixed", "16-true", "16-mixed", "32-true"):
        command = [sys.executable, ROOT / "finetune/lora.py", "--checkpoint_dir", sample_dir, "--data_dir", docstrings]
        command += ["--out_dir", tmp_path / precision, "--precision", precision, "--devices", devices]
        command += ["--n_answers", 1, "--train.max_steps", 30, "--train.learning_rate", 2e-3]
        argv = list(map(str, command))
        with (tmp_path / f"{precision}.txt").open("w") as file:
            processes[precision] = subprocess.Popen(argv, env=environment(), stdout=file, stderr=file)
    for process in processes.values():
        process.wait()
    falls = []
    for precision, process in processes.items():
        assert process.returncode == 0, (tmp_path / f"{precision}.txt").read_text()[-3000:]
        falls.append(fall_of_loss(f"LoRA {precision}, {devices} GPU, sample", tmp_path / precision))
    assert min(falls) > 0.5


# ---- last, since it may have to wait


def test_a_compiled_run_learns(runs: Runs) -> None:
    """Triton, and the C++ of a CPU, are compiled with the compiler and the headers of the machine."""
    if shutil.which("gcc") is None and shutil.which("clang") is None and "CC" not in os.environ:
        pytest.skip("no C compiler")
    if DEVICE.type == "cuda" and not Path(sysconfig.get_path("include"), "Python.h").is_file():
        pytest.skip("no headers of Python")
    try:
        runs.futures["LoRA compiled"].result()
    except subprocess.TimeoutExpired:
        pytest.skip(f"not done in {TIMEOUT} s")
    assert fall_of_loss("LoRA compiled", runs.out_dir / "LoRA compiled") > 0.1
