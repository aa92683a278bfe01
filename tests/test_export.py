"""What leaves the toolkit is the model, and is proven to be: `pytest tests/test_export.py`, about 35 s"""

import json
import re
import runpy
import shutil
import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT, make_tiny
from helpers.families import CASES, make, tokens, trained, weights_of
from helpers.models import error, reference
from helpers.runs import equal
from helpers.scripts import script
from helpers.shell import python
from helpers.tiny_tokenizers import SPECIAL, byte_level, metaspace, sentencepiece, write
from helpers.tiny_tokenizers import TEXTS as ALL_SORTS
from record_llama_cpp import llama_cpp_tokens
from safetensors.torch import load_file, save_file

from lit_gpt import Config, InputError, Tokenizer
from lit_gpt.checkpoint.load import load_model
from lit_gpt.checkpoint.save import convert_checkpoint, save_hf, save_tensors, write_files
from lit_gpt.checkpoint.tensor_names import hf_name
from lit_gpt.checkpoint.weight_files import read_metadata
from lit_gpt.data.prompts import render, resolve_style
from lit_gpt.formats import gguf_writer as gguf_out
from lit_gpt.formats import merge as exporting
from lit_gpt.formats.gguf_reader import convert_gguf, read_gguf
from lit_gpt.formats.gguf_tokenizer import CONTROL, UNUSED, USER_DEFINED
from lit_gpt.formats.gguf_vocabulary import gguf_vocabulary
from lit_gpt.formats.merge import export_merged, export_merged_gguf, export_peft
from lit_gpt.formats.verify import TEXTS, Logits, compare_logits, logits_of, verify_copy
from lit_gpt.generate.decode import stream
from lit_gpt.lora import LoRA, LoRALinear
from lit_gpt.replace_modules import replace_modules
from lit_gpt.runs.header import Header
from lit_gpt.runs.load_finetuned import UseArgs, load_finetuned, load_for_use, read_for_use
from lit_gpt.runs.saves import Checkpoints

EVERYWHERE = LoRA(r=4, alpha=8, query=True, key=True, value=True, projection=True, mlp=True)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory, sample_dir) -> Path:
    """With a template and stop tokens, which have to go along."""
    folder = make_tiny(tmp_path_factory.mktemp("tiny") / "model", sample_dir, hidden_size=64, num_attention_heads=4)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 0], "bos_token_id": 1}))
    return folder


def write_adapter(
    folder: Path, base: Path, lora: LoRA = EVERYWHERE, quantize: str | None = None, prompt_style: str = "chat"
) -> Path:
    """As finetune/lora.py writes it."""
    from dataclasses import asdict

    from lit_gpt.checkpoint.load import build_model, load_weights

    model, tokenizer = trained(base, lora), Tokenizer(base)
    fingerprint = load_weights(build_model(Config.from_checkpoint(base)), base)
    header = dict(
        method="lora", settings=asdict(lora), checkpoint_dir=str(base), base=fingerprint,
        tokenizer=tokenizer.fingerprint, prompt_style=prompt_style, quantize=quantize,
    )  # fmt: skip
    folder.mkdir(parents=True)
    save_tensors(weights_of(model), folder / "lora.safetensors", {"lit_gpt": json.dumps(header)})
    return folder


@torch.no_grad()
def test_a_merged_model_says_so_itself(tiny, tmp_path, capsys) -> None:
    """And transformers finds everything in its folder."""
    from transformers import AutoTokenizer, GenerationConfig

    adapter = write_adapter(tmp_path / "lora", tiny)
    export_merged(adapter, None, tmp_path / "merged", max_shard=3 * 10**5)
    output = capsys.readouterr().out
    assert "Merged: logits" in output and "Read back in float32" in output and "same at 100.0 %" in output
    model, _ = load_finetuned(None, adapter)
    assert len(list((tmp_path / "merged").glob("model-*.safetensors"))) == 3
    assert error(reference(tmp_path / "merged")(tokens(1, 15)).logits, model(tokens(1, 15))) < 1e-5
    theirs = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert theirs.chat_template == Tokenizer(tiny).chat_template and theirs.chat_template
    assert set(GenerationConfig.from_pretrained(tmp_path / "merged").eos_token_id) == Tokenizer(tiny).stop_ids == {0, 2}


OWN_STYLE = "{% for message in messages %}<<{{ message.role }}>>{{ message.content }}\n{% endfor %}"


@pytest.mark.parametrize("style", ["alpaca", "zephyr", "llama2", OWN_STYLE])
def test_the_style_that_was_trained_is_the_chat_template(style, tiny, tmp_path, capsys) -> None:
    """Of every folder that leaves: transformers and our scripts ask as in training."""
    from transformers import AutoTokenizer

    adapter = write_adapter(tmp_path / "lora", tiny, prompt_style=style)
    export_merged(adapter, None, tmp_path / "merged")
    export_peft(adapter, None, tmp_path / "peft")
    assert capsys.readouterr().out.count("which is its chat template now.") == 2
    base_tokenizer = Tokenizer(tiny)
    messages = [{"role": "user", "content": "Who is Ada?"}]
    rendered = render(style, {"messages": messages}, base_tokenizer)
    expected = base_tokenizer.encode(rendered.text, bos=rendered.bos).tolist()
    for folder in (tmp_path / "merged", tmp_path / "peft"):
        theirs = AutoTokenizer.from_pretrained(folder)
        assert theirs.apply_chat_template(messages, add_generation_prompt=True)["input_ids"] == expected
        use = UseArgs(finetuned=folder) if folder.name == "peft" else UseArgs(checkpoint_dir=folder)
        _, tokenizer, trained_style = load_for_use(use, torch.device("cpu"))
        assert resolve_style("auto", tokenizer, trained_style) == "chat"
        asked = render("chat", {"messages": messages}, tokenizer)
        assert tokenizer.encode(asked.text, bos=asked.bos).tolist() == expected


