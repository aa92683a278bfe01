"""A checkpoint of the llama architecture as a GGUF file, for llama.cpp."""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch

from lit_gpt.checkpoint.load import cast_without_overflow, load_model
from lit_gpt.checkpoint.tensor_names import hf_name
from lit_gpt.config import Config
from lit_gpt.data.tokenizer import Tokenizer
from lit_gpt.errors import InputError
from lit_gpt.files import must_be_empty, new_folder
from lit_gpt.formats.gguf_reader import LAYER_TENSORS, OTHER_TENSORS, ROPE_FACTORS, convert_gguf, import_gguf
from lit_gpt.formats.gguf_tokenizer import PROBE
from lit_gpt.formats.gguf_vocabulary import gguf_vocabulary
from lit_gpt.formats.verify import ROUNDING, compare_logits, logits_of
from lit_gpt.lock import locks
from lit_gpt.model.gpt import GPT
from lit_gpt.model.rope import Rope

GGUFType = Literal["float32", "float16", "bfloat16", "q8_0"]
FILE_TYPES = {"float32": 0, "float16": 1, "q8_0": 7, "bfloat16": 32}  # LLAMA_FTYPE in llama.cpp's llama.h
TENSOR_TYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "q8_0": "Q8_0"}
Q8_0_BLOCK = 32  # values that share a scale: a row has to be whole blocks
PLAIN_LLAMA = (  # fields of Config in which llama.cpp's class for this architecture has no choice
    "block", "norm", "mlp", "activation", "embedding", "qk_norm", "attn_bias", "proj_bias", "mlp_bias",
    "rotary_percentage", "sliding_window",
)  # fmt: skip


@locks("out_dir")
def export_gguf(checkpoint_dir: Path, out_dir: Path, kind: GGUFType) -> Path:
    """Writes `out_dir/NAME-KIND.gguf`, reads it back and compares logits and tokens with the checkpoint's.

    Vectors stay in float32, as llama.cpp wants them; matrices become `kind`. q8_0 has 8 bits and a scale for every 32.

    Raises:
        InputError: another architecture, a tokenizer that llama.cpp has no name for; see also `must_be_empty`.
    """
    # what can be refused before the weights are read
    must_be_empty(out_dir)
    gguf = import_gguf()
    tokenizer, vocabulary = check_can_be_gguf(checkpoint_dir)
    config = Config.from_checkpoint(checkpoint_dir)

    model = load_model(checkpoint_dir, torch.float32)
    with new_folder(out_dir) as folder:
        path = folder / f"{checkpoint_dir.resolve().name}-{kind}.gguf"
        writer = gguf.GGUFWriter(path, "llama")

        # settings, vocabulary
        add_settings(writer, config, kind)
        for method, values in vocabulary.items():
            getattr(writer, method)(values)

        # tensors
        for name, tensor in gguf_tensors(model):
            tensor_type = gguf.GGMLQuantizationType[tensor_type_of(tensor, kind)]
            if tensor_type.name == "F16":
                cast_without_overflow(name, tensor, torch.float16)  # only to refuse: gguf would write infinity
            writer.add_tensor(name, gguf.quants.quantize(tensor.numpy(), tensor_type), raw_dtype=tensor_type)

        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        verify_gguf(path, model, tokenizer, kind)
    return out_dir / path.name


def check_can_be_gguf(checkpoint_dir: Path) -> tuple[Tokenizer, dict[str, Any]]:
    """The tokenizer of a checkpoint, and what of it a GGUF file holds; see `gguf_vocabulary`. No weight is read.

    Raises:
        InputError: another architecture, or a tokenizer that llama.cpp has no name for.
    """
    config = Config.from_checkpoint(checkpoint_dir)
    tokenizer = Tokenizer(checkpoint_dir)
    check_plain_llama(config)
    return tokenizer, gguf_vocabulary(checkpoint_dir, config, tokenizer)


def check_plain_llama(config: Config) -> None:
    """Raises InputError for a model that llama.cpp's architecture `llama` does not compute."""
    llama = Config(family="llama", activation="silu")
    differing = [key for key in PLAIN_LLAMA if getattr(config, key) != getattr(llama, key)]
    if config.rope_scaling and config.rope_scaling["rope_type"] not in ("linear", "llama3"):
        differing.append(f"{config.rope_scaling['rope_type']} positions")
    if config.no_rope_layers:
        differing.append("layers without positions")
    if differing:
        raise InputError(
            f"{config.name} is no plain llama ({', '.join(differing)}): convert it with llama.cpp's own script."
        )


