"""LoRA: learn a low-rank change to frozen linear layers. https://arxiv.org/abs/2106.09685

    y = W x + (alpha / r) B A x        W (out, in) frozen, A (r, in) random, B (out, r) zero at the start

`apply_lora` swaps layers of a built model in place. It does not ask what they are made of: nn.Linear gives LoRA, a
quantized linear gives QLoRA. `merge_lora_weights` is its inverse and leaves a plain model behind. `scale_lora` sets how
much of the change is used: from 0, the base to the last bit, to 1, as trained.
"""

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from lit_gpt.errors import InputError
from lit_gpt.model.fused import low_rank_linear
from lit_gpt.model.gpt import GPT
from lit_gpt.name_patterns import check_patterns, matches_end, value_by_end
from lit_gpt.ranges import check_range
from lit_gpt.replace_modules import replace_modules
from lit_gpt.sharding import full_tensor

# a switch of LoRA -> the ends of the names of the linears that it adapts
TARGETS = {
    "query": r"attn\.q",
    "key": r"attn\.k",
    "value": r"attn\.v",
    "projection": r"attn\.proj",
    "mlp": r"mlp\.(experts\.\d+\.)?(fc|fc_1|fc_2|proj)",  # not the gate that chooses experts
    "head": r"lm_head",
}


@dataclass(frozen=True)
class LoRA:
    """How large the low-rank changes are, and which linears are changed."""

    r: int = 8
    """Rank of the change. The number of trained parameters grows with it; 8 to 64 is usual."""
    alpha: float = 16
    """The change is scaled by alpha / r, so that the learning rate can stay when the rank changes."""
    dropout: float = 0.0
    """Dropout on the input of the low-rank branch."""
    query: bool = True
    """Adapt the query projection."""
    key: bool = True
    """Adapt the key projection."""
    value: bool = True
    """Adapt the value projection."""
    projection: bool = True
    """Adapt the output projection of the attention."""
    mlp: bool = True
    """Adapt all linears of the MLP."""
    head: bool = False
    """Adapt the language model head."""
    layers: int | list[int] | None = None
    """The blocks to adapt: None is all, 8 is the last eight, [0, 5, 11] is these three. The head is not one of them."""
    modules: list[str] | None = None
    """Adapt these linears instead of those switched on above: patterns for the ends of names as in
    transformer.h.3.mlp.fc_1, such as ["mlp.fc_[12]", attn.proj]."""
    rank_pattern: dict[str, int] = field(default_factory=dict)
    """Other ranks for some linears, by patterns for the ends of their names: {attn.q: 16, "mlp.fc_[12]": 4}."""
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    """Other alphas for some linears, by such patterns, too."""
    rslora: bool = False
    """Scale by alpha / sqrt(r), which lets high ranks learn as fast as low ones. https://arxiv.org/abs/2312.03732"""
    dora: bool = False
    """Train the length of each row of the weight apart from its direction. https://arxiv.org/abs/2402.09353"""

    def __post_init__(self) -> None:
        for name in ("rank_pattern", "alpha_pattern"):  # jsonargparse takes null for a mapping
            if not isinstance(getattr(self, name), dict):
                raise InputError(f"--lora.{name} is {getattr(self, name)}, expected a mapping, such as {{attn.q: 16}}.")
        check_range("--lora.r", self.r, at_least=1)
        check_range("--lora.alpha", self.alpha, above=0)
        check_range("--lora.dropout", self.dropout, at_least=0, below=1)
        for pattern, r in self.rank_pattern.items():
            check_range(f"--lora.rank_pattern, {pattern}:", r, at_least=1)
        for pattern, alpha in self.alpha_pattern.items():
            check_range(f"--lora.alpha_pattern, {pattern}:", alpha, above=0)
        if isinstance(self.layers, int):
            check_range("--lora.layers", self.layers, at_least=1)
        check_patterns(self.modules or [])
        check_patterns(self.rank_pattern)
        check_patterns(self.alpha_pattern)
        if not self.modules and not any(getattr(self, switch) for switch in TARGETS):
            raise InputError(f"LoRA has nothing to adapt. Turn on at least one of {', '.join(TARGETS)}.")

    def matches(self, name: str, n_layer: int) -> bool:
        """Whether the linear called `name`, of a model of `n_layer` blocks, is to be adapted."""
        if not any(matches_end(name, pattern) for pattern in self.targets()):
            return False
        in_block = re.match(r"transformer\.h\.(\d+)\.", name)
        if in_block is None:  # the head
            return True
        block = int(in_block[1])
        return block in self.blocks(n_layer)

    def targets(self) -> list[str]:
        """Patterns for the ends of the names of the linears to adapt."""
        if self.modules is not None:
            return self.modules
        return [pattern for switch, pattern in TARGETS.items() if getattr(self, switch)]

    def blocks(self, n_layer: int) -> range | list[int]:
        """The numbers of the blocks to adapt in a model that has `n_layer` of them.

        Raises:
            InputError: the model has no such block.
        """
        if self.layers is None:
            return range(n_layer)
        blocks: range | list[int]
        if isinstance(self.layers, int):  # the last ones
            blocks = range(n_layer - self.layers, n_layer)
        else:
            blocks = self.layers
        if not blocks or not all(0 <= block < n_layer for block in blocks):
            raise InputError(f"lora.layers is {self.layers}, but the model's blocks are 0 to {n_layer - 1}.")
        return blocks

    def rank_of(self, name: str) -> int:
        """The rank of the change to the linear called `name`."""
        return value_by_end(name, self.rank_pattern, default=self.r)

    def scaling_of(self, name: str) -> float:
        """The factor before B A of the linear called `name`."""
        alpha = value_by_end(name, self.alpha_pattern, default=self.alpha)
        r = self.rank_of(name)
        if self.rslora:
            return alpha / math.sqrt(r)
        return alpha / r


