"""Frozen linears whose weights are kept in 4 or 8 bits: the base of QLoRA. https://arxiv.org/abs/2305.14314

    nf4, fp4    a 4-bit code for each value, two in a byte, and a float32 scale for every 64 of them
    -dq         the same, but the scales are 8-bit codes themselves: 4.1 bits a value instead of 4.5
    int8        an 8-bit code for each value and a scale for every row, https://arxiv.org/abs/2208.07339

Codes are those of bitsandbytes, and its kernels read them. They are frozen parameters of whole rows, so that a state
dict, a safetensors file, DDP and `fully_shard` take them for what they are: tensors.

`quantize_linears` swaps the linears of an empty model; the loader hands each its weight the moment it is read.
"""

import logging
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional as F

from lit_gpt.errors import InputError
from lit_gpt.name_patterns import matches_end
from lit_gpt.packages import import_optional
from lit_gpt.replace_modules import replace_modules
from lit_gpt.sharding import full_tensor

Quantize = Literal["bnb.nf4", "bnb.nf4-dq", "bnb.fp4", "bnb.fp4-dq", "bnb.int8"]

UNQUANTIZED = "lm_head|gate"  # linears that stay as they are, by the ends of their names; a gate chooses experts
BLOCK_SIZE = 64  # values that share a scale
SCALE_BLOCK_SIZE = 256  # scales that share one, with -dq: bitsandbytes' kernels know no other number
# values to quantize in one call: on a CPU, whose kernels need four times as much room as these; and on a GPU, where a
# call costs more than so few values do
VALUES_AT_ONCE = 2**18
VALUES_AT_ONCE_ON_A_GPU = 2**26


# what `QuantizedLinear.tensors` gives
Kept = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]


