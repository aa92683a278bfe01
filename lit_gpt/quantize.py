"""Frozen linears whose weights are kept in 4 or 8 bits: the base of QLoRA. https://arxiv.org/abs/2305.14314

    nf4, fp4    a 4-bit code for each value, two in a byte, and a float32 scale for every 64 of them
    -dq         the same, but the scales are 8-bit codes themselves: 4.1 bits a value instead of 4.5
    int8        an 8-bit code for each value and a scale for every row, https://arxiv.org/abs/2208.07339

Codes are those of bitsandbytes, and its kernels read them. They are frozen parameters of whole rows, so that a state
dict, a safetensors file, DDP and `fully_shard` take them for what they are: tensors.

`quantize_linears` swaps the linears of an empty model; the loader hands each its weight the moment it is read.
"""

import logging
import re
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional as F

from lit_gpt.errors import InputError
from lit_gpt.replace_modules import replace_modules

Quantize = Literal["bnb.nf4", "bnb.nf4-dq", "bnb.fp4", "bnb.fp4-dq", "bnb.int8"]

KEPT = re.compile(r"lm_head|.*gate")  # linears that stay as they are: the head, and what chooses experts
BLOCK = 64  # values that share a scale
SCALE_BLOCK = 256  # scales that share one, with -dq: bitsandbytes' kernels know no other number
PART = 2**18  # values to quantize at once: the kernels need four times as much room as these


