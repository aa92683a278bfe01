"""A checkpoint of the llama architecture as a GGUF file, for llama.cpp."""

import tempfile
from pathlib import Path
from typing import Any, Literal

import torch

from lit_gpt.checkpoint.load import cast_without_overflow, load_model
from lit_gpt.checkpoint.tensor_names import hf_name
from lit_gpt.config import Config
from lit_gpt.data.tokenizer import Tokenizer
from lit_gpt.errors import InputError
from lit_gpt.files import must_be_empty, new_folder
from lit_gpt.formats.gguf_reader import LAYER_TENSORS, OTHER_TENSORS, convert_gguf, import_gguf
from lit_gpt.formats.gguf_tokenizer import PROBE
from lit_gpt.formats.gguf_vocabulary import vocabulary
from lit_gpt.formats.verify import difference, logits_of
from lit_gpt.model.gpt import GPT
from lit_gpt.model.rope import Rope

FILE_TYPES = {"float32": 0, "float16": 1, "q8_0": 7, "bfloat16": 32}  # llama.cpp's numbers of them
ROUNDING = {"float32": 1e-4, "float16": 0.03, "q8_0": 0.15, "bfloat16": 0.15}
GGUFType = Literal["float32", "float16", "bfloat16", "q8_0"]


def export_gguf(checkpoint_dir: Path, out_dir: Path, kind: GGUFType) -> Path:
    """Writes `out_dir/NAME-KIND.gguf`, reads it back and compares logits and tokens with the checkpoint's.

    Vectors stay in float32, as llama.cpp wants them; matrices become `kind`. q8_0 has 8 bits and a scale for every 32.

    Raises:
        InputError: another architecture, a tokenizer that llama.cpp has no name for; see also `must_be_empty`.
    """
    must_be_empty(out_dir)
    gguf, config, tokenizer = import_gguf(), Config.from_checkpoint(checkpoint_dir), Tokenizer(checkpoint_dir)
    check(config)
    metadata = vocabulary(checkpoint_dir, config, tokenizer)
    model = load_model(checkpoint_dir, torch.float32)
    with new_folder(out_dir) as folder:
        path = folder / f"{checkpoint_dir.resolve().name}-{kind}.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        add_settings(writer, config, kind)
        for add, values in metadata.items():
            getattr(writer, add)(values)
        for name, tensor in tensors(model):
            to = type_of(gguf, tensor, kind)
            if to.name == "F16":
                cast_without_overflow(name, tensor, torch.float16)  # gguf would write infinity
            writer.add_tensor(name, gguf.quants.quantize(tensor.numpy(), to), raw_dtype=to)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        read_back(path, model, tokenizer, kind)
    return out_dir / path.name


def check(config: Config) -> None:
    usual = Config(family="llama", activation="silu", tie_embeddings=config.tie_embeddings)
    kept = ("block", "norm", "mlp", "activation", "embedding", "qk_norm", "attn_bias", "proj_bias", "mlp_bias")
    other = [
        key for key in (*kept, "rotary_percentage", "sliding_window") if getattr(config, key) != getattr(usual, key)
    ]
    if config.rope_scaling and config.rope_scaling["rope_type"] not in ("linear", "llama3"):
        other.append(f"{config.rope_scaling['rope_type']} positions")
    if config.no_rope_layers:
        other.append("layers without positions")
    if other:
        raise InputError(
            f"{config.name} is no plain llama ({', '.join(other)}): convert it with llama.cpp's own script."
        )


def add_settings(writer: Any, config: Config, kind: GGUFType) -> None:
    known = dict(
        name=config.name, file_type=FILE_TYPES[kind], vocab_size=config.padded_vocab_size, block_count=config.n_layer,
        context_length=config.block_size, embedding_length=config.n_embd, feed_forward_length=config.intermediate_size,
        head_count=config.n_head, head_count_kv=config.n_query_groups, key_length=config.head_size,
        value_length=config.head_size, layer_norm_rms_eps=config.norm_eps, rope_freq_base=config.rope_base,
        rope_dimension_count=config.head_size,
    )  # fmt: skip
    for key, value in known.items():
        getattr(writer, f"add_{key}")(value)
    scaling = config.rope_scaling or {}
    if scaling.get("rope_type") == "linear":
        writer.add_string("llama.rope.scaling.type", "linear")
        writer.add_rope_scaling_factor(scaling["factor"])
    elif scaling:  # the factors of llama3 are a tensor of their own
        writer.add_rope_scaling_orig_ctx_len(scaling["original_max_position_embeddings"])


def tensors(model: GPT) -> Any:
    """(name, float32 tensor) as llama.cpp has them: it rotates neighbours of a head, so the rows of q and k move."""
    names = {f"model.layers.{{}}.{theirs}": f"blk.{{}}.{ours}" for ours, (theirs, _) in LAYER_TENSORS.items()}
    names |= {theirs: ours for ours, (theirs, _) in OTHER_TENSORS.items()}
    for name, param in model.named_parameters():
        theirs = hf_name(name, model.config)[0].removesuffix(".weight")
        layer = name.split(".")[2] if ".h." in name else ""
        ours = names[theirs.replace(f".{layer}.", ".{}.", 1) if layer else theirs].format(layer)
        if ours.endswith(("attn_q", "attn_k")):
            halves = param.view(-1, 2, model.config.head_size // 2, param.size(1))  # (heads, 2, size / 2, E)
            param = halves.transpose(1, 2).reshape(param.shape)
        yield f"{ours}.weight", param.detach().float().contiguous()
    if (model.config.rope_scaling or {}).get("rope_type") == "llama3":
        plain = Rope(model.config.replace(rope_scaling=None)).theta
        yield "rope_freqs.weight", plain / model.ropes["global"].theta


def type_of(gguf: Any, tensor: torch.Tensor, kind: GGUFType) -> Any:
    kinds = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "q8_0": "Q8_0"}
    exact = tensor.ndim == 1 or (kind == "q8_0" and tensor.size(-1) % 32)  # q8_0 has blocks of 32
    return gguf.GGMLQuantizationType["F32" if exact else kinds[kind]]


def read_back(path: Path, model: GPT, tokenizer: Tokenizer, kind: GGUFType) -> None:
    """Raises InputError where the file gives other tokens, or logits that rounding does not explain."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        convert_gguf(path, Path(folder) / "again")
        again, words = load_model(Path(folder) / "again", torch.float32), Tokenizer(Path(folder) / "again")
        found = difference(logits_of(model, tokenizer), logits_of(again, words))
    same = words.encode(PROBE).tolist() == tokenizer.encode(PROBE).tolist() and words.stop_ids == tokenizer.stop_ids
    print(f"Read back from {kind}: {found}; tokens are {'the same' if same else 'others'}.")
    if not same or not found.largest <= ROUNDING[kind] * found.scale:
        raise InputError("What was written is not the model. Nothing was kept. Please report this, with its name.")