@pytest.mark.parametrize("added", [{}, {"pad_token": "[PAD]"}], ids=str)
def test_the_tokenizer_beside_an_adapter_of_peft_is_the_one_that_was_trained(added, tiny, tmp_path) -> None:
    """TRL saves it there. generate asks with its template, which goes along into every folder."""
    from transformers import AutoTokenizer

    adapter = tmp_path / "peft"
    export_peft(write_adapter(tmp_path / "lora", tiny), None, adapter)
    theirs = AutoTokenizer.from_pretrained(adapter)
    theirs.chat_template = OWN_STYLE
    theirs.add_special_tokens(added)
    theirs.save_pretrained(adapter)
    messages = [{"role": "user", "content": "Who is Ada?"}]
    expected = theirs.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]

    merged, again = tmp_path / "merged", tmp_path / "again"
    export_merged(adapter, None, merged)
    export_peft(adapter, None, again)
    for use in UseArgs(finetuned=adapter), UseArgs(finetuned=again), UseArgs(checkpoint_dir=merged):
        tokenizer, _, style = read_for_use(use)
        asked = render(resolve_style("auto", tokenizer, style), {"messages": messages}, tokenizer)
        assert tokenizer.encode(asked.text, bos=asked.bos).tolist() == expected
        assert tokenizer.stop_ids == {0, 2}
    for folder in merged, again:
        exported = AutoTokenizer.from_pretrained(folder)
        assert exported.apply_chat_template(messages, add_generation_prompt=True)["input_ids"] == expected


def test_a_tokenizer_beside_an_adapter_that_is_larger_than_the_base(tiny, tmp_path) -> None:
    """Of an adapter that was trained on a base with a resized embedding, which its settings do not name."""
    adapter = tmp_path / "peft"
    export_peft(write_adapter(tmp_path / "lora", tiny), None, adapter)
    tokenizer = json.loads((adapter / "tokenizer.json").read_text())
    size = Config.from_checkpoint(tiny).padded_vocab_size
    known = len(tokenizer["model"]["vocab"])
    tokenizer["added_tokens"] += [
        {"id": token_id, "content": f"<x{token_id}>", "special": True, "normalized": False}
        | dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
        for token_id in range(known, size + 1)
    ]
    (adapter / "tokenizer.json").write_text(json.dumps(tokenizer))
    export_merged(adapter, None, tmp_path / "merged")  # as long as nothing needs them
    settings = json.loads((adapter / "tokenizer_config.json").read_text())
    own_end = OWN_STYLE.replace("message.content }}", f"message.content }}}}<x{size}>")
    for changes in ({"eos_token": f"<x{size}>"}, {"chat_template": own_end}):
        (adapter / "tokenizer_config.json").write_text(json.dumps(settings | changes))
        for act in (
            lambda: export_merged(adapter, None, tmp_path / "again"),
            lambda: export_peft(adapter, None, tmp_path / "again"),
            lambda: export_merged_gguf(adapter, None, tmp_path / "again", "float16"),
        ):
            with pytest.raises(
                InputError, match=rf"What ends an answer in .* is '<x{size}>' .*, beyond the {size:,} rows"
            ):
                act()
    assert not (tmp_path / "again").exists()


