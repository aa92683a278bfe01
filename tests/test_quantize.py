"""Quantized linears and QLoRA, on tiny models and a CPU: `pytest tests/test_quantize.py`, about 1 min

Two processes, and one whose memory is watched, are this file itself, run as a script.
"""

import copy
import json
import os
import subprocess
import sys
import threading
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from conftest import make_tiny
from helpers.runs import column, equal, error, write_data
from helpers.scripts import lora, script
from helpers.shell import torchrun
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.checkpoint import checkpoint

import lit_gpt.quantize
from lit_gpt import Config, InputError
from lit_gpt.checkpoint.load import build_model, load_model, load_weights
from lit_gpt.checkpoint.weight_files import read_metadata
from lit_gpt.data.dataset import Dataset, micro_batches
from lit_gpt.distributed import launch
from lit_gpt.lora import LoRA, LoRALinear, apply_lora, mark_only_lora_as_trainable, merge_lora_weights
from lit_gpt.make_optimizer import make_optimizer
from lit_gpt.model.gpt import GPT
from lit_gpt.quantize import Quantize, QuantizedLinear, quantization, quantize_linears
from lit_gpt.runs.header import read_header
from lit_gpt.runs.load_finetuned import load_finetuned
from lit_gpt.train import TrainArgs

KINDS = get_args(Quantize)
BITS = {"bnb.nf4": 4.5, "bnb.nf4-dq": 4.13, "bnb.fp4": 4.5, "bnb.fp4-dq": 4.13, "bnb.int8": 8.03}  # of 1,000 x 1,024
SHAPES = [(64, 128), (48, 48), (7, 66), (3, 2), (40, 576)]  # (out, in): whole blocks in a row, and not
ALL = LoRA(r=4, alpha=8, query=True, key=True, value=True, projection=True, mlp=True, head=True)
SHORT = TrainArgs(learning_rate=0.01, global_batch_size=8, micro_batch_size=4, epochs=2, max_steps=8, warmup_steps=1)
each_kind = pytest.mark.parametrize("kind", KINDS)


def quantized(linear: nn.Linear, kind: Quantize) -> QuantizedLinear:
    holder = nn.ModuleDict({"linear": copy.deepcopy(linear)})
    assert quantize_linears(holder, kind) == ["linear"]
    return holder["linear"]


def make_linear(out_features: int, in_features: int, dtype: torch.dtype, bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(in_features, out_features, bias).to(dtype).requires_grad_(False)


def reference(linear: nn.Linear, kind: Quantize) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """The layer of bitsandbytes with the same weight, its codes and its scales."""
    from bitsandbytes import nn as bnb

    size = linear.in_features, linear.out_features
    if kind == "bnb.int8":
        layer = bnb.Linear8bitLt(*size, bias=True, has_fp16_weights=False)
        layer.weight = bnb.Int8Params(linear.weight.clone(), requires_grad=False, has_fp16_weights=False)
    else:
        options = dict(compress_statistics=kind.endswith("-dq"), quant_type=kind[4:7])
        layer = bnb.Linear4bit(*size, bias=True, compute_dtype=linear.weight.dtype, **options)
        layer.weight = bnb.Params4bit(linear.weight.clone(), requires_grad=False, **options)
    layer.bias = linear.bias
    layer = layer.to("cpu")
    return layer, layer.weight.data, layer.weight.SCB if kind == "bnb.int8" else layer.weight.quant_state.absmax


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory, tiny_dir: Path) -> Path:
    return write_data(tmp_path_factory.mktemp("data") / "str", tiny_dir)


# ---- one linear