class QuantizedLinear(nn.Module):
    """y = x W^T + b, where W (out, in) is frozen and kept as codes. It is computed in the dtype of x.

    With 4 bits on CUDA, bitsandbytes multiplies a few tokens by the codes themselves. Otherwise W is made anew, for a
    moment, in forward and in backward: on a CPU a single token then costs more than it does with a float32 weight.

    `bnb.int8` rounds weights only. (The layer of bitsandbytes also rounds x to 8 bits, on CUDA and to generate.)
    """

    def __init__(self, in_features: int, out_features: int, bias: nn.Parameter | None, kind: Quantize) -> None:
        super().__init__()
        self.in_features, self.out_features, self.kind = in_features, out_features, kind
        self.format, _, dq = kind.removeprefix("bnb.").partition("-")
        self.nested = bool(dq)
        self.bias = bias
        for name, (shape, dtype) in self.layout().items():
            setattr(self, name, frozen(torch.empty(shape, dtype=dtype, device="meta")))

    def layout(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """The shape and dtype of everything that is kept of the weight."""
        rows, columns = self.out_features, self.in_features
        if self.format == "int8":
            return {"codes": ((rows, columns), torch.int8), "scales": ((rows,), torch.float32)}
        blocks = -(rows * columns // -BLOCK)  # they run on from row to row, where rows are no multiple of them
        shape = (blocks,) if columns % BLOCK else (rows, columns // BLOCK)
        kept = {"codes": ((rows, columns // 2), torch.uint8), "scales": (shape, torch.float32)}
        if self.nested:  # the mean and the 256 values that 8-bit codes stand for go along
            kept["scales"] = (shape, torch.uint8)
            sizes = {"scale_scales": -(blocks // -SCALE_BLOCK), "scale_mean": 1, "scale_values": 256}
            kept |= {name: ((size,), torch.float32) for name, size in sizes.items()}
        return kept

    @torch.no_grad()
    def load_weight(self, weight: torch.Tensor) -> None:
        """Keeps the codes of a weight (out, in), which has the values of the checkpoint, and not the weight.

        Raises:
            InputError: int8 codes come from float16, and the weight exceeds it.
        """
        from bitsandbytes.functional import int8_vectorwise_quant, quantize_4bit, quantize_blockwise

        if self.format == "int8":
            parts = weight.split(max(1, PART // self.in_features))
            codes, scales, _ = zip(*(int8_vectorwise_quant(part.half().contiguous()) for part in parts))
        else:
            weight = weight.float() if weight.dtype == torch.float64 else weight
            parts = weight.flatten().split(PART)  # whole blocks, so that the codes are those of the whole
            codes, states = zip(*(quantize_4bit(part, blocksize=BLOCK, quant_type=self.format) for part in parts))
            scales = [state.absmax for state in states]
        kept = {"codes": torch.cat(codes), "scales": torch.cat(scales)}
        if not kept["scales"].isfinite().all():
            raise InputError("bnb.int8 reads weights as float16, which some of these exceed. Use bnb.nf4.")
        if self.nested:
            mean = kept["scales"].mean()
            kept["scales"], state = quantize_blockwise(kept["scales"] - mean, blocksize=SCALE_BLOCK)
            kept |= {"scale_scales": state.absmax, "scale_mean": mean, "scale_values": state.code}
        for name, (shape, _) in self.layout().items():
            setattr(self, name, frozen(kept[name].view(shape)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.is_autocast_enabled(x.device.type):  # as it does with nn.Linear
            x = x.to(torch.get_autocast_dtype(x.device.type))
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return Multiply.apply(x, bias, self)  # (B, T, in) -> (B, T, out)

    @torch.no_grad()
    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weight (out, in) that the codes stand for."""
        if self.format == "int8":
            return self.codes.to(dtype, copy=True).mul_(self.scales.unsqueeze(1).mul(1 / 127))
        from bitsandbytes.functional import dequantize_4bit

        known = torch.float32 if dtype == torch.float64 else dtype  # to the kernels
        weight = dequantize_4bit(self.codes.view(-1, 1), self.state(known))
        return weight.to(dtype).reshape(self.out_features, self.in_features)  # a single byte comes back transposed

    def state(self, dtype: torch.dtype) -> Any:
        """What bitsandbytes' kernels want to know besides the codes."""
        from bitsandbytes.functional import QuantState

        scales, nested = self.scales.view(-1), {}
        if self.nested:
            inner = dict(code=self.scale_values.float(), blocksize=SCALE_BLOCK, dtype=torch.float32)
            nested = dict(offset=self.scale_mean[0].float(), state2=QuantState(self.scale_scales.float(), **inner))
        else:
            scales = scales.float()  # as they are, unless the whole model was cast; the kernels would not notice
        shape = torch.Size((self.out_features, self.in_features))
        return QuantState(scales, shape, blocksize=BLOCK, quant_type=self.format, dtype=dtype, **nested)

    def dequantized(self, dtype: torch.dtype = torch.float32) -> nn.Linear:
        """A plain linear of the weight that the codes stand for."""
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        linear.weight, linear.bias = frozen(self.dequantize(dtype)), self.bias
        return linear


class Multiply(torch.autograd.Function):
    """x W^T + b of a QuantizedLinear. What backward needs are the codes, so that nothing is stored."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, bias: torch.Tensor | None, linear: QuantizedLinear) -> torch.Tensor:
        ctx.linear = linear
        if linear.format == "int8" or x.dtype == torch.float64:
            return F.linear(x, linear.dequantize(x.dtype), bias)
        from bitsandbytes import matmul_4bit

        return matmul_4bit(x, linear.codes, linear.state(x.dtype), bias=bias)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        needs_x, needs_bias, _ = ctx.needs_input_grad
        x_grad = grad @ ctx.linear.dequantize(grad.dtype) if needs_x else None
        return x_grad, grad.flatten(0, -2).sum(0) if needs_bias else None, None


def frozen(tensor: torch.Tensor) -> nn.Parameter:
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
    # It advises to install a package that fetches a kernel from the hub, on CPUs with bfloat16 units
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise InputError(f"--quantize {kind} needs bitsandbytes ({error}): pip install 'bitsandbytes>=0.50'") from None

    def swap(name: str, module: nn.Module) -> nn.Module | None:
        if not isinstance(module, nn.Linear) or KEPT.fullmatch(name):
            return None
        if module.in_features % 2 and kind != "bnb.int8":
            raise InputError(f"{name} has {module.in_features} inputs, and {kind} packs them in pairs. Use bnb.int8.")
        quantized = QuantizedLinear(module.in_features, module.out_features, module.bias, kind)
        if not module.weight.is_meta:
            quantized.load_weight(module.weight)
        return quantized

    return replace_modules(model, swap)


def dequantize_linears(model: nn.Module, dtype: torch.dtype = torch.float32) -> list[str]:
    """Puts plain linears of what the codes stand for in the place of quantized ones, and returns their names."""
    return replace_modules(model, lambda name, m: m.dequantized(dtype) if isinstance(m, QuantizedLinear) else None)


def quantization(model: nn.Module) -> Quantize | None:
    """How the linears of a model are quantized, if they are."""
    return next((module.kind for module in model.modules() if isinstance(module, QuantizedLinear)), None)