class LoRALinear(nn.Module):
    """A frozen linear and the low-rank change to it. A and B are float32, whatever the linear is stored in."""

    def __init__(self, linear: nn.Module, r: int, scaling: float, dropout: float = 0.0) -> None:
        super().__init__()
        self.linear = linear
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self.scaling = scaling
        self.change_scale = 1.0  # how much of the change is used: see `scale_lora`
        self.dropout = nn.Dropout(dropout)
        device = next(linear.parameters()).device
        A = torch.empty(r, linear.in_features, device=device, dtype=torch.float32)
        B = torch.zeros(linear.out_features, r, device=device, dtype=torch.float32)
        nn.init.kaiming_uniform_(A, a=math.sqrt(5))  # as nn.Linear begins with its own weight
        self.lora_A = nn.Parameter(A)
        self.lora_B = nn.Parameter(B)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.change_scale == 0:
            return self.linear(x)
        x_low = self.dropout(x) if self.training and self.dropout.p else None
        scaling = self.scaling * self.change_scale
        return low_rank_linear(x, self.linear, self.lora_A, self.lora_B, scaling, x_low)  # (B, T, out)

    @torch.no_grad()
    def merged(self) -> nn.Module:
        """The wrapped linear with the change added to its weight: in float32, rounded once.

        Its weight is a new parameter, so that a head that was tied to the embedding leaves the embedding alone. A
        quantized linear becomes a plain one in float32, the change added to the weight that its codes stand for.
        """
        linear = self.linear
        if not isinstance(linear, nn.Linear):  # a quantized one
            linear = linear.dequantized()
        changed = self.changed(linear.weight)
        linear.weight = nn.Parameter(changed.to(linear.weight.dtype), requires_grad=False)
        return linear

    def changed(self, weight: torch.Tensor) -> torch.Tensor:
        """The weight (out, in) with the change added, in float32 at least."""
        change = self.scaling * self.change_scale * (self.lora_B @ self.lora_A)
        # bfloat16 plus float32 is float32, a float64 weight stays what it is
        dtype = torch.promote_types(weight.dtype, change.dtype)
        return weight.to(dtype) + change

    @torch.no_grad()
    def fix_scale(self) -> None:
        """Multiplies B by `change_scale`, which is 1 from then on: for files that have no place for it."""
        self.lora_B.mul_(self.change_scale)
        self.change_scale = 1.0