@each_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_codes_outputs_and_gradients_are_those_of_bitsandbytes(shape, dtype: torch.dtype, kind: Quantize) -> None:
    linear = make_linear(*shape, dtype)
    ours, (theirs, codes, scales) = quantized(linear, kind), reference(linear, kind)
    assert torch.equal(ours.codes.flatten(), codes.flatten()) and torch.equal(ours.scales.flatten(), scales.flatten())
    for size in (2, 5), (1, 1):
        inputs = [torch.randn(*size, shape[1], generator=torch.manual_seed(1)).to(dtype) for _ in range(2)]
        found = []
        for layer, x in zip((ours, theirs), inputs):
            y = layer(x.requires_grad_())
            y.backward(torch.ones_like(y))
            with torch.no_grad():
                found.append((y, x.grad, layer(x)))
        for our, their in zip(*found):
            assert torch.equal(our, their) and our.dtype == dtype


@each_kind
def test_a_part_at_a_time_gives_the_same_codes(kind: Quantize, monkeypatch) -> None:
    """Of 3,000 values in parts of 128, or two rows each: the last one is short."""
    linear = make_linear(50, 60, torch.float32)
    whole = quantized(linear, kind).state_dict()
    monkeypatch.setattr(lit_gpt.quantize, "VALUES_AT_ONCE", 128)
    assert equal(quantized(linear, kind).state_dict(), whole)
    assert quantized(make_linear(1, 2, torch.float32), kind).dequantize().shape == (1, 2), "a single byte, with 4 bits"


@each_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_it_computes_as_the_dequantized_linear(kind: Quantize, dtype: torch.dtype) -> None:
    """Forward and backward, a bias that is trained included; and nothing but the codes is kept for backward."""
    ours = quantized(make_linear(24, 192, torch.float32), kind)
    plain = ours.dequantized(dtype)
    assert type(plain) is nn.Linear and plain.weight.dtype == dtype
    near = {torch.bfloat16: 1e-2, torch.float32: 1e-6, torch.float64: 1e-12}
    found, saved = [], {}
    ours.bias.requires_grad_()
    for layer in ours, plain:
        x = torch.randn(2, 3, 192, generator=torch.manual_seed(1)).to(dtype).requires_grad_()
        plain.bias = nn.Parameter(ours.bias.detach().to(dtype))
        saved[layer] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=saved[layer]: kept.append(t) or t, lambda t: t):
            y = layer(x)
        if layer is ours:
            assert {t.data_ptr() for t in saved[ours]} == {t.data_ptr() for t in ours.tensors() if t is not None}
        (y**2).sum().backward()
        found.append((y, x.grad, layer.bias.grad))
    assert [t.numel() for t in saved[plain]] == [24 * 192], "a plain linear does keep its weight"
    for our, their in zip(*found):
        assert (our - their).abs().max() <= near[our.dtype] * their.abs().max()


@each_kind
@pytest.mark.parametrize("bias", [True, False])
def test_lora_adds_to_what_it_computes(bias: bool, kind: Quantize) -> None:
    """In place, also where a bias has been added: Qwen2, GPT-2, Phi and Falcon have them."""
    ours = quantized(make_linear(24, 192, torch.float32, bias), kind)
    found = []
    for layer in ours, ours.dequantized():
        torch.manual_seed(0)
        layer = LoRALinear(layer, r=4, scaling=2.0)
        nn.init.normal_(layer.lora_B)
        x = torch.randn(2, 3, 192, generator=torch.manual_seed(1)).requires_grad_()
        y = layer(x)
        (y**2).sum().backward()
        found.append((y, x.grad, layer.lora_A.grad, layer.lora_B.grad))
    for our, their in zip(*found):
        assert (our - their).abs().max() <= 1e-6 * their.abs().max()


@each_kind
def test_it_is_as_small_as_it_says(kind: Quantize) -> None:
    linear = make_linear(1000, 1024, torch.float32, bias=False)
    layer = quantized(linear, kind)
    bits = 8 * sum(param.nbytes for param in layer.parameters()) / linear.weight.numel()
    assert bits == pytest.approx(BITS[kind], abs=0.01 + 0.01 * ("dq" in kind))
    assert not any(param.requires_grad for param in layer.parameters()) and not list(layer.buffers())
    lost = (layer.dequantize() - linear.weight).norm() / linear.weight.norm()
    assert lost < (0.01 if kind == "bnb.int8" else 0.15)


