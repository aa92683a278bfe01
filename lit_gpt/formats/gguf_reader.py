"""GGUF files (llama.cpp's format) of llama and qwen2, rewritten as Hugging Face checkpoint folders.

GGUF, version, number of tensors, number of keys | key, type, value; ... | name, shape, type, place; ... | padding |
rows of the tensors, in blocks that share a scale
"""

import json
import math
import shutil
import struct
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lit_gpt.checkpoint.load import cast_without_overflow
from lit_gpt.checkpoint.save import SafetensorsWriter
from lit_gpt.errors import InputError
from lit_gpt.files import must_be_empty, new_folder
from lit_gpt.formats.gguf_tokenizer import TOKENIZER_KEYS, adds_bos, build_tokenizer, special_ids
from lit_gpt.lock import locks
from lit_gpt.packages import import_optional

WRITTEN_FILES = (
    "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
)  # fmt: skip
ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}
# Keys of the architecture, such as llama.block_count. Any that is in neither list and not 0 means arithmetic that the
# class in ARCHITECTURES does not do.
REQUIRED_KEYS = (
    "block_count", "context_length", "embedding_length", "feed_forward_length", "attention.head_count",
    "attention.layer_norm_rms_epsilon",
)  # fmt: skip
OPTIONAL_KEYS = (
    "attention.head_count_kv", "attention.key_length", "attention.value_length", "rope.freq_base",
    "rope.dimension_count", "rope.scaling.type", "rope.scaling.factor", "rope.scaling.original_context_length",
    "rope.scaling.finetuned", "rope.scale_linear", "vocab_size", "tensor_data_layout",
)  # fmt: skip
# types of metadata values; those of numbers -> letters of `struct`
STRING = 8
ARRAY = 9
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
# llama.cpp's name -> (Hugging Face's, shape): E embedding, Q and K heads times their size, F feed-forward, V vocabulary
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
    "output": ("lm_head", "VE"),  # absent if it is the embedding
}
ROPE_FACTORS = "rope_freqs.weight"  # a tensor that no model has: what Llama 3 divides each rotary frequency by
MAX_PROBLEMS = 5  # of the tensors, that one error tells

Metadata = dict[str, Any]
Sources = dict[str, tuple[str, tuple[int, ...]]]  # Hugging Face's name of a tensor -> (llama.cpp's name, shape)


