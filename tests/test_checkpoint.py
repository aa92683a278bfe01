"""Reading and writing checkpoint folders: `pytest tests/test_checkpoint.py`, about 30 s"""

import json
import math
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from helpers.families import CASES, make, tokens
from helpers.models import edit_config, make_checkpoint, reference
from helpers.shell import python
from safetensors.torch import load_file, save_file
from torch.multiprocessing.reductions import StorageWeakRef

from lit_gpt import Config, InputError, files
from lit_gpt.checkpoint import load, save
from lit_gpt.checkpoint.load import build_model, load_model, load_weights
from lit_gpt.checkpoint.save import convert_checkpoint
from lit_gpt.checkpoint.tensor_names import hf_name


@pytest.fixture(scope="module", params=["untied", "tied"])
def source(request, tmp_path_factory) -> Path:
    """A checkpoint as transformers writes it, without a tokenizer. Read-only."""
    return make_checkpoint(tmp_path_factory.mktemp("source") / "hf", tie_word_embeddings=request.param == "tied")


@pytest.fixture
def copy(tmp_path, tmp_path_factory) -> Path:
    """One that a test may damage."""
    return make_checkpoint(tmp_path / "hf")


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {key: value for file in sorted(folder.glob("*.safetensors")) for key, value in load_file(file).items()}


def fingerprint(folder: Path) -> str:
    return load_weights(build_model(Config.from_checkpoint(folder)), folder)


def save_bins(folder: Path, parts: list[dict[str, torch.Tensor]], **options) -> None:
    names = [f"pytorch_model-{i}.bin" for i in range(len(parts))] if len(parts) > 1 else ["pytorch_model.bin"]
    for name, part in zip(names, parts):
        torch.save(part, folder / name, **options)
    if len(parts) > 1:
        weight_map = {key: name for name, part in zip(names, parts) for key in part}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))


def in_layout(layout: str, source: Path, out: Path, monkeypatch) -> Path:
    """A copy of `source` in another layout of files."""
    kind, _, parts = layout.partition(", ")
    monkeypatch.setattr(save, "MAX_SHARD", 20_000 if parts == "sharded" else 10**9)
    if kind == "safetensors":
        reference(source).save_pretrained(out, max_shard_size="20KB" if parts == "sharded" else "1GB")
    elif kind == "converted":
        convert_checkpoint(source, out, hugging_face=False)
    else:
        shutil.copytree(source, out, ignore=shutil.ignore_patterns("*.safetensors"))
        tensors = list(tensors_of(source).items())
        half = [dict(tensors[:9]), dict(tensors[9:])]
        save_bins(out, half if parts == "sharded" else [dict(tensors)], _use_new_zipfile_serialization=parts != "old")
    return out


@pytest.mark.parametrize(
    "layout",
    ["safetensors, sharded", "bin", "bin, sharded", "bin, old", "converted", "converted, sharded"],
)  # fmt: skip
def test_every_layout_of_files_is_the_same_model(layout, source, tmp_path, monkeypatch) -> None:
    folder = in_layout(layout, source, tmp_path / "copy", monkeypatch)
    weights = list(folder.glob("*.safetensors")) + list(folder.glob("*.bin"))
    assert (len(weights) > 1) == layout.endswith("sharded")
    model, theirs = load_model(folder), reference(source)
    assert set(dict(model.named_parameters())) == set(dict(load_model(source).named_parameters()))
    for name, param in model.named_parameters():
        assert torch.equal(param, theirs.get_parameter(hf_name(name, model.config)[0])), name
        assert not param.requires_grad and not param.is_meta
    assert (model.lm_head.weight is model.transformer.wte.weight) == model.config.tie_embeddings
    assert fingerprint(folder) == fingerprint(source)


