"""Rotary positions, and the ways in which they are stretched over longer contexts.

A kind of scaling is one function. It gets the base and the exponents of the frequencies, (rope_n_elem / 2,), the
settings of config.json and the length of the record, and gives the frequencies, (rope_n_elem / 2,), and the factor of
cosine and sine. The legend of the shapes is in `gpt.py`."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from lit_gpt.config import Config

# one per pair of rotated elements, and the factor of cosine and sine
Frequencies = tuple[torch.Tensor, float]


class Rope(nn.Module):
    """Rotary positions: https://arxiv.org/abs/2104.09864

    One float32 frequency per pair of rotated elements, (rope_n_elem / 2,). Always made on the CPU, so that a model
    built on the meta device has them too, and such that every bit is that of transformers: at position 10,000 one bit
    of a frequency turns a vector by 0.001.

    With some kinds of scaling a record's frequencies depend on its length. In a key-value cache `text_lengths` are the
    lengths: all keys are turned alike, also those of a text that has yet to grow. `lit_gpt/generate/batch.py` has
    `unstretched_length` for it until the text is longer, and then reads all of it again. From there on
    longrope knows one set of frequencies, so that each token is what the whole text without a cache gives; dynamic has
    one for every length, of which the cache uses the last. (transformers turns each new key by its own, and leaves the
    older ones.)
    """

    def __init__(self, config: Config, kind: str = "global") -> None:
        """A model has up to three kinds: "global", "local" for layers with a window and a base of their own, "none"."""
        super().__init__()
        self.n_elem = 0 if kind == "none" else config.rope_n_elem
        self.base = config.rope_local_base if kind == "local" else config.rope_base
        self.block_size = config.block_size

        # only the global kind is ever stretched
        self.scaling = {"rope_type": "default"}
        if kind == "global" and self.n_elem and config.rope_scaling:
            self.scaling = config.rope_scaling
        rope_type = self.scaling["rope_type"]
        self.scaling_function = SCALING_FUNCTIONS[rope_type]
        self.by_length = rope_type in ("dynamic", "longrope")
        self.unstretched_length = self.scaling.get("original_max_position_embeddings", config.block_size)

        theta, self.factor = self.frequencies(length=1)
        self.register_buffer("theta", theta, persistent=False)

    def frequencies(self, length: int) -> Frequencies:
        """The frequencies for a record of this length, and the factor of cosine and sine."""
        elements = torch.arange(0, self.n_elem, 2, device="cpu")  # the first of each pair
        exponents = elements.float() / max(1, self.n_elem)
        settings = self.scaling | {"block_size": self.block_size}
        return self.scaling_function(self.base, exponents, settings, length)

    def forward(self, pos: torch.Tensor, lengths: Sequence[tuple[int, int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosine and sine for positions (T,), each (T, rope_n_elem) as `spread` makes them, once for all blocks.

        `lengths` says how many of the tokens belong to records of which length, in order.
        """
        pos = pos.to(self.theta.dtype)
        if self.by_length:
            # the tokens of each record by the record's own frequencies, which are made on the CPU: one copy for all
            thetas = torch.stack([self.frequencies(length)[0] for _, length in lengths])
            thetas = thetas.to(self.theta, non_blocking=True)
            counts = [count for count, _ in lengths]
            angles_of_records = []
            for record_pos, theta in zip(pos.split(counts), thetas, strict=True):
                angles_of_records.append(torch.outer(record_pos, theta))
            angles = torch.cat(angles_of_records)
        else:
            angles = torch.outer(pos, self.theta)
        return spread(angles.cos() * self.factor, angles.sin() * self.factor)


