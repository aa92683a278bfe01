"""Linears that are faster for answers say what they said: `pytest tests/test_fast_linears.py`, about 15 s"""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.families import CASES, make, tokens
from helpers.models import error, make_checkpoint
from torch import nn

from lit_gpt import GPT, InputError
from lit_gpt.adapter import Adapter, apply_adapter, apply_adapter_v2
from lit_gpt.checkpoint.load import load_model
from lit_gpt.cpu_codes import CodedLinear, quantize_to_4_bits
from lit_gpt.fast_linears import OneDNNLinear, StackedAttention, StackedMLP, has_onednn, prepare_for_answers
from lit_gpt.generate.decode import generate
from lit_gpt.lora import DoRALinear, LoRA, apply_lora, scale_lora
from lit_gpt.runs.load_finetuned import UseArgs, load_model_for_use

needs_onednn = pytest.mark.skipif(not has_onednn(), reason="This CPU or this torch has no such oneDNN.")
# attention with biases, tied; experts; norms of queries and keys, of each head and of all; clipped values; no gate; ...
FAMILIES = "qwen2", "mixtral", "qwen3_moe", "stablelm 2 12b", "olmo2", "olmo, clipped", "gemma2", "gpt2", "falcon 40b"
# rows of a size that the 4-bit kernel takes, and queries, keys, gates of whole blocks and of others
SIZES = dict(hidden_size=128, intermediate_size=192, num_attention_heads=4, num_key_value_heads=2)


@pytest.fixture(scope="module")
def llama_dir(tmp_path_factory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("fast") / "llama", **SIZES)


def logits(model: GPT) -> torch.Tensor:
    """The logits of a text, of which the cache gives the second half token by token."""
    idx = tokens(2, 24)
    cache = model.new_kv_cache(2, 24)
    with torch.inference_mode():
        pieces = [model(idx[:, pos], pos, cache=cache) for pos in torch.arange(24).split([12] + [1] * 12)]
    return torch.cat(pieces, dim=1)


def count(model: GPT, kind: type) -> int:
    return sum(type(module) is kind for module in model.modules())


@pytest.mark.parametrize("n_rows", [1, 16])
@pytest.mark.parametrize("family", FAMILIES)
def test_families_say_what_they_said(family: str, n_rows: int, tmp_path: Path) -> None:
    model = load_model(make(tmp_path, *CASES[family]), torch.float32)
    plain = logits(model)
    assert error(logits(prepare_for_answers(model, n_rows)), plain) < 1e-4
    assert count(model, StackedAttention) == model.config.n_layer
    if has_onednn():
        assert count(model, nn.Linear) == 0


