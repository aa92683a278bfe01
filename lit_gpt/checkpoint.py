"""Checkpoint folders: reading their tensors into a model, one at a time, and writing them in either format."""

import hashlib
import json
import shutil
import struct
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from lit_gpt import families
from lit_gpt.config import Config, read_json
from lit_gpt.convert import hf_name, to_hf, to_lit
from lit_gpt.errors import InputError, reading
from lit_gpt.files import must_be_empty, new_folder
from lit_gpt.model import GPT
from lit_gpt.quantize import Quantize, QuantizedLinear, quantize_linears

# what belongs to a checkpoint besides its weights
COMPANIONS = (
    "config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "chat_template.jinja", "additional_chat_templates/*.jinja", "LICENSE*",
)  # fmt: skip
FINGERPRINT = "lit_gpt.fingerprint"  # in a safetensors header, where a copy says what it is a copy of
MAX_SHARD = 4 * 10**9  # bytes; a larger model is written as several files


def build_model(config: Config) -> GPT:
    """A GPT without weights: on the meta device, where it takes no memory."""
    with torch.device("meta"):
        try:
            return GPT(config).requires_grad_(False)
        except KeyError as error:  # from one of the tables at the end of model.py
            raise InputError(f"{config.name}: its lit_config.json says {error}, which no part is called.") from error


def load_model(
    checkpoint_dir: Path,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    quantize: Quantize | None = None,
) -> GPT:
    """A GPT that is ready to use. `dtype` None keeps what the files hold.

    Raises:
        InputError: see `load_weights` and `quantize_linears`.
    """
    model = build_model(Config.from_checkpoint(checkpoint_dir))
    quantize_linears(model, quantize)
    load_weights(model, checkpoint_dir, dtype, device)
    return model.eval()


def load_weights(
    model: GPT, checkpoint_dir: Path, dtype: torch.dtype | None = None, device: torch.device | None = None
) -> str:
    """Puts a checkpoint's tensors into `model`, one at a time and in file order, and returns their fingerprint.

    Takes a Hugging Face folder as it is, or one that `scripts/convert_hf_checkpoint.py` wrote. Each tensor goes to its
    dtype and device the moment it arrives, so that the peak is the model and one tensor.

    Raises:
        InputError: files are missing or damaged, tensors are missing, superfluous, of another shape or not finite, as
            they are or in `dtype`. All that is wrong with the tensors as they are is said at once.
    """
    checkpoint_dir = Path(checkpoint_dir)
    digests = {}
    for name, tensor in checked_tensors(model, checkpoint_dir):
        assign(model, name, tensor.to(device), dtype or tensor.dtype)
        digests[name] = digest(name, tensor)
    if model.config.tie_embeddings:
        model.lm_head.weight = model.transformer.wte.weight
    model.to(device)  # what is not in the files: the rotary frequencies
    return read_metadata(weight_files(checkpoint_dir)[0]).get(FINGERPRINT) or fingerprint(digests)


def checked_tensors(model: GPT, checkpoint_dir: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """A checkpoint's tensors under our names, in file order, if they are those that `model` has.

    Raises:
        InputError: see `load_weights`; after the last tensor.
    """
    # a model of this config, whatever has been done to ours: a quantized linear has no weight left
    shapes = {name: tuple(param.shape) for name, param in build_model(model.config).named_parameters()}
    files = weight_files(checkpoint_dir)
    seen, problems = set(), []
    for name, tensor in read_tensors(files):
        try:
            ours = [(name, tensor)] if is_converted(files) else to_lit(name, tensor, model.config)
        except KeyError:
            problems.append(f"{name} is in no {model.config.family} model")
            continue
        for key, value in ours:
            seen.add(key)
            if key not in shapes:
                problems.append(f"{name} has no place in a model of {model.config.n_layer} layers")
            elif tuple(value.shape) != shapes[key]:
                problems.append(f"{name} has shape {list(value.shape)}, the config says {list(shapes[key])}")
            elif not is_finite(value):
                problems.append(f"{name} holds NaN or infinite values")
            else:
                yield key, value
    missing = {key if is_converted(files) else hf_name(key, model.config)[0]: None for key in shapes if key not in seen}
    problems += [f"{name} is missing" for name in missing]
    if problems:
        more = f" (and {len(problems) - 5} more)" if len(problems) > 5 else ""
        raise InputError(
            f"{checkpoint_dir}: {'; '.join(problems[:5])}{more}. Download or convert the checkpoint again."
        )


def is_converted(files: list[Path]) -> bool:
    """Whether these are our own names and layout."""
    return files[0].name.startswith("lit_model")


def weight_files(checkpoint_dir: Path) -> list[Path]:
    """The files that hold a checkpoint's weights: ours before Hugging Face's, safetensors before .bin."""
    for stem, ending in (("lit_model", "safetensors"), ("model", "safetensors"), ("pytorch_model", "bin")):
        index = checkpoint_dir / f"{stem}.{ending}.index.json"
        if index.is_file():
            content = read_json(index)
            with reading(index):
                files = [checkpoint_dir / name for name in sorted(set(content["weight_map"].values()))]
            missing = [file.name for file in files if not file.is_file()]
            if missing or not files:
                raise InputError(
                    f"{checkpoint_dir} lacks {', '.join(missing) or 'all weights'}. Download the checkpoint again."
                )
            return files
        if (checkpoint_dir / f"{stem}.{ending}").is_file():
            return [checkpoint_dir / f"{stem}.{ending}"]
    raise InputError(
        f"{checkpoint_dir} has no weights: no model.safetensors, no pytorch_model.bin and no index of parts of them."
        " `python scripts/download_sample.py` fetches a small checkpoint."
    )


def read_tensors(files: Iterable[Path]) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor, in file order."""
    from safetensors import SafetensorError, safe_open

    for file in files:
        if file.suffix == ".bin":
            yield from read_bin(file).items()
            continue
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.offset_keys():
                    yield name, tensors.get_tensor(name)
        except SafetensorError as error:
            raise InputError(f"{file} is damaged or incomplete ({first_line(error)}). Download it again.") from None


def read_bin(file: Path) -> dict[str, torch.Tensor]:
    """What `torch.save` wrote, if it is nothing but tensors by name."""
    mapped = zipfile.is_zipfile(file)  # before torch 1.6 it was no zip, and cannot be mapped into memory
    try:
        tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # of many kinds; torch's own text advises to run the code in the file
        raise InputError(
            f"{file} is damaged, or is no plain file of tensors ({type(error).__name__}). Download it again, best as"
            " safetensors."
        ) from None
    if not isinstance(tensors, dict):
        raise InputError(f"{file} is no plain file of tensors: it holds a {type(tensors).__name__}.")
    others = [str(name) for name, value in tensors.items() if not torch.is_tensor(value)]
    if others:
        raise InputError(f"{file} is no plain file of tensors: it also holds {', '.join(others[:5])}.")
    return tensors


def read_metadata(file: Path) -> dict[str, str]:
    """The header of a safetensors file."""
    from safetensors import SafetensorError, safe_open

    if file.suffix != ".safetensors":
        return {}
    try:
        with safe_open(file, framework="pt") as tensors:
            return tensors.metadata() or {}
    except SafetensorError as error:
        raise InputError(f"{file} is damaged or incomplete ({first_line(error)}).") from None


def save_tensors(tensors: dict[str, torch.Tensor], file: Path, metadata: dict[str, str]) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(tensors, file, {"format": "pt"} | metadata)
        file.chmod(file.parent.stat().st_mode & 0o666)  # the library leaves it to its owner alone
    except SafetensorError as error:  # its way to report a full disk
        raise InputError(f"{file} could not be written ({first_line(error)}). Free some space and run again.") from None


def first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0].rstrip(".")


def assign(model: nn.Module, name: str, tensor: torch.Tensor, dtype: torch.dtype) -> None:
    """Replaces a parameter, which may be on the meta device. A quantized linear takes the checkpoint's own values."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    if leaf == "weight" and isinstance(module, QuantizedLinear):
        module.load_weight(tensor)
    else:
        setattr(module, leaf, nn.Parameter(cast(name, tensor, dtype), requires_grad=False))


def cast(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Raises InputError where a value is too large for `dtype`, and would become infinite."""
    found = tensor.to(dtype)
    if found is not tensor and dtype.itemsize <= tensor.dtype.itemsize and not is_finite(found):
        raise InputError(
            f"{name} holds {tensor.abs().max():.3g}, and {str(dtype).removeprefix('torch.')} ends at"
            f" {torch.finfo(dtype).max:.3g}. Choose bfloat16 or float32."
        )
    return found


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether all values are. The extremes tell, and finding them needs no memory."""
    return tensor.numel() == 0 or bool(torch.isfinite(torch.stack(tensor.aminmax())).all())


def digest(name: str, tensor: torch.Tensor) -> str:
    """A tensor's name, shape and 64 evenly spaced values."""
    values = tensor.flatten()[torch.linspace(0, tensor.numel() - 1, 64, dtype=torch.float64).long()]
    return f"{name} {list(tensor.shape)} {values.float().tolist()}"


def fingerprint(digests: dict[str, str]) -> str:
    """sha256 of a base model, whatever the order of its tensors. An adapter is refused by any other base."""
    return hashlib.sha256("\n".join(digests[name] for name in sorted(digests)).encode()).hexdigest()


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
