"""Reading checkpoint folders: files -> tensors under our names -> checks -> a model's parameters, one at a time."""

import functools
import hashlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from lit_gpt import families
from lit_gpt.checkpoint.fingerprint import FINGERPRINT_KEY, model_fingerprint, tensor_digest
from lit_gpt.checkpoint.quantized_elsewhere import check_not_quantized
from lit_gpt.checkpoint.tensor_names import hf_name, is_transposed, lit_names, to_lit
from lit_gpt.checkpoint.weight_files import (
    TensorHeader,
    is_converted,
    read_headers,
    read_metadata,
    read_tensors,
    weight_files,
)
from lit_gpt.config import Config
from lit_gpt.cpu_codes import CPU_KINDS, CodedLinear, CpuQuantize, quantize_for_cpu
from lit_gpt.errors import InputError
from lit_gpt.model.gpt import GPT
from lit_gpt.quantize import Quantize, QuantizedLinear, frozen_parameter, quantize_linears
from lit_gpt.sharding import as_slice, full_tensor, own_rows, slice_of

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

MAX_PROBLEMS = 5  # of a checkpoint's tensors, that one error tells
HEAD = "lm_head.weight"
EMBEDDING = "transformer.wte.weight"
BLOCKS = "transformer.h."  # how the names of all that is in a block begin
ROWS_AT_ONCE = 1024  # of a tensor whose values are compared


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
    quantize: Quantize | CpuQuantize | None = None,
    mesh: "DeviceMesh | None" = None,
    blocks_on_host: bool = False,
) -> GPT:
    """A GPT that is ready to use. `dtype` None is that of the files; see `load_weights`, for the others, too.

    Raises:
        InputError: see `load_weights` and `quantize_empty_model`.
    """
    model = build_model(Config.from_checkpoint(checkpoint_dir))
    quantize_empty_model(model, quantize, device)
    load_weights(model, checkpoint_dir, dtype, device, mesh, blocks_on_host)
    return model.eval()


def quantize_empty_model(
    model: GPT, kind: Quantize | CpuQuantize | None, device: torch.device | None = None
) -> list[str]:
    """Swaps the linears of a model that waits for its weights, in place, and returns their names. None swaps none.

    Raises:
        InputError: see `quantize_linears` and `quantize_for_cpu`.
    """
    if kind in CPU_KINDS:
        return quantize_for_cpu(model, kind, device)  # type: ignore[arg-type] # one of these
    return quantize_linears(model, kind)  # type: ignore[arg-type] # one of the others


def load_weights(
    model: GPT,
    checkpoint_dir: Path,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    mesh: "DeviceMesh | None" = None,
    blocks_on_host: bool = False,
) -> str:
    """Puts a checkpoint's tensors into `model`, one at a time and in file order, and returns their fingerprint.

    Takes a Hugging Face folder as it is, or one that `scripts/convert_hf_checkpoint.py` wrote. Each tensor goes to its
    dtype and device the moment it arrives, so that the peak is the model and one tensor. `dtype` None is that of the
    files; of several the widest, since a model computes in one. `blocks_on_host` keeps what a block is made of in the
    host's memory, for `stream_blocks`: codes are computed on the device, one weight at a time.

    With a `mesh`, the devices that will split the weights among them, each process reads its own rows of every matrix,
    and codes are made of these; then the peak is its share of the model and one tensor. All processes must call it,
    and `sharding.split_among_devices` before the model computes.

    Raises:
        InputError: there are no weights, or two sets of them; files are damaged; weights were quantized by another
            program; tensors are missing, superfluous or of another shape; a head is not the embedding that config.json
            says it is; values are not finite, as they are or in `dtype`.
    """
    checkpoint_dir = Path(checkpoint_dir)
    digests = {}
    tensors = checked_tensors(model, checkpoint_dir, mesh)
    if dtype is None:
        dtype = widest(stored_dtypes(checkpoint_dir, model.config).values())
    for name, tensor in tensors:
        if mesh is not None and tensor.ndim > 1:
            replace_by_rows(model, name, tensor, dtype, device, mesh)
        else:
            # with a mesh vectors, a thousandth of a model, stay whole until it is split; as copies, since a tensor that
            # is left where it is keeps the mapped file
            tensor_there = tensor.to(device, copy=mesh is not None)
            on_host = blocks_on_host and name.startswith(BLOCKS)
            replace_parameter(model, name, tensor_there, dtype, on_host)
        digests[name] = tensor_digest(name, tensor)
    if model.config.tie_embeddings:
        tie_head(model)
    move_buffers(model, device)
    return stored_fingerprint(checkpoint_dir) or model_fingerprint(digests)