def test_dtype(source, tmp_path) -> None:
    exact = dict(load_model(source).named_parameters())
    convert_checkpoint(source, tmp_path / "bf16", hugging_face=True, dtype=torch.bfloat16)
    for model in (load_model(source, dtype=torch.bfloat16), load_model(tmp_path / "bf16")):
        for name, param in model.named_parameters():
            assert param.dtype == torch.bfloat16 and torch.equal(param, exact[name].bfloat16())
        assert model.ropes["global"].theta.dtype == torch.float32
    wide = load_model(tmp_path / "bf16", dtype=torch.float32)
    assert all(torch.equal(param, exact[name].bfloat16().float()) for name, param in wide.named_parameters())
    assert json.loads((tmp_path / "bf16" / "config.json").read_text())["dtype"] == "bfloat16"

    # of both versions of transformers, if both have written the file
    edit_config(tmp_path / "bf16", {"torch_dtype": "bfloat16", "architectures": None})
    convert_checkpoint(tmp_path / "bf16", tmp_path / "f32", hugging_face=True, dtype=torch.float32)
    hf = json.loads((tmp_path / "f32" / "config.json").read_text())
    assert hf["dtype"] == hf["torch_dtype"] == "float32"


@pytest.mark.parametrize("max_shard", [10**9, 3 * 10**5])
@pytest.mark.parametrize("kind", ["tiny_dir", "tied_dir"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_there_and_back_is_bit_identical(kind, max_shard, dtype, request, tmp_path, monkeypatch) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source, ours, back = request.getfixturevalue(kind), tmp_path / "ours", tmp_path / "back"
    monkeypatch.setattr(save, "MAX_SHARD", max_shard)
    convert_checkpoint(source, ours, hugging_face=False, dtype=dtype)
    convert_checkpoint(ours, back, hugging_face=True)

    assert (len(list(back.glob("*.safetensors"))) > 1) == (max_shard < 10**9)
    before = {key: value.to(dtype or value.dtype) for key, value in tensors_of(source).items()}
    after = tensors_of(back)
    assert before.keys() == after.keys()
    assert all(torch.equal(after[key], before[key]) and after[key].dtype == before[key].dtype for key in before)
    theirs, again = (AutoModelForCausalLM.from_pretrained(folder, dtype="auto") for folder in (source, back))
    for name, param in again.named_parameters():
        assert param.dtype == (dtype or torch.float32)
        assert torch.equal(param, theirs.get_parameter(name).to(param.dtype))
    text = "Größe, 3.14 and\n\tall that"
    assert AutoTokenizer.from_pretrained(back)(text) == AutoTokenizer.from_pretrained(source)(text)
    assert Config.from_checkpoint(back, name="") == Config.from_checkpoint(source, name="")


@pytest.mark.parametrize("case", ["gpt2", "gpt_neox", "falcon 40b", "phi3"])
@torch.no_grad()
def test_a_copy_computes_the_same_in_float16(case, tmp_path) -> None:
    """Its sums depend on how a weight lies in memory, such as GPT-2's, which its files have transposed."""
    source = make(tmp_path / "source", *CASES[case])
    convert_checkpoint(source, tmp_path / "ours", hugging_face=False, dtype=torch.float16)
    convert_checkpoint(tmp_path / "ours", tmp_path / "back", hugging_face=True)
    folders = (source, tmp_path / "ours", tmp_path / "back")
    first, *others = (load_model(folder, torch.float16)(tokens(1, 9)) for folder in folders)
    assert all(torch.equal(other, first) for other in others)


OLD_CONFIGS = {  # (case of test_families, its model_type before transformers knew it, names then)
    "RefinedWeb": (
        "falcon 40b",
        dict(num_hidden_layers="n_layer", num_attention_heads="n_head", num_kv_heads="n_head_kv"),
    ),
    "RefinedWebModel": ("falcon 7b", dict(num_hidden_layers="n_layer", num_attention_heads="n_head")),
    "stablelm_epoch": ("stablelm", dict(layer_norm_eps="norm_eps")),
}


@pytest.mark.parametrize("model_type", OLD_CONFIGS)
@torch.no_grad()
def test_a_copy_needs_no_code_of_its_own(model_type, tmp_path) -> None:
    """Where config.json named code, transformers' own class loads what is written."""
    from transformers import AutoModelForCausalLM

    case, names = OLD_CONFIGS[model_type]
    source = make(tmp_path / "source", *CASES[case])
    expected = reference(source)(tokens(1, 9)).logits
    hf = json.loads((source / "config.json").read_text())
    old = {names.get(key, key): value for key, value in hf.items() if key != "new_decoder_architecture"}
    old |= dict(model_type=model_type, architectures=["Other"], auto_map={"AutoModelForCausalLM": "other.Other"})
    if case == "stablelm":
        old |= dict(rope_pct=0.25, rope_theta=old.pop("rope_parameters")["rope_theta"])
    (source / "config.json").write_text(json.dumps(old))
    convert_checkpoint(source, tmp_path / "copy", hugging_face=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "copy", attn_implementation="eager")
    assert type(model).__name__ in ("FalconForCausalLM", "StableLmForCausalLM")
    assert (model(tokens(1, 9)).logits - expected).abs().max() < 1e-5 * expected.abs().max()


def test_fingerprint_follows_copies_and_tells_weights_apart(copy, tmp_path) -> None:
    base = fingerprint(copy)
    convert_checkpoint(copy, tmp_path / "ours", hugging_face=False, dtype=torch.bfloat16)
    convert_checkpoint(tmp_path / "ours", tmp_path / "theirs", hugging_face=True, dtype=torch.float16)
    assert fingerprint(tmp_path / "ours") == fingerprint(tmp_path / "theirs") == base
    change(copy, lambda tensors: tensors["model.norm.weight"][7].mul_(1.001))
    assert fingerprint(copy) != base


@pytest.mark.parametrize("dtype", [torch.bfloat16, None])
def test_tensors_are_converted_one_at_a_time(copy, dtype, monkeypatch) -> None:
    """With another dtype no more than two of the file's tensors live at once; without, they are the model."""
    alive = watch(monkeypatch)
    model = load_model(copy, dtype=dtype)
    assert len(alive) == len(list(model.parameters())) > 15
    assert max(alive) <= 2 if dtype else max(alive) >= 15


@pytest.mark.parametrize("hugging_face", [False, True])
@pytest.mark.parametrize("max_shard", [None, 20_000])
def test_a_copy_reads_every_tensor_once(hugging_face, max_shard, copy, tmp_path, monkeypatch) -> None:
    """And holds no more than two; all its files say what it is a copy of."""
    expected, alive = fingerprint(copy), watch(monkeypatch)
    convert_checkpoint(copy, tmp_path / "out", hugging_face, max_shard=max_shard)
    assert len(alive) == len(tensors_of(copy)) > 15 and max(alive) <= 2
    written = sorted((tmp_path / "out").glob("*.safetensors"))
    assert {load.read_metadata(file)[load.FINGERPRINT_KEY] for file in written} == {expected}
    assert (len(written) > 1) == (max_shard is not None)


def watch(monkeypatch) -> list[int]:
    """How many tensors of the files were alive, each time that one was read."""
    read, seen, alive = load.read_tensors, [], []

    def watched(paths, **settings):
        for name, tensor in read(paths, **settings):
            seen.append(StorageWeakRef(tensor.untyped_storage()))
            alive.append(sum(not storage.expired() for storage in seen))
            yield name, tensor

    monkeypatch.setattr(load, "read_tensors", watched)
    return alive


def change(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def as_bin(folder: Path, content: object = None) -> Path:
    torch.save(load_file(folder / "model.safetensors") if content is None else content, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return folder / "pytorch_model.bin"


def index(folder: Path, text: str) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(text)


LAYER_1 = "model.layers.1.mlp.up_proj.weight"
BAD = {
    "no folder": (shutil.rmtree, r"hf is not there\. .*download_sample"),
    "no config": (lambda f: (f / "config.json").unlink(), r"hf is no checkpoint: it has no config.json"),
    "config.json": (lambda f: (f / "config.json").write_text("{"), r"config.json is not readable as JSON"),
    "config.json is a list": (lambda f: (f / "config.json").write_text("[]"), r"config.json holds a list"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), r"hf has no weights: no model.safetensors"),
    "shard": (lambda f: index(f, '{"weight_map": {"a": "m-1", "b": "m-2"}}'), r"hf lacks m-1, m-2"),
    "index": (lambda f: index(f, "<html>"), r"index.json is not readable as JSON"),
    "index of nothing": (lambda f: index(f, '{"weight_map": {}}'), r"hf lacks all weights"),
    "index of a list": (lambda f: index(f, '{"weight_map": ["a"]}'), r"index.json holds a value that cannot be used"),
    "index of text": (lambda f: index(f, '{"weight_map": "abc"}'), r"index.json holds a value that cannot be used"),
    "index of null": (lambda f: index(f, '{"weight_map": {"a": null}}'), r"index.json holds a value that cannot be"),
    "index without names": (lambda f: index(f, "{}"), r"index.json.*weight_map"),
    "truncated": (lambda f: truncate(f / "model.safetensors"), r"model.safetensors is damaged or incomplete"),
    "empty": (lambda f: (f / "model.safetensors").write_bytes(b""), r"model.safetensors is damaged or incomplete"),
    "truncated bin": (lambda f: truncate(as_bin(f)), r"pytorch_model.bin is damaged"),
    "empty bin": (lambda f: as_bin(f).write_bytes(b""), r"pytorch_model.bin is damaged"),
    "bin of a list": (lambda f: as_bin(f, [1, 2]), r"pytorch_model.bin.* no plain file of tensors"),
    "bin of settings": (lambda f: as_bin(f, {"step": 3}), r"pytorch_model.bin.* no plain file of tensors.*step"),
    "NaN": (lambda f: change(f, lambda t: t[LAYER_1][3, 4].fill_(math.nan)), rf"{LAYER_1} holds NaN"),
    "infinite": (lambda f: change(f, lambda t: t[LAYER_1][3, 4].fill_(-math.inf)), rf"{LAYER_1} holds NaN or inf"),
    "missing": (lambda f: change(f, lambda t: t.pop(LAYER_1)), rf"{LAYER_1} is missing"),
    "superfluous": (
        lambda f: change(f, lambda t: t.update({"model.layers.2.mlp.up_proj.weight": torch.ones(1)})),
        r"model.layers.2.mlp.up_proj.weight has no place in a model of 2 layers",
    ),
    "unknown": (lambda f: change(f, lambda t: t.update(what=torch.ones(1))), r"what is in no llama model"),
    "bias": (
        lambda f: change(f, lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(48)})),
        r"self_attn.q_proj.bias has no place",
    ),
    "shape": (
        lambda f: change(f, lambda t: t.update({LAYER_1: torch.ones(3, 4)})),
        rf"{LAYER_1} has shape \[3, 4\], the config says \[64, 48\]",
    ),
    "other config": (lambda f: edit_config(f, {"num_hidden_layers": 1}), r"layers.1.* \(and 4 more\)"),
}  # fmt: skip


def test_our_own_config_with_a_part_that_is_not_there(copy, tmp_path) -> None:
    convert_checkpoint(copy, tmp_path / "out", hugging_face=False)
    config = json.loads((tmp_path / "out/lit_config.json").read_text()) | {"norm": "Nope"}
    (tmp_path / "out/lit_config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="its lit_config.json says 'Nope', which no part is called"):
        load_model(tmp_path / "out")


def test_all_templates_travel_and_no_folder_does(copy, sample_dir, tmp_path) -> None:
    from transformers import AutoTokenizer

    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(sample_dir / name, copy)
    tokenizer = AutoTokenizer.from_pretrained(copy)
    tokenizer.chat_template = {"default": "{{ messages }}", "rag": "{{ documents }}"}
    tokenizer.save_pretrained(copy)
    (copy / "tokenizer_backup").mkdir()
    convert_checkpoint(copy, tmp_path / "out", hugging_face=True)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == tokenizer.chat_template
    assert not (tmp_path / "out/tokenizer_backup").exists()


@pytest.mark.parametrize("damage", BAD)
def test_what_is_wrong_with_a_checkpoint_is_said(damage, copy) -> None:
    act, message = BAD[damage]
    act(copy)
    with pytest.raises(InputError, match=message):
        load_model(copy)


def test_all_that_is_wrong_is_said_at_once(copy) -> None:
    def edit(tensors):
        tensors["what"] = torch.ones(1)
        tensors[LAYER_1] = tensors[LAYER_1][:5].clone()
        del tensors["model.layers.0.input_layernorm.weight"]

    change(copy, edit)
    with pytest.raises(InputError) as caught:
        convert_checkpoint(copy, copy.parent / "out", hugging_face=False)
    for part in ("what is in no", f"{LAYER_1} has shape", "input_layernorm.weight is missing"):
        assert part in str(caught.value)
    assert not (copy.parent / "out").exists()


def test_all_values_that_are_not_finite_are_said_at_once(copy) -> None:
    """Names and shapes come first: they are known before a weight is read."""

    def edit(tensors):
        tensors["model.norm.weight"][0] = math.nan
        tensors[LAYER_1][3] = math.inf

    change(copy, edit)
    with pytest.raises(InputError) as caught:
        convert_checkpoint(copy, copy.parent / "out", hugging_face=False)
    assert "norm.weight holds NaN" in str(caught.value) and f"{LAYER_1} holds NaN" in str(caught.value)
    assert not (copy.parent / "out").exists()


def test_a_pickle_that_would_run_code_does_not(copy, tmp_path) -> None:
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "it ran"),)

    file = as_bin(copy, {"model.norm.weight": Evil()})
    with pytest.raises(InputError, match="pytorch_model.bin is damaged, or is no plain file of tensors"):
        load_model(copy)
    assert not (tmp_path / "it ran").exists()
    torch.load(file, weights_only=False)
    assert (tmp_path / "it ran").exists()  # it would have


