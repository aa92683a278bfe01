"""Rotary positions, and the ways in which they are stretched over longer contexts.

A kind of scaling is one function: the base and the exponents of the frequencies, what config.json says of it, and the
length of the record, to the frequencies (rope_n_elem / 2,) and what cosine and sine are multiplied by."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from lit_gpt.config import Config

Frequencies = tuple[torch.Tensor, float]


class Rope(nn.Module):
    """Rotary positions: https://arxiv.org/abs/2104.09864

    One float32 frequency per pair of rotated elements, (rope_n_elem / 2,). Always made on the CPU, so that a model
    built on the meta device has them too, and such that every bit is that of transformers: at position 10,000 one bit
    of a frequency turns a vector by 0.001.

    With some kinds of scaling a record's frequencies depend on its length. In a key-value cache its size counts as the
    length: all keys are turned alike, also those of a text that has yet to grow. `lit_gpt/generate/decode.py` takes
    a cache no longer than `unstretched` until the text is, and then reads all of it again. From there on longrope
    knows one set of frequencies, so that each token is what the whole text without a cache gives; dynamic has one for
    every length, of which the cache uses the last. (transformers turns each new key by its own, and leaves the older
    ones.)
    """

    def __init__(self, config: Config, kind: str = "global") -> None:
        super().__init__()
        n = 0 if kind == "none" else config.rope_n_elem
        base = config.rope_local_base if kind == "local" else config.rope_base
        self.scaling = (config.rope_scaling if kind == "global" and n else None) or {"rope_type": "default"}
        self.scale = ROPE_SCALINGS[self.scaling["rope_type"]]
        self.block_size, self.base, self.n = config.block_size, base, n
        self.by_length = self.scaling["rope_type"] in ("dynamic", "longrope")
        self.unstretched = self.scaling.get("original_max_position_embeddings", config.block_size)
        theta, self.factor = self.theta_of(1)
        self.register_buffer("theta", theta, persistent=False)

    def theta_of(self, length: int) -> Frequencies:
        """The frequencies of a record, and what cosine and sine are multiplied by."""
        exponents = torch.arange(0, self.n, 2, device="cpu").float() / max(1, self.n)
        return self.scale(self.base, exponents, self.scaling | {"block_size": self.block_size}, length)

    def forward(self, pos: torch.Tensor, lengths: Sequence[tuple[int, int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosine and sine, (T, rope_n_elem / 2), for positions (T,).

        `lengths` says how many of the tokens belong to records of which length, in order.
        """
        angles = torch.outer(pos.to(self.theta.dtype), self.theta)
        if self.by_length:
            parts = pos.to(self.theta.dtype).split([n for n, _ in lengths])
            thetas = [self.theta_of(length)[0].to(self.theta) for _, length in lengths]
            angles = torch.cat([torch.outer(*pair) for pair in zip(parts, thetas, strict=True)])
        return angles.cos() * self.factor, angles.sin() * self.factor


def scale_default(base: float, exponents: torch.Tensor, scaling: dict[str, Any], length: int) -> Frequencies:
    return 1.0 / base**exponents, 1.0


def scale_linear(base: float, exponents: torch.Tensor, scaling: dict[str, Any], length: int) -> Frequencies:
    """Position interpolation: all positions are pulled together. https://arxiv.org/abs/2306.15595"""
    return 1.0 / base**exponents / scaling["factor"], 1.0


def scale_dynamic(base: float, exponents: torch.Tensor, scaling: dict[str, Any], length: int) -> Frequencies:
    """Dynamic NTK: the base grows with a record that is longer than the model was trained for.

    https://arxiv.org/abs/2309.00071, section 3.3
    """
    n, trained, factor = 2 * exponents.numel(), scaling["original_max_position_embeddings"], scaling["factor"]
    stretch = factor * max(length, trained) / trained - (factor - 1)
    return 1.0 / (base * stretch ** (n / (n - 2))) ** exponents, 1.0


def scale_llama3(base: float, exponents: torch.Tensor, scaling: dict[str, Any], length: int) -> Frequencies:
    """Stretches the waves that are longer than the original context, leaves the short ones, blends in between.

    Llama 3.1, https://arxiv.org/abs/2407.21783
    """
    theta, low, high = 1.0 / base**exponents, scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] / (2 * torch.pi / theta)  # within the original context
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - keep) * theta / scaling["factor"] + keep * theta, 1.0


def scale_yarn(base: float, exponents: torch.Tensor, scaling: dict[str, Any], length: int) -> Frequencies:
    """Stretches by how often an element turns within the original context. https://arxiv.org/abs/2309.00071"""
    n, trained = 2 * exponents.numel(), scaling["original_max_position_embeddings"]
    factor = scaling.get("factor") or scaling["block_size"] / trained

    def element_of(turns: float) -> float:
        return n * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(base))

    low, high = element_of(scaling.get("beta_fast") or 32), element_of(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, n - 1)
    ramp = ((torch.arange(n // 2, dtype=torch.float32, device="cpu") - low) / ((high - low) or 0.001)).clamp(0, 1)
    keep, powers = 1 - ramp, base**exponents
    theta = 1.0 / (factor * powers) * (1 - keep) + 1.0 / powers * keep

    def attention_factor(mscale: float) -> float:
        return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0

    by, by_all = scaling.get("mscale"), scaling.get("mscale_all_dim")
    usual = attention_factor(by) / attention_factor(by_all) if by and by_all else attention_factor(1)
    return theta, usual if scaling.get("attention_factor") is None else scaling["attention_factor"]


def scale_longrope(base: float, exponents: torch.Tensor, scaling: dict[str, Any], length: int) -> Frequencies:
    """A factor per element, others for records beyond the original context. https://arxiv.org/abs/2402.13753"""
    trained = scaling["original_max_position_embeddings"]
    factor = scaling.get("factor") or scaling["block_size"] / trained
    usual = math.sqrt(1 + math.log(factor) / math.log(trained)) if factor > 1 else 1.0
    factors = torch.tensor(scaling["long_factor" if length > trained else "short_factor"], device="cpu")
    theta = 1.0 / (factors.float() * base**exponents)
    return theta, usual if scaling.get("attention_factor") is None else scaling["attention_factor"]


def apply_rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates the first rope_n_elem elements of every head and leaves the rest, (B, heads, T, hs).

    Element i is paired with element i + rope_n_elem / 2, as in GPT-NeoX and all of Hugging Face's checkpoints.
    """
    n = cos.size(-1)
    x1, x2, rest = x[..., :n], x[..., n : 2 * n], x[..., 2 * n :]
    return torch.cat(((x1 * cos - x2 * sin).to(x.dtype), (x2 * cos + x1 * sin).to(x.dtype), rest), dim=-1)


ROPE_SCALINGS = {
    "default": scale_default,
    "linear": scale_linear,
    "dynamic": scale_dynamic,
    "llama3": scale_llama3,
    "yarn": scale_yarn,
    "longrope": scale_longrope,
}
