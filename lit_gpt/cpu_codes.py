"""Linears whose weights are kept in 4 or 8 bits, for answers on a CPU: a token then reads an eighth or a quarter of
the memory that it reads in float32.

    cpu.int4    a 4-bit code for each value; a scale and a zero for every 32 of them: 5 bits a value
    cpu.int8    an 8-bit code for each value, and a scale for every row

A value is (code - 8) * scale + zero with 4 bits, and code * scale with 8. The 4-bit codes of a group begin at its
smallest value and end at its largest, as those of llama.cpp's Q4_1 do: what comes from such a file has the same codes.

PyTorch's kernels multiply in bfloat16 and add up in float32. All between two linears stays in the model's dtype. The
head has 8 bits also with cpu.int4; the embedding and the gates that choose experts stay as they are.

These codes do not train: their kernels have no gradient. `quantize.py` has those of QLoRA."""

from collections.abc import Sequence
from functools import cache
from typing import Literal, get_args

import torch
from torch import nn
from torch.nn import functional as F

from lit_gpt.errors import InputError
from lit_gpt.name_patterns import matches_end
from lit_gpt.replace_modules import replace_modules

CpuQuantize = Literal["cpu.int4", "cpu.int8"]
CPU_KINDS = get_args(CpuQuantize)

GROUP_SIZE = 32  # values that share a scale and a zero
ROWS_OF_A_BLOCK = 64  # of a weight, which the 4-bit kernel keeps beside each other
ROWS_FIT = 16  # the 4-bit kernel takes multiples of so many rows of a weight
VALUES_AT_ONCE = 2**21  # of a weight that is quantized: they take ten times as many bytes
# rows of x from which it is faster to make the weight of 8-bit codes anew, in bfloat16, where the CPU multiplies in it
MANY_ROWS = 32


class CodedLinear(nn.Module):
    """y = x W^T + b, where W (out, in) is frozen and kept as codes. It is computed in bfloat16, and y is like x."""

    def __init__(self, in_features: int, out_features: int, bias: nn.Parameter | None, kind: CpuQuantize) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.kind = kind
        self.bias = bias
        # int8: codes (out, in), scales (out,). int4: codes (out, in / 2), in the order that the kernel of this CPU
        # wants; scales (in / 32, out, 2), of which the last are scale and zero
        self.codes = frozen(torch.empty(0, device="meta", dtype=torch.uint8))
        self.scales = frozen(torch.empty(0, device="meta", dtype=torch.bfloat16))

    @torch.no_grad()
    def load_weight(self, weight: torch.Tensor) -> None:
        """Keeps the codes of a weight (out, in), which has the values of the checkpoint, and not the weight."""
        blocks_at_once = max(1, VALUES_AT_ONCE // (self.in_features * ROWS_OF_A_BLOCK))
        codes = []
        scales = []
        for rows in weight.split(blocks_at_once * ROWS_OF_A_BLOCK):
            quantize = quantize_to_4_bits if self.kind == "cpu.int4" else quantize_to_8_bits
            row_codes, row_scales = quantize(rows.float())
            codes.append(row_codes)
            scales.append(row_scales)
        self.codes = frozen(torch.cat(codes))
        self.scales = frozen(torch.cat(scales, dim=self.row_dim_of_scales))

    @property
    def row_dim_of_scales(self) -> int:
        """The dimension of `scales` that has an entry for each row of the weight."""
        return 1 if self.kind == "cpu.int4" else 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, self.in_features).to(torch.bfloat16).contiguous()
        y = self.multiply(rows).to(x.dtype).view(*x.shape[:-1], self.out_features)
        if self.bias is None:
            return y
        return y.add_(self.bias.to(y.dtype))

    def multiply(self, rows: torch.Tensor) -> torch.Tensor:
        """x W^T of bfloat16 rows (N, in): (N, out)"""
        if self.kind == "cpu.int4":
            # also of many rows: with 512 it takes 1.2 times as long as float32, and less than to make the weight anew
            return torch.ops.aten._weight_int4pack_mm_for_cpu(rows, self.codes, GROUP_SIZE, self.scales)
        if len(rows) > MANY_ROWS and multiplies_in_bfloat16():
            return F.linear(rows, self.codes.to(rows.dtype)).float().mul_(self.scales)
        return torch.ops.aten._weight_int8pack_mm(rows, self.codes, self.scales)

    @torch.no_grad()
    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weight (out, in) that the codes stand for."""
        if self.kind == "cpu.int8":
            return (self.codes.float() * self.scales[:, None].float()).to(dtype)
        # only the kernel knows the order of its codes: it gets each input by itself
        inputs = torch.eye(self.in_features, dtype=torch.bfloat16)
        return self.multiply(inputs).T.to(dtype).contiguous()

    @torch.no_grad()
    def multiply_rows(self, factors: torch.Tensor) -> None:
        """Multiplies each row of the weight by a factor of its own, (out,), by way of the scales and zeros."""
        if self.kind == "cpu.int4":
            factors = factors[:, None]
        self.scales.copy_(self.scales.float() * factors)

    def fits_above(self, other: "CodedLinear") -> bool:
        """Whether `stacked` can lay the weight of `other` below this one: whole blocks of rows, with 4 bits."""
        same = self.kind == other.kind and (self.bias is None) == (other.bias is None)
        return same and (self.kind == "cpu.int8" or self.out_features % ROWS_OF_A_BLOCK == 0)

    @staticmethod
    def stacked(linears: Sequence["CodedLinear"]) -> "CodedLinear":
        """One linear whose output is that of all these, one after the other. Each `fits_above` the next one."""
        first = linears[0]
        out_features = sum(linear.out_features for linear in linears)
        bias = None if first.bias is None else frozen(torch.cat([linear.bias for linear in linears]))
        one = CodedLinear(first.in_features, out_features, bias, first.kind)
        one.codes = frozen(torch.cat([linear.codes for linear in linears]))
        one.scales = frozen(torch.cat([linear.scales for linear in linears], dim=first.row_dim_of_scales))
        return one


def quantize_to_4_bits(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Packed codes (rows, in / 2), and bfloat16 scales and zeros (in / 32, rows, 2), of float32 rows (rows, in)."""
    groups = rows.unflatten(1, (-1, GROUP_SIZE))  # (rows, in / 32, 32)
    lowest, highest = groups.aminmax(dim=-1, keepdim=True)  # (rows, in / 32, 1)
    # code 0 is the lowest value, 15 the highest; a zero is the value of code 8. Codes are chosen for the scales and
    # zeros that are kept: rounded ones
    scale = ((highest - lowest) / 15).bfloat16()
    zero = (lowest + 8 * (highest - lowest) / 15).bfloat16()
    # values that are all the same have scale 0, and any code
    codes = ((groups - zero) / scale.float().clamp(min=torch.finfo(torch.float32).tiny)).round().add(8).clamp(0, 15)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.flatten(1).int(), 1)
    scales = torch.cat((scale, zero), dim=-1).transpose(0, 1)
    return packed, scales.contiguous()


