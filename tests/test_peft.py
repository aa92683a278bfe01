"""LoRA to peft and from it, for every family: `pytest tests/test_peft.py`, about 30 s"""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.families import CASES, make, tokens, trained, weights_of
from helpers.models import error, reference
from safetensors.torch import load_file, save_file

from lit_gpt import InputError
from lit_gpt.checkpoint.load import load_model
from lit_gpt.checkpoint.peft import load_peft, save_peft
from lit_gpt.lora import LoRA
from lit_gpt.runs.load_finetuned import load_finetuned

EVERYWHERE = LoRA(r=4, alpha=10, query=True, key=True, value=True, projection=True, mlp=True, head=True)
FAMILIES = [case for case in CASES if "," not in case]  # of what follows a comma, peft sees nothing
SETTINGS = {
    "everywhere": EVERYWHERE,
    "query and value": LoRA(r=4, alpha=10, layers=[0, 2], key=False, projection=False, mlp=False),
    "patterns": LoRA(r=4, alpha=10, mlp=True, rank_pattern={"q": 2}, alpha_pattern={"v": 3.0}, rslora=True),
    "dora": replace(EVERYWHERE, dora=True),
}


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda case: case.replace(" ", "_"))
def folder(request, tmp_path_factory) -> Path:
    return make(tmp_path_factory.mktemp("family") / "checkpoint", *CASES[request.param])


@pytest.mark.parametrize("name", SETTINGS)
@torch.no_grad()
def test_peft_gives_the_same_logits(name, folder, tmp_path) -> None:
    """What we wrote, in peft; and what peft then saves, here."""
    from peft import PeftModel

    lora = SETTINGS[name]
    model = trained(folder, lora)
    if model.config.n_expert and lora.mlp:
        with pytest.raises(InputError, match="experts of a mixture"):
            save_peft(weights_of(model), lora, model.config, str(folder), tmp_path)
        return
    if model.config.family == "gpt_neox" and lora.head:
        with pytest.raises(InputError, match="The head of gpt_neox"):
            save_peft(weights_of(model), lora, model.config, str(folder), tmp_path)
        lora = replace(lora, head=False)
        model = trained(folder, lora)
    save_peft(weights_of(model), lora, model.config, str(folder), tmp_path)
    base = reference(folder)
    plain = base(tokens(1, 15)).logits
    theirs = PeftModel.from_pretrained(base, tmp_path).eval()
    assert error(model(tokens(1, 15)), plain) > 1e-2
    assert error(theirs(tokens(1, 15)).logits, model(tokens(1, 15))) < 2e-5
    theirs.save_pretrained(tmp_path / "theirs")
    again, _ = load_finetuned(folder, tmp_path / "theirs")
    assert error(again(tokens(1, 15)), model(tokens(1, 15))) < 2e-5


@torch.no_grad()
def test_what_peft_trained_is_used_here(folder, tmp_path) -> None:
    """Its own adapter on everything, also on whole fused linears."""
    from peft import LoraConfig, get_peft_model

    base = reference(folder)  # of mixtures the attention alone: peft reaches fused experts by other means
    targets = ["q_proj", "o_proj"] if load_model(folder).config.n_expert else "all-linear"
    config = LoraConfig(r=3, lora_alpha=7, target_modules=targets, task_type="CAUSAL_LM", init_lora_weights=False)
    theirs = get_peft_model(base, config).eval()
    expected = theirs(tokens(1, 15)).logits
    theirs.save_pretrained(tmp_path)
    ours, description = load_finetuned(folder, tmp_path)
    assert error(ours(tokens(1, 15)), expected) < 2e-5 and description.settings["r"] == 3


