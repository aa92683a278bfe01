"""The key-value cache: the keys and values of the tokens so far, so that generation computes each of them once.

    cache.layers[i].keys      (B, ng, S, hs)    one text per row; position t stands at [:, :, t], zeros until then
    cache.layers[i].values    (B, ng, S, hs)

A cache belongs to a batch of texts and not to a model: `model(idx, input_pos, cache=cache)`. Several caches can be
used with one model in turns, as for several conversations. The legend of the shapes is in `gpt.py`."""

import torch

from lit_gpt.config import Config


class LayerCache:
    """The part of a cache that belongs to one block."""

    def __init__(
        self, shape: tuple[int, int, int, int], device: torch.device | None, dtype: torch.dtype | None
    ) -> None:
        """Takes the memory of all S positions at once. `shape` is (B, ng, S, hs)."""
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)

    def update(self, input_pos: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Stores the keys and values of new tokens, and returns those of all positions.

        Args:
            input_pos: The positions of the new tokens, (T,).
            k: Their keys, (B, ng, T, hs).
            v: Their values, (B, ng, T, hs).

        Returns:
            Keys and values, (B, ng, S, hs) each: the cache itself, not a copy.
        """
        # in place: a cache that was copied for each new token would cost more than attention
        self.keys.index_copy_(2, input_pos, k.to(self.keys.dtype))
        self.values.index_copy_(2, input_pos, v.to(self.values.dtype))
        return self.keys, self.values


class KVCache:
    """The keys and values of a batch of texts, for all blocks of a model."""

    def __init__(
        self,
        config: Config,
        batch_size: int,
        max_seq_length: int,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Makes an empty cache for `batch_size` texts of up to `max_seq_length` tokens.

        `GPT.new_kv_cache` makes one on the device and in the dtype of a model's weights.
        """
        self.batch_size = batch_size
        self.max_seq_length = max_seq_length
        shape = (batch_size, config.n_query_groups, max_seq_length, config.head_size)
        # one pair of tensors for each block: rows can be replaced, and so texts, without touching the others
        self.layers = [LayerCache(shape, device, dtype) for _ in range(config.n_layer)]
