"""Writing checkpoint folders, in Hugging Face's names or ours, with never more than one tensor in memory."""

import json
import shutil
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from lit_gpt import families
from lit_gpt.checkpoint.fingerprint import FINGERPRINT_KEY, model_fingerprint, tensor_digest
from lit_gpt.checkpoint.load import build_model, cast_without_overflow, checked_tensors, stored_fingerprint
from lit_gpt.checkpoint.quantized_elsewhere import CONFIG_KEYS
from lit_gpt.checkpoint.tensor_names import to_hf
from lit_gpt.checkpoint.weight_files import first_line
from lit_gpt.config import Config, read_json
from lit_gpt.errors import InputError
from lit_gpt.files import must_be_empty, new_folder
from lit_gpt.lock import locks
from lit_gpt.model.gpt import GPT

# what belongs to a checkpoint besides its weights
TOKENIZER = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja",
    "chat_template.json", "additional_chat_templates/*.jinja",
)  # fmt: skip
COMPANIONS = ("config.json", "generation_config.json", *TOKENIZER, "LICENSE*")
MAX_SHARD = 4 * 10**9  # bytes; a larger model is written as several files


def save_tensors(tensors: dict[str, torch.Tensor], file: Path, metadata: dict[str, str]) -> None:
    """Writes a safetensors file of tensors that are all in memory, with text fields in its header.

    Raises:
        InputError: the disk is full.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(on_cpu, file, {"format": "pt"} | metadata)
        # safetensors 0.8 lets only the owner read its files: https://github.com/safetensors/safetensors/issues/782
        file.chmod(file.parent.stat().st_mode & 0o666)
    except SafetensorError as error:  # the library's way to report a full disk
        raise InputError(
            f"{file} could not be written ({first_line(error)}). Free some space and run again."
        ) from error


class SafetensorsWriter:
    """Writes a safetensors file tensor by tensor, where the library wants all of them in memory.

        size of the header | header (JSON), padded with spaces | tensors, one after the other
        8 bytes              `room` bytes                        `size` bytes

    The header stands first and is known last, so that room is left for it. The library has no such writer:
    https://github.com/safetensors/safetensors/issues/291
    """

    DTYPES = {
        "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "int32": "I32",
        "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL",
    }  # fmt: skip
    BYTES_PER_TENSOR = 256  # of header: its name, dtype, shape and place

    def __init__(self, path: Path, metadata: Mapping[str, str], n_tensors: int) -> None:
        """`n_tensors` is the most that will come. Values of `metadata` may change until `close`, not their length."""
        self.metadata = metadata
        self.header: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
        self.room = len(json.dumps(self.header)) + self.BYTES_PER_TENSOR * (n_tensors + 1)
        self.room += -self.room % 8  # the tensors begin at a multiple of 8
        self.size = 0
        self.path = path
        self.file = path.open("wb")
        self.file.seek(8 + self.room)

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Writes a tensor behind those that are there."""
        begin = self.size
        self.size += tensor.nbytes
        self.header[name] = {
            "dtype": self.DTYPES[str(tensor.dtype).removeprefix("torch.")],
            "shape": list(tensor.shape),
            "data_offsets": [begin, self.size],
        }
        content = tensor.detach().cpu().contiguous().flatten()
        with naming(self.path):
            self.file.write(content.view(torch.uint8).numpy().data)  # as bytes: numpy has no bfloat16

    def close(self) -> None:
        """Writes the header into the room that was left for it."""
        self.header["__metadata__"] |= self.metadata
        header = json.dumps(self.header).encode()
        assert len(header) <= self.room, f"{self.file.name}: a header of {len(header)} bytes in room for {self.room}"
        with naming(self.path):
            self.file.seek(0)
            self.file.write(struct.pack("<Q", self.room) + header.ljust(self.room))
            self.file.close()


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Puts the path into the system's errors about an open file, such as a full disk, which do not name it."""
    try:
        yield
    except OSError as error:
        error.filename = str(path)
        raise


