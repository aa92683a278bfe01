"""The GPT: its blocks, attention, positions, loss, and how records lie in a row of tokens. Begin with `gpt.py`."""

from lit_gpt.model.attention import CausalSelfAttention
from lit_gpt.model.gpt import GPT, Block
from lit_gpt.model.kv_cache import KVCache
from lit_gpt.model.norms import RMSNorm
from lit_gpt.model.rope import apply_rope

__all__ = ["GPT", "Block", "CausalSelfAttention", "KVCache", "RMSNorm", "apply_rope"]
