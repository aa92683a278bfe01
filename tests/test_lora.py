"""LoRA changes what it is told to, as peft does, and can be merged: `pytest tests/test_lora.py`, about 20 s"""

import copy
import json
from pathlib import Path

import pytest
import torch
from helpers.models import error, make_checkpoint, make_record, reference, small_gpt
from torch import nn
from torch.nn import functional as F

from lit_gpt import GPT, InputError
from lit_gpt.checkpoint.load import load_model
from lit_gpt.checkpoint.save import save_hf
from lit_gpt.checkpoint.tensor_names import hf_name
from lit_gpt.lora import (
    TARGETS,
    LoRA,
    LoRALinear,
    apply_lora,
    lora_filter,
    mark_only_lora_as_trainable,
    merge_lora_weights,
)
from lit_gpt.model.packing import Layout
from lit_gpt.replace_modules import replace_modules

EVERYWHERE = {place: True for place in TARGETS}
NOWHERE = {place: False for place in TARGETS}
BLOCK = {
    "query": ["attn.q"],
    "key": ["attn.k"],
    "value": ["attn.v"],
    "projection": ["attn.proj"],
    "mlp": ["mlp.fc_1", "mlp.fc_2", "mlp.proj"],
}
IDX = torch.randint(0, 97, (1, 40), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def untied_dir(tmp_path_factory) -> Path:
    """Three blocks, random in every parameter. Read-only."""
    return make_checkpoint(tmp_path_factory.mktemp("untied") / "checkpoint", num_hidden_layers=3)


@pytest.fixture(scope="module")
def tied_dir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tied") / "checkpoint"
    return make_checkpoint(folder, num_hidden_layers=3, tie_word_embeddings=True)


@pytest.fixture(params=["untied_dir", "tied_dir"])
def checkpoint_dir(request) -> Path:
    """Either of them."""
    return request.getfixturevalue(request.param)


def with_lora(model: GPT, trained: bool = True, **settings) -> GPT:
    """Adapts `model`; trained is a B as after many steps, instead of zero."""
    torch.manual_seed(3)
    apply_lora(model, LoRA(**dict(r=4, alpha=10) | settings))
    mark_only_lora_as_trainable(model)
    for module in model.modules():
        if trained and isinstance(module, LoRALinear):
            nn.init.normal_(module.lora_B, std=0.1)
    return model


def batch() -> tuple[torch.Tensor, Layout]:
    torch.manual_seed(5)
    return Layout.end_to_end([make_record(9, 4), make_record(30, 12), make_record(5, 5)])


def train(model: GPT, steps: int) -> None:
    idx, layout = batch()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.0)
    for _ in range(steps):
        loss = model(idx, layout=layout) / layout.n_targets
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_identity_at_birth(checkpoint_dir, dtype) -> None:
    base, model = load_model(checkpoint_dir, dtype), load_model(checkpoint_dir, dtype)
    apply_lora(model, LoRA(**EVERYWHERE))
    assert sum(isinstance(module, LoRALinear) for module in model.modules()) == 3 * 7 + 1
    assert all(module.lora_A.any() for module in model.modules() if isinstance(module, LoRALinear))
    idx, layout = batch()
    assert torch.equal(model(IDX), base(IDX))
    assert torch.equal(model(idx, layout=layout), base(idx, layout=layout))


@torch.no_grad()
@pytest.mark.parametrize("place", TARGETS)
@pytest.mark.parametrize(
    ("layers", "blocks"), [(None, [0, 1, 2]), (1, [2]), (2, [1, 2]), (3, [0, 1, 2]), ([0], [0]), ([2, 0], [0, 2])]
)
def test_lora_lands_where_it_says(untied_dir, place, layers, blocks) -> None:
    base, model = load_model(untied_dir), load_model(untied_dir)
    with_lora(model, layers=layers, **NOWHERE | {place: True})
    changed = set()
    for name, linear in base.named_modules():
        if isinstance(linear, nn.Linear):
            x = torch.randn(1, 2, linear.in_features)
            if not torch.equal(model.get_submodule(name)(x), linear(x)):
                changed.add(name)
    in_blocks = {f"transformer.h.{block}.{path}" for block in blocks for path in BLOCK.get(place, [])}
    assert changed == (in_blocks or {"lm_head"})