def test_mixed_precision_computes_in_bfloat16(monkeypatch) -> None:
    """The kernels are handed bfloat16: those of CUDA compute in whatever they get."""
    kernel, seen = lit_gpt.quantize.multiply, []
    monkeypatch.setattr(lit_gpt.quantize, "multiply", lambda x, *a: seen.append(x.dtype) or kernel(x, *a))
    for kind in ("bnb.nf4", "bnb.int8"):
        layer = quantized(make_linear(8, 64, torch.float32), kind)
        x = torch.randn(3, 64)
        with torch.autocast("cpu", torch.bfloat16):
            y, like = layer(x), layer.dequantized()(x)
        assert y.dtype == like.dtype == torch.bfloat16 and torch.allclose(y, like, rtol=0.02, atol=0.02)
    assert seen == [torch.bfloat16] * 2


def test_what_cannot_be_quantized_is_refused(monkeypatch) -> None:
    with pytest.raises(InputError, match="linear has 33 inputs, and bnb.nf4 packs them in pairs. Use bnb.int8"):
        quantized(make_linear(4, 33, torch.float32), "bnb.nf4")
    quantized(make_linear(4, 33, torch.float32), "bnb.int8")
    large = make_linear(4, 32, torch.float32)
    large.weight[1, 2] = 1e6
    with pytest.raises(InputError, match="float16, which some of these exceed. Use bnb.nf4"):
        quantized(large, "bnb.int8")
    assert torch.isclose(quantized(large, "bnb.nf4").dequantize()[1, 2], torch.tensor(1e6))
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(InputError, match="pip install 'bitsandbytes"):
        quantized(large, "bnb.nf4")


# ---- a model


@each_kind
def test_a_checkpoint_is_quantized_as_it_is_read(kind: Quantize, tiny_dir: Path) -> None:
    """From its own values, whatever the rest is loaded in; the base stays the same base."""
    plain, model = build_model(Config.from_checkpoint(tiny_dir)), build_model(Config.from_checkpoint(tiny_dir))
    names = quantize_linears(model, kind)
    assert len(names) == 2 * 7 and all(param.is_meta for param in model.parameters())
    assert load_weights(plain, tiny_dir) == load_weights(model, tiny_dir, torch.bfloat16)
    assert quantization(model) == kind and quantization(plain) is None
    for name in names:
        expected = quantized(plain.get_submodule(name), kind)
        assert equal(model.get_submodule(name).state_dict(), expected.state_dict()), "of float32, not of bfloat16"
    others = {n: p.dtype for n, p in model.named_parameters() if not n.startswith(tuple(names))}
    assert len(others) == 7 and set(others.values()) == {torch.bfloat16}, "embedding, head and 5 norms"


def test_routers_stay_as_they_are() -> None:
    block = nn.ModuleDict({"gate": nn.Linear(8, 4), "experts": nn.ModuleList([nn.Linear(8, 8)])})
    model = nn.ModuleDict({"mlp": block, "lm_head": nn.Linear(8, 8)})
    assert quantize_linears(model, "bnb.nf4") == ["mlp.experts.0"]