class QuantizedLinear(nn.Module):
    """y = x W^T + b, where W (out, in) is frozen and kept as codes. It is computed in the dtype of x.

    With 4 bits on CUDA, bitsandbytes multiplies a few tokens by the codes themselves. Otherwise W is made anew, for a
    moment, in forward and in backward: on a CPU a single token then costs more than it does with a float32 weight.

    `bnb.int8` rounds weights only. (The layer of bitsandbytes also rounds x to 8 bits, on CUDA and to generate.)
    """

    def __init__(self, in_features: int, out_features: int, bias: nn.Parameter | None, kind: Quantize) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.kind = kind
        self.format = kind.removeprefix("bnb.").removesuffix("-dq")
        self.double_quant = kind.endswith("-dq")
        self.bias = bias
        for name, (shape, dtype) in self.layout().items():
            empty = torch.empty(shape, dtype=dtype, device="meta")
            setattr(self, name, frozen_parameter(empty))

    def layout(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """The shape and dtype of every tensor that is kept of the weight:

        codes           (out, in) int8, or (out, in / 2) of two codes each
        scales          (out,) with int8; with 4 bits (out, in / 64), or (blocks,) where rows are no whole blocks
        scale_scales    (blocks / 256,), scale_mean (1,) and scale_values (256,), the scales' own, with -dq
        """
        rows = self.out_features
        columns = self.in_features
        if self.format == "int8":
            return {"codes": ((rows, columns), torch.int8), "scales": ((rows,), torch.float32)}

        # blocks run on from row to row, if rows are no multiple of them; the last one may be short
        n_blocks = -(rows * columns // -BLOCK_SIZE)
        scales_shape = (n_blocks,) if columns % BLOCK_SIZE else (rows, columns // BLOCK_SIZE)
        codes = ((rows, columns // 2), torch.uint8)
        if not self.double_quant:
            return {"codes": codes, "scales": (scales_shape, torch.float32)}
        n_scale_blocks = -(n_blocks // -SCALE_BLOCK_SIZE)
        return {
            "codes": codes,
            "scales": (scales_shape, torch.uint8),
            "scale_scales": ((n_scale_blocks,), torch.float32),
            "scale_mean": ((1,), torch.float32),
            "scale_values": ((256,), torch.float32),  # what the 8-bit codes of scales stand for
        }

    @torch.no_grad()
    def load_weight(self, weight: torch.Tensor) -> None:
        """Keeps the codes of a weight (out, in), which has the values of the checkpoint, and not the weight.

        Raises:
            InputError: see `quantize_rows`.
        """
        codes, scales = self.quantize_rows(weight)
        tensors = {"codes": codes} | self.pack_scales(scales)
        for name, (shape, _) in self.layout().items():
            setattr(self, name, frozen_parameter(tensors[name].view(shape)))

    @property
    def rows_are_alone(self) -> bool:
        """Whether the codes and scales of some rows of the weight can be computed without the others."""
        return self.format == "int8" or self.in_features % BLOCK_SIZE == 0

    def quantize_rows(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes (rows, in) or (rows, in / 2), and float32 scales, of rows (rows, in) of the weight, or of all of it.

        Scales are (rows,) with int8, else (rows, in / 64), or (blocks,) where rows are no whole blocks.

        Raises:
            InputError: int8 codes come from float16, and the weight exceeds it.
        """
        if self.format == "int8":
            codes, scales = quantize_to_8_bits(rows)
        else:
            codes, scales = quantize_to_4_bits(rows, self.format)
            codes = codes.view(len(rows), -1)
            scales = scales.view(len(rows), -1) if self.rows_are_alone else scales
        if not scales.isfinite().all():
            raise InputError("bnb.int8 reads weights as float16, which some of these exceed. Use bnb.nf4.")
        return codes, scales

    def pack_scales(self, scales: torch.Tensor) -> dict[str, torch.Tensor]:
        """What is kept of the scales of a whole weight: themselves; or, with -dq, 8-bit codes and the codes' scales."""
        if not self.double_quant:
            return {"scales": scales}
        from bitsandbytes.functional import quantize_blockwise

        mean = scales.mean()
        codes, state = quantize_blockwise(scales.flatten() - mean, blocksize=SCALE_BLOCK_SIZE)
        return {
            "scales": codes,
            "scale_scales": state.absmax,
            "scale_mean": mean,
            "scale_values": state.code,
        }

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # autocast casts the inputs of nn.Linear; of other modules it does not know
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return QuantizedMatmul.apply(x, bias, self.format, *self.tensors())  # (B, T, in) -> (B, T, out)

    def input_gradient(self, grad: torch.Tensor) -> torch.Tensor:
        """The gradient of x, (N, in), from that of y, (N, out)."""
        return grad @ dequantize(self.format, self.tensors(), grad.dtype)

    @torch.no_grad()
    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weight (out, in) that the codes stand for. If they are split, all processes must call it."""
        whole = tuple(None if tensor is None else full_tensor(tensor) for tensor in self.tensors())
        return dequantize(self.format, whole, dtype)  # type: ignore[arg-type] # five of them

    def tensors(self) -> Kept:
        """What is kept of the weight, in the order of `layout`; None is what this kind does not have."""
        if self.double_quant:
            return self.codes, self.scales, self.scale_scales, self.scale_mean, self.scale_values
        return self.codes, self.scales, None, None, None

    def dequantized(self, dtype: torch.dtype = torch.float32) -> nn.Linear:
        """A plain linear of the weight that the codes stand for."""
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        linear.weight = frozen_parameter(self.dequantize(dtype))
        linear.bias = self.bias
        return linear


class QuantizedMatmul(torch.autograd.Function):
    """x W^T + b, where codes stand for W. Its backward needs the frozen codes alone: nothing else is stored for it.

    It takes tensors and not the QuantizedLinear, so that torch.compile can read it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        bias: torch.Tensor | None,
        format: str,
        codes: torch.Tensor,
        scales: torch.Tensor,
        scale_scales: torch.Tensor | None,
        scale_mean: torch.Tensor | None,
        scale_values: torch.Tensor | None,
    ) -> torch.Tensor:
        tensors = (codes, scales, scale_scales, scale_mean, scale_values)
        ctx.save_for_backward(*tensors)
        ctx.format = format
        # with a bias, F.linear returns a view, and autograd refuses LoRA's adding in place to a view that comes out of
        # a Function; .data is the same memory, and no view
        return multiply(x, bias, format, tensors).data

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x_grad = None
        bias_grad = None
        if ctx.needs_input_grad[0]:
            x_grad = grad @ dequantize(ctx.format, ctx.saved_tensors, grad.dtype)  # (B, T, out) -> (B, T, in)
        if ctx.needs_input_grad[1]:
            bias_grad = grad.flatten(0, -2).sum(0)  # (B, T, out) -> (out,)
        return x_grad, bias_grad, None, None, None, None, None, None


def multiply(x: torch.Tensor, bias: torch.Tensor | None, format: str, tensors: Kept) -> torch.Tensor:
    """x W^T + b, (..., out)."""
    # no kernel multiplies by these codes, or computes in float64
    if format == "int8" or x.dtype == torch.float64:
        return F.linear(x, dequantize(format, tensors, x.dtype), bias)
    codes, scales, scale_scales, scale_mean, scale_values = tensors
    n_out = codes.size(0)
    if x.numel() == 0:  # an expert without tokens
        return x.new_empty(*x.shape[:-1], n_out)

    # .float() changes nothing, unless the whole model was cast: the kernels would read other dtypes as float32
    nested: dict[str, torch.Tensor] = {}
    if scale_scales is not None:
        nested = {
            "absmax_8bit": scales.view(-1),
            "absmax_code": scale_values.float(),
            "absmax_offset": scale_mean[0].float(),
        }
        scales = scale_scales
    return torch.ops.bitsandbytes.gemm_4bit(
        x, codes.view(-1, 1), [n_out, x.size(-1)], scales.view(-1).float(), BLOCK_SIZE, format, bias=bias, **nested
    )


def dequantize(format: str, tensors: Kept, dtype: torch.dtype) -> torch.Tensor:
    """The weight (out, in) that codes stand for."""
    codes, scales, scale_scales, scale_mean, scale_values = tensors
    if format == "int8":
        return codes.to(dtype, copy=True).mul_(scales.unsqueeze(1).mul(1 / 127))

    # the scales; see `multiply` for .float()
    if scale_scales is not None:
        scales = torch.ops.bitsandbytes.dequantize_blockwise(
            scales.view(-1), scale_scales.float(), scale_values.float(), SCALE_BLOCK_SIZE, torch.float32
        )
        scales = scales + scale_mean.float()

    # the kernels know no float64
    kernel_dtype = torch.float32 if dtype == torch.float64 else dtype
    shape = [codes.size(0), 2 * codes.size(1)]  # two codes in a byte
    weight = torch.ops.bitsandbytes.dequantize_4bit(
        codes.view(-1, 1), scales.view(-1).float(), BLOCK_SIZE, format, shape, kernel_dtype
    )
    return weight.to(dtype)


def quantize_to_8_bits(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes (out, in) and scales (out,) of a weight (out, in), a few rows at a time."""
    from bitsandbytes.functional import int8_vectorwise_quant

    codes = []
    scales = []
    rows_at_once = max(1, values_at_once(weight) // weight.size(1))
    for rows in weight.split(rows_at_once):
        row_codes, row_scales, _ = int8_vectorwise_quant(rows.half().contiguous())
        codes.append(row_codes)
        scales.append(row_scales)
    return torch.cat(codes), torch.cat(scales)


def quantize_to_4_bits(weight: torch.Tensor, format: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes (bytes, 1), two in a byte, and scales (blocks,) of a weight (out, in), some blocks at a time."""
    from bitsandbytes.functional import quantize_4bit

    if weight.dtype == torch.float64:  # which the kernels do not know
        weight = weight.float()
    codes = []
    scales = []
    # pieces of whole blocks: the codes are those of the whole weight
    for piece in weight.flatten().split(values_at_once(weight)):
        piece_codes, state = quantize_4bit(piece, blocksize=BLOCK_SIZE, quant_type=format)
        codes.append(piece_codes)
        scales.append(state.absmax)
    return torch.cat(codes), torch.cat(scales)


def values_at_once(weight: torch.Tensor) -> int:
    """How many values of a weight are quantized in one call."""
    return VALUES_AT_ONCE if weight.device.type == "cpu" else VALUES_AT_ONCE_ON_A_GPU


def frozen_parameter(tensor: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


def quantize_linears(model: nn.Module, kind: Quantize | None) -> list[str]:
    """Swaps the linears of all blocks, in place, and returns their names. The embedding and the head stay.

    On the meta device, as `build_model` makes it, the model then waits for its weights; others are quantized at once.
    `kind` None leaves everything as it is.

    Raises:
        InputError: bitsandbytes is missing, or rows of an odd length were to be packed in pairs.
    """
    if kind is None:
        return []
    import_bitsandbytes(kind)

    def swap(name: str, module: nn.Module) -> nn.Module | None:
        if not isinstance(module, nn.Linear) or matches_end(name, UNQUANTIZED):
            return None
        if module.in_features % 2 and kind != "bnb.int8":
            raise InputError(f"{name} has {module.in_features} inputs, and {kind} packs them in pairs. Use bnb.int8.")
        quantized = QuantizedLinear(module.in_features, module.out_features, module.bias, kind)
        if not module.weight.is_meta:
            quantized.load_weight(module.weight)
        return quantized

    return replace_modules(model, swap)


def import_bitsandbytes(kind: Quantize) -> None:
    """Imports bitsandbytes for the first time, and quietly.

    Raises:
        InputError: it is missing.
    """
    # On a CPU with bfloat16 units bitsandbytes 0.50 looks for a kernel on the hub as it is imported, and warns if the
    # package `kernels` is missing, or beside a PyTorch for CUDA:
    # https://github.com/bitsandbytes-foundation/bitsandbytes/issues/2064
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    import_optional("bitsandbytes", None, f"--quantize {kind}")


def dequantize_linears(model: nn.Module, dtype: torch.dtype = torch.float32) -> list[str]:
    """Puts plain linears of the weights that codes stand for in the place of quantized ones; returns their names."""

    def swap(name: str, module: nn.Module) -> nn.Module | None:
        return module.dequantized(dtype) if isinstance(module, QuantizedLinear) else None

    return replace_modules(model, swap)


def quantization(model: nn.Module) -> Quantize | None:
    """How the linears of a model are quantized; None if they are not."""
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            return module.kind
    return None