@torch.no_grad()
def test_a_change_of_query_changes_q_and_neither_k_nor_v(untied_dir) -> None:
    model, outputs = load_model(untied_dir), {}
    with_lora(model, trained=False, **NOWHERE | {"query": True})
    attn = model.transformer.h[0].attn
    for key in "qkv":
        attn.get_submodule(key).register_forward_hook(lambda *hooked, key=key: outputs.update({key: hooked[2].clone()}))
    model(IDX)
    before = dict(outputs)
    attn.q.lora_B.normal_()
    model(IDX)
    assert not torch.equal(outputs["q"], before["q"])
    assert torch.equal(outputs["k"], before["k"]) and torch.equal(outputs["v"], before["v"])


def test_all_that_may_train_does_and_nothing_else(checkpoint_dir) -> None:
    model = with_lora(load_model(checkpoint_dir), trained=False, **EVERYWHERE)
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    trainable = {name for name, param in model.named_parameters() if param.requires_grad}
    assert trainable == {name for name in before if lora_filter(name)} and len(trainable) == 2 * (3 * 7 + 1)

    idx, layout = batch()
    with torch.no_grad():
        start = model(idx, layout=layout)
    train(model, steps=2)
    moved = {name for name, param in model.named_parameters() if not torch.equal(param, before[name])}
    assert moved == trainable
    with torch.no_grad():
        assert model(idx, layout=layout) < start


def assert_same_gradients(ours: GPT, theirs: nn.Module, names: dict[str, str], tolerance: float) -> None:
    """With the same A and B; `names` maps our parameters to peft's, and none may be left over."""
    assert set(names) == {name for name, param in ours.named_parameters() if param.requires_grad}
    assert set(names.values()) == {name for name, param in theirs.named_parameters() if param.requires_grad}
    for name, their_name in names.items():
        theirs.get_parameter(their_name).data.copy_(ours.get_parameter(name).data)
    idx, layout = Layout.end_to_end([make_record(40, 25)])
    ours(idx, layout=layout).backward()
    logits = theirs(idx)
    logits = logits if torch.is_tensor(logits) else logits.logits
    F.cross_entropy(logits[0, layout.target_index], layout.target, reduction="sum").backward()
    for name, their_name in names.items():
        grad = theirs.get_parameter(their_name).grad
        assert grad.any() and error(ours.get_parameter(name).grad, grad) < tolerance, name


def test_gradients_are_those_of_peft_on_transformers(untied_dir) -> None:
    from peft import LoraConfig, get_peft_model

    ours = with_lora(load_model(untied_dir), **EVERYWHERE)
    linears = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]
    theirs = get_peft_model(reference(untied_dir), LoraConfig(r=4, lora_alpha=10, target_modules=linears))
    names = [name for name, _ in ours.named_parameters() if lora_filter(name)]
    names = {name: f"base_model.model.{hf_name(name, ours.config)[0]}.default.weight" for name in names}
    assert_same_gradients(ours, theirs, names, 1e-5)


@pytest.mark.parametrize("tied", [False, True])
def test_gradients_are_those_of_peft_in_float64(tied) -> None:
    """peft on our own model: transformers computes its norms in float32 whatever the model is."""
    from peft import LoraConfig, inject_adapter_in_model

    base = small_gpt(tie_embeddings=tied).requires_grad_(False)
    ours = with_lora(copy.deepcopy(base), **EVERYWHERE).double()
    targets = ["q", "k", "v", "proj", "fc_1", "fc_2", "lm_head"]
    theirs = inject_adapter_in_model(LoraConfig(r=4, lora_alpha=10, target_modules=targets), base).double()
    names = {name: f"{name}.default.weight" for name, _ in ours.named_parameters() if lora_filter(name)}
    assert_same_gradients(ours, theirs, names, 1e-10)


@torch.no_grad()
def test_merging_leaves_a_plain_model_with_the_same_logits(checkpoint_dir) -> None:
    base, model = load_model(checkpoint_dir), with_lora(load_model(checkpoint_dir), **EVERYWHERE)
    expected = model(IDX)
    assert error(base(IDX), expected) > 0.01
    assert len(merge_lora_weights(model)) == 22
    assert error(model(IDX), expected) < 1e-5
    assert model.state_dict().keys() == base.state_dict().keys()
    assert [type(module) for module in model.modules()] == [type(module) for module in base.modules()]


