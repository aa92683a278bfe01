"""Embeddings: from token ids to vectors. A family names one of EMBEDDINGS.

The legend of the shapes is in `gpt.py`."""

import torch
from torch import nn

from lit_gpt.config import Config


class Embedding(nn.Embedding):
    """A vector for each token: Llama and most others."""

    def __init__(self, config: Config) -> None:
        super().__init__(config.padded_vocab_size, config.n_embd)

    def forward(self, idx: torch.Tensor, pos: torch.Tensor | None = None) -> torch.Tensor:
        """Tokens (B, T) at positions (T,), which most embeddings do not look at -> (B, T, C)"""
        return super().forward(idx)


class ScaledEmbedding(Embedding):
    """The vectors are multiplied by a constant: Gemma, Granite."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        # the factor is rounded to the dtype of the weights, as it was in training. It is a number: a GPU would wait for
        # a tensor of the CPU
        self.scales: dict[torch.dtype, float] = {}
        for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            self.scales[dtype] = torch.tensor(config.embedding_scale, dtype=dtype, device="cpu").item()

    def forward(self, idx: torch.Tensor, pos: torch.Tensor | None = None) -> torch.Tensor:
        x = super().forward(idx)
        return x * self.scales[x.dtype]


class PositionEmbedding(Embedding):
    """A learned vector for each position is added: GPT-2."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.positions = nn.Embedding(config.block_size, config.n_embd)

    def forward(self, idx: torch.Tensor, pos: torch.Tensor | None = None) -> torch.Tensor:
        return super().forward(idx) + self.positions(pos)


# `embedding` in a config -> the class
EMBEDDINGS: dict[str, type[Embedding]] = {
    "plain": Embedding,
    "scaled": ScaledEmbedding,
    "positions": PositionEmbedding,
}
