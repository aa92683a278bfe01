"""Scaled and switched off, and how far from the base: `pytest tests/test_forgetting.py`, about 10 s"""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.models import small_gpt
from torch.nn import functional as F

from lit_gpt import GPT, InputError, Tokenizer
from lit_gpt.adapter import Adapter, adapter_scaled, apply_adapter, apply_adapter_v2, scale_adapter
from lit_gpt.checkpoint.load import load_model
from lit_gpt.evaluation import forgetting as module
from lit_gpt.evaluation.forgetting import (
    forgetting,
    general_records,
    losses_and_kl,
    read_general_text,
    remember_base,
)
from lit_gpt.lora import LoRA, apply_lora, lora_scaled, merge_lora_weights, scale_lora
from lit_gpt.quantize import quantize_linears

IDX = torch.randint(0, 50, (2, 30), generator=torch.Generator().manual_seed(1))

# the methods that can be scaled: how they are applied, switched for a while, and set
METHODS: dict[str, tuple[Callable, Callable, Callable]] = {
    "lora": (lambda model: apply_lora(model, LoRA(head=True)), lora_scaled, scale_lora),
    "dora": (lambda model: apply_lora(model, LoRA(dora=True, head=True)), lora_scaled, scale_lora),
    "adapter": (lambda model: apply_adapter(model, Adapter(start_layer=1)), adapter_scaled, scale_adapter),
    "adapter_v2": (lambda model: apply_adapter_v2(model, Adapter(start_layer=0)), adapter_scaled, scale_adapter),
}


def trained(method: str, model: GPT) -> GPT:
    """The model with a method on it, in which all that trains has moved."""
    METHODS[method][0](model)
    torch.manual_seed(0)
    for name, param in model.named_parameters():
        if "lora_" in name or "adapter_" in name or (method == "adapter_v2" and "norm" in name):
            param.data += 0.1 * torch.randn_like(param)
    return model


@torch.no_grad()
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_a_scale_of_0_is_the_base_and_1_what_was_trained(method: str, bias: bool) -> None:
    """To the last bit, for a while and for good; and between them the way is smooth."""
    _, scaled, set_scale = METHODS[method]
    base = small_gpt(attn_bias=bias)(IDX)
    model = trained(method, small_gpt(attn_bias=bias))
    as_trained = model(IDX)
    for scale, expected in ((0, base), (1, as_trained)):
        with scaled(model, scale):
            assert model(IDX).equal(expected)
        assert model(IDX).equal(as_trained)

    logits = []
    for scale in (0.0, 1e-6, 0.5, 1 - 1e-6, 1.0, 1.25):
        with scaled(model, scale):
            logits.append(model(IDX))
    near_base, half, near_trained, beyond = logits[1], logits[2], logits[3], logits[5]
    size = (as_trained - base).abs().max()
    assert 0 < (near_base - base).abs().max() < 1e-4 * size
    assert 0 < (near_trained - as_trained).abs().max() < 1e-4 * size
    assert (
        min((half - base).abs().max(), (half - as_trained).abs().max(), (beyond - as_trained).abs().max()) > 0.05 * size
    )

    set_scale(model, 0.5)
    assert model(IDX).equal(half)


@torch.no_grad()
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_merging_takes_the_scale_along(method: str) -> None:
    model = trained(method, small_gpt()).double()
    for scale in (0.0, 0.3, 1.25):
        merged = trained(method, small_gpt()).double()
        scale_lora(merged, scale)
        merge_lora_weights(merged)
        with lora_scaled(model, scale):
            torch.testing.assert_close(merged(IDX), model(IDX), rtol=1e-9, atol=1e-9)
        if scale == 0:
            assert merged(IDX).equal(small_gpt()(IDX))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["bnb.nf4", "bnb.int8"])
@pytest.mark.parametrize("method", ["lora", "dora", "adapter_v2"])
def test_a_quantized_base_is_that_of_scale_0(method: str, kind: str) -> None:
    base = small_gpt().float()
    quantize_linears(base, kind)
    model = small_gpt().float()
    quantize_linears(model, kind)
    model = trained(method, model)
    assert not model(IDX).equal(base(IDX))
    with METHODS[method][1](model, 0):
        assert model(IDX).equal(base(IDX))


# ---- forgetting