def test_a_part_of_a_tokenizer_beside_an_adapter(tiny, tmp_path) -> None:
    """As a slow tokenizer is saved: the template that was trained is there, and no vocabulary that is read."""
    from transformers import AutoTokenizer

    adapter = tmp_path / "peft"
    export_peft(write_adapter(tmp_path / "lora", tiny), None, adapter)
    model = json.loads((adapter / "tokenizer.json").read_text())["model"]
    (adapter / "tokenizer.json").unlink()
    settings = json.loads((adapter / "tokenizer_config.json").read_text())
    settings |= {"chat_template": OWN_STYLE, "tokenizer_class": "GPT2Tokenizer"}
    (adapter / "tokenizer_config.json").write_text(json.dumps(settings))
    acts = {
        "generate": lambda: read_for_use(UseArgs(finetuned=adapter)),
        "merge": lambda: export_merged(adapter, None, tmp_path / "merged"),
        "peft": lambda: export_peft(adapter, None, tmp_path / "again"),
        "gguf": lambda: export_merged_gguf(adapter, None, tmp_path / "gguf", "float16"),
    }
    for act in acts.values():
        with pytest.raises(InputError, match="has tokenizer_config.json beside the adapter, and no tokenizer.json"):
            act()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lora", "peft"]

    # what the line says to type
    (adapter / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = (merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"])
    (adapter / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
    with pytest.raises(
        InputError, match="vocab.json, merges.txt beside the adapter.* AutoTokenizer.from_pretrained"
    ) as e:
        read_for_use(UseArgs(finetuned=adapter))
    eval(re.search(r"AutoTokenizer\..*?\)\.save_pretrained\(.*?\)", str(e.value))[0], {"AutoTokenizer": AutoTokenizer})
    tokenizer, _, _ = read_for_use(UseArgs(finetuned=adapter))
    assert tokenizer.chat_templates["default"] == OWN_STYLE


def test_a_model_that_was_trained_whole_asks_as_in_training(tiny, tmp_path) -> None:
    header = Header(method="full", settings={}, checkpoint_dir=str(tiny), base="", tokenizer="", prompt_style="alpaca")
    Checkpoints(tmp_path / "run", load_model(tiny), header).save("best")
    tokenizer = Tokenizer(tmp_path / "run/best")
    question = {"instruction": "Who is Ada?"}
    asked = render(resolve_style("auto", tokenizer), question, tokenizer)
    trained_so = render("alpaca", question, Tokenizer(tiny))
    assert tokenizer.encode(asked.text, bos=asked.bos).tolist() == tokenizer.encode(trained_so.text).tolist()


def test_nothing_of_the_templates_of_the_base_wins(tiny, tmp_path) -> None:
    """Neither one that has a name, nor where old programs look; and others stop where answers ended in training."""
    from transformers import AutoTokenizer, GenerationConfig

    base = shutil.copytree(tiny, tmp_path / "base")
    settings = json.loads((base / "tokenizer_config.json").read_text())
    settings["chat_template"] = [{"name": name, "template": f"{name} of the base"} for name in ("default", "tool_use")]
    (base / "tokenizer_config.json").write_text(json.dumps(settings))
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates/tool_use.jinja").write_text("tool_use of the base")
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": 0}))

    adapter = write_adapter(tmp_path / "lora", base, prompt_style="zephyr")
    export_merged(adapter, None, tmp_path / "merged")
    header = Header("full", settings={}, checkpoint_dir=str(base), base="", tokenizer="", prompt_style="zephyr")
    Checkpoints(tmp_path / "run", load_model(base), header).save("best")
    script("scripts/convert_lit_checkpoint.py").main(tmp_path / "hf", finetuned=tmp_path / "run")

    messages = [{"role": "user", "content": "Who is Ada?"}]
    tokenizer = Tokenizer(base)
    rendered = render("zephyr", {"messages": messages}, tokenizer)
    expected = tokenizer.encode(rendered.text, bos=rendered.bos).tolist()
    tools = [{"type": "function", "function": {"name": "f", "description": "F.", "parameters": {}}}]
    for folder in (tmp_path / "merged", tmp_path / "run/best", tmp_path / "hf"):
        theirs = AutoTokenizer.from_pretrained(folder)
        for given in (None, tools):
            options = dict(add_generation_prompt=True, tools=given, return_dict=False)
            assert theirs.apply_chat_template(messages, **options) == expected
        old = json.loads((folder / "tokenizer_config.json").read_text())
        assert old["chat_template"] == (folder / "chat_template.jinja").read_text()
        assert GenerationConfig.from_pretrained(folder).eos_token_id == [0, tokenizer.eos_id]


def test_a_whole_model_whose_style_no_template_has_is_told_once_a_run_and_when_it_is_copied(tiny, tmp_path, capsys):
    header = Header("full", settings={}, checkpoint_dir=str(tiny), base="", tokenizer="", prompt_style="none")
    checkpoints = Checkpoints(tmp_path / "run", load_model(tiny), header)
    checkpoints.save("best")
    checkpoints.save("last")
    script("scripts/convert_lit_checkpoint.py").main(tmp_path / "hf", finetuned=tmp_path / "run", prove_it=False)
    said = capsys.readouterr()
    sentence = "trained in the style none, and its chat template is another: ask it with --prompt_style none."
    assert said.err.count(sentence) == 1 and said.out.count(sentence) == 1


def test_a_style_that_no_template_has_is_told(tiny, tmp_path, capsys) -> None:
    export_merged(write_adapter(tmp_path / "lora", tiny, prompt_style="none"), None, tmp_path / "merged")
    said = capsys.readouterr().out
    assert "trained in the style none, and its chat template is another: ask it with --prompt_style none." in said
    assert Tokenizer(tmp_path / "merged").chat_template == Tokenizer(tiny).chat_template

    # and a base that has none has no other one
    bare = shutil.copytree(tiny, tmp_path / "bare")
    settings = json.loads((bare / "tokenizer_config.json").read_text())
    settings.pop("chat_template")
    (bare / "tokenizer_config.json").write_text(json.dumps(settings))
    export_peft(write_adapter(tmp_path / "lora2", bare, prompt_style="none"), None, tmp_path / "peft")
    assert "trained in the style none, and it has no chat template: ask it with" in capsys.readouterr().out


LINEARS = "q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj"


def of_family(folder: Path, case: str) -> Path:
    """A tiny model of a family, with a tokenizer of 300 tokens."""
    kind, settings = CASES[case]
    make(folder, kind, settings | dict(vocab_size=300))
    return write(folder, tokenizer_json=byte_level(), tokenizer_config_json=SPECIAL)


@pytest.mark.parametrize("kind", ["lora", "dora", "bnb.nf4", "bnb.nf4, original"])
def test_a_merge_rounds_once(kind, tmp_path) -> None:
    """Of a bfloat16 base and a float32 change: what is written in float32 has no rounding of bfloat16 in it."""
    quantize, _, base = kind.partition(", ")
    quantize = quantize if quantize.startswith("bnb") else None
    lora = replace(EVERYWHERE, dora=kind == "dora")
    convert_checkpoint(of_family(tmp_path / "llama", "llama"), tmp_path / "base", True, torch.bfloat16)
    adapter = write_adapter(tmp_path / "lora", tmp_path / "base", lora, quantize)
    written = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16, None):
        out = tmp_path / str(dtype)
        export_merged(adapter, None, out, dtype, base or "dequantized")
        written[dtype] = load_file(out / "model.safetensors")

    # the values, in float64
    model, _ = load_finetuned(None, adapter, torch.float64, quantize="none" if base else "auto")
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear):
            weight = module.linear.weight if hasattr(module.linear, "weight") else module.linear.dequantize()
            expected = module.double().changed(weight.double())
            merged = written[torch.float32][hf_name(f"{name}.weight", model.config)[0]]
            assert (merged - expected).abs().max() < 1e-6 * expected.abs().max(), name

    # each dtype is that of float32, rounded once; None is the base's
    changed = [name for name in written[None] if re.search(LINEARS, name)]
    assert len(changed) == 21
    for dtype, tensors in written.items():
        for name, tensor in tensors.items():
            assert torch.equal(tensor, written[torch.float32][name].to(dtype or torch.bfloat16)), name


MIXED = {
    "llama": LINEARS,  # the rest of it is float32
    "phi3": "proj",
    "gpt_neox": "attention|embed_in",
    "gpt2": "c_attn.weight|wte",
    "phi": "weight",
    "starcoder2": "embed_tokens|bias",
}  # a case of families.py -> what of it is bfloat16


@pytest.mark.parametrize("case", MIXED)
@torch.no_grad()
def test_two_dtypes_in_one_checkpoint(case, tmp_path, capsys) -> None:
    """It is used in the wider one, and every copy keeps the dtype of each tensor."""
    folder = of_family(tmp_path / "base", case)
    tensors = load_file(folder / "model.safetensors")
    mixed = {name: value.bfloat16() if re.search(MIXED[case], name) else value for name, value in tensors.items()}
    assert {tensor.dtype for tensor in mixed.values()} == {torch.bfloat16, torch.float32}
    save_file(mixed, folder / "model.safetensors", {"format": "pt"})
    assert error(load_model(folder)(tokens(1, 9)), reference(folder)(tokens(1, 9)).logits) < 1e-5

    # copies
    convert_checkpoint(folder, tmp_path / "lit", False)
    copy = runpy.run_path(str(ROOT / "scripts/convert_lit_checkpoint.py"))["main"]
    copy(tmp_path / "hf", tmp_path / "lit")
    copies = load_file(tmp_path / "hf/model.safetensors")
    assert all(torch.equal(copies[name], mixed[name]) and copies[name].dtype == mixed[name].dtype for name in mixed)
    copy(tmp_path / "half", folder, dtype="float16")
    halves = load_file(tmp_path / "half/model.safetensors")
    assert all(torch.equal(halves[name], mixed[name].half()) for name in mixed)

    # merged: each tensor keeps its dtype, or all get another
    capsys.readouterr()
    adapter = write_adapter(tmp_path / "lora", folder)
    export_merged(adapter, None, tmp_path / "merged")
    assert "Rounded to bfloat16 and float32: " in capsys.readouterr().out
    export_merged(adapter, None, tmp_path / "wide", torch.float32)
    merged, wide = (load_file(tmp_path / name / "model.safetensors") for name in ("merged", "wide"))
    assert merged.keys() == wide.keys() == mixed.keys()
    for name, tensor in merged.items():
        assert tensor.dtype == mixed[name].dtype and torch.equal(tensor, wide[name].to(tensor.dtype)), name
    model, _ = load_finetuned(None, adapter)
    assert error(load_model(tmp_path / "wide")(tokens(1, 9)), model(tokens(1, 9))) < 1e-5


def test_a_lora_is_merged_on_its_way_to_gguf(tiny, tmp_path, capsys) -> None:
    """In float32, and in the style that was trained."""
    convert_checkpoint(tiny, tmp_path / "base", True, torch.bfloat16)
    adapter = write_adapter(tmp_path / "mine", tmp_path / "base", quantize="bnb.nf4", prompt_style="alpaca")
    main = runpy.run_path(str(ROOT / "scripts/convert_lit_checkpoint.py"))["main"]
    main(tmp_path / "gguf", finetuned=adapter, format="gguf", dtype="float32")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "gguf", "mine"]
    assert [path.name for path in (tmp_path / "gguf").iterdir()] == ["mine-float32.gguf"]
    convert_gguf(tmp_path / "gguf/mine-float32.gguf", tmp_path / "again")
    export_merged(adapter, None, tmp_path / "merged", torch.float32)
    merged, again = load_model(tmp_path / "merged"), load_model(tmp_path / "again")
    assert equal(again.state_dict(), merged.state_dict())
    assert Tokenizer(tmp_path / "again").chat_template == Tokenizer(tmp_path / "merged").chat_template


