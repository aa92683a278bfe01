"""LoRA: learn a low-rank change to frozen linear layers. https://arxiv.org/abs/2106.09685

    y = W x + (alpha / r) B A x        W (out, in) frozen, A (r, in) random, B (out, r) zero at the start

`apply_lora` swaps layers of a built model in place. It does not ask what they are made of: nn.Linear gives LoRA, a
quantized linear gives QLoRA. `merge_lora_weights` is its inverse and leaves a plain model behind.
"""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from lit_gpt.errors import InputError
from lit_gpt.model.gpt import GPT
from lit_gpt.name_patterns import check_patterns
from lit_gpt.replace_modules import replace_modules

PLACES = {  # field of LoRA -> the modules it names, below transformer.h.{layer} but for the head
    "query": r"attn\.q",
    "key": r"attn\.k",
    "value": r"attn\.v",
    "projection": r"attn\.proj",
    "mlp": r"mlp\.(experts\.\d+\.)?(fc|fc_1|fc_2|proj)",  # not the gate that chooses experts
    "head": r"lm_head",
}


@dataclass(frozen=True)
class LoRA:
    """What to learn, and where."""

    r: int = 8
    """Rank of the change. The number of trained parameters grows with it; 8 to 64 is usual."""
    alpha: float = 16
    """The change is scaled by alpha / r, so that the learning rate can stay when the rank changes."""
    dropout: float = 0.0
    """Dropout on the input of the low-rank branch."""
    query: bool = True
    """Adapt the query projection."""
    key: bool = False
    """Adapt the key projection."""
    value: bool = True
    """Adapt the value projection."""
    projection: bool = False
    """Adapt the output projection of the attention."""
    mlp: bool = False
    """Adapt all linears of the MLP."""
    head: bool = False
    """Adapt the language model head."""
    layers: int | list[int] | None = None
    """Which blocks: None is all, 8 the last eight, [0, 5, 11] these. The head does not count as one."""
    modules: list[str] | None = None
    """Adapt these instead of the places above: patterns of names as in transformer.h.3.mlp.fc_1, such as
    ["mlp.fc_[12]", attn.proj]."""
    rank_pattern: dict[str, int] = field(default_factory=dict)
    """Other ranks for some modules, by patterns of their names: {attn.q: 16, "mlp.fc_[12]": 4}."""
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    """Other alphas for some modules."""
    rslora: bool = False
    """Scale by alpha / sqrt(r), which lets high ranks learn as fast as low ones. https://arxiv.org/abs/2312.03732"""
    dora: bool = False
    """Train the length of each row of the weight apart from its direction. https://arxiv.org/abs/2402.09353"""

    def __post_init__(self) -> None:
        ranks, alphas = [self.r, *self.rank_pattern.values()], [self.alpha, *self.alpha_pattern.values()]
        if min(ranks) < 1 or not min(alphas) > 0 or not 0 <= self.dropout < 1:
            raise InputError(
                f"lora.r is {min(ranks)}, expected 1 or more; lora.alpha {min(alphas)}, expected more than 0;"
                f" lora.dropout {self.dropout}, expected 0 to 1."
            )
        check_patterns([*(self.modules or ()), *self.rank_pattern, *self.alpha_pattern])
        if not self.modules and not any(getattr(self, place) for place in PLACES):
            raise InputError(f"LoRA has nothing to adapt. Turn on at least one of {', '.join(PLACES)}.")

    def matches(self, name: str, n_layer: int) -> bool:
        """Whether the module called `name` is to be adapted."""
        layer, path = re.fullmatch(r"(?:transformer\.h\.(\d+)\.)?(.+)", name).groups()
        if self.modules is not None:
            chosen = fits(name, self.modules) is not None
        else:
            chosen = any(getattr(self, place) and re.fullmatch(pattern, path) for place, pattern in PLACES.items())
        return chosen and (layer is None or int(layer) in self.blocks(n_layer))

    def rank_of(self, name: str) -> int:
        return self.rank_pattern.get(fits(name, self.rank_pattern), self.r)

    def scaling_of(self, name: str) -> float:
        """What the change of a module is multiplied by."""
        alpha, r = self.alpha_pattern.get(fits(name, self.alpha_pattern), self.alpha), self.rank_of(name)
        return alpha / (math.sqrt(r) if self.rslora else r)

    def blocks(self, n_layer: int) -> range | list[int]:
        """The adapted blocks of a model that has `n_layer`.

        Raises:
            InputError: the model has no such block.
        """
        if self.layers is None:
            return range(n_layer)
        blocks = range(n_layer - self.layers, n_layer) if isinstance(self.layers, int) else self.layers
        if not blocks or not all(0 <= block < n_layer for block in blocks):
            raise InputError(f"lora.layers is {self.layers}, but the model's blocks are 0 to {n_layer - 1}.")
        return blocks


def fits(name: str, patterns: Iterable[str]) -> str | None:
    """The first pattern that a module's name, or its last parts, match."""
    return next((pattern for pattern in patterns if re.fullmatch(rf"(?:.*\.)?(?:{pattern})", name)), None)