class DoRALinear(LoRALinear):
    """The changed weight gives each row its direction, a trained magnitude its length:

        y = m / |V| V x        V = W + scaling B A, |V| (out,) the lengths of its rows, m = |W| at the start

    As in the paper no gradient goes through |V|.

    With a scale s, both parts of the change are multiplied by it, so that 0 is W and 1 what was trained:

        V = W + s scaling B A        m becomes |W| + s (m - |W|)
    """

    def __init__(self, linear: nn.Module, r: int, scaling: float, dropout: float = 0.0) -> None:
        super().__init__(linear, r, scaling, dropout)
        lengths = self.base_lengths(self.base_weight())
        self.lora_magnitude = nn.Parameter(lengths.to(self.lora_A.dtype))

    def base_weight(self) -> torch.Tensor:
        """W (out, in) of the wrapped linear, quantized or not. If it is split, all processes must call it."""
        if isinstance(self.linear, nn.Linear):
            return full_tensor(self.linear.weight)
        return self.linear.dequantize()

    def base_lengths(self, weight: torch.Tensor) -> torch.Tensor:
        """|W| (out,) of the weight (out, in), in float32 at least."""
        dtype = torch.promote_types(self.lora_A.dtype, weight.dtype)
        return weight.to(dtype).norm(dim=1)

    def magnitude(self, weight: torch.Tensor) -> torch.Tensor:
        """m (out,) at this scale, of the module's `base_weight`."""
        if self.change_scale == 1:
            return self.lora_magnitude
        lengths = self.base_lengths(weight)
        return torch.lerp(lengths, self.lora_magnitude.to(lengths.dtype), self.change_scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.change_scale == 0:  # to the last bit: with a bias, what is below rounds
            return self.linear(x)
        with torch.no_grad():
            weight = self.base_weight()
            lengths = super().changed(weight).norm(dim=1)
        # m / |V| is for V x alone: the bias is taken off the linear's output, and put back
        bias = self.linear.bias
        if bias is None:
            bias = 0
        y = super().forward(x) - bias  # (B, T, out)
        row_scale = (self.magnitude(weight) / lengths).to(x.dtype)
        return y * row_scale + bias

    @torch.no_grad()
    def for_answers(self) -> LoRALinear | None:
        """A LoRALinear with the same output, for a model that no longer trains: m / |V| goes into W and B, once.

        It takes over the wrapped linear, whose weight it changes. None if that would round the weight anew: it is in
        half precision, or in codes whose rows cannot be multiplied.
        """
        linear = self.linear
        is_wide = isinstance(linear, nn.Linear) and linear.weight.dtype.itemsize >= 4
        if not is_wide and not hasattr(linear, "multiply_rows"):
            return None
        weight = self.base_weight()
        lengths = super().changed(weight).norm(dim=1)
        row_scale = self.magnitude(weight) / lengths
        if is_wide:
            # a new parameter: a head may be tied to the embedding
            scaled = linear.weight * row_scale[:, None].to(linear.weight.dtype)
            linear.weight = nn.Parameter(scaled, requires_grad=False)
        else:
            linear.multiply_rows(row_scale)
        lora = LoRALinear(linear, len(self.lora_A), self.scaling)
        lora.change_scale = self.change_scale
        lora.lora_A = self.lora_A
        lora.lora_B = nn.Parameter(self.lora_B * row_scale[:, None])
        return lora.train(self.training)

    def changed(self, weight: torch.Tensor) -> torch.Tensor:
        direction = super().changed(weight)
        row_scale = self.magnitude(weight) / direction.norm(dim=1)
        return direction * row_scale[:, None]

    @torch.no_grad()
    def fix_scale(self) -> None:
        self.lora_magnitude.copy_(self.magnitude(self.base_weight()))
        super().fix_scale()


def apply_lora(model: GPT, lora: LoRA) -> list[str]:
    """Wraps the linears that `lora` names, in place, and returns their names.

    Raises:
        InputError: the model has none of them, or already carries LoRA; a pattern is for none of them.
    """
    # what cannot be
    if lora_linears(model):
        raise InputError("This model already carries LoRA: merge it first (`python scripts/merge_lora.py`).")
    n_layer = model.config.n_layer
    lora.blocks(n_layer)  # refuses layers that are not there, even if only the head is adapted

    # which linears: all kinds of them, quantized ones too, have in_features
    linears = [name for name, module in model.named_modules() if hasattr(module, "in_features")]
    chosen = {name for name in linears if lora.matches(name, n_layer)}
    if not chosen:
        raise InputError(f"{lora} matches no linear of {model.config.name}.")
    for pattern in [*lora.rank_pattern, *lora.alpha_pattern]:
        if not any(matches_end(name, pattern) for name in chosen):
            raise InputError(f"lora has a rank or an alpha for {pattern!r}, of which nothing is adapted.")

    # wrap them
    wrapper = DoRALinear if lora.dora else LoRALinear

    def wrap(name: str, module: nn.Module) -> nn.Module | None:
        if name not in chosen:
            return None
        r = lora.rank_of(name)
        scaling = lora.scaling_of(name)
        return wrapper(module, r, scaling, lora.dropout)

    return replace_modules(model, wrap)


def lora_filter(key: str, value: Any = None) -> bool:
    """Whether a state dict key belongs to LoRA: these keys train and get saved."""
    leaf = key.rsplit(".", 1)[-1]
    return leaf.startswith("lora_")


def mark_only_lora_as_trainable(model: nn.Module) -> None:
    """Freezes everything but the parameters of LoRA."""
    for name, param in model.named_parameters():
        param.requires_grad = lora_filter(name)


def scale_lora(model: nn.Module, scale: float) -> None:
    """Multiplies the change that LoRA has made by `scale`: 1 is as trained, 0 is the base to the last bit."""
    for module in lora_linears(model):
        module.change_scale = scale


@contextmanager
def lora_scaled(model: nn.Module, scale: float) -> Iterator[None]:
    """Within it the change has this scale, as by `scale_lora`; after it the one it had. No weight is copied."""
    linears = lora_linears(model)
    scales_before = [module.change_scale for module in linears]
    scale_lora(model, scale)
    try:
        yield
    finally:
        for module, scale_before in zip(linears, scales_before, strict=True):
            module.change_scale = scale_before


def fix_lora_scale(model: nn.Module) -> None:
    """Changes the trained weights such that they have the scale themselves: for files that have no place for it."""
    for module in lora_linears(model):
        module.fix_scale()


def lora_linears(model: nn.Module) -> list[LoRALinear]:
    return [module for module in model.modules() if isinstance(module, LoRALinear)]


def merge_lora_weights(model: nn.Module) -> list[str]:
    """Puts a plain, merged linear back in the place of every LoRALinear, and returns their names."""

    def merge(name: str, module: nn.Module) -> nn.Module | None:
        return module.merged() if isinstance(module, LoRALinear) else None

    return replace_modules(model, merge)


def lora_learning_rate(width: int) -> float:
    """The peak of the learning rate for a model of this width (n_embd), where the user names none.

    2e-3 is measured, for the sample model's width (tutorials/lora.md, "Why these defaults"). For Llamas the best rate
    falls with the width to the power of 0.781 (Schulman et al., LoRA Without Regret, 2025). What is narrower than the
    sample has its rate.
    """
    wider = max(1.0, width / 576)
    return float(f"{2e-3 * wider**-0.781:.1e}")  # two digits, for who reads it