def test_a_base_of_codes_is_refused(tiny, tmp_path) -> None:
    adapter = write_adapter(tmp_path / "lora", tiny)
    convert_checkpoint(tiny, tmp_path / "base", True)
    tensors = load_file(tmp_path / "base/model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    save_file(tensors, tmp_path / "base/model.safetensors", {"format": "pt"})
    for act in (export_merged, export_peft):
        with pytest.raises(InputError, match=r"base is quantized \(float8\): model.layers.0.self_attn.q_proj"):
            act(adapter, tmp_path / "base", tmp_path / "out")


def test_gguf_is_refused_before_anything_is_merged(tiny, tmp_path) -> None:
    folder = of_family(tmp_path / "base", "qwen3")
    with pytest.raises(InputError, match="is no plain llama"):
        export_merged_gguf(write_adapter(tmp_path / "lora", folder), None, tmp_path / "gguf", "float16")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "lora"]


def test_both_bases_of_a_quantized_one(tiny, tmp_path, capsys) -> None:
    """The change fits the weights that the codes stand for; the original ones are another model."""
    adapter = write_adapter(tmp_path / "lora", tiny, quantize="bnb.nf4")
    model, _ = load_finetuned(None, adapter)
    expected = logits_of(model, Tokenizer(tiny))
    export_merged(adapter, None, tmp_path / "default")
    assert "Written: the dequantized ones" in capsys.readouterr().out
    for base in ("original", "dequantized"):
        export_merged(adapter, None, tmp_path / base, base=base)
        output = capsys.readouterr().out
        assert "Nearer to what was trained: the dequantized weights" in output and f"Written: the {base} ones" in output
        assert ("scripts/merge_lora.py --base dequantized writes the others" in output) == (base == "original")
    models = (load_model(tmp_path / base) for base in ("original", "dequantized"))
    original, dequantized = (compare_logits(expected, logits_of(model, Tokenizer(tiny))) for model in models)
    assert dequantized.largest < 1e-4 * dequantized.scale and dequantized.largest < 0.01 * original.largest