METHODS: dict[str, Callable[[GPT], object]] = {
    "lora": lambda model: apply_lora(model, LoRA(key=False, head=True)),
    "dora": lambda model: apply_lora(model, LoRA(dora=True, key=False)),
    "adapter": lambda model: apply_adapter(model, Adapter(start_layer=1)),
    "adapter_v2": lambda model: apply_adapter_v2(model, Adapter(start_layer=0)),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("quantize", [None, "cpu.int8"])
def test_methods_stay_on_top(method: str, quantize: str | None, llama_dir: Path) -> None:
    model = load_model(llama_dir, torch.float32, quantize=quantize)
    METHODS[method](model)
    torch.manual_seed(0)
    for name, param in model.named_parameters():
        if "lora_" in name or "adapter_" in name:
            param.data += 0.1 * torch.randn_like(param)
    plain = logits(model)
    assert error(logits(prepare_for_answers(model)), plain) < (1e-4 if quantize is None else 0.03)
    assert not any(isinstance(module, DoRALinear) for module in model.modules())


@pytest.mark.parametrize("scale", [0.0, 0.5])
@pytest.mark.parametrize("quantize", [None, "cpu.int8"])
def test_a_scaled_dora_stays_scaled(quantize: str | None, scale: float, llama_dir: Path) -> None:
    model = load_model(llama_dir, torch.float32, quantize=quantize)
    base = logits(model)
    METHODS["dora"](model)
    torch.manual_seed(0)
    for name, param in model.named_parameters():
        if "lora_" in name:
            param.data += 0.1 * torch.randn_like(param)
    scale_lora(model, scale)
    plain = logits(model)
    assert plain.equal(base) == (scale == 0)
    assert error(logits(prepare_for_answers(model)), plain) < (1e-4 if quantize is None else 0.03)


def test_dora_stays_where_its_weight_would_be_rounded_anew(llama_dir: Path) -> None:
    model = load_model(llama_dir, torch.bfloat16)
    METHODS["dora"](model)
    plain = logits(model)
    assert torch.equal(logits(prepare_for_answers(model)), plain)
    assert count(model, DoRALinear) == 2 * 6


def kept(module: nn.Module) -> list[tuple[int, int]]:
    """Where each tensor of a model lies, and its bytes; one that oneDNN has packed lies alone, wherever that is."""
    places = {}
    for tensor in [*module.parameters(), *module.buffers()]:
        opaque = tensor.is_mkldnn
        place = id(tensor) if opaque else tensor.untyped_storage().data_ptr()
        places[place] = tensor.numel() * 4 if opaque else tensor.untyped_storage().nbytes()
    return list(places.items())


@needs_onednn
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("n_rows", [1, 16])
def test_no_weight_is_kept_twice(n_rows: int, tied: bool, tmp_path: Path) -> None:
    model = load_model(make_checkpoint(tmp_path, **SIZES, tie_word_embeddings=tied), torch.float32)
    # in memory of their own, and not that of the file
    for param in model.parameters():
        param.data = param.data.clone()
    before = sum(n_bytes for _, n_bytes in kept(model))
    linears = sum(type(module) is nn.Linear for module in model.modules())
    assert linears == 2 * 7 + 1
    prepare_for_answers(model, n_rows)
    assert sum(n_bytes for _, n_bytes in kept(model)) == before
    assert count(model, OneDNNLinear) == 2 * 4 + 1
    embedding = model.transformer.wte.weight
    assert model.lm_head.weight.is_mkldnn == (n_rows > 1 and not tied)
    if tied:
        assert model.lm_head.weight.data_ptr() == embedding.data_ptr()


@needs_onednn
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_keep_their_linears(dtype: torch.dtype, llama_dir: Path) -> None:
    model = load_model(llama_dir, dtype)
    plain = logits(model)
    prepare_for_answers(model)
    assert count(model, OneDNNLinear) == 0 and count(model, StackedMLP) == 2
    assert error(logits(model).float(), plain.float()) < (1e-12 if dtype == torch.float64 else 0.05)


def test_without_onednn_all_stays_right(llama_dir: Path, monkeypatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "arm64")
    model = load_model(llama_dir, torch.float32)
    plain = logits(model)
    prepare_for_answers(model)
    assert count(model, OneDNNLinear) == 0
    assert error(logits(model), plain) < 1e-5


def test_the_sample_answers_alike(sample_dir: Path) -> None:
    model = load_model(sample_dir, torch.float32)
    prompt = torch.randint(0, 49152, (20,), generator=torch.Generator().manual_seed(0))
    plain = generate(model, prompt, 40, temperature=0.0)
    assert generate(prepare_for_answers(model), prompt, 40, temperature=0.0).tolist() == plain.tolist()


# ---- codes


def test_values_of_a_grid_keep_their_codes() -> None:
    """Values as a Q4_1 file of llama.cpp has them: 16 levels in each group of 32, of which both ends are used."""
    torch.manual_seed(0)
    codes = torch.randint(0, 16, (64, 4, 32))
    codes[..., 0] = 0
    codes[..., 1] = 15
    scale = (torch.rand(64, 4, 1) + 0.1).half().float()
    lowest = (-8 * scale + 0.3 * torch.randn_like(scale)).half().float()
    packed, _ = quantize_to_4_bits((codes * scale + lowest).flatten(1))
    assert torch.equal(packed, torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.flatten(1).int(), 1))