@locks("out_dir")
def convert_checkpoint(
    checkpoint_dir: Path,
    out_dir: Path,
    hugging_face: bool,
    dtype: torch.dtype | None = None,
    max_shard: int | None = None,
    check: Callable[[Path], None] | None = None,
) -> None:
    """Copies a checkpoint in our names or in Hugging Face's, tensor by tensor. The fingerprint goes with it.

    Files hold at most `max_shard` bytes, None is MAX_SHARD. `check` sees the folder before it gets its name, and may
    refuse it.

    Raises:
        InputError: see `must_be_empty` and `load_weights`.
    """
    must_be_empty(out_dir)
    model = build_model(Config.from_checkpoint(checkpoint_dir))
    tensors = checked_tensors(model, checkpoint_dir)
    original = stored_fingerprint(checkpoint_dir)
    # of a checkpoint without one it is known after the last tensor; until then another of the same length stands here
    metadata = {FINGERPRINT_KEY: original or model_fingerprint({})}

    def converted_tensors() -> Iterator[tuple[str, torch.Tensor]]:
        digests = {}
        for name, tensor in tensors:
            digests[name] = tensor_digest(name, tensor)
            yield name, cast_without_overflow(name, tensor, dtype or tensor.dtype)
        metadata[FINGERPRINT_KEY] = original or model_fingerprint(digests)

    write_checkpoint(
        converted_tensors(),
        config=model.config,
        source=checkpoint_dir,
        out_dir=out_dir,
        hugging_face=hugging_face,
        metadata=metadata,
        max_shard=max_shard,
        check=check,
    )


