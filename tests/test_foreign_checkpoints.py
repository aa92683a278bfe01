"""Checkpoints of other programs with too much in them, or codes: `pytest tests/test_foreign_checkpoints.py`, about 20 s

They are used as transformers uses them, or refused in one line.
"""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import ROOT, make_tiny
from helpers.families import CASES, make, tokens
from helpers.models import edit_config, error, make_checkpoint, reference
from helpers.shell import python
from safetensors.torch import load_file, save_file

from lit_gpt import Config, InputError
from lit_gpt.checkpoint.load import build_model, load_model, load_weights
from lit_gpt.checkpoint.save import convert_checkpoint

Tensors = dict[str, torch.Tensor]


def fingerprint(folder: Path) -> str:
    return load_weights(build_model(Config.from_checkpoint(folder)), folder)


def write(folder: Path, *parts: Tensors, stem: str = "model") -> Path:
    """The folder with these weights and no others: a file, or several and their index."""
    for file in [*folder.glob("*.safetensors"), *folder.glob("*.index.json"), *folder.glob("*.bin")]:
        file.unlink()
    write_set(folder, *parts, stem=stem)
    return folder


def write_set(folder: Path, *parts: Tensors, stem: str = "model", end: str = "safetensors", index: bool = True) -> None:
    names = [f"{stem}-{i + 1:05d}-of-{len(parts):05d}.{end}" for i in range(len(parts))]
    if len(parts) == 1:
        names = [f"{stem}.{end}"]
    for name, part in zip(names, parts, strict=True):
        if end == "bin":
            torch.save(part, folder / name)
        else:
            save_file(part, folder / name, {"format": "pt"})
    if len(parts) > 1 and index:
        weight_map = {key: name for name, part in zip(names, parts, strict=True) for key in part}
        (folder / f"{stem}.{end}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def tensors_of(folder: Path) -> Tensors:
    return load_file(folder / "model.safetensors")


def halves(tensors: Tensors) -> tuple[Tensors, Tensors]:
    names = list(tensors)
    return {name: tensors[name] for name in names[:9]}, {name: tensors[name] for name in names[9:]}


def refusal(folder: Path) -> str:
    """What all ways of reading a folder say of it: nothing is written."""
    with pytest.raises(InputError) as caught:
        load_model(folder)
    out = folder.parent / "out"
    for hugging_face in (True, False):
        with pytest.raises(InputError) as again:
            convert_checkpoint(folder, out, hugging_face)
        assert str(again.value) == str(caught.value) and list(folder.parent.glob("*out*")) == []
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- a head beside the embedding that it is said to be

HEADS = {"gpt_neox": ("gpt_neox.embed_in.weight", "embed_out.weight")}
HEADS |= {"falcon": ("transformer.word_embeddings.weight", "lm_head.weight")}
HEADS |= {"gpt2": ("transformer.wte.weight", "lm_head.weight")}
LIKE_LLAMA = ("model.embed_tokens.weight", "lm_head.weight")
FAMILIES = [case for case in CASES if "," not in case]


def tied(folder: Path, case: str) -> tuple[Path, Tensors, str, str]:
    """A checkpoint with one tensor for both, its tensors, and the names of its embedding and its head."""
    kind, settings = CASES[case]
    make(folder, kind, settings | dict(tie_word_embeddings=True))
    return folder, tensors_of(folder), *HEADS.get(Config.from_checkpoint(folder).family, LIKE_LLAMA)


@pytest.mark.parametrize("case", FAMILIES)
def test_a_head_beside_the_embedding(case, tmp_path) -> None:
    """The same: it is the embedding. Another: transformers 4 and 5 take it for different models."""
    folder, tensors, embedding, head = tied(tmp_path / "model", case)
    base = fingerprint(folder)
    write(folder, tensors | {head: tensors[embedding].clone()})
    assert fingerprint(folder) == base
    write(folder, tensors | {head: tensors[embedding].clone().index_fill_(0, torch.tensor([96]), 1.0)})
    with pytest.raises(InputError, match=f"tie_word_embeddings: true, but {head} differs from {embedding}. Set it to"):
        load_model(folder)


@pytest.mark.parametrize("case", ["llama", "gpt_neox"])
@torch.no_grad()
def test_a_head_in_any_file_and_order(case, tmp_path) -> None:
    folder, tensors, embedding, head = tied(tmp_path / "model", case)
    base = fingerprint(folder)
    weight = tensors[embedding]
    others = {name: tensor for name, tensor in tensors.items() if name != embedding}
    first, last, both = {embedding: weight}, {head: weight.clone()}, {embedding: weight, head: weight.clone()}

    # safetensors writes the names in order, a .bin and parts as they come
    for parts in ([others | both], [others | first, last], [last, others | first], [others, both]):
        write(folder, *parts)
        assert fingerprint(folder) == base and load_model(folder).config.tie_embeddings
        write(folder, *({name: 2 * part[name] if name == head else part[name] for name in part} for part in parts))
        assert f"{head} differs from {embedding}" in refusal(folder)
    for pair in (both, last | first):
        write(folder)
        write_set(folder, others | pair, stem="pytorch_model", end="bin")
        assert fingerprint(folder) == base
        write_set(folder, others | pair | {head: 2 * weight}, stem="pytorch_model", end="bin")
        assert f"{head} differs from {embedding}" in refusal(folder)

    # a head of other rows, and one in another dtype
    write(folder, others | first | {head: weight[:-1].clone()})
    assert f"{head} has shape [96, 48], the config says [97, 48]" in refusal(folder)
    write(folder, others | {embedding: weight.bfloat16(), head: weight.bfloat16().float()})
    assert load_model(folder).config.tie_embeddings
    write(folder, others | {embedding: weight.bfloat16(), head: weight})
    assert f"{head} differs from {embedding}" in refusal(folder)


@pytest.mark.parametrize("case", ["llama", "phi", "gpt_neox", "gpt2"])
@torch.no_grad()
def test_what_the_line_says_to_type_is_what_transformers_does(case, tmp_path) -> None:
    folder, tensors, embedding, head = tied(tmp_path / "model", case)
    write(folder, tensors | {head: 2 * tensors[embedding]})
    expected = reference(folder)(tokens(1, 9)).logits
    config = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(config))
    model = load_model(folder)
    assert model.lm_head.weight is not model.transformer.wte.weight
    assert error(model(tokens(1, 9)), expected) < 1e-5