@pytest.mark.parametrize("quantize", [None, "bnb.nf4"])
def test_a_merge_that_forgets_the_change_is_not_written(quantize, tiny, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(exporting, "merge_lora_weights", lambda part: replace_modules(part, unwrapped))
    with pytest.raises(InputError, match="merged is not the model that was trained: logits"):
        export_merged(write_adapter(tmp_path / "lora", tiny, quantize=quantize), None, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def unwrapped(name: str, module: torch.nn.Module) -> torch.nn.Module | None:
    return module.linear if isinstance(module, LoRALinear) else None


@pytest.mark.parametrize("base", ["original", "dequantized"])
def test_one_model_at_a_time(base, tiny, tmp_path, monkeypatch) -> None:
    """Of a quantized one; and its base is bfloat16, as most are."""
    alive, most = weakref.WeakSet(), []

    def watched(*args, **kwargs):
        loaded = load_finetuned(*args, **kwargs)
        alive.add(loaded[0])
        most.append(len(alive))
        return loaded

    convert_checkpoint(tiny, tmp_path / "base", True, torch.bfloat16)
    adapter = write_adapter(tmp_path / "lora", tmp_path / "base", quantize="bnb.nf4")
    monkeypatch.setattr(exporting, "load_finetuned", watched)
    export_merged(adapter, None, tmp_path / "merged", base=base)
    assert most == [1, 1, 1]
    assert next(load_model(tmp_path / "merged").parameters()).dtype == torch.bfloat16


def test_what_is_no_lora_is_refused_before_it_is_loaded(tmp_path) -> None:
    header = dict(method="classifier", settings={}, checkpoint_dir="gone", base="", tokenizer="", prompt_style="")
    save_tensors({"head": torch.ones(1)}, tmp_path / "classifier.safetensors", {"lit_gpt": json.dumps(header)})
    for act in (export_merged, export_peft):
        with pytest.raises(InputError, match="was trained with classifier"):
            act(tmp_path, None, tmp_path / "out")


def test_a_whole_model_is_copied(tiny, tmp_path) -> None:
    header = dict(method="full", settings={}, checkpoint_dir="gone", base="", tokenizer="", prompt_style="")
    model, best = load_model(tiny), tmp_path / "run" / "best"
    model.lm_head.weight.data *= 2
    best.mkdir(parents=True)
    write_files(model.named_parameters(), model.config, tiny, best, metadata={"lit_gpt": json.dumps(header)})
    runpy.run_path(str(ROOT / "scripts/convert_lit_checkpoint.py"))["main"](tmp_path / "copy", finetuned=best.parent)
    for (name, ours), copied in zip(model.state_dict().items(), load_model(tmp_path / "copy").state_dict().values()):
        assert torch.equal(ours, copied), name
    with pytest.raises(InputError, match="holds a whole model, nothing to merge: --checkpoint_dir .*run/best"):
        export_merged(best.parent, None, tmp_path / "merged")


def test_a_little_less_than_the_model_is_not_kept(tiny, tmp_path) -> None:
    """A copy is exact in any dtype: one row of one weight shows."""
    exact = load_model(tiny, torch.bfloat16)
    expected = logits_of(exact, Tokenizer(tiny))
    exact.transformer.h[0].mlp.proj.weight.data[3] *= 1.05
    with pytest.raises(InputError, match="not the model: logits"):
        save_hf(exact, tiny, tmp_path / "wrong", check=lambda folder: verify_copy(expected, folder))


def test_what_is_not_the_model_is_not_kept(tiny, tmp_path) -> None:
    adapter = write_adapter(tmp_path / "lora", tiny)
    expected = logits_of(load_finetuned(None, adapter)[0], Tokenizer(tiny))
    with pytest.raises(InputError, match="not the model: logits"):
        convert_checkpoint(tiny, tmp_path / "wrong", True, check=lambda folder: verify_copy(expected, folder))
    assert not (tmp_path / "wrong").exists() and not list(tmp_path.glob(".wrong*"))


@pytest.mark.parametrize(("dtype", "largest"), [(torch.float16, 0.01), (torch.bfloat16, 0.1)])
def test_rounding_is_not_an_error(dtype, largest, tiny, tmp_path, capsys) -> None:
    expected, rounded = (logits_of(load_model(tiny, kind), Tokenizer(tiny)) for kind in (None, dtype))
    convert_checkpoint(tiny, tmp_path / "copy", True, dtype, check=lambda folder: verify_copy(rounded, folder))
    assert f"Read back in {str(dtype)[6:]}" in capsys.readouterr().out
    found = compare_logits(expected, logits_of(load_model(tmp_path / "copy"), Tokenizer(tiny)))
    assert 0 < found.largest < largest * found.scale and found.mean < found.largest


def too_large(folder: Path, source: Path) -> Path:
    """A copy with a weight beyond float16."""
    model = load_model(source)
    model.transformer.h[1].mlp.proj.weight.data[3, 4] = -1e5
    save_hf(model, source, folder)
    return folder


TOO_LARGE = r"h.1.mlp.proj.weight holds 1e\+05, and float16 ends at 6.55e\+04. Choose bfloat16 or float32."
EXPORTS = {
    "hf": lambda source, out, adapter: convert_checkpoint(source, out, True, torch.float16),
    "lit": lambda source, out, adapter: convert_checkpoint(source, out, False, torch.float16),
    "merged": lambda source, out, adapter: export_merged(adapter, None, out, torch.float16),
    "loaded": lambda source, out, adapter: load_model(source, torch.float16),
}


@pytest.mark.parametrize("act", EXPORTS)
def test_what_float16_cannot_hold_is_named(act, tiny, tmp_path) -> None:
    source = too_large(tmp_path / "large", tiny)
    # of the head alone: behind such a weight all rounding is too large for merging, which says that first
    head = LoRA(r=4, query=False, key=False, value=False, projection=False, mlp=False, head=True)
    adapter = write_adapter(tmp_path / "lora", source, head) if act == "merged" else None
    with pytest.raises(InputError, match=TOO_LARGE):
        EXPORTS[act](source, tmp_path / "out", adapter)
    assert not (tmp_path / "out").exists()
    load_model(source, torch.bfloat16)


def test_what_rounding_does_is_printed(tiny, tmp_path) -> None:
    """Next to the exact comparison with what was written."""
    adapter, scripts = write_adapter(tmp_path / "lora", tiny), ROOT / "scripts"
    copied = (scripts / "convert_lit_checkpoint.py", "--checkpoint_dir", tiny)
    merged = (scripts / "merge_lora.py", "--finetuned", adapter)
    for i, command in enumerate((copied, merged)):
        out = python(*command, "--dtype", "bfloat16", "--out_dir", tmp_path / str(i), check=True).stdout
        found = dict(re.findall(r"^(Rounded to|Read back in) bfloat16: .* at most (\S+),", out, re.M))
        assert float(found["Rounded to"]) > 0.01 > float(found["Read back in"]), out


def test_peft_folder_from_the_script(tiny, tmp_path) -> None:
    from peft import PeftModel

    adapter = write_adapter(tmp_path / "lora", tiny)
    export_peft(adapter, None, tmp_path / "peft")
    theirs = PeftModel.from_pretrained(reference(tiny), tmp_path / "peft").eval()
    with torch.no_grad():
        ours, _ = load_finetuned(None, adapter)
        assert error(theirs(tokens(1, 15)).logits, ours(tokens(1, 15))) < 1e-5
        assert torch.equal(load_finetuned(tiny, tmp_path / "peft")[0](tokens(1, 15)), ours(tokens(1, 15)))
    # with the tokenizer, its template and what ends a text
    again, before = Tokenizer(tmp_path / "peft"), Tokenizer(tiny)
    assert again.behaviour == before.behaviour and not (tmp_path / "peft" / "config.json").exists()


@torch.no_grad()
@pytest.mark.parametrize("scale", [0.0, 0.6, 1.25])
@pytest.mark.parametrize("lora", [LoRA(r=4), LoRA(r=4, dora=True, alpha_pattern={"attn.q": 3})], ids=["lora", "dora"])
def test_exports_take_a_scale_along(lora, scale, tiny, tmp_path) -> None:
    """Merged and for peft they are the model that is used with this scale; 0 is the base. Headers say it."""
    from peft import PeftModel

    adapter = write_adapter(tmp_path / "lora", tiny, lora)
    export_merged(adapter, None, tmp_path / "merged", scale=scale)
    export_peft(adapter, None, tmp_path / "peft", scale=scale)
    ours, _ = load_finetuned(None, adapter, scale=scale)
    expected = ours(tokens(1, 15))
    assert error(reference(tmp_path / "merged")(tokens(1, 15)).logits, expected) < 1e-5
    theirs = PeftModel.from_pretrained(reference(tiny), tmp_path / "peft").eval()
    assert error(theirs(tokens(1, 15)).logits, expected) < 1e-5
    assert (error(load_model(tiny)(tokens(1, 15)), expected) < 1e-5) == (scale == 0)
    for file in ("merged/model.safetensors", "peft/adapter_model.safetensors"):
        assert read_metadata(tmp_path / file)["lit_gpt.scale"] == f"{scale:g}"


def test_what_was_not_fine_tuned_has_no_scale(tiny, tmp_path) -> None:
    main = script("scripts/convert_lit_checkpoint.py").main
    with pytest.raises(InputError, match=r"^--scale 0\.5 is for what was fine-tuned\. Name it: --finetuned\.$"):
        main(tmp_path / "out", checkpoint_dir=tiny, scale=0.5)
    with pytest.raises(InputError, match=r"^--scale 0\.5 is for what was fine-tuned\. Name it: --finetuned\.$"):
        load_for_use(UseArgs(checkpoint_dir=tiny, scale=0.5), torch.device("cpu"))
    assert not (tmp_path / "out").exists()


@torch.no_grad()
def test_peft_of_a_head_that_is_the_embedding(tied_dir, tmp_path) -> None:
    adapter = write_adapter(tmp_path / "lora", tied_dir, LoRA(r=4, head=True))
    export_peft(adapter, None, tmp_path / "peft")
    ours, again = (load_finetuned(tied_dir, folder)[0] for folder in (adapter, tmp_path / "peft"))
    assert torch.equal(ours(tokens(1, 15)), again(tokens(1, 15)))
    assert error(load_model(tied_dir)(tokens(1, 15)), ours(tokens(1, 15))) > 1e-2


@torch.no_grad()
def test_peft_of_a_quantized_base(tiny, tmp_path, capsys) -> None:
    """peft keeps nothing of the base's codes: what it gets on the original weights is told, and the codes are known."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig  # noqa: F401 # of the line that is printed

    adapter = write_adapter(tmp_path / "lora", tiny, quantize="bnb.nf4")
    export_peft(adapter, None, tmp_path / "peft")
    printed = capsys.readouterr()
    assert f"{adapter} was trained on weights in bnb.nf4" in printed.err and ".partial" not in printed.err
    assert "On the original weights: logits" in printed.out

    # read again, as it was trained; and on original weights, with a line, or merged
    ours, again = (load_finetuned(None, folder)[0] for folder in (adapter, tmp_path / "peft"))
    assert torch.equal(ours(tokens(1, 15)), again(tokens(1, 15))) and not capsys.readouterr().err
    original, _ = load_finetuned(None, tmp_path / "peft", quantize="none")
    assert "was trained on weights in bnb.nf4" in capsys.readouterr().err
    export_merged(tmp_path / "peft", None, tmp_path / "merged")
    assert error(load_model(tmp_path / "merged")(tokens(1, 15)), ours(tokens(1, 15))) < 1e-4

    # the line's own words make it nearly the same in peft (bitsandbytes computes in 16 bits)
    quantized = eval(re.search(r"quantization_config=(.*)\.", printed.out)[1])
    base = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32, quantization_config=quantized)
    theirs = PeftModel.from_pretrained(base, tmp_path / "peft").eval()(tokens(1, 15)).logits.float()
    assert 3 * error(theirs, ours(tokens(1, 15))) < error(original(tokens(1, 15)), ours(tokens(1, 15)))


def as_peft_writes(folder: Path) -> None:
    """Takes from an adapter what only this toolkit writes."""
    file = folder / "adapter_model.safetensors"
    save_file(load_file(file), file, {"format": "pt"})


def test_nothing_is_said_of_how_peft_has_trained(tiny, tmp_path, capsys) -> None:
    """An adapter of peft does not say whether its base was quantized."""
    export_peft(write_adapter(tmp_path / "lora", tiny), None, tmp_path / "peft")
    as_peft_writes(tmp_path / "peft")
    for quantize in ("none", "bnb.nf4"):
        load_finetuned(None, tmp_path / "peft", quantize=quantize)
    assert not capsys.readouterr().err


@torch.no_grad()
def test_a_qlora_of_peft_is_merged_as_its_user_says(tiny, tmp_path, capsys) -> None:
    """Into the weights that its codes stand for; without the flag, a line says that it exists."""
    adapter = write_adapter(tmp_path / "lora", tiny)
    export_peft(adapter, None, tmp_path / "peft")
    as_peft_writes(tmp_path / "peft")
    for quantize in ("auto", "none", "bnb.nf4"):
        export_merged(tmp_path / "peft", None, tmp_path / quantize, torch.float32, quantize=quantize)
        told = "does not say whether its base was quantized in training. If it was: --quantize"
        assert (told in capsys.readouterr().out) == (quantize == "auto")
        trained, _ = load_finetuned(None, tmp_path / "peft", quantize="none" if quantize == "auto" else quantize)
        assert error(load_model(tmp_path / quantize)(tokens(1, 15)), trained(tokens(1, 15))) < 1e-4
    with pytest.raises(InputError, match="says itself that it was trained on the original weights: leave out"):
        export_merged(adapter, None, tmp_path / "no", quantize="bnb.nf4")
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("format", ["hf", "merged", "peft", "gguf"])
def test_a_folder_with_something_in_it_is_left_alone(format, tiny, tmp_path) -> None:
    """Also the checkpoint's own; before anything is loaded."""
    adapter, before = tmp_path / "lora", {path: path.stat().st_mtime_ns for path in tiny.iterdir()}
    act = {
        "hf": lambda: convert_checkpoint(tiny, tiny, True),
        "merged": lambda: export_merged(adapter, tiny, tiny),
        "peft": lambda: export_peft(adapter, tiny, tiny),
        "gguf": lambda: gguf_out.export_gguf(tiny, tiny, "float16"),
    }[format]
    with pytest.raises(InputError, match="model is not empty. Name another folder"):
        act()
    assert {path: path.stat().st_mtime_ns for path in tiny.iterdir()} == before


# ---- GGUF


@pytest.mark.parametrize("kind", ["float32", "float16", "q8_0"])
def test_gguf_is_the_model(kind, tiny, tmp_path, capsys) -> None:
    path = gguf_out.export_gguf(tiny, tmp_path / "gguf", kind)
    assert path.is_file() and "tokens are the same" in capsys.readouterr().out
    convert_gguf(path, tmp_path / "again")
    for (name, ours), theirs in zip(
        load_model(tiny).state_dict().items(), load_model(tmp_path / "again").state_dict().values(), strict=True
    ):
        if kind == "float32" or ours.ndim == 1:
            assert torch.equal(ours, theirs), name
        elif kind == "float16":
            assert torch.equal(ours.half().float(), theirs), name
        else:  # 32 values share a scale, which is their largest over 127, in float16
            step = ours.unflatten(-1, (-1, 32)).abs().amax(-1, keepdim=True) / 127
            assert ((ours - theirs).unflatten(-1, (-1, 32)).abs() <= 0.51 * step + 1e-3 * step * 127).all(), name
    again, before = Tokenizer(tmp_path / "again"), Tokenizer(tiny)
    assert again.chat_template == before.chat_template and again.stop_ids == before.stop_ids


def test_gguf_has_all_chat_templates(tiny, tmp_path) -> None:
    folder = shutil.copytree(tiny, tmp_path / "tiny")
    write(folder / "additional_chat_templates", tool_use_jinja="{{ tools }}{{ messages }}")
    before = Tokenizer(folder).chat_templates
    path = gguf_out.export_gguf(folder, tmp_path / "gguf", "float32")
    convert_gguf(path, tmp_path / "again")
    assert list(before) == ["default", "tool_use"] and Tokenizer(tmp_path / "again").chat_templates == before


def pieces_dir(folder: Path, sample_dir: Path, kind: str, **settings) -> Path:
    """A tiny llama with a sentencepiece tokenizer: tokenizer.model, or a tokenizer.json as Llama 2 has it."""
    make_tiny(folder, sample_dir, vocab_size=512, hidden_size=64, num_attention_heads=4)
    (folder / "tokenizer.json").unlink()
    file = {"tokenizer_json": metaspace()} if kind == "json" else {"tokenizer_model": sentencepiece(**settings)}
    return write(folder, **file, tokenizer_config_json=SPECIAL | {"add_bos_token": True})


@pytest.mark.parametrize("kind", ["model", "json"])
def test_gguf_has_the_pieces_of_sentencepiece(kind, sample_dir, tmp_path) -> None:
    folder = pieces_dir(tmp_path / "model", sample_dir, kind, user_defined_symbols=["<pre>"])
    path = gguf_out.export_gguf(folder, tmp_path / "gguf", "float32")
    found = {key.removeprefix("tokenizer.ggml."): value for key, value in read_gguf(path)[0].items()}
    before, n_words = Tokenizer(folder), Tokenizer(folder).vocab_size
    assert found["tokens"][:n_words] == [before.id_to_token(i) for i in range(n_words)]
    types, words = found["token_type"], found["tokens"]
    expected = {"<unk>": 2, "<s>": 3, "</s>": 3, "<0x00>": 6, "<0xFF>": 6, "▁": 1, "a": 1, "[PAD511]": 5}
    assert {word: types[words.index(word)] for word in expected} == expected and types.count(6) == 256
    if kind == "model":
        assert types[words.index("<pre>")] == 4 and types.count(4) == 1
        assert found["scores"][:n_words] == [before.processor.get_score(i) for i in range(n_words)]
    else:  # joined in the order of the merges
        assert (
            found["scores"][words.index("▁a")] > found["scores"][words.index("▁▁")] > found["scores"][words.index("a")]
        )
    ids = [found[f"{name}_token_id"] for name in ("unknown", "bos", "eos")]
    assert ids == [0, 1, 2] and found["model"] == "llama" and found["add_space_prefix"]
    assert found["add_bos_token"] == before.use_bos == (kind == "model")

    convert_gguf(path, tmp_path / "again")
    after = Tokenizer(tmp_path / "again")
    for text in ALL_SORTS:
        assert after.encode(text).tolist() == before.encode(text).tolist(), text
        assert after.decode(after.encode(text)) == before.decode(before.encode(text)), text


def test_pieces_that_llama_cpp_would_cut_otherwise(sample_dir, tmp_path) -> None:
    cases = [dict(normalization_rule_name="nmt_nfkc"), dict(model_type="unigram"), dict(byte_fallback=False)]
    for i, case in enumerate([*cases, dict(remove_extra_whitespaces=True)]):
        folder = pieces_dir(tmp_path / str(i), sample_dir, "model", **case)
        with pytest.raises(InputError, match="llama.cpp would find other tokens"):
            gguf_out.export_gguf(folder, tmp_path / "gguf", "float32")
    folder = pieces_dir(tmp_path / "few", sample_dir, "json")
    words = json.loads((folder / "tokenizer.json").read_text())
    words["model"]["merges"].pop()  # llama.cpp would join the two all the same, as they are a token
    (folder / "tokenizer.json").write_text(json.dumps(words))
    with pytest.raises(InputError, match="llama.cpp would find other tokens"):
        gguf_out.export_gguf(folder, tmp_path / "gguf", "float32")


def test_tokens_beside_a_tokenizer_model_are_pieces(tmp_path) -> None:
    """Special ones as such; what is beyond the rows of the embedding is none of the model's."""
    decoder = {"400": {"content": "<|im_start|>", "special": True}, "405": {"content": "<think>"}}
    config = SPECIAL | {"added_tokens_decoder": decoder | {"406": {"content": "<pad>"}}}
    folder = write(tmp_path / "model", tokenizer_model=sentencepiece(), tokenizer_config_json=config)
    values = gguf_vocabulary(folder, Config(vocab_size=406), Tokenizer(folder))
    assert [values["add_token_list"][i] for i in (400, 401, 405)] == ["<|im_start|>", "[PAD401]", "<think>"]
    assert [values["add_token_types"][i] for i in (400, 401, 405)] == [CONTROL, UNUSED, USER_DEFINED]
    assert len(values["add_token_list"]) == 406


def test_rotary_scaling_of_llama_3_goes_along(sample_dir, tmp_path) -> None:
    scaling = dict(
        rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, rope_theta=5000.0,
        original_max_position_embeddings=32,
    )  # fmt: skip
    folder = make_tiny(tmp_path / "model", sample_dir, rope_parameters=scaling, hidden_size=64, num_attention_heads=4)
    gguf_out.export_gguf(folder, tmp_path / "gguf", "float32")


def test_no_plain_llama_is_refused(tmp_path) -> None:
    for case, reason in (("qwen3", ".*qk_norm"), ("smollm3", ".layers without positions")):
        folder = make(tmp_path / case, *CASES[case])
        with pytest.raises(InputError, match=f"no plain llama {reason}"):
            gguf_out.check_plain_llama(Config.from_checkpoint(folder))


LLAMA_CPP = """
import json, sys
from llama_cpp import Llama
model = Llama(sys.argv[1], n_ctx=256, verbose=False)
for ids in json.loads(sys.argv[2]):
    new = model.generate(ids, temp=0.0, top_k=1, repeat_penalty=1.0)
    print(json.dumps([token for _, token in zip(range(20), new)]))
"""


@pytest.mark.parametrize("kind", ["float16", "q8_0"])
def test_llama_cpp_writes_the_same(kind, sample_dir, tmp_path) -> None:
    """Greedy tokens of the sample model; of the one with rounded weights, where they were rounded."""
    pytest.importorskip("llama_cpp")
    path = gguf_out.export_gguf(sample_dir, tmp_path / "gguf", kind)
    convert_gguf(path, tmp_path / "again")
    tokenizer, model = Tokenizer(sample_dir), load_model(tmp_path / "again")
    prompts = [tokenizer.encode(text) for text in TEXTS[:3]]
    command = [sys.executable, "-c", LLAMA_CPP, str(path), json.dumps([ids.tolist() for ids in prompts])]
    found = subprocess.check_output(command, text=True).strip().splitlines()[-3:]
    for ids, theirs in zip(prompts, found, strict=True):
        assert list(stream(model, ids, len(ids) + 20, temperature=0.0)) == json.loads(theirs)


@pytest.mark.parametrize("kind", ["model", "json"])
def test_llama_cpp_reads_the_same_pieces(kind, sample_dir, tmp_path) -> None:
    pytest.importorskip("llama_cpp")
    folder = pieces_dir(tmp_path / "model", sample_dir, kind, user_defined_symbols=["<pre>"])
    path, tokenizer = gguf_out.export_gguf(folder, tmp_path / "gguf", "float32"), Tokenizer(folder)
    texts = [text for text in ALL_SORTS if text and "<" not in text]  # no special tokens; llama.cpp has no empty text
    found = llama_cpp_tokens(path, texts, special=True)
    assert found == [encoded.ids for encoded in tokenizer.encode_batch(texts, bos=False)]


def test_more_stop_tokens_than_gguf_holds(tiny, tmp_path) -> None:
    source = tmp_path / "model"
    convert_checkpoint(tiny, source, True)
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 0, 3, 4]}))
    with pytest.raises(InputError, match=r"has 4 stop tokens, \[2, 0, 3, 4\], a GGUF file at most 3"):
        gguf_out.export_gguf(source, tmp_path / "gguf", "float16")
    with pytest.raises(InputError, match=TOO_LARGE.replace("h.1.mlp.proj", "blk.1.ffn_down")):
        gguf_out.export_gguf(too_large(tmp_path / "large", tiny), tmp_path / "gguf", "float16")