def test_dora_on_a_part_of_a_fused_linear_is_refused(tmp_path) -> None:
    folder, lora = make(tmp_path / "base", *CASES["gpt_neox"]), LoRA(r=2, dora=True, key=False)
    model = trained(folder, lora)
    with pytest.raises(InputError, match="one magnitude for all of"):
        save_peft(weights_of(model), lora, model.config, str(folder), tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(peft_type="IA3"), "a IA3 of peft"),
        (dict(bias="all"), "bias 'all'"),
        (dict(modules_to_save=["lm_head"]), "modules_to_save"),
        (dict(alora_invocation_tokens=[1, 2]), "alora_invocation_tokens"),
        *((dict(init_lora_weights=start), f"init_lora_weights '{start}'") for start in ("pissa", "olora", "corda")),
        (dict(r=None), "adapter_config.json holds a value that cannot be used"),
        (dict(r="8"), "adapter_config.json holds a value that cannot be used"),
        (dict(r=4.0), "adapter_config.json holds a value that cannot be used"),
        (dict(r=8), "the rank of .* is 8, and in adapter_model.safetensors it is 4"),
        (dict(rank_pattern={"v_proj": 2}), r"the rank of model.layers.0.self_attn.v_proj is 2, and in .* it is 4"),
        (dict(lora_alpha=None), "adapter_config.json holds a value that cannot be used"),
        (dict(lora_dropout="x"), "adapter_config.json holds a value that cannot be used"),
        (dict(alpha_pattern=[1]), "adapter_config.json holds a value that cannot be used"),
        (dict(alpha_pattern={"(": 3}), "adapter_config.json holds a value that cannot be used"),
    ],
)
def test_what_is_not_lora_is_refused(changes, message, tmp_path) -> None:
    folder = make(tmp_path / "base", *CASES["llama"])
    save_peft(weights_of(trained(folder, EVERYWHERE)), EVERYWHERE, load_model(folder).config, str(folder), tmp_path)
    settings = json.loads((tmp_path / "adapter_config.json").read_text()) | changes
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(InputError, match=message):
        load_peft(tmp_path, load_model(folder).config)


@pytest.mark.parametrize("key", ["r", "lora_alpha"])
def test_a_setting_that_is_missing_is_named(key, tmp_path) -> None:
    folder = make(tmp_path / "base", *CASES["llama"])
    save_peft(weights_of(trained(folder, EVERYWHERE)), EVERYWHERE, load_model(folder).config, str(folder), tmp_path)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    del settings[key]
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(InputError, match=f"adapter_config.json has no '{key}'"):
        load_peft(tmp_path, load_model(folder).config)