def save_hf(
    model: GPT,
    source: Path,
    out_dir: Path,
    max_shard: int | None = None,
    check: Callable[[Path], None] | None = None,
    dtypes: Mapping[str, torch.dtype] | None = None,
    metadata: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Writes a model as a Hugging Face folder. `source` is the folder it came from: its tokenizer goes along.

    A head that no longer is the embedding (a LoRA on it was merged) is written too, and config.json says so.
    `dtypes` has one for each weight, None keeps what it has. `max_shard` and `check` are those of `convert_checkpoint`,
    `metadata` is text for the headers of the files.
    """
    config = model.config
    if config.tie_embeddings and model.lm_head.weight is not model.transformer.wte.weight:
        config = config.replace(tie_embeddings=False)

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for name, param in model.named_parameters():
            yield name, cast_without_overflow(name, param, dtypes[name]) if dtypes else param

    write_checkpoint(
        tensors(),
        config=config,
        source=source,
        out_dir=out_dir,
        hugging_face=True,
        metadata=dict(metadata),
        max_shard=max_shard,
        check=check,
    )


def write_checkpoint(
    tensors: Iterable[tuple[str, torch.Tensor]],
    config: Config,
    source: Path,
    out_dir: Path,
    hugging_face: bool,
    metadata: dict[str, str],
    max_shard: int | None,
    check: Callable[[Path], None] | None,
) -> None:
    """Writes a new folder, which appears when it is whole and `check` has not refused it. See `write_files`."""
    must_be_empty(out_dir)
    with new_folder(out_dir) as folder:
        write_files(
            tensors,
            config=config,
            source=source,
            folder=folder,
            hugging_face=hugging_face,
            metadata=metadata,
            max_shard=max_shard,
        )
        if check is not None:
            check(folder)


def write_files(
    tensors: Iterable[tuple[str, torch.Tensor]],
    config: Config,
    source: Path,
    folder: Path,
    hugging_face: bool = True,
    metadata: Mapping[str, str] = MappingProxyType({}),
    max_shard: int | None = None,
) -> None:
    """Writes a checkpoint into a folder that is there: the weights, and the tokenizer and settings of `source`.

    `tensors` come under our names, one at a time. Headers are written last, so that the last tensor may still complete
    `metadata`.
    """
    dtypes = write_weights(
        to_hf(tensors, config) if hugging_face else tensors,
        folder=folder,
        stem="model" if hugging_face else "lit_model",
        metadata=metadata,
        n_tensors=len(build_model(config).state_dict()),
        max_shard=max_shard or MAX_SHARD,
    )
    copy_companions(source, folder)
    write_hf_config(source, folder, config, dtype=dtypes.pop() if len(dtypes) == 1 else None)
    if not hugging_face:
        config.save(folder)


def write_weights(
    tensors: Iterable[tuple[str, torch.Tensor]],
    folder: Path,
    stem: str,
    metadata: Mapping[str, str],
    n_tensors: int,
    max_shard: int,
) -> set[str]:
    """Writes STEM.safetensors, or several files of at most `max_shard` bytes and their index. Returns the dtypes.

    `n_tensors` is the most that will come.
    """
    # the tensors; how many files they need is known in the end
    shards: list[SafetensorsWriter] = []
    dtypes = set()
    for name, tensor in tensors:
        if not shards or (shards[-1].size and shards[-1].size + tensor.nbytes > max_shard):
            path = folder / f"{stem}-{len(shards)}.safetensors"
            shards.append(SafetensorsWriter(path, metadata, n_tensors))
        shards[-1].add(name, tensor)
        dtypes.add(str(tensor.dtype).removeprefix("torch."))
    for shard in shards:
        shard.close()

    # their names
    file_names = [f"{stem}-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    if len(shards) == 1:
        file_names = [f"{stem}.safetensors"]
    for i, file_name in enumerate(file_names):
        (folder / f"{stem}-{i}.safetensors").rename(folder / file_name)

    # the index of several: in which file each tensor is
    if len(shards) > 1:
        weight_map: dict[str, str] = {}
        for shard, file_name in zip(shards, file_names, strict=True):
            weight_map |= {name: file_name for name in shard.header if name != "__metadata__"}
        total_size = sum(shard.size for shard in shards)
        index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")
    return dtypes


def copy_companions(source: Path, folder: Path) -> None:
    """Copies what belongs to a checkpoint besides its weights, but for config.json: that describes the weights."""
    copy_files(source, folder, COMPANIONS)


def replace_tokenizer(source: Path, folder: Path) -> None:
    """Puts the tokenizer of `source`, with its chat templates, in the place of the one in `folder`."""
    for pattern in TOKENIZER:
        for path in folder.glob(pattern):
            path.unlink()
    copy_files(source, folder, TOKENIZER)


def copy_files(source: Path, folder: Path, patterns: Iterable[str]) -> None:
    for pattern in patterns:
        for path in source.glob(pattern):
            if path.name != "config.json" and path.is_file():
                copy = folder / path.relative_to(source)
                copy.parent.mkdir(exist_ok=True)
                shutil.copyfile(path, copy)


def write_hf_config(source: Path, folder: Path, config: Config, dtype: str | None) -> None:
    """Writes the config.json of `source` such that it describes the weights in `folder`, and transformers reads it."""
    hf = read_json(source / "config.json")

    # a model_type that transformers has renamed, and keys that it has
    former = families.definition(config.family, "FORMER_MODEL_TYPES")
    renamed_keys, added_keys = former.get(hf.get("model_type"), ({}, {}))
    hf = {renamed_keys.get(key, key): value for key, value in hf.items()}
    hf |= added_keys
    hf.pop("auto_map", None)  # names the checkpoint's own code, which does not go along
    for key in (*CONFIG_KEYS, "transformers_weights"):  # describe files of before: these weights are plain
        hf.pop(key, None)

    # what the weights are now
    hf["tie_word_embeddings"] = config.tie_embeddings
    if hf.get("architectures"):
        hf["architectures"] = [with_a_head(name) for name in hf["architectures"]]
    if dtype is not None:
        dtype_keys = hf.keys() & {"dtype", "torch_dtype"} or {"torch_dtype"}  # transformers 5 and 4
        hf |= dict.fromkeys(dtype_keys, dtype)
    write_json(folder / "config.json", hf)

    # what followed from the folder's name alone (EXCEPTIONS of a family), and the copy has another name
    if Config.from_checkpoint(folder).replace(name=config.name) != config:
        hf |= {"rope_scaling": config.rope_scaling, "max_position_embeddings": config.block_size}
        write_json(folder / "config.json", hf)


def with_a_head(architecture: str) -> str:
    """transformers' class for what writes text, of one that is the model below its head. vLLM goes by that name.

    LlamaModel -> LlamaForCausalLM, Gemma3TextModel -> Gemma3ForCausalLM, GPT2Model -> GPT2LMHeadModel
    """
    if architecture.endswith("LMHeadModel") or not architecture.endswith("Model"):
        return architecture
    name = architecture.removesuffix("Model").removesuffix("Text")
    return "GPT2LMHeadModel" if name == "GPT2" else f"{name}ForCausalLM"


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