def tie_head(model: GPT) -> None:
    """Makes the head the embedding, which is there by now; a head of codes is made from its values."""
    embedding = model.transformer.wte.weight
    if isinstance(model.lm_head, CodedLinear):
        model.lm_head.load_weight(embedding)
    else:
        model.lm_head.weight = embedding


def checked_tensors(
    model: GPT, checkpoint_dir: Path, mesh: "DeviceMesh | None" = None
) -> Iterator[tuple[str, torch.Tensor]]:
    """A checkpoint's tensors under our names, in file order, which are those that `model` has.

    Names, shapes and dtypes are checked at once, before a weight is read. Values are checked as they are read: those
    that are not finite are left out, and named by an error after the last one. With a `mesh` each process checks its
    own rows. Tensors come whole, but are read from the file only where they are looked at.

    Raises:
        InputError: see `load_weights`.
    """
    files = weight_files(checkpoint_dir)
    headers = checked_headers(files, model.config, checkpoint_dir)
    return values_checked(files, headers, model.config, checkpoint_dir, mesh)


def checked_headers(files: list[Path], config: Config, checkpoint_dir: Path) -> dict[str, TensorHeader]:
    """What the files of a checkpoint say of their tensors, if it is what a model of this config has.

    Raises:
        InputError: weights were quantized by another program; or see `check_headers`.
    """
    headers = read_headers(files)
    check_not_quantized(checkpoint_dir, headers, families.definition(config.family, "IGNORED"))
    check_headers(checkpoint_dir, headers, config, is_converted(files))
    return headers