def spread(cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine of pairs, (T, n / 2), for each of the n elements: (cos, cos) and (-sin, sin), both (T, n)."""
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def apply_rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """`apply_spread_rope` of heads (B, heads, T, hs), by cosine and sine of pairs, both (T, rope_n_elem / 2)."""
    return apply_spread_rope(x, *spread(cos, sin))


def apply_spread_rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates the first rope_n_elem elements of every head and leaves the rest, (B, heads, T, hs).

    Element i is paired with element i + rope_n_elem / 2, as in GPT-NeoX and all of Hugging Face's checkpoints. Cosine
    and sine are (T, rope_n_elem), of `spread`.
    """
    n = cos.size(-1)
    part = x if n == x.size(-1) else x[..., :n]
    # cosine and sine are float32: half precision is rounded once, after the sum
    wide = part.to(torch.promote_types(x.dtype, cos.dtype))

    # x1 cos - x2 sin, x2 cos + x1 sin: both halves at once, which takes half the time of one after the other
    swapped = wide.roll(n // 2, dims=-1)  # x2, x1
    rotated = (wide * cos).addcmul_(swapped, sin).to(x.dtype)
    if part is x:
        return rotated

    # in memory the heads of a token stay side by side, as linears give and take them
    parts_of_tokens = [part.transpose(1, 2) for part in (rotated, x[..., n:])]
    return torch.cat(parts_of_tokens, dim=-1).transpose(1, 2)


# ---- kinds of scaling


def scale_default(base: float, exponents: torch.Tensor, scaling: dict[str, Any], length: int) -> Frequencies:
    """Positions as they are."""
    return 1.0 / base**exponents, 1.0


def scale_linear(base: float, exponents: torch.Tensor, scaling: dict[str, Any], length: int) -> Frequencies:
    """Position interpolation: all positions are pulled together. https://arxiv.org/abs/2306.15595"""
    return 1.0 / base**exponents / scaling["factor"], 1.0


def scale_dynamic(base: float, exponents: torch.Tensor, scaling: dict[str, Any], length: int) -> Frequencies:
    """Dynamic NTK: the base grows with a record that is longer than the model was trained for.

    https://arxiv.org/abs/2309.00071, section 3.3
    """
    n = 2 * exponents.numel()
    trained_length = scaling["original_max_position_embeddings"]
    factor = scaling["factor"]
    stretch = factor * max(length, trained_length) / trained_length - (factor - 1)
    stretched_base = base * stretch ** (n / (n - 2))
    return 1.0 / stretched_base**exponents, 1.0


def scale_llama3(base: float, exponents: torch.Tensor, scaling: dict[str, Any], length: int) -> Frequencies:
    """Stretches the waves that are longer than the original context, leaves the short ones, blends in between.

    Llama 3.1, https://arxiv.org/abs/2407.21783
    """
    theta = 1.0 / base**exponents
    low = scaling["low_freq_factor"]
    high = scaling["high_freq_factor"]
    wavelengths = 2 * torch.pi / theta
    waves = scaling["original_max_position_embeddings"] / wavelengths  # within the original context
    keep = ((waves - low) / (high - low)).clamp(0, 1)
    stretched = (1 - keep) * theta / scaling["factor"]
    return stretched + keep * theta, 1.0


def scale_yarn(base: float, exponents: torch.Tensor, scaling: dict[str, Any], length: int) -> Frequencies:
    """Stretches by how often an element turns within the original context. https://arxiv.org/abs/2309.00071"""
    n = 2 * exponents.numel()
    trained_length = scaling["original_max_position_embeddings"]
    factor = scaling.get("factor") or scaling["block_size"] / trained_length

    # elements up to `low` turn often and stay as they are; those from `high` on are stretched by the whole factor
    low = yarn_element(scaling.get("beta_fast") or 32, n, base, trained_length)
    high = yarn_element(scaling.get("beta_slow") or 1, n, base, trained_length)
    if scaling.get("truncate", True):
        low = math.floor(low)
        high = math.ceil(high)
    low = max(low, 0)
    high = min(high, n - 1)
    width = (high - low) or 0.001
    elements = torch.arange(n // 2, dtype=torch.float32, device="cpu")
    ramp = ((elements - low) / width).clamp(0, 1)

    # a blend of both
    keep = 1 - ramp
    powers = base**exponents
    stretched = 1.0 / (factor * powers) * (1 - keep)
    theta = stretched + 1.0 / powers * keep

    # longer contexts have flatter scores; cosine and sine are made larger, and so the scores
    if scaling.get("attention_factor") is not None:
        return theta, scaling["attention_factor"]
    mscale = scaling.get("mscale")
    mscale_all_dim = scaling.get("mscale_all_dim")
    if mscale and mscale_all_dim:
        return theta, yarn_attention_factor(factor, mscale) / yarn_attention_factor(factor, mscale_all_dim)
    return theta, yarn_attention_factor(factor, 1)


def yarn_element(n_turns: float, n: int, base: float, trained_length: int) -> float:
    """The element, of n, that turns `n_turns` times within the original context; rarely a whole number."""
    wavelength = n_turns * 2 * math.pi
    return n * math.log(trained_length / wavelength) / (2 * math.log(base))


def yarn_attention_factor(factor: float, mscale: float) -> float:
    """The factor of cosine and sine for a context `factor` times as long."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def scale_longrope(base: float, exponents: torch.Tensor, scaling: dict[str, Any], length: int) -> Frequencies:
    """A factor per element, others for records beyond the original context. https://arxiv.org/abs/2402.13753"""
    trained_length = scaling["original_max_position_embeddings"]
    factors = scaling["long_factor"] if length > trained_length else scaling["short_factor"]
    factor_of_element = torch.tensor(factors, device="cpu").float()
    theta = 1.0 / (factor_of_element * base**exponents)

    # the factor of cosine and sine follows from the longest context, whatever the record's length
    if scaling.get("attention_factor") is not None:
        return theta, scaling["attention_factor"]
    factor = scaling.get("factor") or scaling["block_size"] / trained_length
    if factor > 1:
        return theta, math.sqrt(1 + math.log(factor) / math.log(trained_length))
    return theta, 1.0


# rope_type in config.json -> the function. ROPE_TYPES in lit_gpt/families/__init__.py says what numbers each needs
SCALING_FUNCTIONS = {
    "default": scale_default,
    "linear": scale_linear,
    "dynamic": scale_dynamic,
    "llama3": scale_llama3,
    "yarn": scale_yarn,
    "longrope": scale_longrope,
}


def rotates_by_length(model: nn.Module) -> bool:
    """Whether the rotation of a token depends on how long its record is, as with some kinds of `Rope`."""
    return any(getattr(module, "by_length", False) for module in model.modules())
