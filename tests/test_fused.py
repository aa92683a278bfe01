"""Small functions of a block, and compiled blocks: `pytest tests/test_fused.py`, about 45 s"""

import math

import pytest
import torch
from helpers.flash import flash_on_a_cpu
from helpers.fused_cases import CASES, C, T, inputs_of, random, results
from torch.nn import functional as F

from lit_gpt import GPT, Config, InputError, recipe
from lit_gpt.lora import LoRA, apply_lora, mark_only_lora_as_trainable
from lit_gpt.model import attention, fused
from lit_gpt.model.activation_checkpointing import recompute_blocks
from lit_gpt.model.compile import compile_blocks
from lit_gpt.model.loss import chunks
from lit_gpt.model.packing import Layout
from lit_gpt.quantize import quantize_linears
from lit_gpt.recipe import is_to_compile

each_case = pytest.mark.parametrize("name", CASES)


@each_case
def test_it_is_the_formula_and_its_gradient(name: str) -> None:
    """In float64, with a gradient, without one, and as a compiler sees it."""
    case = CASES[name]
    inputs = inputs_of(case)
    expected = results(case.expected, inputs, case.constants)
    for found, wanted in zip(results(case.function, inputs, case.constants), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        outputs = case.function(*inputs, *case.constants)
    for found, wanted in zip(outputs if isinstance(outputs, tuple) else [outputs], expected):
        torch.testing.assert_close(found, wanted.detach(), rtol=1e-12, atol=1e-12)


@each_case
def test_half_precision_is_rounded_once_or_nearly(name: str) -> None:
    """As near to float64 as one rounding of each number that is written, LoRA's three products as near as three."""
    case = CASES[name]
    inputs = [x.bfloat16() for x in inputs_of(case)]
    constants = [
        x.float() if isinstance(x, torch.Tensor) and name.startswith("rotations") else x for x in case.constants
    ]
    constants = [x.bfloat16() if isinstance(x, torch.Tensor) and name.startswith("low") else x for x in constants]
    found = results(case.function, inputs, constants)
    wide = [x.double() if isinstance(x, torch.Tensor) else x for x in constants]
    expected = results(case.expected, [x.double() for x in inputs], wide)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == torch.bfloat16
        assert (a.double() - b).norm() / b.norm() < (0.008 if name.startswith("low") else 0.005)


@each_case
def test_it_keeps_little(name: str) -> None:
    """Of its inputs what backward reads, and else a number for each row: no float32 copies."""
    case = CASES[name]
    inputs = [x.bfloat16().requires_grad_() for x in inputs_of(case)]
    constants = [x.bfloat16() if isinstance(x, torch.Tensor) else x for x in case.constants]
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        case.function(*inputs, *constants)
    known = {x.data_ptr() for x in [*inputs, *constants] if isinstance(x, torch.Tensor)}
    new = sum(t.numel() for t in kept if t.data_ptr() not in known)
    rows = inputs[0].numel() // inputs[0].size(-1)
    assert new <= 4 * rows  # LoRA: the rank


def test_no_gradient_is_made_for_what_is_frozen() -> None:
    x = random(2, T, C).requires_grad_()
    weight = random(C)
    y = fused.rms_norm(x, weight, 1e-5)
    assert y.requires_grad and torch.autograd.grad(y.sum(), x)[0].shape == x.shape
    weight.requires_grad_()
    y = fused.rms_norm(x.detach(), weight, 1e-5)
    assert torch.autograd.grad(y.sum(), weight)[0].shape == (C,)
    assert not fused.rms_norm(x.detach(), weight.detach(), 1e-5).requires_grad


def test_a_linear_that_trains_beside_lora_gets_its_gradient() -> None:
    """Somebody edits a script so that biases train, too."""
    linear = torch.nn.Linear(C, 40).double()
    linear.weight.requires_grad_(False)
    x, A, B = random(2, T, C), random(4, C).requires_grad_(), random(40, 4).requires_grad_()
    fused.low_rank_linear(x, linear, A, B, 2.0).sum().backward()
    assert torch.allclose(linear.bias.grad, torch.full((40,), 2.0 * T).double())
    assert A.grad is not None and B.grad is not None


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_gradient_of_the_loss(dtype: torch.dtype) -> None:
    """Also where a target has so little probability that float32 has no number for it."""
    logits = (5 * random(9, 300)).to(dtype)
    logits[0, 0], logits[0, 1] = 200, -200
    target = torch.arange(9)
    target[0] = 1
    wide = logits.double().requires_grad_()
    expected = F.cross_entropy(wide, target, reduction="sum")
    (wanted,) = torch.autograd.grad(expected, wide)
    loss, grad = fused.loss_and_gradient(logits, target)
    assert grad.dtype == dtype and loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    tolerance = 1e-12 if dtype == torch.float64 else 4e-3
    assert abs(loss - expected) <= tolerance * expected
    assert (grad.double() - wanted).abs().max() <= tolerance


@pytest.mark.parametrize(("n", "at_most"), [(0, 5), (1, 5), (5, 5), (6, 5), (23, 5), (41, 20), (1000, 1)])
def test_chunks_have_all_rows_and_none_has_one(n: int, at_most: int) -> None:
    rows = [list(range(n))[chunk] for chunk in chunks(n, at_most)]
    assert sum(rows, []) == list(range(n))
    sizes = [len(chunk) for chunk in rows]
    assert all(size <= at_most for size in sizes) and len(sizes) == math.ceil(n / at_most)
    assert all(size > 1 for size in sizes) or n == 1 or at_most == 1


def test_fewer_rows_never_take_more_at_once() -> None:
    """The plan of the largest micro-batch holds for all others, but for one row, of which a slice is not made."""
    largest = [max(len(range(n)[chunk]) for chunk in chunks(n, 20)) for n in range(1, 200)]
    assert largest[19] == 20 and all(after >= before - 1 for before, after in zip(largest, largest[1:]))
    assert all(size >= 19 for size in largest[19:])


# ---- compiled blocks


def test_what_is_compiled(monkeypatch) -> None:
    """On a GPU by default, on a CPU by a flag; where something is missing, it is said."""
    model = tiny_model(None, n_layer=1)
    assert not is_to_compile(model, None) and not is_to_compile(model, False) and is_to_compile(model, True)
    monkeypatch.setattr(recipe, "compiling_pays", lambda device: True)
    assert is_to_compile(model, None) and not is_to_compile(model, False)
    monkeypatch.setenv("PATH", "")
    assert not is_to_compile(model, None)
    with pytest.raises(InputError, match="--compile: torch.compile needs a C compiler.*apt install"):
        is_to_compile(model, True)


RECORDS = [(0, 3), (1, 4), (2, 2), (3, 6)]  # a seed, and how many records


def tiny_model(quantize: str | None, n_layer: int) -> GPT:
    torch.manual_seed(0)
    sizes = dict(n_head=4, n_query_groups=2, n_embd=64, intermediate_size=96, vocab_size=50, block_size=64)
    model = GPT(Config(n_layer=n_layer, **sizes))
    quantize_linears(model, quantize)
    apply_lora(model, LoRA(r=4))
    mark_only_lora_as_trainable(model)
    for name, param in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(param, std=0.1)
    return model


def loss_and_gradients(model: GPT, seed: int, n_records: int) -> list[torch.Tensor]:
    chance = torch.Generator().manual_seed(seed)
    records = []
    for _ in range(n_records):
        length = int(torch.randint(5, 20, (1,), generator=chance))
        ids = torch.randint(0, 50, (length,), generator=chance)
        records.append((ids, torch.arange(length) > length // 2))
    idx, layout = Layout.end_to_end(records)
    loss = model(idx, layout=layout)
    params = [param for param in model.parameters() if param.requires_grad]
    return [loss, *torch.autograd.grad(loss, params)]


@pytest.mark.parametrize(("quantize", "recompute"), [(None, "none"), ("bnb.nf4", "block"), (None, "selective")])
def test_a_block_is_one_graph(quantize: str | None, recompute: str, monkeypatch) -> None:
    """For all blocks and all lengths, without breaks; with QLoRA and recomputation, too."""
    from torch._dynamo.utils import counters

    monkeypatch.setattr(attention, "has_flash_attention", lambda q: True)
    torch._dynamo.reset()
    counters.clear()
    plain = tiny_model(quantize, n_layer=3)
    compiled = tiny_model(quantize, n_layer=3)
    compile_blocks(compiled)
    recompute_blocks(compiled, recompute)
    with flash_on_a_cpu():
        for seed, n_records in RECORDS:
            wanted = loss_and_gradients(plain, seed, n_records)
            for a, b in zip(loss_and_gradients(compiled, seed, n_records), wanted, strict=True):
                assert (a - b).norm() <= 1e-5 * b.norm()
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == 2  # the block and the loss