def values_checked(
    files: list[Path],
    headers: Mapping[str, TensorHeader],
    config: Config,
    checkpoint_dir: Path,
    mesh: "DeviceMesh | None" = None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields the tensors of files whose headers are right. See `checked_tensors`."""
    converted = is_converted(files)
    heads = {name for name in headers if our_names_of(name, config, converted) == [HEAD]}
    embeddings = {name for name in headers if our_names_of(name, config, converted) == [EMBEDDING]}
    to_compare = heads | embeddings if config.tie_embeddings and heads and embeddings else set()
    digests: dict[str, str] = {}
    problems = []

    def looked_at(tensor: torch.Tensor) -> torch.Tensor:
        """The part of a tensor whose values this process checks."""
        return tensor if mesh is None else tensor[own_rows(len(tensor), mesh)]

    for stored_name, stored in read_tensors(files, let_go=mesh is not None):
        # a head that should be the embedding is: then it is not needed twice
        if stored_name in to_compare:
            digests[stored_name] = digest_of_values(looked_at(stored))
            if len(set(digests.values())) > 1:
                raise not_tied(checkpoint_dir, *heads, *embeddings)
            if stored_name in heads:
                continue

        # under our names; the parts of a fused tensor have one each
        for name, tensor in [(stored_name, stored)] if converted else to_lit(stored_name, stored, config):
            if not is_finite(looked_at(tensor)):
                problems.append(f"{stored_name} holds NaN or infinite values")
            elif config.tie_embeddings and name == HEAD:
                yield EMBEDDING, tensor  # the file has the tensor of both under the name of the head alone
            else:
                yield name, tensor

    if problems:
        raise unfit(checkpoint_dir, list(dict.fromkeys(problems)))


def check_headers(checkpoint_dir: Path, headers: Mapping[str, TensorHeader], config: Config, converted: bool) -> None:
    """Raises InputError for tensors that are missing, superfluous or of another shape: all that is wrong at once."""
    shapes = parameter_shapes(config)
    if config.tie_embeddings:
        shapes[HEAD] = shapes[EMBEDDING]
    problems: list[str] = []
    seen: set[str] = set()
    for stored_name, header in headers.items():
        try:
            names = our_names_of(stored_name, config, converted)
        except KeyError:
            problems.append(f"{stored_name} is in no {config.family} model")
            continue
        if not seen.isdisjoint(names):  # with the family's prefix and without
            problems.append(f"{stored_name} is there under another name, too")
        seen.update(names)
        if any(name not in shapes for name in names):
            problems.append(f"{stored_name} has no place in a model of {config.n_layer} layers")
            continue
        expected = stored_shape(stored_name, [shapes[name] for name in names], config, converted)
        if names and list(header.shape) != expected:
            problems.append(f"{stored_name} has shape {list(header.shape)}, the config says {expected}")

    # missing ones, by the names that the checkpoint would give them; parts of a fused tensor share one
    if config.tie_embeddings and seen & {HEAD, EMBEDDING}:
        seen |= {HEAD, EMBEDDING}
    missing = [name for name in shapes if name not in seen]
    stored_names = missing if converted else [hf_name(name, config)[0] for name in missing]
    problems += [f"{name} is missing" for name in dict.fromkeys(stored_names)]
    if missing == [HEAD]:
        key = "tie_embeddings" if converted else "tie_word_embeddings"
        problems[-1] += f" (if the head is the embedding, config.json has to say {key}: true)"
    if problems:
        raise unfit(checkpoint_dir, problems)


def our_names_of(stored_name: str, config: Config, converted: bool) -> list[str]:
    """Our names of what a stored tensor holds: several if it is fused, none if no model needs it.

    Raises:
        KeyError: the family does not know the name.
    """
    return [stored_name] if converted else lit_names(stored_name, config)


def stored_shape(stored_name: str, shapes: list[list[int]], config: Config, converted: bool) -> list[int]:
    """The shape of a stored tensor whose parts are to have these shapes: their rows below each other."""
    if not shapes:
        return []
    rows = sum(shape[0] for shape in shapes)
    shape = [rows, *shapes[0][1:]]
    return shape[::-1] if not converted and is_transposed(stored_name, config) else shape


def unfit(checkpoint_dir: Path, problems: list[str]) -> InputError:
    """The error that tells the first of many problems, and how many more there are."""
    said = "; ".join(problems[:MAX_PROBLEMS])
    n_more = len(problems) - MAX_PROBLEMS
    if n_more > 0:
        said += f" (and {n_more} more)"
    return InputError(f"{checkpoint_dir}: {said}. Download or convert the checkpoint again.")


def not_tied(checkpoint_dir: Path, head: str, embedding: str) -> InputError:
    """The error for a head that is another one than the embedding, which config.json says it is."""
    # transformers 4 drops such a head, transformers 5 uses it: nobody can tell which model is meant
    return InputError(
        f"{checkpoint_dir}: config.json says tie_word_embeddings: true, but {head} differs from {embedding}. Set it to"
        " false in config.json to use that head, as transformers 5 does."
    )


def digest_of_values(tensor: torch.Tensor) -> str:
    """A sha256 over the values of a tensor in float32, in whatever dtype it holds them."""
    digest = hashlib.sha256()
    for rows in tensor.split(ROWS_AT_ONCE):
        digest.update(rows.float().add(0.0).numpy().data)  # + 0: -0 is 0
    return digest.hexdigest()


def stored_dtypes(checkpoint_dir: Path, config: Config) -> dict[str, torch.dtype]:
    """The dtype of each tensor in the files, by our names; a head that is the embedding is not among them.

    Raises:
        InputError: see `checked_headers`.
    """
    files = weight_files(checkpoint_dir)
    dtypes = {}
    for stored_name, header in checked_headers(files, config, checkpoint_dir).items():
        for name in our_names_of(stored_name, config, is_converted(files)):
            if config.tie_embeddings and name == HEAD:
                name = EMBEDDING
            dtypes[name] = getattr(torch, header.dtype)
    return dtypes


def widest(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """The narrowest dtype that holds the values of all of these exactly: float32 for bfloat16 and float16."""
    return functools.reduce(torch.promote_types, dtypes)


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


def replace_parameter(
    model: nn.Module, name: str, tensor: torch.Tensor, dtype: torch.dtype, on_host: bool = False
) -> None:
    """Puts a tensor in the place of a parameter, which may be on the meta device.

    A quantized linear takes the checkpoint's own values and computes its codes from them: `dtype` is not for it. With
    `on_host` what is kept goes to the host's memory, wherever it was computed.
    """
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    if leaf == "weight" and isinstance(module, QuantizedLinear | CodedLinear):
        module.load_weight(tensor)
    else:
        value = cast_without_overflow(name, tensor, dtype)
        setattr(module, leaf, nn.Parameter(value, requires_grad=False))  # trained ones are chosen after loading
    if on_host:
        for key, param in list(module.named_parameters(recurse=False)):
            if not param.is_meta:  # a bias that has not been read yet
                setattr(module, key, nn.Parameter(param.cpu(), requires_grad=False))


def replace_by_rows(
    model: nn.Module,
    name: str,
    tensor: torch.Tensor,
    dtype: torch.dtype,
    device: torch.device | None,
    mesh: "DeviceMesh",
) -> None:
    """Puts this process' rows of a matrix in the place of a parameter, as `sharding` holds them; see above."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    if leaf == "weight" and isinstance(module, QuantizedLinear):
        load_rows_as_codes(module, tensor, device, mesh)
        return
    rows = tensor[own_rows(len(tensor), mesh)]
    rows = cast_without_overflow(name, rows.to(device, copy=True), dtype)
    setattr(module, leaf, frozen_parameter(as_slice(rows, len(tensor), mesh)))


@torch.no_grad()
def load_rows_as_codes(
    linear: QuantizedLinear, weight: torch.Tensor, device: torch.device | None, mesh: "DeviceMesh"
) -> None:
    """Keeps the codes of this process' rows of a weight (out, in): the same codes as `QuantizedLinear.load_weight`."""
    if not linear.rows_are_alone or len(weight) % mesh.size():
        # of a small model: every process computes all codes
        linear.load_weight(weight.to(device))
        for tensor_name in linear.layout():
            keep_own_rows(linear, tensor_name, mesh)
        return

    codes, scales = linear.quantize_rows(weight[own_rows(len(weight), mesh)].to(device))
    codes = as_slice(codes, len(weight), mesh)
    scales = as_slice(scales, len(weight), mesh)
    if linear.double_quant:
        # scales have scales in blocks that know no rows, and a mean over all of them: from all processes, for a moment
        scales = full_tensor(scales)
    tensors = {"codes": codes} | linear.pack_scales(scales)
    for tensor_name, (shape, _) in linear.layout().items():
        setattr(linear, tensor_name, frozen_parameter(tensors[tensor_name].view(shape)))
    if linear.double_quant:
        keep_own_rows(linear, "scales", mesh)


def keep_own_rows(module: nn.Module, name: str, mesh: "DeviceMesh") -> None:
    """Puts this process' rows in the place of a parameter that is a whole matrix; a vector stays."""
    param = getattr(module, name)
    if param.ndim > 1:
        setattr(module, name, frozen_parameter(slice_of(param, mesh)))


def move_buffers(model: nn.Module, device: torch.device | None) -> None:
    """Moves what is in no file, such as the rotary frequencies, to the device of the weights."""
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))


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