@pytest.mark.parametrize("case", ["llama", "gpt_neox", "gpt2"])
@torch.no_grad()
def test_one_tensor_for_both_under_either_name(case, tmp_path) -> None:
    folder, tensors, embedding, head = tied(tmp_path / "model", case)
    base = fingerprint(folder)
    weight = tensors.pop(embedding)
    write(folder, tensors | {head: weight})
    assert fingerprint(folder) == base and torch.equal(load_model(folder).transformer.wte.weight, weight)
    assert error(load_model(folder)(tokens(1, 9)), reference(folder)(tokens(1, 9)).logits) < 1e-5
    write(folder, tensors)
    assert f"{embedding} is missing" in refusal(folder)


def test_a_head_that_is_missing(tmp_path) -> None:
    folder = make_checkpoint(tmp_path / "model", tie_word_embeddings=False)
    tensors = tensors_of(folder)
    del tensors["lm_head.weight"]
    write(folder, tensors)
    said = refusal(folder)
    assert "lm_head.weight is missing (if the head is the embedding, config.json has to say tie_word_emb" in said
    edit_config(folder, {"tie_word_embeddings": True})
    assert load_model(folder).config.tie_embeddings


# ---- two sets of weights


@pytest.fixture
def two(tmp_path) -> tuple[Path, Tensors, Tensors]:
    """A folder, and two sets of weights for it: what is there, and what was there before."""
    folder = make_checkpoint(tmp_path / "model")
    tensors = tensors_of(folder)
    return folder, tensors, {name: tensor + 1 for name, tensor in tensors.items()}