def add_settings(writer: Any, config: Config, kind: GGUFType) -> None:
    """Writes the sizes of the model, with a method of gguf.GGUFWriter for each."""
    writer.add_name(config.name)
    writer.add_file_type(FILE_TYPES[kind])
    writer.add_vocab_size(config.padded_vocab_size)
    writer.add_block_count(config.n_layer)
    writer.add_context_length(config.block_size)
    writer.add_embedding_length(config.n_embd)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.n_head)
    writer.add_head_count_kv(config.n_query_groups)
    writer.add_key_length(config.head_size)
    writer.add_value_length(config.head_size)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_freq_base(config.rope_base)
    writer.add_rope_dimension_count(config.head_size)

    scaling = config.rope_scaling or {}
    if scaling.get("rope_type") == "linear":
        writer.add_string("llama.rope.scaling.type", "linear")
        writer.add_rope_scaling_factor(scaling["factor"])
    elif scaling:  # llama3, whose factors are a tensor of their own
        writer.add_rope_scaling_orig_ctx_len(scaling["original_max_position_embeddings"])


def gguf_tensors(model: GPT) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields llama.cpp's names and tensors, in float32.

    llama.cpp rotates the neighbours 2i and 2i + 1 of a head, this model i and i + head_size / 2: the rows of q and k
    change places.
    """
    config = model.config
    names = gguf_names(config)
    for name, param in model.named_parameters():
        gguf_name = names[hf_name(name, config)[0]]
        tensor = param
        if gguf_name.endswith(("attn_q.weight", "attn_k.weight")):
            halves = param.view(-1, 2, config.head_size // 2, param.size(1))  # (heads, 2, size / 2, E)
            tensor = halves.transpose(1, 2).reshape(param.shape)
        yield gguf_name, tensor.detach().float().contiguous()

    # Llama 3's scaling, as what each frequency is divided by
    if (config.rope_scaling or {}).get("rope_type") == "llama3":
        unscaled = Rope(config.replace(rope_scaling=None)).theta
        yield ROPE_FACTORS, unscaled / model.ropes["global"].theta


def gguf_names(config: Config) -> dict[str, str]:
    """Hugging Face's name of each weight -> llama.cpp's."""
    names = {}
    for gguf_module, (hf_module, _) in OTHER_TENSORS.items():
        names[f"{hf_module}.weight"] = f"{gguf_module}.weight"
    for layer in range(config.n_layer):
        for gguf_module, (hf_module, _) in LAYER_TENSORS.items():
            names[f"model.layers.{layer}.{hf_module}.weight"] = f"blk.{layer}.{gguf_module}.weight"
    return names


def tensor_type_of(tensor: torch.Tensor, kind: GGUFType) -> str:
    """The name of a tensor's GGMLQuantizationType. Vectors stay exact, and rows that are no whole blocks of q8_0."""
    if tensor.ndim == 1 or (kind == "q8_0" and tensor.size(-1) % Q8_0_BLOCK):
        return "F32"
    return TENSOR_TYPES[kind]


def verify_gguf(path: Path, model: GPT, tokenizer: Tokenizer, kind: GGUFType) -> None:
    """Reads the file back and prints how it differs from the model.

    Raises:
        InputError: its tokens are others, or its logits differ by more than rounding explains.
    """
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        copy_dir = Path(folder) / "again"
        convert_gguf(path, copy_dir)
        copy = load_model(copy_dir, torch.float32)
        copy_tokenizer = Tokenizer(copy_dir)
        difference = compare_logits(logits_of(model, tokenizer), logits_of(copy, copy_tokenizer))
    same_ids = copy_tokenizer.encode(PROBE).tolist() == tokenizer.encode(PROBE).tolist()
    same = same_ids and copy_tokenizer.stop_ids == tokenizer.stop_ids
    print(f"Read back from {kind}: {difference}; tokens are {'the same' if same else 'others'}.")
    if not same or not difference.is_within(ROUNDING[kind]):
        raise InputError("What was written is not the model. Nothing was kept. Please report this, with its name.")