def quantize_to_8_bits(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes (rows, in) and bfloat16 scales (rows,) of float32 rows (rows, in)."""
    scales = (rows.abs().amax(dim=1) / 127).bfloat16()
    at_least_tiny = scales.float().clamp(min=torch.finfo(torch.float32).tiny)  # of a row of zeros the scale is 0
    codes = (rows / at_least_tiny[:, None]).round().clamp(-127, 127)
    return codes.to(torch.int8), scales


def frozen(tensor: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


@cache
def multiplies_in_bfloat16() -> bool:
    """Whether this CPU has units for products in bfloat16; others emulate them, which can be 100 times slower."""
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def quantize_for_cpu(model: nn.Module, kind: CpuQuantize, device: torch.device | None = None) -> list[str]:
    """Swaps the linears of an empty model, in place, for those that wait for a weight; returns their names.

    Args:
        model: A model on the meta device, as `build_model` makes it.
        kind: The codes of the blocks. The head has 8 bits in any case; see `load_weights` for one that is tied.
        device: Where the model will be. None is the CPU.

    Raises:
        InputError: the device is no CPU, or a weight's shape is not one that the kernel for 4 bits takes.
    """
    if device is not None and device.type != "cpu":
        raise InputError(
            f"--quantize {kind} is for answers on a CPU, and this model goes to {device.type}. Use --quantize bnb.nf4."
        )

    def swap(name: str, module: nn.Module) -> nn.Module | None:
        if not isinstance(module, nn.Linear) or matches_end(name, "gate"):
            return None
        kind_of_module: CpuQuantize = "cpu.int8" if matches_end(name, "lm_head") else kind
        if kind_of_module == "cpu.int4" and (module.in_features % GROUP_SIZE or module.out_features % ROWS_FIT):
            raise InputError(
                f"{name} is ({module.out_features}, {module.in_features}), and cpu.int4 takes multiples of"
                f" ({ROWS_FIT}, {GROUP_SIZE}). Use --quantize cpu.int8."
            )
        return CodedLinear(module.in_features, module.out_features, module.bias, kind_of_module)

    return replace_modules(model, swap)