@locks("out_dir")
def convert_gguf(gguf_path: Path, out_dir: Path, dtype: str = "float32") -> None:
    """Writes the GGUF file as a Hugging Face checkpoint folder, which appears when it is complete.

    Raises:
        InputError: the file is damaged, or holds a model or a tokenizer that such a folder cannot express, or the disk
            is full.
    """
    # what can be refused before a byte is written
    must_be_empty(out_dir)
    metadata, tensors = read_gguf(gguf_path)
    check_metadata(metadata)
    config = hf_config(metadata, tensors, dtype)
    sources = tensor_sources(config)
    check_tensors(sources, tensors)
    special = special_ids(metadata)
    tokenizer = build_tokenizer(metadata, special)

    try:
        with new_folder(out_dir) as folder:
            writer = SafetensorsWriter(folder / "model.safetensors", {}, len(sources))
            for name, (gguf_name, _) in sources.items():
                writer.add(name, hf_tensor(gguf_name, tensors[gguf_name], config))
            writer.close()
            (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
            for name, content in json_files(config, metadata, special).items():
                text = json.dumps(content, indent=2, ensure_ascii=False)
                (folder / name).write_text(f"{text}\n", encoding="utf-8")
    except OSError as error:
        n_values = sum(math.prod(shape) for _, shape in sources.values())
        size = n_values * getattr(torch, dtype).itemsize
        disk = next(parent for parent in out_dir.absolute().parents if parent.exists())
        free = shutil.disk_usage(disk).free
        raise InputError(
            f"Could not write {out_dir}: {error.strerror}. It needs {size / 1e9:.2f} GB, "
            f"{free / 1e9:.2f} GB are free there. Free some space, or write to another disk."
        ) from error


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of the file. `kind` is a GGMLQuantizationType; the rows are bytes that are still on disk."""

    shape: tuple[int, ...]
    kind: Any
    rows: np.ndarray

    def dequantize(self, n_rows: int | None = None) -> np.ndarray:
        """The first rows, or all, as a float32 matrix. Raises NotImplementedError for a type that gguf cannot read."""
        from gguf.quants import dequantize

        return dequantize(self.rows[:n_rows], self.kind)


class Cursor:
    """A place in the header that moves on as values are taken. Running past the end is a struct.error."""

    def __init__(self, content: np.ndarray) -> None:
        self.content = memoryview(content)  # type: ignore[arg-type] # numpy declares that from Python 3.12 on
        self.at = 0

    def take(self, letters: str) -> tuple:
        """The values at the place, by letters of `struct`: "8sQ" is 8 bytes and a number."""
        values = struct.unpack_from(f"<{letters}", self.content, self.at)
        self.at += struct.calcsize(f"<{letters}")
        return values

    def number(self, letter: str) -> Any:
        return self.take(letter)[0]

    def string(self) -> str:
        length = self.number("Q")
        return self.number(f"{length}s").decode()

    def value(self, kind: int) -> Any:
        """The value of a key, by the number of its type."""
        if kind == STRING:
            return self.string()
        if kind != ARRAY:
            return self.number(SCALARS[kind])
        entry_kind, length = self.take("IQ")
        if entry_kind in SCALARS:
            return list(self.take(f"{length}{SCALARS[entry_kind]}"))  # all at once: vocabularies are long
        return [self.value(entry_kind) for _ in range(length)]


def read_gguf(path: Path) -> tuple[Metadata, dict[str, StoredTensor]]:
    """Metadata and tensors.

    Not by `gguf.GGUFReader`: its version 0.19 takes 5 s for the sample's 49,000 tokens where this takes 0.2 s, and a
    damaged length makes it fill the memory.

    Raises:
        InputError: no such file, no GGUF, or one that is damaged.
    """
    gguf = import_gguf()
    check_begins_as_gguf(path)
    content = np.memmap(path, mode="r")
    cursor = Cursor(content)
    try:
        # keys and values
        _, n_tensors, n_keys = cursor.take("8sQQ")
        metadata: Metadata = {}
        for _ in range(n_keys):
            name = cursor.string()
            metadata[name] = cursor.value(kind=cursor.number("I"))

        # the table of tensors
        table = []
        for _ in range(n_tensors):
            name = cursor.string()
            n_dims = cursor.number("I")
            shape = cursor.take(f"{n_dims}Q")[::-1]  # the file has columns first
            kind, begin = cursor.take("IQ")
            table.append((name, shape, kind, begin))

        # their rows
        alignment = metadata.get("general.alignment", 32)
        data = content[math.ceil(cursor.at / alignment) * alignment :]
        tensors = {}
        for name, shape, kind, begin in table:
            tensor_type = gguf.GGMLQuantizationType(kind)
            block_size, block_bytes = gguf.GGML_QUANT_SIZES[tensor_type]
            n_rows = math.prod(shape[:-1])
            row_bytes = shape[-1] // block_size * block_bytes
            rows = data[begin : begin + n_rows * row_bytes].reshape(n_rows, row_bytes)
            tensors[name] = StoredTensor(shape, tensor_type, rows)
    except (struct.error, KeyError, ValueError, IndexError, TypeError, OverflowError, RecursionError) as error:
        raise InputError(
            f"{path} has {len(content)} bytes and is truncated or damaged (byte {cursor.at}: {error}). Fetch it again."
        ) from error
    return metadata, tensors


def check_begins_as_gguf(path: Path) -> None:
    """Raises InputError for a file that is none, or no GGUF of a known version."""
    if not path.is_file():
        raise InputError(f"{path} is not a file; expected a .gguf file. Pass its path with --gguf_path.")
    with path.open("rb") as file:
        magic = file.read(4)
        version = file.read(4)
    if magic != b"GGUF":
        raise InputError(f"{path} begins with {magic!r}; a GGUF file begins with b'GGUF'. Change --gguf_path.")
    if len(version) == 4 and version not in (b"\2\0\0\0", b"\3\0\0\0"):
        raise InputError(f"{path} has the GGUF version {version!r}; expected 2 or 3, little-endian. Convert it again.")


def import_gguf() -> Any:
    return import_optional("gguf", "sample", "Reading GGUF files")


def check_metadata(metadata: Metadata) -> None:
    """Raises InputError for what a Hugging Face folder with a BPE tokenizer cannot express, by its name."""
    # the architecture, and the sort of tokenizer
    architecture = metadata.get("general.architecture")
    if architecture not in ARCHITECTURES:
        known = " or ".join(ARCHITECTURES)
        raise InputError(f"The GGUF file's architecture is {architecture}; expected {known}. Pass another --gguf_path.")
    tokenizer = metadata.get("tokenizer.ggml.model")
    if tokenizer not in TOKENIZER_KEYS:
        raise InputError(
            f"The GGUF file's tokenizer is of the kind {tokenizer}; expected gpt2 or llama (two sorts of BPE), "
            "which tokenizer.json repeats exactly. Use the model's Hugging Face folder instead."
        )

    # all that they need
    required = [f"{architecture}.{key}" for key in REQUIRED_KEYS]
    required_tokenizer = [f"tokenizer.ggml.{key}" for key in TOKENIZER_KEYS[tokenizer]]
    missing = [key for key in (*required, *required_tokenizer) if key not in metadata]
    if missing:
        raise InputError(
            f"The GGUF file has no {', '.join(missing)}. Make it again with llama.cpp's convert_hf_to_gguf.py."
        )
    if metadata.get("split.count", 1) > 1:
        raise InputError(
            f"The GGUF file is one of {metadata['split.count']} parts; expected a whole one. "
            "Join them: llama-gguf-split --merge FIRST_PART WHOLE_FILE"
        )

    # and nothing else
    optional = [f"{architecture}.{key}" for key in OPTIONAL_KEYS]
    known_keys = {*required, *optional}
    foreign = []
    for key, value in metadata.items():
        if key.startswith(f"{architecture}.") and key not in known_keys and value:
            foreign.append(f"{key} = {value}")
    if foreign:
        raise InputError(
            f"The GGUF file has {', '.join(foreign)}; a plain {architecture} has none. Use the model's Hugging Face"
            " folder."
        )


def architecture_number(metadata: Metadata, key: str, default: float | None = None) -> Any:
    """A number of the architecture, such as `block_count`. A list of equal ones, one for each layer, counts as one.

    Raises:
        InputError: it is none.
    """
    name = f"{metadata['general.architecture']}.{key}"
    value = metadata.get(name, default)
    if isinstance(value, list) and len(set(value)) == 1:
        value = value[0]
    if not isinstance(value, int | float):
        raise InputError(f"The GGUF file has {name} = {value}; expected one number for all layers.")
    return float(str(np.float32(value))) if isinstance(value, float) else value  # 1e-5, not 9.999999747378752e-06


def hf_config(metadata: Metadata, tensors: dict[str, StoredTensor], dtype: str) -> dict[str, Any]:
    """The content of config.json, but for the special tokens.

    Raises:
        InputError: sizes that do not fit together.
    """
    architecture = metadata["general.architecture"]
    number = partial(architecture_number, metadata)

    # heads of one size, all of which is rotated
    n_head = number("attention.head_count")
    n_embd = number("embedding_length")
    head_size = number("attention.key_length", n_embd // n_head)
    for key in ("attention.value_length", "rope.dimension_count"):
        if number(key, head_size) != head_size:
            raise InputError(
                f"The GGUF file has {architecture}.{key} = {number(key)}; expected the head size, {head_size}."
            )
    n_layer = number("block_count")
    if n_layer > len(tensors):
        raise InputError(f"The GGUF file has {len(tensors)} tensors for {n_layer} layers. Fetch it again.")

    rope_theta = number("rope.freq_base", 10000.0)
    biases = {"attention_bias": False, "mlp_bias": False} if architecture == "llama" else {}
    return {
        "architectures": [ARCHITECTURES[architecture]],
        "model_type": architecture,
        "vocab_size": len(metadata["tokenizer.ggml.tokens"]),
        "hidden_size": n_embd,
        "intermediate_size": number("feed_forward_length"),
        "num_hidden_layers": n_layer,
        "num_attention_heads": n_head,
        "num_key_value_heads": number("attention.head_count_kv", n_head),
        "head_dim": head_size,
        "hidden_act": "silu",
        "rms_norm_eps": number("attention.layer_norm_rms_epsilon"),
        "max_position_embeddings": number("context_length"),
        "rope_theta": rope_theta,
        "rope_scaling": rope_scaling(metadata, tensors, rope_theta, head_size),
        **biases,
        "tie_word_embeddings": "output.weight" not in tensors,
        "torch_dtype": dtype,
    }


def rope_scaling(
    metadata: Metadata, tensors: dict[str, StoredTensor], rope_theta: float, head_size: int
) -> dict[str, Any] | None:
    """The scaling of rotary positions, in Hugging Face's words: none, linear, or Llama 3's.

    Raises:
        InputError: it is another.
    """
    prefix = f"{metadata['general.architecture']}.rope"
    factor = metadata.get(f"{prefix}.scaling.factor", metadata.get(f"{prefix}.scale_linear")) or 1.0
    kind = metadata.get(f"{prefix}.scaling.type", "linear")
    original = metadata.get(f"{prefix}.scaling.original_context_length", 8192)

    if ROPE_FACTORS not in tensors:
        if kind == "none" or (kind == "linear" and factor == 1.0):
            return None
        if kind == "linear":
            return {"rope_type": "linear", "factor": factor}
    elif kind == "none" or factor == 1.0:
        divisors = tensors[ROPE_FACTORS].dequantize().ravel()
        scaling = llama3_scaling(divisors, original, rope_theta, head_size)
        if scaling is not None:
            return scaling
        kind = ROPE_FACTORS
        factor = float(divisors.max())
    raise InputError(
        f"The GGUF file scales its rotary positions by {kind}, factor {factor}; expected none, linear, or Llama 3's "
        f"(from {original} positions, low_freq_factor 1, high_freq_factor 4). Use the model's Hugging Face folder."
    )


def llama3_scaling(divisors: np.ndarray, original: int, rope_theta: float, head_size: int) -> dict[str, Any] | None:
    """Llama 3's scaling, of which a GGUF file holds only what each frequency is divided by. None if these are others.

    `scale_llama3` in lit_gpt/model/rope.py is the formula.
    """
    factor = float(divisors.max())  # of the slowest frequencies
    low, high = 1.0, 4.0  # in every Llama 3.1, 3.2 and 3.3
    exponents = np.arange(0, head_size, 2) / head_size
    turns = original / (2 * math.pi * rope_theta**exponents)  # of each frequency within the original context
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    scale = (1 - smooth) / factor + smooth
    if len(divisors) != len(scale) or not np.allclose(divisors * scale, 1, atol=1e-4):
        return None
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }


def json_files(config: dict[str, Any], metadata: Metadata, special: dict[str, int]) -> dict[str, dict[str, Any]]:
    """The other files of the folder, by name."""
    # ids for the model
    ids: dict[str, Any] = {}
    if "bos" in special:
        ids["bos_token_id"] = special["bos"]
    stop_ids = list(dict.fromkeys(special[name] for name in ("eos", "eot", "eom") if name in special))
    ids["eos_token_id"] = stop_ids if len(stop_ids) > 1 else stop_ids[0]
    generation = dict(ids)
    if "pad" in special:
        # not in config.json: transformers would keep the gradient from that row, and it often is the end of a turn
        generation["pad_token_id"] = special["pad"]

    # texts for the tokenizer
    tokenizer: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    for name in ("bos", "eos", "unk", "pad"):
        if name in special:
            tokenizer[f"{name}_token"] = metadata["tokenizer.ggml.tokens"][special[name]]
    tokenizer["add_bos_token"] = adds_bos(metadata, special)
    tokenizer["model_max_length"] = config["max_position_embeddings"]
    tokenizer["clean_up_tokenization_spaces"] = False
    key = "tokenizer.chat_template"
    templates = {"default": metadata[key]} if metadata.get(key) else {}
    templates |= {name.removeprefix(f"{key}."): metadata[name] for name in metadata if name.startswith(f"{key}.")}
    if list(templates) == ["default"]:
        tokenizer["chat_template"] = templates["default"]
    elif templates:
        tokenizer["chat_template"] = [{"name": name, "template": text} for name, text in templates.items()]
    return {"config.json": config | ids, "generation_config.json": generation, "tokenizer_config.json": tokenizer}


def tensor_sources(config: dict[str, Any]) -> Sources:
    """All tensors of the Hugging Face model: where each is in the GGUF file, and its shape."""
    sizes = {
        "E": config["hidden_size"],
        "F": config["intermediate_size"],
        "Q": config["num_attention_heads"] * config["head_dim"],
        "K": config["num_key_value_heads"] * config["head_dim"],
        "V": config["vocab_size"],
    }
    modules = dict(OTHER_TENSORS)
    if config["tie_word_embeddings"]:
        del modules["output"]
    for layer in range(config["num_hidden_layers"]):
        for gguf_module, (hf_module, letters) in LAYER_TENSORS.items():
            modules[f"blk.{layer}.{gguf_module}"] = (f"model.layers.{layer}.{hf_module}", letters)

    sources = {}
    for gguf_module, (hf_module, letters) in modules.items():
        shape = tuple(sizes[letter] for letter in letters)
        sources[f"{hf_module}.weight"] = (f"{gguf_module}.weight", shape)
        if config["model_type"] == "qwen2" and gguf_module.endswith(("attn_q", "attn_k", "attn_v")):
            sources[f"{hf_module}.bias"] = (f"{gguf_module}.bias", shape[:1])
    return sources


def check_tensors(sources: Sources, tensors: dict[str, StoredTensor]) -> None:
    """Raises InputError for all that keeps the tensors from being read."""
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
        n_more = len(problems) - MAX_PROBLEMS
        more = f", and {n_more} more" if n_more > 0 else ""
        first = "; ".join(sorted(problems)[:MAX_PROBLEMS])
        raise InputError(f"The GGUF file is not what it says: {first}{more}. Fetch it again.")


def hf_tensor(gguf_name: str, stored: StoredTensor, config: dict[str, Any]) -> torch.Tensor:
    """One tensor with Hugging Face's order of rows, in the dtype of the config.

    For the architecture llama, llama.cpp rotates the neighbours 2i and 2i + 1 of a head, Hugging Face i and
    i + head_size / 2.
    """
    values = torch.from_numpy(stored.dequantize().reshape(stored.shape).copy())
    rotated = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}
    n_heads_key = rotated.get(gguf_name.split(".")[-2])
    if n_heads_key and config["model_type"] == "llama":
        pairs = values.view(config[n_heads_key], -1, 2, values.shape[-1])  # (H, size / 2, 2, E)
        values = pairs.transpose(1, 2).reshape(values.shape)
    return cast_without_overflow(gguf_name, values, getattr(torch, config["torch_dtype"]))