@torch.no_grad()
def test_merging_rounds_once(untied_dir) -> None:
    model = with_lora(load_model(untied_dir, torch.bfloat16), query=True)
    q = model.transformer.h[1].attn.q
    exact = q.linear.weight.float() + 10 / 4 * q.lora_B @ q.lora_A
    in_bfloat16 = q.linear.weight + (10 / 4 * q.lora_B @ q.lora_A).bfloat16()
    merge_lora_weights(model)
    merged = model.transformer.h[1].attn.q.weight
    assert merged.dtype == torch.bfloat16 and not torch.equal(merged, in_bfloat16)
    assert ((merged.float() - exact).abs() <= exact.abs() * 2**-8).all()  # half of the last of 8 bits
    assert (merged == exact.bfloat16()).float().mean() > 0.99


def test_a_merged_head_leaves_the_embedding_alone_and_is_saved(tied_dir, tmp_path) -> None:
    base, model = load_model(tied_dir), with_lora(load_model(tied_dir), trained=False, **NOWHERE | {"head": True})
    train(model, steps=3)
    with torch.no_grad():
        expected = model(IDX)
        merge_lora_weights(model)
        embedding, head = model.transformer.wte.weight, model.lm_head.weight
        assert torch.equal(embedding, base.transformer.wte.weight) and not torch.equal(head, embedding)
        assert error(model(IDX), expected) < 1e-5

        save_hf(model, tied_dir, tmp_path / "merged")
        assert json.loads((tmp_path / "merged" / "config.json").read_text())["tie_word_embeddings"] is False
        assert error(load_model(tmp_path / "merged")(IDX), expected) < 1e-5
        assert error(reference(tmp_path / "merged")(IDX).logits, expected) < 1e-5


def test_a_merge_elsewhere_leaves_a_tied_head_tied(tied_dir, tmp_path) -> None:
    model = with_lora(load_model(tied_dir))
    with torch.no_grad():
        expected = model(IDX)
        merge_lora_weights(model)
        save_hf(model, tied_dir, tmp_path / "merged")
        theirs = reference(tmp_path / "merged")
        assert theirs.lm_head.weight is theirs.model.embed_tokens.weight
        assert error(theirs(IDX).logits, expected) < 1e-5


@torch.no_grad()
def test_dropout_is_on_the_branch_and_in_training_only(untied_dir) -> None:
    base, plain = load_model(untied_dir), with_lora(load_model(untied_dir), **EVERYWHERE)
    model = with_lora(load_model(untied_dir), dropout=0.5, **EVERYWHERE)
    assert torch.equal(model.eval()(IDX), plain(IDX))
    model.train()
    assert not torch.equal(model(IDX), model(IDX))
    born = with_lora(load_model(untied_dir), trained=False, dropout=0.5, **EVERYWHERE).train()
    assert torch.equal(born(IDX), base(IDX))


def test_small_updates_survive_over_a_bfloat16_base(untied_dir) -> None:
    model = with_lora(load_model(untied_dir, torch.bfloat16), **EVERYWHERE)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}
    assert model(IDX).dtype == torch.bfloat16
    B = model.transformer.h[1].attn.v.lora_B
    before = B.detach().clone()
    idx, layout = batch()
    model(idx, layout=layout).backward()
    rate = 1e-4 * before.abs() / B.grad.abs()
    B.grad.mul_(rate)  # every entry by a ten-thousandth of itself
    torch.optim.SGD([B], lr=1.0).step()
    assert ((B - before).abs() > 0.9e-4 * before.abs()).float().mean() > 0.99
    assert (B.bfloat16() == before.bfloat16()).float().mean() > 0.9  # where they would have been lost


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(r=0), "lora.r is 0, expected 1 or more"),
        (dict(alpha=0), "lora.alpha is 0, expected more than 0"),
        (dict(dropout=1.0), "lora.dropout is 1.0, expected 0 to below 1"),
        (dict(dropout=-0.1), "lora.dropout is -0.1, expected 0 to below 1"),
        (NOWHERE, "nothing to adapt. Turn on at least one of query, key"),
        (dict(layers=0), "lora.layers is 0, expected 1 or more"),
        (dict(layers=4), "lora.layers is 4, but"),
        (dict(layers=[0, 3]), r"lora.layers is \[0, 3\], but"),
        (dict(layers=[-1]), r"lora.layers is \[-1\], but"),
        (dict(layers=[]), r"lora.layers is \[\], but"),
        (NOWHERE | dict(head=True, layers=9), "lora.layers is 9, but"),
        (dict(modules=["("]), r"'\(' is no pattern of names"),
        (dict(rank_pattern={"attn.[": 4}), "is no pattern of names"),
        (dict(rank_pattern={1: 4}), "1 is no pattern of names"),
        (dict(alpha_pattern=None), "lora.alpha_pattern is None, expected a mapping"),
        (dict(rank_pattern={"attn.qq": 4}), "a rank or an alpha for 'attn.qq', of which nothing is adapted"),
        (dict(mlp=False, alpha_pattern={"mlp.fc_1": 4}), "'mlp.fc_1', of which nothing is adapted"),
    ],
)
def test_settings_that_cannot_work_say_why(untied_dir, settings, message) -> None:
    model = load_model(untied_dir)
    with pytest.raises(InputError, match=message):
        apply_lora(model, LoRA(**settings))
    assert not any(isinstance(module, LoRALinear) for module in model.modules())