def reads(folder: Path, tensors: Tensors) -> bool:
    """Whether transformers and we read these weights."""
    ours = load_model(folder).lm_head.weight
    theirs = reference(folder).lm_head.weight
    return torch.equal(ours, tensors["lm_head.weight"]) and torch.equal(ours, theirs)


def test_an_index_of_a_save_before(two) -> None:
    folder, new, old = two
    write_set(folder, *halves(old))
    assert "two sets of weights, model.safetensors and model.safetensors.index.json with model-00001-of" in refusal(
        folder
    )
    for part in folder.glob("model-*"):  # as save_pretrained clears them away
        part.unlink()
    assert reads(folder, new)
    (folder / "model.safetensors").unlink()
    assert "lacks model-00001-of-00002.safetensors, model-00002-of-00002.safetensors" in refusal(folder)
    write_set(folder, new)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": dict.fromkeys(new, "model.safetensors")})
    )
    assert reads(folder, new)


def test_parts_of_another_save(two) -> None:
    folder, new, old = two
    (folder / "model.safetensors").unlink()
    third = halves(halves(old)[1])
    write_set(folder, halves(old)[0], *third, index=False)
    assert "parts, and not the index.json" in refusal(folder)
    write_set(folder, *halves(new))
    assert len(list(folder.glob("model-*"))) == 5 and reads(folder, new)


def test_safetensors_beside_other_formats(two) -> None:
    folder, new, old = two
    for stem, parts in (("pytorch_model", [old]), ("pytorch_model", halves(old))):
        write_set(folder, *parts, stem=stem, end="bin")
    save_file(old, folder / "consolidated.safetensors")
    save_file(old, folder / "model.fp16.safetensors")
    (folder / "original").mkdir()
    torch.save(old, folder / "original/consolidated.00.pth")
    assert reads(folder, new)
    (folder / "model.safetensors").unlink()
    assert "two sets of weights, pytorch_model.bin and pytorch_model.bin.index.json with" in refusal(folder)
    (folder / "pytorch_model.bin").unlink()
    assert reads(folder, old)
    for file in folder.glob("pytorch_model*"):
        file.unlink()
    assert "has no weights" in (said := refusal(folder))
    assert "consolidated.safetensors, model.fp16.safetensors, original/consolidated.00.pth, in another layout" in said


def test_weights_that_config_json_names(two) -> None:
    folder, new, old = two
    save_file(old, folder / "better.safetensors", {"format": "pt"})
    edit_config(folder, {"transformers_weights": "better.safetensors"})
    assert "config.json names better.safetensors as the weights" in refusal(folder)
    edit_config(folder, {"transformers_weights": "model.safetensors"})
    assert reads(folder, new)


def test_an_adapter_beside_a_model(two) -> None:
    """As save_pretrained of what was merged leaves it in the adapter's folder: transformers puts it on once more."""
    from peft import LoraConfig, get_peft_model

    folder, tensors, _ = two
    alone = reference(folder)(tokens(1, 9)).logits
    model = get_peft_model(reference(folder), LoraConfig(r=2, init_lora_weights=False, target_modules=["q_proj"]))
    model.save_pretrained(folder)
    assert error(reference(folder)(tokens(1, 9)).logits, alone) > 1e-2
    said = refusal(folder)
    assert "holds a model, model.safetensors, and an adapter of peft, adapter_model.safetensors, and progr" in said
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    assert "adapter_model.bin, and programs differ" in refusal(folder)
    (folder / "adapter_config.json").unlink()
    assert reads(folder, tensors)


def test_a_converted_copy_beside_the_original(two) -> None:
    folder, _, _ = two
    convert_checkpoint(folder, folder.parent / "lit", hugging_face=False)
    for file in (folder.parent / "lit").iterdir():
        shutil.copy(file, folder)
    assert "two sets of weights, lit_model.safetensors and model.safetensors" in refusal(folder)


