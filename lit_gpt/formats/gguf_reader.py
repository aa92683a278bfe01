"""GGUF files (llama.cpp's format) of llama and qwen2, rewritten as Hugging Face checkpoint folders."""

import json
import math
import shutil
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lit_gpt.checkpoint.load import cast_without_overflow
from lit_gpt.checkpoint.save import SafetensorsWriter
from lit_gpt.errors import InputError
from lit_gpt.files import must_be_empty, new_folder
from lit_gpt.formats.gguf_tokenizer import TOKENIZER_KEYS, adds_bos, build_tokenizer, special_ids
from lit_gpt.packages import import_optional

FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}
REQUIRED_KEYS = (  # of the architecture
    "block_count", "context_length", "embedding_length", "feed_forward_length", "attention.head_count",
    "attention.layer_norm_rms_epsilon",
)  # fmt: skip
# Any other of its keys that is not 0 means arithmetic that the class in ARCHITECTURES does not do.
OPTIONAL_KEYS = (
    "attention.head_count_kv", "attention.key_length", "attention.value_length", "rope.freq_base",
    "rope.dimension_count", "rope.scaling.type", "rope.scaling.factor", "rope.scaling.original_context_length",
    "rope.scaling.finetuned", "rope.scale_linear", "vocab_size", "tensor_data_layout",
)  # fmt: skip
# Types of metadata values, as letters of `struct` where they are numbers.
STRING, ARRAY = 8, 9
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
# Names there and here, and shapes: E embedding, Q and K heads times their size, F feed-forward, V vocabulary.
LAYER_TENSORS = {
    "attn_norm": ("input_layernorm", "E"),
    "attn_q": ("self_attn.q_proj", "QE"),
    "attn_k": ("self_attn.k_proj", "KE"),
    "attn_v": ("self_attn.v_proj", "KE"),
    "attn_output": ("self_attn.o_proj", "EQ"),
    "ffn_norm": ("post_attention_layernorm", "E"),
    "ffn_gate": ("mlp.gate_proj", "FE"),
    "ffn_up": ("mlp.up_proj", "FE"),
    "ffn_down": ("mlp.down_proj", "EF"),
}
OTHER_TENSORS = {
    "token_embd": ("model.embed_tokens", "VE"),
    "output_norm": ("model.norm", "E"),
    "output": ("lm_head", "VE"),  # absent where it is the embedding
}
ROPE_FACTORS = "rope_freqs.weight"