def test_a_file_that_does_not_fit_is_still_refused(tiny_dir, tmp_path) -> None:
    (tmp_path / "config.json").write_text((tiny_dir / "config.json").read_text())
    tensors = load_file(tiny_dir / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    save_file(tensors | {name: tensors[name][:, :-2].contiguous()}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"q_proj.weight has shape \[48, 46\], the config says \[48, 48\]"):
        load_model(tmp_path, quantize="bnb.nf4")


@each_kind
def test_saved_and_reloaded(kind: Quantize, tiny_dir, tmp_path) -> None:
    model = load_model(tiny_dir, quantize=kind)
    save_file(model.state_dict(), tmp_path / "state.safetensors")
    again = build_model(model.config)
    quantize_linears(again, kind)
    again.load_state_dict(load_file(tmp_path / "state.safetensors"), assign=True)
    idx = torch.arange(20)[None]
    assert equal(model.state_dict(), again.state_dict()) and torch.equal(model(idx), again(idx))


def qlora(tiny_dir: Path, kind: Quantize, dtype: torch.dtype | None = None) -> GPT:
    """What finetune/lora.py --quantize trains, with a B that is not zero."""
    model = build_model(Config.from_checkpoint(tiny_dir))
    quantize_linears(model, kind)
    load_weights(model, tiny_dir, dtype)
    torch.manual_seed(0)
    apply_lora(model, ALL)
    mark_only_lora_as_trainable(model)
    for name, param in model.named_parameters():
        if name.endswith("lora_B"):
            nn.init.normal_(param, std=0.1)
    return model


def gradients(model: nn.Module, data: Dataset, size: int, rank: int = 0, ranks: int = 1, share: bool = False) -> dict:
    """Of the summed loss of all records, `size` at a time."""
    for idx, layout in micro_batches(data, list(range(len(data))), size, rank, ranks, share):
        model(idx, layout=layout).backward()
    return {name: param.grad for name, param in model.named_parameters() if param.requires_grad}


@pytest.mark.parametrize("kind", ["bnb.nf4-dq", "bnb.int8"])
def test_gradient_does_not_depend_on_micro_batches(kind: Quantize, tiny_dir, data_dir) -> None:
    """4 x 1, 2 x 2 and 1 x 4 records, with shared prefixes, with blocks computed again in backward.

    And it is that of the dequantized model.
    """
    data = four(data_dir)
    expected = gradients(qlora(tiny_dir, kind).double(), data, 1)
    ((_, layout),) = micro_batches(data, [0, 1, 2, 3], 4, 0, 1, True)
    assert any(segment.prefix_length for segment in layout.segments)
    for size, share in ((2, False), (4, False), (4, True), (2, True)):
        assert error(gradients(qlora(tiny_dir, kind).double(), data, size, share=share), expected) < 1e-10
    recomputed = qlora(tiny_dir, kind).double()
    for block in recomputed.transformer.h:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    assert error(gradients(recomputed, data, 2), expected) < 1e-10
    plain = qlora(tiny_dir, kind)
    for module in plain.modules():
        if isinstance(module, LoRALinear) and isinstance(module.linear, QuantizedLinear):
            module.linear = module.linear.dequantized()
    assert error(gradients(plain.double(), data, 4), expected) < 1e-6, "int8 weights are made in float32 there"


def four(data_dir: Path) -> Dataset:
    data = Dataset(data_dir, "train")
    data.records = data.records[:4]
    assert len({data.length(i) for i in range(4)}) > 2
    return data


@each_kind
def test_merging_leaves_plain_linears(kind: Quantize, tiny_dir) -> None:
    model, idx = qlora(tiny_dir, kind), torch.arange(20)[None]
    with torch.no_grad():
        before = model(idx)
        assert len(merge_lora_weights(model)) == 15
        assert (model(idx) - before).abs().max() < 1e-4 * before.abs().max()
    assert quantization(model) is None and {type(model.transformer.h[1].mlp.fc_1), type(model.lm_head)} == {nn.Linear}
    assert {param.dtype for param in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("kind", ["bnb.nf4-dq", "bnb.int8"])
def test_setup_keeps_every_dtype(kind: Quantize, tiny_dir) -> None:
    fabric = launch(1, "bf16-true")
    model = qlora(tiny_dir, kind, torch.bfloat16)
    fabric.setup(model, make_optimizer(model, SHORT))
    found = {name: tensor.dtype for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    dtypes = {"codes": torch.int8 if kind == "bnb.int8" else torch.uint8, "weight": torch.bfloat16}
    dtypes["scales"] = torch.float32 if kind == "bnb.int8" else torch.uint8
    for name, dtype in found.items():
        assert dtype == dtypes.get(name.rpartition(".")[2], torch.float32), name
    assert sum(name.endswith("codes") for name in found) == 14 and sum("lora_" in name for name in found) == 30


# ---- the scripts


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory, tiny_dir, data_dir) -> Path:
    out_dir = tmp_path_factory.mktemp("out") / "qlora"
    settings = dict(lora=replace(ALL, head=False), quantize="bnb.nf4", train=SHORT, n_answers=1)
    lora.main(out_dir=out_dir, checkpoint_dir=tiny_dir, data_dir=data_dir, **settings)
    return out_dir


def test_qlora_learns(run_dir: Path, tiny_dir: Path) -> None:
    losses = column(run_dir, "loss")
    assert len(losses) == 8 and losses[-1] < losses[0] - 0.5
    assert "quantize: bnb.nf4" in (run_dir / "hyperparameters.yaml").read_text()
    model, description = load_finetuned(None, run_dir)
    assert quantization(model) == description.quantize == "bnb.nf4"
    base = load_model(tiny_dir, quantize="bnb.nf4").state_dict()
    found = {key.replace(".linear.", "."): value for key, value in model.state_dict().items() if "lora_" not in key}
    assert equal(found, base)


def test_only_lora_moves(tiny_dir, data_dir) -> None:
    model = qlora(tiny_dir, "bnb.fp4-dq", torch.bfloat16)
    before = copy.deepcopy(model.state_dict())
    optimizer = make_optimizer(model, SHORT)
    gradients(model, four(data_dir), 4)
    optimizer.step()
    moved = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert moved == {key for key in before if "lora_" in key}


def test_another_base_is_said(run_dir: Path, capsys) -> None:
    load_finetuned(None, run_dir)
    assert capsys.readouterr().err == ""
    model, _ = load_finetuned(None, run_dir, quantize="none")
    assert quantization(model) is None
    assert "trained on weights in bnb.nf4, here it is used on the original weights" in capsys.readouterr().err
    script("generate/base.py").main("What does str.upper do?", finetuned=run_dir, quantize="bnb.int8", max_new_tokens=3)
    assert "trained on weights in bnb.nf4, here it is used on weights in bnb.int8" in capsys.readouterr().err


def test_a_run_goes_on_as_if_it_had_not_stopped(run_dir, tiny_dir, data_dir, tmp_path) -> None:
    """With its own quantization, that is."""
    settings = dict(lora=replace(ALL, head=False), n_answers=1, checkpoint_dir=tiny_dir, data_dir=data_dir)
    lora.main(out_dir=tmp_path, quantize="bnb.nf4", train=replace(SHORT, max_hours=1e-9), **settings)  # a step
    lora.main(out_dir=tmp_path, quantize="bnb.nf4", resume=True, train=SHORT, **settings)
    assert len(column(tmp_path, "loss")) == 8
    assert equal(*(load_file(folder / "last/lora.safetensors") for folder in (run_dir, tmp_path)))
    with pytest.raises(InputError, match="quantize was bnb.nf4, now None"):
        lora.main(out_dir=run_dir, resume=True, train=SHORT, **settings)


def test_files_of_before_there_was_quantization_load(run_dir, tmp_path) -> None:
    header = json.loads(read_metadata(run_dir / "best/lora.safetensors")["lit_gpt"])
    assert header.pop("quantize") == "bnb.nf4"
    save_file(
        load_file(run_dir / "best/lora.safetensors"), tmp_path / "lora.safetensors", {"lit_gpt": json.dumps(header)}
    )
    assert read_header(tmp_path).quantize is None


def test_merging_takes_the_original_weights(run_dir, tiny_dir, tmp_path) -> None:
    """The change that was learned, to the values that were not rounded."""
    script("scripts/merge_lora.py").main(run_dir, tmp_path / "merged", base="original")
    model, _ = load_finetuned(None, run_dir, quantize="none")
    idx = torch.arange(20)[None]
    assert torch.allclose(load_model(tmp_path / "merged")(idx), model(idx), atol=1e-4)


# ---- other processes


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory, tiny_dir: Path, data_dir: Path) -> list[dict[str, Any]]:
    out_dir = tmp_path_factory.mktemp("ranks")
    torchrun(__file__, "ranks", tiny_dir, data_dir, out_dir)
    return [torch.load(out_dir / f"{rank}.pt", weights_only=True) for rank in range(2)]


def one_of_two_ranks(tiny_dir: Path, data_dir: Path, out_dir: Path) -> None:
    """Sharded by rows, or replicated: the gradients, and what is gathered again."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.fsdp import fully_shard

    fabric, found = launch(2, "32-true"), {}
    for kind in ("bnb.nf4", "bnb.nf4-dq", "bnb.int8"):
        sharded, replicated = qlora(tiny_dir, kind), qlora(tiny_dir, kind)
        for block in sharded.transformer.h:
            fully_shard(block)
        fully_shard(sharded)
        shard = sharded.transformer.h[0].attn.q.linear.codes
        assert shard.to_local().shape[0] == shard.shape[0] // 2 == 24, "half of the rows"
        shared = torch.nn.parallel.DistributedDataParallel(replicated)
        for name, model in (("sharded", sharded), ("replicated", shared)):
            grads = gradients(model, four(data_dir), 2, fabric.global_rank, 2)
            grads = {k.removeprefix("module."): getattr(g, "full_tensor", lambda g=g: g)() for k, g in grads.items()}
            found[f"{kind} {name}"] = {key: 2 * grad for key, grad in grads.items()}  # both take the mean of the ranks
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        found[f"{kind} gathered"] = get_model_state_dict(sharded, options=options)
    torch.save(found, out_dir / f"{fabric.global_rank}.pt")


@pytest.mark.parametrize("kind", ["bnb.nf4", "bnb.nf4-dq", "bnb.int8"])
def test_two_processes(kind: Quantize, two_ranks, tiny_dir, data_dir) -> None:
    model = qlora(tiny_dir, kind)
    expected = gradients(model, four(data_dir), 4)
    for rank in two_ranks:
        assert error(rank[f"{kind} sharded"], expected) < 1e-5 and error(rank[f"{kind} replicated"], expected) < 1e-5
    assert equal(two_ranks[0][f"{kind} gathered"], model.state_dict())


def test_loading_needs_the_quantized_model_and_one_tensor(tmp_path, sample_dir) -> None:
    """A checkpoint of 302 MB becomes a model of 55 MB; its largest linear has 17 MB."""
    sizes = dict(vocab_size=4096, hidden_size=1024, intermediate_size=4096, num_hidden_layers=4)
    make_tiny(tmp_path, sample_dir, **sizes, num_attention_heads=16, num_key_value_heads=16)
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}  # what is freed goes back to the system
    output = subprocess.check_output([sys.executable, __file__, "memory", tmp_path], text=True, env=environment)
    model, peak, plain = map(int, output.split())
    assert plain > 5 * model and 0.9 * model < peak < model + 4096 * 1024 * 4


def watch_memory(checkpoint_dir: Path) -> None:
    """Prints the bytes of a quantized model, the most that loading it took, and the bytes of the plain model."""
    import bitsandbytes.functional as kernels

    kernels.quantize_4bit(torch.randn(64), quant_type="nf4")  # what is imported on first use is no weight
    since, peak, done = anonymous(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.0005):
            peak = max(peak, anonymous() - since)

    watcher = threading.Thread(target=watch)
    watcher.start()
    model = load_model(checkpoint_dir, torch.bfloat16, quantize="bnb.nf4")
    done.set()
    watcher.join()
    plain = build_model(model.config)
    print(sum(p.nbytes for p in model.parameters()), peak, sum(p.nbytes for p in plain.parameters()))


def anonymous() -> int:
    """Bytes of this process that are no mapped file: a checkpoint is one, and its pages can be dropped."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("RssAnon:")[2].split()[0])


if __name__ == "__main__":
    job, *paths = sys.argv[1:]
    {"ranks": one_of_two_ranks, "memory": watch_memory}[job](*map(Path, paths))