def test_lora_is_applied_once_and_to_something(untied_dir) -> None:
    model = with_lora(load_model(untied_dir))
    with pytest.raises(InputError, match="already carries LoRA: merge it first"):
        apply_lora(model, LoRA())
    merge_lora_weights(model)
    assert len(apply_lora(model, LoRA())) == 3 * 7, "all linears of three blocks, and not the head"
    headless = load_model(untied_dir)
    replace_modules(headless, lambda name, module: nn.Identity() if name == "lm_head" else None)
    with pytest.raises(InputError, match="matches no linear of checkpoint"):
        apply_lora(headless, LoRA(**NOWHERE | {"head": True}))


# ---- variants, equal to peft's

VARIANTS = {
    "rslora": (dict(rslora=True), dict(use_rslora=True)),
    "dora": (dict(dora=True), dict(use_dora=True)),
    "patterns": (
        dict(rank_pattern={"attn.q": 2, "0.mlp.fc_1": 6}, alpha_pattern={"v": 3.0}),
        dict(rank_pattern={"attn.q": 2, "0.mlp.fc_1": 6}, alpha_pattern={"v": 3.0}),
    ),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_are_those_of_peft(variant) -> None:
    """Gradients and what is merged, in float64, on our own model."""
    from peft import LoraConfig, inject_adapter_in_model

    ours_too, theirs_too = VARIANTS[variant]
    base = small_gpt(tie_embeddings=False).requires_grad_(False).double()
    ours = with_lora(copy.deepcopy(base), **EVERYWHERE | ours_too).double()
    targets = ["q", "k", "v", "proj", "fc_1", "fc_2", "lm_head"]
    config = LoraConfig(r=4, lora_alpha=10, target_modules=targets, **theirs_too)
    theirs = inject_adapter_in_model(config, copy.deepcopy(base)).double()
    names = {}
    for name, _ in ours.named_parameters():
        if lora_filter(name):
            module, _, kind = name.rpartition(".")
            kind = {"lora_magnitude": "lora_magnitude_vector"}.get(kind, kind)
            names[name] = f"{module}.{kind}.default.weight"
    assert any("magnitude" in name for name in names) == (variant == "dora")
    assert_same_gradients(ours, theirs, names, 1e-9)
    for module in theirs.modules():
        if hasattr(module, "merge"):
            module.merge()
    for name in merge_lora_weights(ours):
        merged = theirs.get_submodule(name).get_base_layer().weight
        assert error(ours.get_submodule(name).weight, merged) < 1e-9
        assert error(ours.get_submodule(name).weight, base.get_submodule(name).weight) > 1e-3


def test_modules_by_pattern(untied_dir) -> None:
    model = load_model(untied_dir)
    names = apply_lora(model, LoRA(modules=[r"mlp\.fc_1", "k"], layers=[1]))
    assert names == ["transformer.h.1.attn.k", "transformer.h.1.mlp.fc_1"]
    with pytest.raises(InputError, match="matches no linear"):
        apply_lora(load_model(untied_dir), LoRA(modules=["attn.key"]))


def test_dora_changes_nothing_at_birth(untied_dir) -> None:
    idx, base = torch.arange(20)[None], load_model(untied_dir)
    adapted = load_model(untied_dir)
    apply_lora(adapted, LoRA(dora=True, mlp=True))
    with torch.no_grad():
        assert error(adapted(idx), base(idx)) < 1e-5