def convert_gguf(gguf_path: Path, checkpoint_dir: Path, dtype: str = "float32") -> None:
    """Writes the GGUF file as a Hugging Face checkpoint folder, which appears when it is complete."""
    must_be_empty(checkpoint_dir)
    metadata, tensors = read_gguf(gguf_path)
    check_metadata(metadata)
    config = hf_config(metadata, tensors, dtype)
    sources = tensor_sources(config)
    check_tensors(sources, tensors)
    special = special_ids(metadata)
    tokenizer = build_tokenizer(metadata, special)
    try:
        with new_folder(checkpoint_dir) as folder:
            writer = SafetensorsWriter(folder / "model.safetensors", {}, len(sources))
            for name, (source, _) in sources.items():
                writer.add(name, hf_tensor(source, tensors[source], config))
            writer.close()
            (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
            for name, document in json_files(config, metadata, special).items():
                text = json.dumps(document, indent=2, ensure_ascii=False)
                (folder / name).write_text(f"{text}\n", encoding="utf-8")
    except OSError as error:
        free = shutil.disk_usage(next(parent for parent in checkpoint_dir.absolute().parents if parent.exists())).free
        size = sum(math.prod(shape) for _, shape in sources.values()) * getattr(torch, dtype).itemsize
        raise InputError(
            f"Could not write {checkpoint_dir}: {error.strerror}. It needs {size / 1e9:.2f} GB, "
            f"{free / 1e9:.2f} GB are free there. Free some space or change --checkpoint_dir."
        ) from None


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of the file: its shape, its type (a GGMLQuantizationType), its rows as bytes that are still on disk."""

    shape: tuple[int, ...]
    kind: Any
    rows: np.ndarray

    def dequantize(self, n_rows: int | None = None) -> np.ndarray:
        """The first rows, or all, as a float32 matrix. NotImplementedError where gguf does not know how."""
        from gguf.quants import dequantize

        return dequantize(self.rows[:n_rows], self.kind)


class Cursor:
    """A place in the header that moves on as values are taken. Running past the end is a struct.error."""

    def __init__(self, content: np.ndarray) -> None:
        self.content, self.at = memoryview(content), 0

    def take(self, letters: str) -> tuple:
        values = struct.unpack_from(f"<{letters}", self.content, self.at)
        self.at += struct.calcsize(f"<{letters}")
        return values

    def string(self) -> str:
        return self.take(f"{self.take('Q')[0]}s")[0].decode()

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.string()
        if kind != ARRAY:
            return self.take(SCALARS[kind])[0]
        kind, length = self.take("IQ")
        if kind in SCALARS:
            return list(self.take(f"{length}{SCALARS[kind]}"))
        return [self.value(kind) for _ in range(length)]


def read_gguf(path: Path) -> tuple[dict[str, Any], dict[str, StoredTensor]]:
    """Metadata and tensors.

    Not by `gguf.GGUFReader`: it takes 5 s for the sample's 49,000 tokens where this takes 0.2 s, and a damaged length
    makes it fill the memory.
    """
    gguf = import_gguf()
    if not path.is_file():
        raise InputError(f"{path} is not a file; expected a .gguf file. Pass its path with --gguf_path.")
    with path.open("rb") as file:
        start = file.read(8)
    if start[:4] != b"GGUF":
        raise InputError(f"{path} begins with {start[:4]!r}; a GGUF file begins with b'GGUF'. Change --gguf_path.")
    if len(start) == 8 and start[4:] not in (b"\2\0\0\0", b"\3\0\0\0"):
        raise InputError(
            f"{path} has the GGUF version {start[4:]!r}; expected 2 or 3, little-endian. Convert it again."
        )

    content = np.memmap(path, mode="r")
    cursor, metadata, tensors = Cursor(content), {}, {}
    try:
        _, n_tensors, n_keys = cursor.take("8sQQ")
        for _ in range(n_keys):
            name, (kind,) = cursor.string(), cursor.take("I")
            metadata[name] = cursor.value(kind)
        table = []
        for _ in range(n_tensors):
            name, (n_dims,) = cursor.string(), cursor.take("I")
            table.append((name, cursor.take(f"{n_dims}Q")[::-1], *cursor.take("IQ")))  # columns come first there

        alignment = metadata.get("general.alignment", 32)
        data = content[math.ceil(cursor.at / alignment) * alignment :]
        for name, shape, kind, begin in table:
            kind = gguf.GGMLQuantizationType(kind)
            block, n_bytes = gguf.GGML_QUANT_SIZES[kind]
            n_rows, row = math.prod(shape[:-1]), shape[-1] // block * n_bytes
            tensors[name] = StoredTensor(shape, kind, data[begin : begin + n_rows * row].reshape(n_rows, row))
    except (struct.error, KeyError, ValueError, IndexError, TypeError, OverflowError, RecursionError) as error:
        raise InputError(
            f"{path} has {len(content)} bytes and is truncated or damaged (byte {cursor.at}: {error}). Fetch it again."
        ) from None
    return metadata, tensors


def import_gguf() -> Any:
    return import_optional("gguf", "sample", "Reading GGUF files")


def check_metadata(metadata: dict[str, Any]) -> None:
    """Refuses by name what a Hugging Face folder with a BPE tokenizer cannot express."""
    architecture, tokenizer = metadata.get("general.architecture"), metadata.get("tokenizer.ggml.model")
    if architecture not in ARCHITECTURES:
        known = " or ".join(ARCHITECTURES)
        raise InputError(f"The GGUF file's architecture is {architecture}; expected {known}. Pass another --gguf_path.")
    if tokenizer not in TOKENIZER_KEYS:
        raise InputError(
            f"The GGUF file's tokenizer is of the kind {tokenizer}; expected gpt2 or llama (two sorts of BPE), "
            "which tokenizer.json repeats exactly. Use the model's Hugging Face folder instead."
        )
    required = [f"{architecture}.{key}" for key in REQUIRED_KEYS]
    words = [f"tokenizer.ggml.{key}" for key in TOKENIZER_KEYS[tokenizer]]
    missing = [key for key in (*required, *words) if key not in metadata]
    if missing:
        raise InputError(
            f"The GGUF file has no {', '.join(missing)}. Make it again with llama.cpp's convert_hf_to_gguf.py."
        )
    if metadata.get("split.count", 1) > 1:
        raise InputError(
            f"The GGUF file is one of {metadata['split.count']} parts; expected a whole one. "
            "Join them: llama-gguf-split --merge FIRST_PART WHOLE_FILE"
        )
    known = {*required, *(f"{architecture}.{key}" for key in OPTIONAL_KEYS)}
    own = {key: value for key, value in metadata.items() if key.startswith(f"{architecture}.")}
    foreign = [key for key, value in own.items() if key not in known and value]
    if foreign:
        found = ", ".join(f"{key} = {metadata[key]}" for key in foreign)
        raise InputError(
            f"The GGUF file has {found}; a plain {architecture} has none. Use the model's Hugging Face folder."
        )


def hf_config(metadata: dict[str, Any], tensors: dict[str, StoredTensor], dtype: str) -> dict[str, Any]:
    """config.json, but for the special tokens."""
    kind = metadata["general.architecture"]

    def number(key: str, default: float | None = None) -> Any:
        value = metadata.get(f"{kind}.{key}", default)
        if isinstance(value, list) and len(set(value)) == 1:  # one number per layer
            value = value[0]
        if not isinstance(value, int | float):
            raise InputError(f"The GGUF file has {kind}.{key} = {value}; expected one number for all layers.")
        return float(str(np.float32(value))) if isinstance(value, float) else value  # 1e-5, not 9.999999747378752e-06

    heads, n_embd = number("attention.head_count"), number("embedding_length")
    head_size = number("attention.key_length", n_embd // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if number(key, head_size) != head_size:
            raise InputError(f"The GGUF file has {kind}.{key} = {number(key)}; expected the head size, {head_size}.")
    n_layer = number("block_count")
    if n_layer > len(tensors):
        raise InputError(f"The GGUF file has {len(tensors)} tensors for {n_layer} layers. Fetch it again.")
    rope_theta = number("rope.freq_base", 10000.0)
    return {
        "architectures": [ARCHITECTURES[kind]],
        "model_type": kind,
        "vocab_size": len(metadata["tokenizer.ggml.tokens"]),
        "hidden_size": n_embd,
        "intermediate_size": number("feed_forward_length"),
        "num_hidden_layers": n_layer,
        "num_attention_heads": heads,
        "num_key_value_heads": number("attention.head_count_kv", heads),
        "head_dim": head_size,
        "hidden_act": "silu",
        "rms_norm_eps": number("attention.layer_norm_rms_epsilon"),
        "max_position_embeddings": number("context_length"),
        "rope_theta": rope_theta,
        "rope_scaling": rope_scaling(metadata, tensors, rope_theta, head_size),
        **({"attention_bias": False, "mlp_bias": False} if kind == "llama" else {}),
        "tie_word_embeddings": "output.weight" not in tensors,
        "torch_dtype": dtype,
    }


def rope_scaling(
    metadata: dict[str, Any], tensors: dict[str, StoredTensor], rope_theta: float, head_size: int
) -> dict[str, Any] | None:
    """Nothing, linear, or Llama 3's, of which the file holds only what each frequency is divided by."""
    prefix = f"{metadata['general.architecture']}.rope"
    factor = metadata.get(f"{prefix}.scaling.factor", metadata.get(f"{prefix}.scale_linear")) or 1.0
    kind = metadata.get(f"{prefix}.scaling.type", "linear")
    original = metadata.get(f"{prefix}.scaling.original_context_length", 8192)
    if ROPE_FACTORS not in tensors and (kind == "none" or kind == "linear" and factor == 1.0):
        return None
    if ROPE_FACTORS not in tensors and kind == "linear":
        return {"rope_type": "linear", "factor": factor}

    if ROPE_FACTORS in tensors and (kind == "none" or factor == 1.0):
        stored = tensors[ROPE_FACTORS].dequantize().ravel()
        factor = float(stored.max())
        low, high = 1.0, 4.0  # in every Llama 3.1, 3.2 and 3.3
        turns = original / (2 * math.pi * rope_theta ** (np.arange(0, head_size, 2) / head_size))
        smooth = np.clip((turns - low) / (high - low), 0, 1)
        if len(stored) == len(smooth) and np.allclose(stored * ((1 - smooth) / factor + smooth), 1, atol=1e-4):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": low,
                "high_freq_factor": high,
                "original_max_position_embeddings": original,
            }
        kind = ROPE_FACTORS
    raise InputError(
        f"The GGUF file scales its rotary positions by {kind}, factor {factor}; expected none, linear, or Llama 3's "
        f"(from {original} positions, low_freq_factor 1, high_freq_factor 4). Use the model's Hugging Face folder."
    )