@pytest.fixture(scope="module")
def text() -> str:
    return "The sun rose over the harbour.\n\n" + "Then it rained, and all went home. " * 20 + "\n\nI\n\nIt is 3 pm."


@torch.no_grad()
def test_the_measures_are_those_of_all_logits(tiny_dir: Path, text: str, monkeypatch) -> None:
    """Paragraph by paragraph, from whole rows of logits; here in several batches and several chunks of one."""
    tokenizer = Tokenizer(tiny_dir)
    base = load_model(tiny_dir)
    tuned = trained("lora", load_model(tiny_dir))
    records = general_records(text, tokenizer, base.config.block_size)
    assert [len(ids) for ids, _ in records] == [
        len(tokenizer.encode(part)) for part in map(str.strip, text.split("\n\n")) if part != "I"
    ]

    expected_losses = []
    expected_kl = []
    for ids, _ in records:
        log_p = tuned(ids[None])[0, :-1].log_softmax(-1)
        base_log_p = base(ids[None])[0, :-1].log_softmax(-1)
        expected_losses.append(F.nll_loss(log_p, ids[1:].long()).item())
        expected_kl.append(F.kl_div(log_p, base_log_p, log_target=True, reduction="batchmean").item())

    monkeypatch.setattr(module, "BATCH_TOKENS", 20)
    monkeypatch.setattr(module, "rows_at_once", lambda *sizes: 7)
    with lora_scaled(tuned, 0):
        remembered = remember_base(tuned, records)
    assert len(remembered.states) == 3
    for from_base in (remembered, remember_base(base, records)):  # the same weights switched off, and others
        measured = forgetting(tuned, from_base, records)
        assert measured.loss.values.tolist() == pytest.approx(expected_losses, rel=1e-4)
        assert measured.kl.values.tolist() == pytest.approx(expected_kl, rel=1e-3)
    n_targets = [len(ids) - 1 for ids, _ in records]
    assert measured.kl.weights.tolist() == measured.loss.weights.tolist() == n_targets
    assert measured.kl.mean == pytest.approx(
        sum(map(float.__mul__, map(float, n_targets), expected_kl)) / sum(n_targets)
    )
    assert measured.loss.ids == measured.kl.ids and len(set(measured.kl.ids)) == 3

    # the base has forgotten nothing, to the last bit
    with lora_scaled(tuned, 0):
        assert forgetting(tuned, remembered, records).kl.values.tolist() == [0, 0, 0]


@torch.no_grad()
def test_what_is_remembered_stays_while_the_model_trains(tiny_dir: Path, text: str) -> None:
    """A head that trains is copied, a frozen one is shared."""
    model = load_model(tiny_dir)
    records = general_records(text, Tokenizer(tiny_dir), model.config.block_size)
    model.requires_grad_(True)
    base = remember_base(model, records)
    before = base.logits(base.states[0]).clone()
    for param in model.parameters():
        param.mul_(1.1)
    assert base.logits(base.states[0]).equal(before)
    assert forgetting(model, base, records).kl.mean > 0.01
    model.requires_grad_(False)
    base = remember_base(model, records)
    model.lm_head.weight.zero_()
    assert not base.logits(base.states[0]).any()


@torch.no_grad()
def test_no_tensor_holds_the_logits_of_all_positions() -> None:
    rows = []

    def head(x: torch.Tensor) -> torch.Tensor:
        rows.append(len(x))
        return x.repeat(1, 2**20)

    states = torch.randn(20, 1)
    loss, kl = losses_and_kl(head, states, head, states, torch.zeros(20).long())
    assert loss.shape == kl.shape == (20,) and not kl.any()
    assert max(rows) == 8 and sum(rows) >= 40


def test_texts_that_are_none_are_refused(tiny_dir: Path, tmp_path: Path) -> None:
    assert len(general_records(read_general_text(), Tokenizer(tiny_dir), 256)) > 10
    with pytest.raises(InputError, match="no paragraph of two tokens"):
        general_records("\n\n \n\nI", Tokenizer(tiny_dir), 256)
    with pytest.raises(InputError, match="gone.txt is missing"):
        read_general_text(tmp_path / "gone.txt")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(InputError, match="not UTF-8"):
        read_general_text(tmp_path / "latin.txt")
