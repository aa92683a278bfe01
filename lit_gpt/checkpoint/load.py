"""Reading checkpoint folders: files -> tensors under our names -> checks -> a model's parameters, one at a time."""

import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import nn

from lit_gpt.checkpoint.fingerprint import FINGERPRINT_KEY, model_fingerprint, tensor_digest
from lit_gpt.checkpoint.tensor_names import hf_name, to_lit
from lit_gpt.config import Config, check_is_checkpoint, read_json
from lit_gpt.errors import InputError, reading
from lit_gpt.model.gpt import GPT
from lit_gpt.quantize import Quantize, QuantizedLinear, quantize_linears

MAX_PROBLEMS = 5  # of a checkpoint's tensors, that one error tells


def build_model(config: Config) -> GPT:
    """A GPT without weights: on the meta device, where it takes no memory."""
    with torch.device("meta"):
        try:
            return GPT(config).requires_grad_(False)
        except KeyError as error:  # from one of the tables of classes in lit_gpt/model/
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
        replace_parameter(model, name, tensor.to(device), dtype or tensor.dtype)
        digests[name] = tensor_digest(name, tensor)
    if model.config.tie_embeddings:
        model.lm_head.weight = model.transformer.wte.weight
    model.to(device)  # the rotary frequencies too, which are in no file
    return stored_fingerprint(checkpoint_dir) or model_fingerprint(digests)


def checked_tensors(model: GPT, checkpoint_dir: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields a checkpoint's tensors under our names, in file order, if they are those that `model` has.

    A tensor that does not fit is noted and left out. After the last one, all problems are raised as one error.

    Raises:
        InputError: see `load_weights`.
    """
    config = model.config
    files = weight_files(checkpoint_dir)
    converted = is_converted(files)
    shapes = parameter_shapes(config)
    problems: list[str] = []
    seen: set[str] = set()
    for stored_name, stored in read_tensors(files):
        # under our names; the parts of a fused tensor have one each
        try:
            named = [(stored_name, stored)] if converted else to_lit(stored_name, stored, config)
        except KeyError:
            problems.append(f"{stored_name} is in no {config.family} model")
            continue

        # those that fit
        for name, tensor in named:
            seen.add(name)
            shape = list(tensor.shape)
            expected = shapes.get(name)
            if expected is None:
                problems.append(f"{stored_name} has no place in a model of {config.n_layer} layers")
            elif shape != expected:
                problems.append(f"{stored_name} has shape {shape}, the config says {expected}")
            elif not is_finite(tensor):
                problems.append(f"{stored_name} holds NaN or infinite values")
            else:
                yield name, tensor

    # missing ones, by the names that the checkpoint would give them; parts of a fused tensor share one
    missing = [name for name in shapes if name not in seen]
    if not converted:
        missing = [hf_name(name, config)[0] for name in missing]
    problems += [f"{name} is missing" for name in dict.fromkeys(missing)]

    if problems:
        said = "; ".join(problems[:MAX_PROBLEMS])
        n_more = len(problems) - MAX_PROBLEMS
        if n_more > 0:
            said += f" (and {n_more} more)"
        raise InputError(f"{checkpoint_dir}: {said}. Download or convert the checkpoint again.")


def parameter_shapes(config: Config) -> dict[str, list[int]]:
    """The shapes of a plain model of this config.

    A model that is being loaded cannot be asked instead: its quantized linears no longer have a weight.
    """
    plain = build_model(config)
    return {name: list(param.shape) for name, param in plain.named_parameters()}


def stored_fingerprint(checkpoint_dir: Path) -> str | None:
    """The fingerprint that a converted or exported copy carries in the header of its first file."""
    first_file = weight_files(checkpoint_dir)[0]
    return read_metadata(first_file).get(FINGERPRINT_KEY)


def is_converted(files: list[Path]) -> bool:
    """Whether the tensors have our own names and layout: `scripts/convert_hf_checkpoint.py` wrote them."""
    return files[0].name.startswith("lit_model")


def weight_files(checkpoint_dir: Path) -> list[Path]:
    """The files that hold a checkpoint's weights: ours before Hugging Face's, safetensors before .bin.

    Raises:
        InputError: there is no such folder, there are none in it, or one that the index names is missing.
    """
    check_is_checkpoint(checkpoint_dir)
    for name in ("lit_model.safetensors", "model.safetensors", "pytorch_model.bin"):
        index = checkpoint_dir / f"{name}.index.json"  # of a model in several files
        if index.is_file():
            return indexed_files(index)
        if (checkpoint_dir / name).is_file():
            return [checkpoint_dir / name]
    raise InputError(
        f"{checkpoint_dir} has no weights: no model.safetensors, no pytorch_model.bin and no index of parts of them."
        " `python scripts/download_sample.py` fetches a small checkpoint."
    )


def indexed_files(index: Path) -> list[Path]:
    """The files that a model.safetensors.index.json names, which says for each tensor where it is."""
    folder = index.parent
    content = read_json(index)
    with reading(index):
        names = sorted(set(content["weight_map"].values()))
        files = [folder / name for name in names]
    missing = [file.name for file in files if not file.is_file()]
    if missing or not files:
        raise InputError(f"{folder} lacks {', '.join(missing) or 'all weights'}. Download the checkpoint again.")
    return files


def read_tensors(files: Iterable[Path]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields every tensor with its name, in file order."""
    from safetensors import SafetensorError, safe_open

    for file in files:
        if file.suffix == ".bin":
            yield from read_bin(file).items()
            continue
        check_readable(file)
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.offset_keys():
                    yield name, tensors.get_tensor(name)
        except SafetensorError as error:
            raise InputError(f"{file} is damaged or incomplete ({first_line(error)}). Download it again.") from error


def check_readable(file: Path) -> None:
    """Raises the system's own error, which names the file; safetensors takes one that is not ours for missing."""
    with file.open("rb"):
        pass


def read_bin(file: Path) -> dict[str, torch.Tensor]:
    """Reads a file that `torch.save` wrote, if it holds nothing but tensors by name. No code in it is run.

    Raises:
        InputError: it holds something else, or is damaged.
    """
    is_zip = zipfile.is_zipfile(file)  # before torch 1.6 it was none, and cannot be mapped into memory
    try:
        tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=is_zip)
    except Exception as error:
        # A damaged file makes the unpickler fail with almost any error. Only its kind is shown: for what
        # weights_only refuses, torch's own text advises to load the file without it, which runs the code in it.
        raise InputError(
            f"{file} is damaged, or is no plain file of tensors ({type(error).__name__}). Download it again, best as"
            " safetensors."
        ) from error
    if not isinstance(tensors, dict):
        raise InputError(f"{file} is no plain file of tensors: it holds a {type(tensors).__name__}.")
    others = [str(name) for name, value in tensors.items() if not torch.is_tensor(value)]
    if others:
        listed = ", ".join(others[:5])
        raise InputError(f"{file} is no plain file of tensors: it also holds {listed}.")
    return tensors


