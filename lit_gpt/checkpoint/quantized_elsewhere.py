"""Weights that another program has quantized: recognized by their headers, and refused by the method's name.

Here weights are quantized as they are read, from the values that the model was trained with: `--quantize`.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lit_gpt.checkpoint.weight_files import TensorHeader
from lit_gpt.errors import InputError

PLAIN = ("float64", "float32", "float16", "bfloat16")  # dtypes of weights as they are

# the end of a tensor's name -> the method that writes such tensors; the first one that fits
SIGNS = {
    ".weight_packed": "compressed-tensors",
    ".weight_shape": "compressed-tensors",
    ".g_idx": "GPTQ",
    ".qweight": "GPTQ or AWQ",
    ".qzeros": "GPTQ or AWQ",
    ".SCB": "bitsandbytes, 8 bits",
    ".absmax": "bitsandbytes, 4 bits",
    ".quant_map": "bitsandbytes, 4 bits",
    ".quant_state.bitsandbytes__nf4": "bitsandbytes, 4 bits",
    ".quant_state.bitsandbytes__fp4": "bitsandbytes, 4 bits",
    ".weight_scale_inv": "float8 with scales",
    ".weight_scale_2": "NVIDIA ModelOpt",
    ".weight_scale": "float8 or int8 with scales",
    ".input_scale": "float8 or int8 with scales",
    ".W_q": "HQQ",
    "_blocks": "MXFP4",
    ".codebooks": "AQLM",
    ".Qidxs": "QuIP#",
    ".q_weight": "EXL2",
    ".trellis": "EXL3",
    ".weight._data": "quanto",
    ".scales": "integers with scales",  # those of MLX stand beside `.biases`
}
# keys of config.json under which programs describe how weights are quantized: transformers; early compressed-tensors;
# MLX. A file that quantization has left has none of them
CONFIG_KEYS = ("quantization_config", "compression_config", "quantization")


def check_not_quantized(
    checkpoint_dir: Path, headers: Mapping[str, TensorHeader], ignored: tuple[str, ...] = ()
) -> None:
    """Checks that weights are plain numbers. `ignored` are ends of the names of tensors that no model needs.

    What config.json says of quantization does not count alone: it is often left over from a step before.

    Raises:
        InputError: they are codes, or in a dtype that is no use without scales. The method is named, and what to do.
    """
    names = [name for name in headers if not name.endswith(ignored)]
    signed = [(name, sign) for name in names if (sign := sign_of(name))]
    weights = [name for name in names if name.endswith((".weight", ".bias"))]
    coded = [(name, headers[name].dtype) for name in weights if headers[name].dtype not in PLAIN]
    if not signed and not coded:
        return

    found = f"it holds {signed[0][0]}" if signed else f"{coded[0][0]} is {dtype_name(coded[0][1])}"
    method = method_in_config(checkpoint_dir) or (signed[0][1] if signed else dtype_name(coded[0][1]))
    raise quantized(checkpoint_dir, method, found)


def check_names_not_quantized(where: object, names: list[str]) -> None:
    """The same of names alone, as an index.json lists them. Raises InputError."""
    for name in names:
        if sign := sign_of(name):
            raise quantized(where, sign, f"it holds {name}")


def quantized(where: object, method: str, found: str) -> InputError:
    return InputError(
        f"{where} is quantized ({method}): {found}; expected weights in float32, bfloat16 or float16. Download the"
        " model as it was before it was quantized; --quantize bnb.nf4 then keeps it in 4 bits."
    )


def sign_of(name: str) -> str | None:
    """The method that writes tensors of such a name; None if none does."""
    for end, method in SIGNS.items():
        if name.endswith(end):
            return method
    return None


def method_in_config(checkpoint_dir: Path) -> str | None:
    """The method that config.json names; None if it does not."""
    path = checkpoint_dir / "config.json"
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # the method is only a word in another error
        return None
    for key in CONFIG_KEYS:
        settings = content.get(key)
        if isinstance(settings, dict):
            return settings.get("quant_method") or "by what config.json calls " + key
    return None


def dtype_name(dtype: str) -> str:
    """A dtype for people: F8_E4M3 is how safetensors calls torch's float8_e4m3fn."""
    known = {"F8_E4M3": "float8", "F8_E5M2": "float8", "I8": "int8", "U8": "uint8", "I32": "int32", "U32": "uint32"}
    known |= {"I16": "int16", "I64": "int64", "BOOL": "bool"}
    if dtype.startswith("float8"):
        return "float8"
    return known.get(dtype, dtype)