def test_a_tensor_under_two_names(tmp_path) -> None:
    folder = make(tmp_path / "model", *CASES["gpt2"])
    write(folder, tensors_of(folder) | {"h.0.ln_1.weight": torch.ones(48)})
    assert "h.0.ln_1.weight is there under another name, too" in refusal(folder)


def test_a_tensor_in_two_parts(two) -> None:
    folder, new, old = two
    write(folder, new, {"lm_head.weight": old["lm_head.weight"]})
    assert "lm_head.weight is in " in refusal(folder)


# ---- weights that another program has quantized


Q_PROJ = "model.layers.0.self_attn.q_proj"


def codes(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.ones(shape).to(dtype)


FLOAT8 = {f"{Q_PROJ}.weight": codes(torch.float8_e4m3fn, 48, 48)}
PACKED = {name: codes(torch.int32, 6, 48) for name in (f"{Q_PROJ}.qweight", f"{Q_PROJ}.qzeros")}
PACKED |= {f"{Q_PROJ}.scales": codes(torch.float16, 1, 48)}
BNB_4 = {f"{Q_PROJ}.weight": codes(torch.uint8, 1152, 1), f"{Q_PROJ}.weight.absmax": codes(torch.float32, 36)}
BNB_4 |= {f"{Q_PROJ}.weight.quant_state.bitsandbytes__nf4": codes(torch.uint8, 90)}
BNB_8 = {f"{Q_PROJ}.weight": codes(torch.int8, 48, 48), f"{Q_PROJ}.SCB": codes(torch.float32, 48)}
PACKED_4 = {f"{Q_PROJ}.weight_packed": codes(torch.int32, 48, 6), f"{Q_PROJ}.weight_scale": codes(torch.float16, 48, 2)}
MXFP4 = {f"model.layers.0.mlp.experts.gate_up_proj_{end}": codes(torch.uint8, 4, 8) for end in ("blocks", "scales")}
MLX = {f"{Q_PROJ}.weight": codes(torch.uint32, 48, 6), f"{Q_PROJ}.scales": codes(torch.float16, 48, 1)}
QUANTIZED: dict[str, tuple[Tensors, dict, str]] = {  # (tensors, what config.json says, what the line says)
    "DeepSeek's": (
        FLOAT8 | {f"{Q_PROJ}.weight_scale_inv": codes(torch.float32, 1, 1)},
        {"quantization_config": {"quant_method": "fp8"}},
        r"quantized \(fp8\): it holds \S+weight_scale_inv",
    ),
    "float8": (FLOAT8, {}, r"quantized \(float8\): \S+q_proj.weight is float8"),
    "float8, other": ({f"{Q_PROJ}.weight": codes(torch.float8_e5m2, 48, 48)}, {}, r"q_proj.weight is float8"),
    "FBGEMM": (FLOAT8 | {f"{Q_PROJ}.weight_scale": codes(torch.float32, 48, 1)}, {}, r"\(float8 or int8 with scales\)"),
    "GPTQ": (PACKED | {f"{Q_PROJ}.g_idx": codes(torch.int32, 48)}, {}, r"quantized \((GPTQ|GPTQ or AWQ)\)"),
    "GPTQ, said": (PACKED, {"quantization_config": {"quant_method": "gptq", "bits": 4}}, r"quantized \(gptq\)"),
    "AWQ": (PACKED, {"quantization_config": {"quant_method": "awq"}}, r"quantized \(awq\)"),
    "bitsandbytes 4": (BNB_4, {"quantization_config": {"quant_method": "bitsandbytes"}}, r"quantized \(bitsandbytes\)"),
    "bitsandbytes 4, not said": (BNB_4, {}, r"quantized \(bitsandbytes, 4 bits\)"),
    "bitsandbytes 8": (BNB_8, {}, r"quantized \(bitsandbytes, 8 bits\): it holds \S+SCB"),
    "compressed-tensors": (PACKED_4, {}, r"quantized \(compressed-tensors\)"),
    "MXFP4": (MXFP4, {"quantization_config": {"quant_method": "mxfp4"}}, r"quantized \(mxfp4\)"),
    "MLX": (MLX, {"quantization": {"group_size": 64, "bits": 4}}, r"by what config.json calls quantization"),
    "HQQ": ({f"{Q_PROJ}.W_q": codes(torch.uint8, 24, 48)}, {}, r"quantized \(HQQ\)"),
    "int8": ({f"{Q_PROJ}.weight": codes(torch.int8, 48, 48)}, {}, r"\(int8\): \S+q_proj.weight is int8"),
    "uint8": ({"model.embed_tokens.weight": codes(torch.uint8, 97, 48)}, {}, r"embed_tokens.weight is uint8"),
    "int32": ({"model.norm.weight": codes(torch.int32, 48)}, {}, r"norm.weight is int32"),
}  # fmt: skip


@pytest.mark.parametrize("end", ["safetensors", "bin"])
@pytest.mark.parametrize("kind", QUANTIZED)
def test_weights_that_another_program_has_quantized(kind, end, tmp_path) -> None:
    changed, settings, message = QUANTIZED[kind]
    folder = make_checkpoint(tmp_path / "model")
    tensors = tensors_of(folder)
    if f"{Q_PROJ}.weight" not in changed:
        del tensors[f"{Q_PROJ}.weight"]
    write(folder)
    write_set(folder, tensors | changed, stem="model" if end == "safetensors" else "pytorch_model", end=end)
    edit_config(folder, settings)
    said = refusal(folder)
    assert re.search(message, said), said
    assert said.endswith("before it was quantized; --quantize bnb.nf4 then keeps it in 4 bits.")


LEFT_OVER = {
    "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    "compression_config": {"format": "int-quantized"},
    "quantization": {"bits": 4},
    "transformers_weights": "model.safetensors",
}


def test_what_is_left_over_of_a_quantization_stays_behind(tmp_path) -> None:
    """The weights are plain: config.json describes files of before."""
    folder = make_checkpoint(tmp_path / "model")
    expected = load_model(folder)
    edit_config(folder, LEFT_OVER)
    for i, hugging_face in enumerate([False, True]):
        out = tmp_path / str(i)
        convert_checkpoint(folder, out, hugging_face)
        assert not LEFT_OVER.keys() & json.loads((out / "config.json").read_text()).keys()
        assert torch.equal(load_model(out).lm_head.weight, expected.lm_head.weight)


# ---- fused, truncated, superfluous


FUSED = {
    "phi3": ("self_attn.qkv_proj.weight", "mlp.gate_up_proj.weight"),
    "gpt_neox": ("attention.query_key_value.weight", "attention.query_key_value.bias"),
    "falcon 7b": ("self_attention.query_key_value.weight",),
    "falcon 40b": ("self_attention.query_key_value.weight", "self_attention.query_key_value.bias"),
    "gpt2": ("attn.c_attn.weight", "attn.c_attn.bias", "mlp.c_fc.weight"),
}


@pytest.mark.parametrize("case", FUSED)
def test_a_fused_weight_that_does_not_fit(case, tmp_path) -> None:
    """Too few rows or columns, too many, a dimension more: the stored shape and the expected one are told."""
    folder = make(tmp_path / "model", *CASES[case])
    tensors = tensors_of(folder)
    for end in FUSED[case]:
        (name,) = [name for name in tensors if ".1." in name and name.endswith(end)]
        right = tensors[name]
        wrongs = [right[:-1], right[..., :-8], torch.cat([right, right]), right[None], right.flatten()[:0]]
        for wrong in wrongs:
            write(folder, tensors | {name: wrong.clone()})
            expected = f"{name} has shape {list(wrong.shape)}, the config says {list(right.shape)}"
            assert expected in refusal(folder)
    write(folder, tensors)
    load_model(folder)


@pytest.mark.parametrize("case", ["llama", "phi3", "gpt2"])
def test_other_heads_than_the_config_says(case, tmp_path) -> None:
    folder = make(tmp_path / "model", *CASES[case])
    edit_config(folder, {"n_embd": 24, "n_head": 3} if case == "gpt2" else {"num_key_value_heads": 3})
    assert "has shape" in refusal(folder)


def test_constants_that_old_exports_carry(tmp_path) -> None:
    """Masks and frequencies, in whatever dtype: the config says them."""
    for case, names in (
        ("llama", ["model.layers.0.self_attn.rotary_emb.inv_freq", "model.layers.0.self_attn.rotary_emb.cos_cached"]),
        ("gpt2", ["transformer.h.0.attn.bias", "transformer.h.0.attn.masked_bias"]),
        ("gpt_neox", ["gpt_neox.layers.0.attention.bias", "gpt_neox.layers.0.attention.rotary_emb.inv_freq"]),
        ("falcon 7b", ["transformer.h.0.self_attention.rotary_emb.inv_freq"]),
    ):
        folder = make(tmp_path / case, *CASES[case])
        base = fingerprint(folder)
        for dtype in (torch.float32, torch.uint8, torch.bool):
            write(folder, tensors_of(folder) | {name: codes(dtype, 3) for name in names})
            assert fingerprint(folder) == base


def test_a_pointer_in_the_place_of_weights(tmp_path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
    for name in ("model.safetensors", "pytorch_model.bin"):
        folder = make_checkpoint(tmp_path / name)
        write(folder)
        (folder / name).write_text(pointer)
        assert f"{name} is a Git LFS pointer, a text in the place of the weights. Run `git lfs pull`" in refusal(folder)


def test_no_layers_at_all(tmp_path) -> None:
    folder = make_checkpoint(tmp_path / "model", num_hidden_layers=0)
    with pytest.raises(InputError, match="num_hidden_layers is 0, expected more than 0"):
        load_model(folder)


# ---- by the scripts: one line, status 2, and nothing is written


def test_scripts_refuse_before_they_write(sample_dir, tmp_path) -> None:
    folder = make_tiny(tmp_path / "model", sample_dir, tie_word_embeddings=True)
    tensors = tensors_of(folder)
    write(folder, tensors | {"lm_head.weight": 2 * tensors["model.embed_tokens.weight"]})
    out = tmp_path / "out"
    commands = (
        ("generate/base.py", "--checkpoint_dir", folder, "--prompt", "hi"),
        ("scripts/convert_lit_checkpoint.py", "--checkpoint_dir", folder, "--out_dir", out, "--format", "gguf"),
    )
    for script, *flags in commands:
        done = python(ROOT / script, *flags)
        assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
        assert "lm_head.weight differs from model.embed_tokens.weight" in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_text_of_a_gemma_3_that_reads_images(sample_dir: Path, tmp_path: Path) -> None:
    """tutorials/rented_gpu.md takes it out with transformers; then it answers as the whole model does."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    # a tiny one, which is refused as it is
    text = dict(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=6, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, sliding_window=8,
    )  # fmt: skip
    vision = dict(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    torch.manual_seed(0)
    whole = Gemma3ForConditionalGeneration(
        Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=60)
    )
    whole.save_pretrained(tmp_path / "whole")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(sample_dir / name, tmp_path / "whole")
    with pytest.raises(InputError, match="also reads images"):
        Config.from_checkpoint(tmp_path / "whole")

    # the lines of the page
    page = (ROOT / "tutorials/rented_gpu.md").read_text(encoding="utf-8")
    (lines,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    lines = lines.replace("google/gemma-3-4b-it", f"{tmp_path}/whole").replace(
        "checkpoints/mine/gemma-3-4b-text", f"{tmp_path}/text"
    )
    exec(lines, {})

    model = load_model(tmp_path / "text")
    idx = torch.arange(1, 20)[None]
    with torch.no_grad():
        expected = whole(input_ids=idx).logits
        assert (model(idx) - expected).abs().max() < 1e-5 * expected.abs().max()
    assert (tmp_path / "text/tokenizer.json").is_file() and (tmp_path / "text/generation_config.json").is_file()