@pytest.mark.parametrize(("kind", "levels"), [("cpu.int4", 15), ("cpu.int8", 254)])
@pytest.mark.parametrize("out_features", [64, 208])
def test_a_value_is_off_by_half_a_step_at_most(kind: str, levels: int, out_features: int) -> None:
    torch.manual_seed(0)
    weight = torch.randn(out_features, 96)
    weight[3] = 0
    weight[5, :32] = 1.5  # all values of a group
    linear = CodedLinear(96, out_features, None, kind)
    linear.load_weight(weight)
    steps = weight.abs().amax(1, keepdim=True) * 2 / 254
    if kind == "cpu.int4":
        groups = weight.unflatten(1, (-1, 32))
        steps = ((groups.amax(-1) - groups.amin(-1)) / 15).repeat_interleave(32, dim=1)
    # bfloat16 rounds a scale, and with 4 bits the zero, the sum and the value by up to 2^-9 each
    allowed = steps * (0.5 + levels / 2 * 2**-8) + weight.abs() * 2**-8 + 2**-8 * steps * 8
    assert bool(((linear.dequantize() - weight).abs() <= allowed).all())


@pytest.mark.parametrize("kind", ["cpu.int4", "cpu.int8"])
@pytest.mark.parametrize("n_rows", [1, 5, 40])
def test_products_are_those_of_the_values(kind: str, n_rows: int) -> None:
    torch.manual_seed(0)
    bias = nn.Parameter(torch.randn(208), requires_grad=False)
    linear = CodedLinear(96, 208, bias, kind)
    linear.load_weight(torch.randn(208, 96))
    x = torch.randn(2, n_rows, 96)
    y = linear(x)
    assert y.dtype == x.dtype
    assert error(y, nn.functional.linear(x, linear.dequantize(), bias)) < 0.01


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["cpu.int4", "cpu.int8"])
def test_a_model_of_codes_is_that_of_their_values(kind: str, tied: bool, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, **SIZES, tie_word_embeddings=tied)
    # a plain model of the values that the codes stand for, whose embedding is the checkpoint's
    plain = load_model(folder, torch.float32)
    codes = load_model(folder, torch.float32, quantize=kind)
    for name, module in codes.named_modules():
        if isinstance(module, CodedLinear):
            plain.get_submodule(name).weight = nn.Parameter(module.dequantize(), requires_grad=False)

    args = UseArgs(checkpoint_dir=folder, quantize=kind, precision="32-true")
    coded = load_model_for_use(args, torch.device("cpu"))
    assert error(logits(coded), logits(plain)) < 0.1  # of which bfloat16 makes 0.04
    assert count(coded, nn.Linear) == 0 and count(coded, StackedMLP) == count(coded, StackedAttention) == 2

    # no float copy of what has codes: of those the norms and the embedding alone
    floats = sum(param.numel() for param in coded.parameters() if param.dtype == torch.float32)
    assert floats == coded.transformer.wte.weight.numel() + 5 * 128
    kinds = {module.kind for module in coded.transformer.h.modules() if isinstance(module, CodedLinear)}
    assert (kinds, coded.lm_head.kind) == ({kind}, "cpu.int8")


def test_stacked_codes_are_those_of_the_parts(llama_dir: Path) -> None:
    model = load_model(llama_dir, torch.float32, quantize="cpu.int4")
    block = model.transformer.h[0]
    parts = copy.deepcopy((block.attn.q, block.attn.k, block.attn.v))
    prepare_for_answers(model)
    x = torch.randn(3, 128)
    together = torch.cat([part(x) for part in parts], dim=-1)
    assert torch.equal(block.attn.qkv(x), together)


def test_parts_that_are_no_whole_blocks_are_not_stacked(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, **SIZES | dict(intermediate_size=96))
    model = load_model(folder, torch.float32, quantize="cpu.int4")
    plain = logits(model)
    prepare_for_answers(model)
    assert count(model, StackedMLP) == 0 and count(model, StackedAttention) == 2
    assert error(logits(model), plain) < 0.02


def test_refusals_are_one_line(tiny_dir: Path, llama_dir: Path) -> None:
    with pytest.raises(InputError, match=r"answers on a CPU, .* goes to meta\. Use --quantize bnb\.nf4\.$"):
        load_model(llama_dir, device=torch.device("meta"), quantize="cpu.int4")
    with pytest.raises(InputError, match=r"attn\.q is \(48, 48\), .* multiples of \(16, 32\)\. Use --quantize cpu"):
        load_model(tiny_dir, quantize="cpu.int4")
    args = UseArgs(checkpoint_dir=llama_dir, quantize="cpu.int8", stream_blocks=True)
    with pytest.raises(InputError, match=r"^--quantize cpu\.int8 is for one CPU .* Leave out --stream_blocks\.$"):
        load_model_for_use(args, torch.device("cpu"))
