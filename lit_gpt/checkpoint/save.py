"""Checkpoint folders: reading their tensors into a model, one at a time, and writing them in either format."""

import json
import shutil
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from lit_gpt import families
from lit_gpt.checkpoint.fingerprint import FINGERPRINT, digest, fingerprint
from lit_gpt.checkpoint.load import build_model, cast, checked_tensors, first_line, read_metadata, weight_files
from lit_gpt.checkpoint.tensor_names import to_hf
from lit_gpt.config import Config, read_json
from lit_gpt.errors import InputError
from lit_gpt.files import must_be_empty, new_folder
from lit_gpt.model.gpt import GPT

# what belongs to a checkpoint besides its weights
COMPANIONS = (
    "config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "chat_template.jinja", "additional_chat_templates/*.jinja", "LICENSE*",
)  # fmt: skip
MAX_SHARD = 4 * 10**9  # bytes; a larger model is written as several files


def save_tensors(tensors: dict[str, torch.Tensor], file: Path, metadata: dict[str, str]) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(tensors, file, {"format": "pt"} | metadata)
        file.chmod(file.parent.stat().st_mode & 0o666)  # the library leaves it to its owner alone
    except SafetensorError as error:  # its way to report a full disk
        raise InputError(f"{file} could not be written ({first_line(error)}). Free some space and run again.") from None


class Writer:
    """A safetensors file, tensor by tensor. Its header stands first and is known last, so that room is left for it."""

    KINDS = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "uint8": "U8", "int8": "I8"}

    def __init__(self, path: Path, metadata: Mapping[str, str], n_tensors: int) -> None:
        """`n_tensors` is the most that will come. Values of `metadata` may change until `close`, not their length."""
        self.metadata = metadata
        self.header: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
        self.room, self.size = len(json.dumps(self.header)) + 256 * (n_tensors + 1) // 8 * 8, 0
        self.room += -self.room % 8  # the data begin at a multiple of 8
        self.file = path.open("wb")
        self.file.seek(8 + self.room)

    def add(self, name: str, tensor: torch.Tensor) -> None:
        begin, self.size = self.size, self.size + tensor.nbytes
        kind = self.KINDS[str(tensor.dtype).removeprefix("torch.")]
        self.header[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [begin, self.size]}
        self.file.write(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)

    def close(self) -> None:
        self.header["__metadata__"] |= self.metadata
        header = json.dumps(self.header).encode()
        assert len(header) <= self.room, f"{self.file.name}: a header of {len(header)} bytes in room for {self.room}"
        self.file.seek(0)
        self.file.write(struct.pack("<Q", self.room) + header.ljust(self.room))
        self.file.close()


def convert(
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
    own = read_metadata(weight_files(checkpoint_dir)[0]).get(FINGERPRINT)
    metadata = {FINGERPRINT: own or fingerprint({})}  # as long as what is known in the end

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        digests = {}
        for name, tensor in checked_tensors(model, checkpoint_dir):
            digests[name] = digest(name, tensor)
            yield name, cast(name, tensor, dtype or tensor.dtype)
        metadata[FINGERPRINT] = own or fingerprint(digests)

    write_checkpoint(tensors(), model.config, checkpoint_dir, out_dir, hugging_face, metadata, max_shard, check)


def save_hf(
    model: GPT,
    source: Path,
    out_dir: Path,
    max_shard: int | None = None,
    check: Callable[[Path], None] | None = None,
) -> None:
    """Writes a model as a Hugging Face folder. `source` is the folder it came from: its tokenizer goes along.

    A head that no longer is the embedding (a LoRA on it was merged) is written too, and config.json says so.
    `max_shard` and `check` are those of `convert`.
    """
    untied = model.config.tie_embeddings and model.lm_head.weight is not model.transformer.wte.weight
    config = model.config.replace(tie_embeddings=False) if untied else model.config
    write_checkpoint(model.named_parameters(), config, source, out_dir, True, {}, max_shard, check)


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
    """Writes tensors, given under our names, with the companions of `source`. Never more than one is in memory."""
    must_be_empty(out_dir)
    with new_folder(out_dir) as folder:
        write_files(tensors, config, source, folder, hugging_face, metadata, max_shard)
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
    """Writes them into a folder that is there. Headers come last: `metadata` may be completed with the last tensor."""
    stem, n_tensors = "model" if hugging_face else "lit_model", len(build_model(config).state_dict())
    shards: list[Writer] = []
    dtypes = set()
    for name, tensor in to_hf(tensors, config) if hugging_face else tensors:
        if not shards or (shards[-1].size and shards[-1].size + tensor.nbytes > (max_shard or MAX_SHARD)):
            shards.append(Writer(folder / f"{stem}-{len(shards)}.safetensors", metadata, n_tensors))
        shards[-1].add(name, tensor)
        dtypes.add(str(tensor.dtype).removeprefix("torch."))
    for shard in shards:
        shard.close()
    names = [f"{stem}-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    names = names if len(shards) > 1 else [f"{stem}.safetensors"]
    for i, name in enumerate(names):
        (folder / f"{stem}-{i}.safetensors").rename(folder / name)
    if len(shards) > 1:
        index: dict[str, Any] = {"metadata": {"total_size": sum(shard.size for shard in shards)}}
        keys = ((key, name) for name, shard in zip(names, shards, strict=True) for key in shard.header)
        index["weight_map"] = {key: name for key, name in keys if key != "__metadata__"}
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")
    copy_companions(source, folder, config, dtypes.pop() if len(dtypes) == 1 else None)
    if not hugging_face:
        config.save(folder)


def copy_others(source: Path, folder: Path) -> None:
    """Copies the companions but config.json, which is about the weights."""
    for pattern in COMPANIONS:
        for path in source.glob(pattern):
            if path.name != "config.json" and path.is_file():
                copy = folder / path.relative_to(source)
                copy.parent.mkdir(exist_ok=True)
                shutil.copyfile(path, copy)


def copy_companions(source: Path, folder: Path, config: Config, dtype: str | None) -> None:
    """Copies the tokenizer and the settings; config.json says what the weights now are."""
    copy_others(source, folder)
    hf = read_json(source / "config.json")
    renamed, new = families.fact(config.family, "OLD").get(hf.get("model_type"), ({}, {}))
    hf = {renamed.get(key, key): value for key, value in hf.items() if key != "auto_map"}  # no code goes along
    hf |= new | {"tie_word_embeddings": config.tie_embeddings}
    if dtype is not None:
        hf["dtype" if "dtype" in hf else "torch_dtype"] = dtype
    (folder / "config.json").write_text(json.dumps(hf, indent=2) + "\n", encoding="utf-8")
    if Config.from_checkpoint(folder).replace(name=config.name) != config:  # it stood in the old folder's name alone
        hf |= {"rope_scaling": config.rope_scaling, "max_position_embeddings": config.block_size}
        (folder / "config.json").write_text(json.dumps(hf, indent=2) + "\n", encoding="utf-8")