def test_an_embedding_beside_the_changes_is_named(tmp_path) -> None:
    """As peft saves it if it was resized."""
    folder = make(tmp_path / "checkpoint", *CASES["llama"])
    save_peft(weights_of(trained(folder, EVERYWHERE)), EVERYWHERE, load_model(folder).config, str(folder), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file(load_file(file) | {"base_model.model.model.embed_tokens.weight": torch.zeros(99, 48)}, file)
    with pytest.raises(InputError, match="embed_tokens.weight, which is no part of a LoRA of linears. Merge it with"):
        load_finetuned(folder, tmp_path)


@pytest.mark.parametrize("leaf", ["lora_A", "lora_B"])
def test_a_tensor_that_is_missing_is_named(leaf, tmp_path) -> None:
    folder, name = make(tmp_path / "base", *CASES["llama"]), "model.layers.1.self_attn.k_proj"
    save_peft(weights_of(trained(folder, EVERYWHERE)), EVERYWHERE, load_model(folder).config, str(folder), tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    del tensors[f"base_model.model.{name}.{leaf}.weight"]
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(InputError, match=f"lacks {name}.{leaf}"):
        load_peft(tmp_path, load_model(folder).config)


def test_no_change_at_all_is_refused(tmp_path) -> None:
    folder = make(tmp_path / "base", *CASES["llama"])
    save_peft(weights_of(trained(folder, EVERYWHERE)), EVERYWHERE, load_model(folder).config, str(folder), tmp_path)
    save_file({}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(InputError, match="holds no change at all"):
        load_peft(tmp_path, load_model(folder).config)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_values_that_are_not_finite_are_named(value, tmp_path) -> None:
    folder = make(tmp_path / "base", *CASES["phi3"])
    model = trained(folder, EVERYWHERE)
    save_peft(weights_of(model), EVERYWHERE, model.config, str(folder), tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    tensors["base_model.model.model.layers.1.self_attn.qkv_proj.lora_B.weight"][50] = value
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(InputError, match="holds NaN or infinite values: transformer.h.1.attn.k.lora_B"):
        load_finetuned(folder, tmp_path)


@pytest.mark.parametrize("case", ["llama", "phi3", "gpt2"])
def test_an_adapter_of_another_model_is_refused(case, tmp_path) -> None:
    """Of other sizes: peft's files have no fingerprint of their base."""
    kind, settings = CASES[case]
    other = dict(n_embd=60) if case == "gpt2" else dict(hidden_size=60, intermediate_size=80)
    folder, wider = make(tmp_path / "base", kind, settings), make(tmp_path / "wider", kind, settings | other)
    model = trained(wider, EVERYWHERE)
    save_peft(weights_of(model), EVERYWHERE, model.config, str(wider), tmp_path)
    with pytest.raises(InputError, match=r"lora_[AB] has shape \[\d+, \d+\], expected \[\d+, \d+\]"):
        load_finetuned(folder, tmp_path)


ROUTER = LoRA(r=4, alpha=10, modules=["mlp.gate", "attn.q"])


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        (
            replace(ROUTER, alpha_pattern={"gate": 3.0}),
            "peft changes model.layers.0.mlp.gate with the rank and the alpha",
        ),
        (replace(ROUTER, rank_pattern={"gate": 2}), "peft changes model.layers.0.mlp.gate with the rank"),
        (replace(ROUTER, dora=True), "without DoRA. Merge instead"),
        (LoRA(r=4, modules=["h.1.mlp.proj"]), "experts of a mixture one by one"),  # of a layer that is no mixture
        (replace(ROUTER, alpha_pattern={"q": 3.0}), None),
        (replace(ROUTER, r=5, rslora=True), None),  # 10 / 5**0.5 * 5**0.5 is not 10
    ],
)
@torch.no_grad()
def test_what_peft_makes_of_a_mixture(lora, message, tmp_path) -> None:
    """Its experts and its router are parameters to peft, not linears: other names and no patterns."""
    from peft import PeftModel

    folder = make(tmp_path / "checkpoint", *CASES["qwen3_moe"])
    model = trained(folder, lora)
    if message is None:
        save_peft(weights_of(model), lora, model.config, str(folder), tmp_path)
        theirs = PeftModel.from_pretrained(reference(folder), tmp_path).eval()
        assert error(theirs(tokens(1, 15)).logits, model(tokens(1, 15))) < 2e-5
        return
    with pytest.raises(InputError, match=message):
        save_peft(weights_of(model), lora, model.config, str(folder), tmp_path)


@pytest.mark.parametrize("start", [True, "gaussian", "orthogonal", "eva"])
def test_other_ways_to_begin_are_none_of_ours(start, tmp_path) -> None:
    folder = make(tmp_path / "base", *CASES["llama"])
    save_peft(weights_of(trained(folder, EVERYWHERE)), EVERYWHERE, load_model(folder).config, str(folder), tmp_path)
    settings = json.loads((tmp_path / "adapter_config.json").read_text()) | {"init_lora_weights": start}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    assert load_peft(tmp_path, load_model(folder).config)


@pytest.mark.parametrize("case", ["llama", "phi3", "gpt2"])
def test_a_layer_without_its_change_is_refused(case, tmp_path) -> None:
    """Half a download: that layer would stay as it was, without a word."""
    folder = make(tmp_path / "base", *CASES[case])
    model = trained(folder, EVERYWHERE)
    save_peft(weights_of(model), EVERYWHERE, model.config, str(folder), tmp_path)
    assert load_peft(tmp_path, model.config)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    others = {name: tensor for name, tensor in tensors.items() if ".2." not in name}
    assert len(others) < len(tensors)
    save_file(others, tmp_path / "adapter_model.safetensors")
    with pytest.raises(InputError, match=r"has no change of \S+\.2\.\S+, which adapter_config.json names"):
        load_finetuned(folder, tmp_path)
