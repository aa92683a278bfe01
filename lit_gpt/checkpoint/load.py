"""TODO doc of checkpoint.load"""

import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import nn

from lit_gpt.checkpoint.fingerprint import FINGERPRINT, digest, fingerprint
from lit_gpt.checkpoint.tensor_names import hf_name, to_lit
from lit_gpt.config import Config, read_json
from lit_gpt.errors import InputError, reading
from lit_gpt.model.gpt import GPT
from lit_gpt.quantize import Quantize, QuantizedLinear, quantize_linears


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