def test_a_folder_with_something_in_it_is_refused(tmp_path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("mine")
    with pytest.raises(InputError, match="out is not empty"):
        convert_checkpoint(tmp_path / "not even there", tmp_path / "out", hugging_face=False)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.tex"]


def test_the_folder_one_is_in_and_links_to_others(copy, tmp_path, monkeypatch) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    with pytest.raises(InputError, match=r"^\. is the folder you are in"):
        convert_checkpoint(tmp_path / "not even there", Path("."), hugging_face=False)
    for name in ("real", "not yet"):
        (tmp_path / f"link to {name}").symlink_to(tmp_path / name)
    (tmp_path / "real").mkdir()
    for name in ("real", "not yet"):
        convert_checkpoint(copy, tmp_path / f"link to {name}", hugging_face=False)
        assert (tmp_path / f"link to {name}").is_symlink() and (tmp_path / name / "lit_config.json").is_file()


def test_a_full_disk_ends_in_one_line_and_leaves_nothing(copy, tmp_path) -> None:
    before = {path: path.read_bytes() for path in copy.iterdir()}
    script = [sys.executable, str(ROOT / "scripts/convert_hf_checkpoint.py")]
    done = subprocess.run(
        [*script, "--checkpoint_dir", str(copy), "--out_dir", str(tmp_path / "out")],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)),
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1 and "Free some space" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
    assert {path: path.read_bytes() for path in copy.iterdir()} == before


