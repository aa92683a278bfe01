"""TODO doc of model.embeddings"""

import torch
from torch import nn

from lit_gpt.config import Config


class Embedding(nn.Embedding):
    def __init__(self, config: Config) -> None:
        super().__init__(config.padded_vocab_size, config.n_embd)

    def forward(self, idx: torch.Tensor, pos: torch.Tensor | None = None) -> torch.Tensor:
        return super().forward(idx)


class ScaledEmbedding(Embedding):
    """Gemma, Granite. The factor is rounded to the weights' dtype, as it was in training."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.scale = config.embedding_scale

    def forward(self, idx: torch.Tensor, pos: torch.Tensor | None = None) -> torch.Tensor:
        x = super().forward(idx)
        return x * torch.tensor(self.scale, dtype=x.dtype, device="cpu").to(x.device)


class PositionEmbedding(Embedding):
    """A learned vector per position is added: GPT-2."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.positions = nn.Embedding(config.block_size, config.n_embd)

    def forward(self, idx: torch.Tensor, pos: torch.Tensor | None = None) -> torch.Tensor:
        return super().forward(idx) + self.positions(pos)


EMBEDDINGS = {"plain": Embedding, "scaled": ScaledEmbedding, "positions": PositionEmbedding}
