"""TODO doc of model.kv_cache"""

import torch
from torch import nn


class KVCache(nn.Module):
    """The keys and values of the tokens so far."""

    def __init__(self, shape: tuple[int, int, int, int], device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("k", torch.zeros(shape, device=device, dtype=dtype), persistent=False)
        self.register_buffer("v", torch.zeros(shape, device=device, dtype=dtype), persistent=False)

    def forward(self, input_pos: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Stores new keys and values (B, ng, T, hs), returns all of them (B, ng, S, hs)."""
        return self.k.index_copy_(2, input_pos, k.to(self.k.dtype)), self.v.index_copy_(
            2, input_pos, v.to(self.v.dtype)
        )