KILLED = """
import os, sys
from pathlib import Path
from lit_gpt.files import new_folder

folder, stage = Path(sys.argv[1]), int(sys.argv[2])

def kill(event, args):  # Python announces every change of a file before making it
    global stage
    if event.startswith(("os.", "shutil.", "open")) and folder.parent.name in str(args):
        stage -= 1
        if stage < 0:
            os._exit(9)

sys.addaudithook(kill)
with new_folder(folder) as new:
    (new / "a").write_text("new")
    (new / "b").write_text("new")
"""


@pytest.mark.parametrize("before", [{}, {"a": "old", "b": "old"}])
def test_killed_at_any_moment_a_folder_is_old_or_new(before, tmp_path) -> None:
    (tmp_path / "killed.py").write_text(KILLED)
    outcomes, status = [], 9
    while status:
        folder = tmp_path / str(len(outcomes)) / "last"
        folder.parent.mkdir()
        if before:
            folder.mkdir()
        for name, text in before.items():
            (folder / name).write_text(text)
        status = python(tmp_path / "killed.py", folder, len(outcomes)).returncode
        assert status in (0, 9)
        files.recover(folder)
        outcomes.append({path.name: path.read_text() for path in folder.iterdir()} if folder.exists() else {})
        assert outcomes[-1] in (before, {"a": "new", "b": "new"})
        assert [path.name for path in folder.parent.iterdir()] == ["last"] * folder.exists()
    assert len(outcomes) > 10 and outcomes[0] == before and outcomes[-1] != before


def test_an_error_while_writing_leaves_the_old_folder(tmp_path) -> None:
    (tmp_path / "last").mkdir()
    (tmp_path / "last" / "a").write_text("old")
    with pytest.raises(RuntimeError), files.new_folder(tmp_path / "last") as new:
        (new / "a").write_text("half")
        raise RuntimeError
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == ["last", "last/a"]
    assert (tmp_path / "last" / "a").read_text() == "old"
