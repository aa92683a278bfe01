"""A decoder-only transformer. One class, many families: the config says which parts to use.

Shapes in the comments:
    B batch, T tokens of this call, S tokens to attend to, N positions with a target, V vocabulary, C n_embd,
    nh n_head, ng n_query_groups, hs head_size"""

from typing import Any

import torch
from torch import nn

from lit_gpt.config import Config
from lit_gpt.model.attention import CausalSelfAttention, View
from lit_gpt.model.embeddings import EMBEDDINGS
from lit_gpt.model.kv_cache import KVCache
from lit_gpt.model.loss import summed_loss
from lit_gpt.model.mlp import MLPS
from lit_gpt.model.norms import NORMS
from lit_gpt.model.packing import Layout
from lit_gpt.model.rope import Rope


class GPT(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(
            dict(
                wte=EMBEDDINGS[config.embedding](config),
                h=nn.ModuleList(BLOCKS[config.block](config, layer) for layer in range(config.n_layer)),
                ln_f=NORMS[config.norm](config.n_embd, eps=config.norm_eps),
            )
        )
        self.lm_head = nn.Linear(config.n_embd, config.padded_vocab_size, bias=config.lm_head_bias)
        self.cap = SoftCap(config.final_softcap) if config.final_softcap else Scale(config.logit_scale)
        if config.tie_embeddings:
            self.lm_head.weight = self.transformer.wte.weight
        self.ropes = nn.ModuleDict({kind: Rope(config, kind) for kind in {block.rope for block in self.transformer.h}})
        self.windows = {block.attn.window for block in self.transformer.h}
        self.max_seq_length = config.block_size

    @classmethod
    def from_name(cls, name: str, **overrides: Any) -> "GPT":
        return cls(Config.from_name(name, **overrides))

    @property
    def max_seq_length(self) -> int:
        """Tokens that the key-value cache will hold. Set it before `set_kv_cache`: a short cache is a fast one."""
        return self._max_seq_length

    @max_seq_length.setter
    def max_seq_length(self, length: int) -> None:
        if length > self.config.block_size:
            raise ValueError(f"{length} tokens exceed the model's block_size, {self.config.block_size}.")
        self._max_seq_length = length

    def forward(
        self, idx: torch.Tensor, input_pos: torch.Tensor | None = None, layout: Layout | None = None
    ) -> torch.Tensor:
        """Logits; or, with a layout, the summed loss of its targets.

        Args:
            idx: Tokens (B, T); with a layout (1, T).
            input_pos: Where in the key-value cache these tokens go, (T,). Needs `set_kv_cache` first.
            layout: Where records begin in idx, and what is trained.

        Returns:
            (B, T, V) in the model's dtype; with a layout a float32 scalar (float64 for a float64 model).

        Raises:
            ValueError: a row or a record is longer than block_size, or the cache is missing or too short.
        """
        x = self.hidden(idx, input_pos, layout)
        if layout is None:
            return self.logits(self.transformer.ln_f(x))
        x = x[0].index_select(0, layout.target_index)  # (N, C); its backward is three times faster than x[0, index]'s
        return summed_loss(self.logits, self.lm_head.parameters(), self.transformer.ln_f(x), layout.target)

    def hidden(
        self, idx: torch.Tensor, input_pos: torch.Tensor | None = None, layout: Layout | None = None
    ) -> torch.Tensor:
        """What the blocks make of the tokens, (B, T, C), before the final norm."""
        pos, lengths, views = self.positions(idx, input_pos, layout)
        turns = {kind: rope(pos, lengths) for kind, rope in self.ropes.items()}  # cos and sin, (T, rope_n_elem / 2)
        x = self.transformer.wte(idx, pos)  # (B, T, C)
        for block in self.transformer.h:
            x = block(x, *turns[block.rope], views[block.window], input_pos)
        return x

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        return self.cap(self.lm_head(x))

    def positions(
        self, idx: torch.Tensor, input_pos: torch.Tensor | None, layout: Layout | None
    ) -> tuple[torch.Tensor, list[tuple[int, int]], dict[int | None, View]]:
        """The position of each token, (T,); how many tokens belong to records of which length; what each may look at,
        for every size of sliding window."""
        if layout is not None:
            lengths = [(segment.length, segment.prefix_length + segment.length) for segment in layout.segments]
            longest = max(length for _, length in lengths)
            if longest > self.config.block_size:
                raise ValueError(f"A record of {longest} tokens exceeds block_size, {self.config.block_size}.")
            return layout.pos, lengths, dict.fromkeys(self.windows, layout)
        T = idx.size(1)
        if input_pos is None:
            if T > self.max_seq_length:
                raise ValueError(f"{T} tokens exceed max_seq_length, {self.max_seq_length}.")
            return torch.arange(T, device=idx.device), [(T, T)], dict.fromkeys(self.windows)
        cache = self.transformer.h[0].attn.kv_cache
        if cache is None:
            raise ValueError("input_pos needs a key-value cache: call model.set_kv_cache(batch_size=...) first.")
        S = cache.k.size(2)
        if T > S:
            raise ValueError(f"{T} tokens exceed the key-value cache, which holds {S}.")
        before = input_pos[:, None] - torch.arange(S, device=idx.device)  # (T, S)
        masks = {w: before >= 0 if w is None else (before >= 0) & (before < w) for w in self.windows}
        return input_pos, [(T, S)], masks

    def set_kv_cache(self, batch_size: int) -> None:
        """Makes room for the keys and values of `max_seq_length` tokens."""
        weight = self.transformer.wte.weight
        shape = (batch_size, self.config.n_query_groups, self.max_seq_length, self.config.head_size)
        for block in self.transformer.h:
            block.attn.kv_cache = KVCache(shape, weight.device, weight.dtype)

    def clear_kv_cache(self) -> None:
        for block in self.transformer.h:
            block.attn.kv_cache = None


def count_parameters(config: Config) -> int:
    """How many a model has: of its layers one of each kind is built, on the meta device."""
    with torch.device("meta"):
        parts = [(1, GPT(config.replace(n_layer=0)))]
        for dense in (False, True):
            layers = [layer for layer in range(config.n_layer) if (layer in config.dense_layers) == dense]
            parts += [(len(layers), BLOCKS[config.block](config, layer)) for layer in layers[:1]]
    return sum(n * param.numel() for n, part in parts for param in part.parameters())


class Block(nn.Module):
    """Attention, then the MLP, each on the normed sum of all before: Llama and most others."""

    def __init__(self, config: Config, layer: int = 0) -> None:
        super().__init__()
        self.norm_1 = NORMS[config.norm](config.n_embd, eps=config.norm_eps)
        self.attn = CausalSelfAttention(config, layer)
        self.norm_2 = NORMS[config.norm](config.n_embd, eps=config.norm_eps)
        self.mlp = MLPS["LLaMAMLP" if layer in config.dense_layers else config.mlp](config)
        self.rope, self.window = config.rope_of(layer), self.attn.window

    def forward(self, x: torch.Tensor, *where: Any) -> torch.Tensor:
        """(B, T, C) -> (B, T, C). `where` the tokens are, and what they may look at, is for attention to know."""
        x = x + self.attn(self.norm_1(x), *where)
        return x + self.mlp(self.norm_2(x))


class ScaledBlock(Block):
    """What a block adds is scaled: Granite."""

    def __init__(self, config: Config, layer: int) -> None:
        super().__init__(config, layer)
        self.scale = config.residual_scale

    def forward(self, x: torch.Tensor, *where: Any) -> torch.Tensor:
        x = x + self.scale * self.attn(self.norm_1(x), *where)
        return x + self.scale * self.mlp(self.norm_2(x))


class ParallelBlock(Block):
    """Attention and MLP side by side, each with its norm: GPT-NeoX, Falcon 40B."""

    def forward(self, x: torch.Tensor, *where: Any) -> torch.Tensor:
        return x + self.attn(self.norm_1(x), *where) + self.mlp(self.norm_2(x))


class SharedNormBlock(Block):
    """Attention and MLP side by side on one normed input: Phi, Falcon 7B, StableLM 2 12B."""

    def __init__(self, config: Config, layer: int) -> None:
        super().__init__(config, layer)
        del self.norm_2

    def forward(self, x: torch.Tensor, *where: Any) -> torch.Tensor:
        normed = self.norm_1(x)
        return x + self.attn(normed, *where) + self.mlp(normed)


class PostNormBlock(Block):
    """The norms come after: OLMo 2."""

    def forward(self, x: torch.Tensor, *where: Any) -> torch.Tensor:
        x = x + self.norm_1(self.attn(x, *where))
        return x + self.norm_2(self.mlp(x))


class SandwichBlock(Block):
    """Norms before and after: Gemma 2 and 3."""

    def __init__(self, config: Config, layer: int) -> None:
        super().__init__(config, layer)
        self.post_norm_1 = NORMS[config.norm](config.n_embd, eps=config.norm_eps)
        self.post_norm_2 = NORMS[config.norm](config.n_embd, eps=config.norm_eps)

    def forward(self, x: torch.Tensor, *where: Any) -> torch.Tensor:
        x = x + self.post_norm_1(self.attn(self.norm_1(x), *where))
        return x + self.post_norm_2(self.mlp(self.norm_2(x)))


class Scale(nn.Module):
    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.scale


class SoftCap(nn.Module):
    def __init__(self, cap: float) -> None:
        super().__init__()
        self.cap = cap

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.cap * torch.tanh(x / self.cap)


BLOCKS = {
    "sequential": Block,
    "scaled": ScaledBlock,
    "parallel": ParallelBlock,
    "shared_norm": SharedNormBlock,
    "post_norm": PostNormBlock,
    "sandwich": SandwichBlock,
}