class LoRALinear(nn.Module):
    """A frozen linear and the low-rank change to it. A and B are float32, whatever the linear is stored in."""

    def __init__(self, linear: nn.Module, r: int, scaling: float, dropout: float = 0.0) -> None:
        super().__init__()
        self.linear = linear
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.scaling = scaling
        self.dropout = nn.Dropout(dropout)
        device = next(linear.parameters()).device
        self.lora_A = nn.Parameter(torch.empty(r, linear.in_features, device=device, dtype=torch.float32))
        self.lora_B = nn.Parameter(torch.zeros(linear.out_features, r, device=device, dtype=torch.float32))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))  # what nn.Linear does to its own weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        low = self.scaling * F.linear(self.dropout(x), self.lora_A.to(x.dtype))  # (B, T, in) -> (B, T, r)
        return self.linear(x).add_(F.linear(low, self.lora_B.to(x.dtype)))  # (B, T, out)

    @torch.no_grad()
    def merged(self) -> nn.Module:
        """The wrapped linear with the change added to its weight: in float32, rounded once.

        Its weight is a new parameter, so that a head that was tied to the embedding leaves the embedding alone. A
        quantized linear becomes a plain one in float32, the change added to what its codes stand for.
        """
        linear = self.linear if isinstance(self.linear, nn.Linear) else self.linear.dequantized()
        linear.weight = nn.Parameter(self.changed(linear.weight).to(linear.weight.dtype), requires_grad=False)
        return linear

    def changed(self, weight: torch.Tensor) -> torch.Tensor:
        """The weight (out, in) and the change to it, in float32 at least."""
        change = self.scaling * (self.lora_B @ self.lora_A)
        return weight.to(torch.promote_types(weight.dtype, change.dtype)) + change


class DoRALinear(LoRALinear):
    """The changed weight gives each row its direction, a trained magnitude its length:

        y = m / |V| V x        V = W + scaling B A, |V| (out,) the lengths of its rows, m = |W| at the start

    As in the paper no gradient goes through |V|.
    """

    def __init__(self, linear: nn.Module, r: int, scaling: float, dropout: float = 0.0) -> None:
        super().__init__(linear, r, scaling, dropout)
        lengths = self.weight().to(torch.promote_types(self.lora_A.dtype, self.weight().dtype)).norm(dim=1)
        self.lora_magnitude = nn.Parameter(lengths.to(self.lora_A.dtype))

    def weight(self) -> torch.Tensor:
        return self.linear.weight if isinstance(self.linear, nn.Linear) else self.linear.dequantize()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            lengths = super().changed(self.weight()).norm(dim=1)
        low = self.scaling * F.linear(self.dropout(x), self.lora_A.to(x.dtype))  # (B, T, in) -> (B, T, r)
        bias = 0 if self.linear.bias is None else self.linear.bias
        y = self.linear(x) - bias + F.linear(low, self.lora_B.to(x.dtype))
        return y * (self.lora_magnitude / lengths).to(x.dtype) + bias

    def changed(self, weight: torch.Tensor) -> torch.Tensor:
        direction = super().changed(weight)
        return direction * (self.lora_magnitude / direction.norm(dim=1))[:, None]


def apply_lora(model: GPT, lora: LoRA) -> list[str]:
    """Wraps the linears that `lora` names, in place, and returns their names.

    Raises:
        InputError: the model has none of them, or already carries LoRA; a pattern is for none of them.
    """
    if any(isinstance(module, LoRALinear) for module in model.modules()):
        raise InputError("This model already carries LoRA: merge it first (`python scripts/merge_lora.py`).")
    n_layer, kind = model.config.n_layer, DoRALinear if lora.dora else LoRALinear
    lora.blocks(n_layer)  # refuses layers that are not there, even if only the head is adapted
    linears = [name for name, module in model.named_modules() if hasattr(module, "in_features")]
    names = {name for name in linears if lora.matches(name, n_layer)}
    if not names:
        raise InputError(f"{lora} matches no linear of {model.config.name}.")
    for pattern in (*lora.rank_pattern, *lora.alpha_pattern):
        if not any(fits(name, [pattern]) for name in names):
            raise InputError(f"lora has a rank or an alpha for {pattern!r}, of which nothing is adapted.")

    def wrap(name: str, module: nn.Module) -> nn.Module | None:
        return kind(module, lora.rank_of(name), lora.scaling_of(name), lora.dropout) if name in names else None

    return replace_modules(model, wrap)


def lora_filter(key: str, value: Any = None) -> bool:
    """Whether a state dict key belongs to LoRA: these keys train and get saved."""
    return key.rsplit(".", 1)[-1].startswith("lora_")


def mark_only_lora_as_trainable(model: nn.Module) -> None:
    for name, param in model.named_parameters():
        param.requires_grad = lora_filter(name)


def merge_lora_weights(model: nn.Module) -> list[str]:
    """Puts a plain, merged linear back in the place of every LoRALinear, and returns their names."""
    return replace_modules(model, lambda name, module: module.merged() if isinstance(module, LoRALinear) else None)