def json_files(config: dict[str, Any], metadata: dict[str, Any], special: dict[str, int]) -> dict[str, dict[str, Any]]:
    """The other files of the folder by name."""
    ends = list(dict.fromkeys(special[name] for name in ("eos", "eot", "eom") if name in special))
    ids = {"bos": special.get("bos"), "eos": ends if len(ends) > 1 else ends[0]}
    ids = {f"{name}_token_id": id for name, id in ids.items() if id is not None}
    # Where config.json has it, transformers keeps the gradient from that row, and it often is the end of a turn.
    pad = {"pad_token_id": special["pad"]} if "pad" in special else {}
    names = [name for name in ("bos", "eos", "unk", "pad") if name in special]
    template = metadata.get("tokenizer.chat_template")
    return {
        "config.json": config | ids,
        "generation_config.json": ids | pad,
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **{f"{name}_token": metadata["tokenizer.ggml.tokens"][special[name]] for name in names},
            "add_bos_token": adds_bos(metadata, special),
            "model_max_length": config["max_position_embeddings"],
            "clean_up_tokenization_spaces": False,
            **({"chat_template": template} if template else {}),
        },
    }


def tensor_sources(config: dict[str, Any]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Per tensor of the Hugging Face model: its name in the GGUF file and its shape."""
    sizes = {
        "E": config["hidden_size"],
        "F": config["intermediate_size"],
        "Q": config["num_attention_heads"] * config["head_dim"],
        "K": config["num_key_value_heads"] * config["head_dim"],
        "V": config["vocab_size"],
    }
    names = {name: hf for name, hf in OTHER_TENSORS.items() if name != "output" or not config["tie_word_embeddings"]}
    for layer in range(config["num_hidden_layers"]):
        for name, (hf_name, letters) in LAYER_TENSORS.items():
            names[f"blk.{layer}.{name}"] = (f"model.layers.{layer}.{hf_name}", letters)
    found = {}
    for name, (hf_name, letters) in names.items():
        shape = tuple(sizes[letter] for letter in letters)
        found[f"{hf_name}.weight"] = (f"{name}.weight", shape)
        if config["model_type"] == "qwen2" and name.endswith(("attn_q", "attn_k", "attn_v")):
            found[f"{hf_name}.bias"] = (f"{name}.bias", shape[:1])
    return found


def check_tensors(sources: dict[str, tuple[str, tuple[int, ...]]], tensors: dict[str, StoredTensor]) -> None:
    """All that keeps the tensors from being read, before a byte is written."""
    expected = dict(sources.values())
    problems = [f"{name} is missing" for name in expected if name not in tensors]
    problems += [f"{name} is unknown" for name in tensors if name not in expected and name != ROPE_FACTORS]
    for name in expected.keys() & tensors.keys():
        if tensors[name].shape != expected[name]:
            problems.append(f"{name} has the shape {tensors[name].shape} instead of {expected[name]}")
        try:
            tensors[name].dequantize(n_rows=1)
        except NotImplementedError:
            problems.append(f"{name} is of the type {tensors[name].kind.name}, which gguf cannot dequantize")
    if problems:
        more = f", and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise InputError(f"The GGUF file is not what it says: {'; '.join(sorted(problems)[:5])}{more}. Fetch it again.")


def hf_tensor(name: str, stored: StoredTensor, config: dict[str, Any]) -> torch.Tensor:
    """One tensor with Hugging Face's order of rows.

    Of llama, llama.cpp rotates the neighbours 2i and 2i + 1 of a head, Hugging Face i and i + head_size / 2.
    """
    values = torch.from_numpy(stored.dequantize().reshape(stored.shape).copy())
    heads = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}.get(name.split(".")[-2])
    if heads and config["model_type"] == "llama":
        pairs = values.view(config[heads], -1, 2, values.shape[-1])  # (H, size / 2, 2, E)
        values = pairs.transpose(1, 2).reshape(values.shape)
    return cast_without_overflow(name, values, getattr(torch, config["torch_dtype"]))