def read_metadata(file: Path) -> dict[str, str]:
    """The text fields in the header of a safetensors file; empty for a .bin, which has none."""
    from safetensors import SafetensorError, safe_open

    if file.suffix != ".safetensors":
        return {}
    check_readable(file)
    try:
        with safe_open(file, framework="pt") as tensors:
            return tensors.metadata() or {}
    except SafetensorError as error:
        raise InputError(f"{file} is damaged or incomplete ({first_line(error)}).") from error


def first_line(error: Exception) -> str:
    """The first line of an error's message, which may have a page of them."""
    lines = str(error).strip().split("\n")
    return lines[0].rstrip(".")


def replace_parameter(model: nn.Module, name: str, tensor: torch.Tensor, dtype: torch.dtype) -> None:
    """Puts a tensor in the place of a parameter, which may be on the meta device.

    A quantized linear takes the checkpoint's own values and computes its codes from them: `dtype` is not for it.
    """
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    if leaf == "weight" and isinstance(module, QuantizedLinear):
        module.load_weight(tensor)
        return
    value = cast_without_overflow(name, tensor, dtype)
    setattr(module, leaf, nn.Parameter(value, requires_grad=False))  # trained ones are chosen after loading


def cast_without_overflow(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The tensor in another dtype.

    Raises:
        InputError: a value is too large for `dtype`, and would become infinite.
    """
    result = tensor.to(dtype)
    # float16 ends at 65504, bfloat16 a little before float32: a cast to as many bits can overflow, too
    may_overflow = result is not tensor and dtype.itemsize <= tensor.dtype.itemsize
    if may_overflow and not is_finite(result):
        largest = tensor.abs().max()
        limit = torch.finfo(dtype).max
        dtype_name = str(dtype).removeprefix("torch.")
        raise InputError(
            f"{name} holds {largest:.3g}, and {dtype_name} ends at {limit:.3g}. Choose bfloat16 or float32."
        )
    return result


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether all values are finite. The smallest and the largest tell, and finding them needs no memory."""
    if tensor.numel() == 0:
        return True
    extremes = torch.stack(tensor.aminmax())
    return bool(torch.isfinite(extremes).all())