def test_convert_script(tiny, tmp_path) -> None:
    command = [ROOT / "scripts/convert_lit_checkpoint.py", "--checkpoint_dir", tiny]
    python(*command, "--out_dir", tmp_path / "copy", "--dtype", "bfloat16", check=True)
    assert next(load_model(tmp_path / "copy").parameters()).dtype == torch.bfloat16
    for message, *flags in (
        ("--finetuned", "--format", "peft"),
        ("--dtype float16 is not for --format peft", "--format", "peft", "--dtype", "float16"),
        ("--max_shard_size is -1.0, expected more than 0", "--max_shard_size", "-1"),
    ):
        refused = python(*command, "--out_dir", tmp_path / "x", *flags)
        assert refused.returncode == 2 and message in refused.stderr and refused.stderr.count("\n") == 1


def test_a_proof_says_how_the_loss_changes(tiny) -> None:
    """With an interval; and of a copy that it is the same."""
    model, tokenizer = load_model(tiny), Tokenizer(tiny)
    expected = logits_of(model, tokenizer)
    assert str(compare_logits(expected, logits_of(model, tokenizer))).endswith("the loss is the same to six digits")
    model.lm_head.weight.data *= 1.1
    actual = logits_of(model, tokenizer)
    difference = compare_logits(expected, actual)

    def mean_loss(texts: Logits) -> float:
        logits = torch.cat([text.logits[:-1] for text in texts])
        targets = torch.cat([tokenizer.encode(text)[1:] for text in TEXTS])
        return torch.nn.functional.cross_entropy(logits, targets).item()

    change = mean_loss(actual) - mean_loss(expected)
    assert difference.loss.mean == pytest.approx(change, rel=1e-3)
    assert difference.loss.low < change < difference.loss.high
    assert re.search(r"the loss changes by [+-]\d\.\d+ \[.+, .+\] nats per token$", str(difference))
