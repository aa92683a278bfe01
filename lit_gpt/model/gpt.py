"""A decoder-only transformer. One class, many families: the config names the parts, and a Llama's are these.

    idx (B, T)                                                  where a name in the config picks another part
     |
    transformer.wte         Embedding                           embeddings.py  EMBEDDINGS
     |
    transformer.h[i]        Block, n_layer times                here           BLOCKS
     |   x = x + attn(norm_1(x))    RMSNorm                     norms.py       NORMS
     |                              CausalSelfAttention         norms.py       QK_NORMS
     |                                cos, sin from Rope        rope.py        SCALING_FUNCTIONS
     |                                attention in a record     attention.py   compute_attention
     |   x = x + mlp(norm_2(x))     RMSNorm, LLaMAMLP           mlp.py         MLPS
     |
    transformer.ln_f        RMSNorm
     |
    lm_head                 Linear, without logits_scale        here           Scale, SoftCap
     |
    logits (B, T, V)

To add a part, write its class beside the others, give it a name in their table, and let a file in `lit_gpt/families/`
say that name. Parts are chosen once, when the model is built: no `forward` asks the config anything.

Shapes in the comments, here and in all of this folder:
    B batch, T tokens of this call, S tokens to attend to, N positions with a target, V vocabulary, C n_embd,
    nh n_head, ng n_query_groups, hs head_size"""

from typing import Any, NamedTuple

import torch
from torch import nn

from lit_gpt.config import Config
from lit_gpt.model.attention import CausalSelfAttention, Mask, cache_masks
from lit_gpt.model.embeddings import EMBEDDINGS
from lit_gpt.model.fused import loss_and_gradient
from lit_gpt.model.kv_cache import KVCache, LayerCache, PackedCache
from lit_gpt.model.loss import Judge, LossAndGradient, judge_targets, summed_loss
from lit_gpt.model.mlp import MLPS
from lit_gpt.model.norms import NORMS
from lit_gpt.model.packing import Layout
from lit_gpt.model.rope import Rope


class Positions(NamedTuple):
    """Where the tokens of a call are in their texts, and which tokens each of them may see."""

    pos: torch.Tensor
    """The position of each token, (T,), or (B, T) if each row has its own."""
    cos_sin: dict[str, tuple[torch.Tensor, torch.Tensor]]
    """Cosine and sine of the rotations for each kind of `Rope` in the model: (T, rope_n_elem) each, or with a row's own
    positions (B, 1, T, rope_n_elem)."""
    masks: dict[int | None, Mask]
    """The mask for each size of sliding window in the model; None is no window."""


class GPT(nn.Module):
    """The model: embedding, blocks, final norm and head."""

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
        if config.tie_embeddings:
            self.lm_head.weight = self.transformer.wte.weight
        # called for every family: most multiply by 1, which changes no bit
        self.scale_logits = SoftCap(config.final_softcap) if config.final_softcap else Scale(config.logit_scale)
        # a part like any other, for which `compile.py` puts in a compiled one
        self.loss_and_gradient: LossAndGradient = loss_and_gradient

        # rotations and masks are made once per call for all blocks; there is one of each kind that a block needs
        kinds = {block.rope for block in self.transformer.h}
        self.ropes = nn.ModuleDict({kind: Rope(config, kind) for kind in sorted(kinds)})
        self.windows = {block.window for block in self.transformer.h}

        # for calls with input_pos and no cache of their own; see `set_kv_cache`
        self.max_seq_length = config.block_size
        self.kv_cache: KVCache | None = None

    @classmethod
    def from_name(cls, name: str, **overrides: Any) -> "GPT":
        """A model of a published shape, with weights as PyTorch starts them; see `Config.from_name`."""
        return cls(Config.from_name(name, **overrides))

    @property
    def max_seq_length(self) -> int:
        """Tokens that `set_kv_cache` makes room for. A short cache is a fast one: set this before.

        Raises:
            ValueError: it is set to more than block_size.
        """
        return self._max_seq_length

    @max_seq_length.setter
    def max_seq_length(self, length: int) -> None:
        if length > self.config.block_size:
            raise ValueError(f"{length} tokens exceed the model's block_size, {self.config.block_size}.")
        self._max_seq_length = length

    def forward(
        self,
        idx: torch.Tensor,
        input_pos: torch.Tensor | None = None,
        layout: Layout | None = None,
        cache: KVCache | PackedCache | None = None,
        judge: Judge | None = None,
    ) -> torch.Tensor:
        """Logits; or, with a layout, the summed loss of its targets.

        Args:
            idx: Tokens (B, T); with a layout (1, T).
            input_pos: Where in the key-value cache these tokens go, (T,), or (B, T) if each row has its own places.
            layout: Where records begin in idx, and what is trained.
            cache: The keys and values of the tokens before, which those of idx join. None, with input_pos, is the
                cache that `set_kv_cache` made. With a layout it is a `PackedCache`, and nothing is trained: what is
                wanted are the logits of the tokens at `target_index`.
            judge: With a layout and no cache, what is wanted of each target in place of the sum, such as
                `loss.loss_of_each`.

        Returns:
            (B, T, V) in the model's dtype; with a layout a float32 scalar (float64 for a float64 model); with a layout
            and a cache (N, V); with a layout and a judge (N, ...), in the order of `layout.target`.

        Raises:
            ValueError: a row or a record is longer than block_size; the cache is missing, too short or for another
                number of rows.
        """
        x = self.hidden(idx, input_pos, layout, cache)
        if layout is None:
            return self.logits(self.transformer.ln_f(x))
        # only the positions with a target need logits; this backward is three times faster than that of x[0, index]
        x = x[0].index_select(0, layout.target_index)  # (N, C)
        x = self.transformer.ln_f(x)
        if cache is not None:
            return self.logits(x)
        # over chunks of targets: the logits of all positions are never in memory
        if judge is not None:
            return judge_targets(self.logits, judge, self.lm_head.out_features, x, layout.target)
        # the cross entropy of all targets, added up
        return summed_loss(
            self.logits,
            self.loss_and_gradient,
            self.lm_head.out_features,
            self.lm_head.parameters(),
            x,
            layout.target,
        )

    def hidden(
        self,
        idx: torch.Tensor,
        input_pos: torch.Tensor | None = None,
        layout: Layout | None = None,
        cache: KVCache | PackedCache | None = None,
    ) -> torch.Tensor:
        """The output of the last block, (B, T, C), before the final norm. The arguments are those of `forward`."""
        if input_pos is not None and cache is None:
            cache = self.kv_cache
        positions = self.positions(idx, input_pos, layout, cache)
        # not kept in a variable here: without gradients it is freed when the first block is done
        return self.run_blocks(self.transformer.wte(idx, positions.pos), positions, input_pos, cache)

    def run_blocks(
        self,
        x: torch.Tensor,
        positions: Positions,
        input_pos: torch.Tensor | None = None,
        cache: KVCache | PackedCache | None = None,
        first_block: int = 0,
    ) -> torch.Tensor:
        """The output of the last block, (B, T, C), from the input of block `first_block`, (B, T, C)."""
        for i in range(first_block, len(self.transformer.h)):
            block = self.transformer.h[i]
            cos, sin = positions.cos_sin[block.rope]
            mask = positions.masks[block.window]
            layer_cache = None if cache is None else cache.layers[i]
            x = block(x, cos, sin, mask, input_pos, layer_cache)
        return x

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """(..., C), after the final norm -> (..., V)"""
        return self.scale_logits(self.lm_head(x))

    def positions(
        self,
        idx: torch.Tensor,
        input_pos: torch.Tensor | None = None,
        layout: Layout | None = None,
        cache: KVCache | PackedCache | None = None,
    ) -> Positions:
        """Positions, rotations and masks of the tokens idx (B, T), or of hidden states (B, T, C) in their place."""
        n_tokens = idx.size(1)
        if layout is not None:
            # records end to end; each begins at position 0 anew
            pos = layout.pos
            lengths = cache.record_lengths if isinstance(cache, PackedCache) else layout.record_lengths()
            masks: dict[int | None, Mask] = dict.fromkeys(self.windows, layout)
            check_longest_record(lengths, self.config.block_size)
        elif input_pos is None:
            # whole texts, one per row
            if n_tokens > self.max_seq_length:
                raise ValueError(f"{n_tokens} tokens exceed max_seq_length, {self.max_seq_length}.")
            pos = torch.arange(n_tokens, device=idx.device)
            lengths = [(n_tokens, n_tokens)]
            masks = dict.fromkeys(self.windows)
        else:
            # more tokens of texts whose beginnings are in the cache
            rows = checked_rows(cache, idx.size(0), n_tokens)
            pos = input_pos
            if rows.is_full and n_tokens == 1:
                masks = dict.fromkeys(self.windows)  # the last token sees all
            else:
                masks = cache_masks(input_pos, rows.max_seq_length, self.windows)
            lengths = [(n_tokens, rows.text_lengths[0])]
            if pos.dim() == 2:
                lengths = [(n_tokens, length) for length in rows.text_lengths]
        # the same for all blocks of a kind: computed once
        cos_sin = {kind: rope(pos.flatten(), lengths) for kind, rope in self.ropes.items()}
        if pos.dim() == 2:
            # (B * T, n) -> (B, 1, T, n): the same for all heads
            cos_sin = {
                kind: (cos.unflatten(0, pos.shape)[:, None], sin.unflatten(0, pos.shape)[:, None])
                for kind, (cos, sin) in cos_sin.items()
            }
        return Positions(pos, cos_sin, masks)

    def new_kv_cache(self, batch_size: int, max_seq_length: int) -> KVCache:
        """An empty cache on the device and in the dtype of the embedding, to hand over as `cache`.

        Raises:
            ValueError: the model cannot read as many tokens.
        """
        if max_seq_length > self.config.block_size:
            raise ValueError(f"{max_seq_length} tokens exceed the model's block_size, {self.config.block_size}.")
        weight = self.transformer.wte.weight
        return KVCache(self.config, batch_size, max_seq_length, weight.device, weight.dtype)

    def set_kv_cache(self, batch_size: int) -> None:
        """Makes a cache of `max_seq_length` tokens that the model keeps, for calls with input_pos and no cache."""
        self.kv_cache = None  # the old one's memory can be used again
        self.kv_cache = self.new_kv_cache(batch_size, self.max_seq_length)

    def clear_kv_cache(self) -> None:
        """Lets go of the cache that the model keeps."""
        self.kv_cache = None


def check_longest_record(lengths: list[tuple[int, int]], block_size: int) -> None:
    """Raises ValueError if a record is longer than the model can read. `lengths` are `Layout.record_lengths`."""
    longest = max(length for _, length in lengths)
    if longest > block_size:
        raise ValueError(f"A record of {longest} tokens exceeds block_size, {block_size}.")


def checked_rows(cache: KVCache | PackedCache | None, batch_size: int, n_tokens: int) -> KVCache:
    """The cache; ValueError if there is none, or if it has no place for as many new tokens or rows."""
    if not isinstance(cache, KVCache):
        raise ValueError(
            "input_pos needs a key-value cache: call model.set_kv_cache(batch_size=...) first, or hand one over as"
            " cache=model.new_kv_cache(batch_size, max_seq_length)."
        )
    if n_tokens > cache.max_seq_length:
        raise ValueError(f"{n_tokens} tokens exceed the key-value cache, which holds {cache.max_seq_length}.")
    if batch_size != cache.batch_size:
        raise ValueError(f"{batch_size} rows of tokens do not fit a key-value cache of {cache.batch_size}.")
    return cache


class Block(nn.Module):
    """Attention, then the MLP, each on the normed sum of all before: Llama and most others."""

    def __init__(self, config: Config, layer: int = 0) -> None:
        super().__init__()
        self.norm_1 = NORMS[config.norm](config.n_embd, eps=config.norm_eps)
        self.attn = CausalSelfAttention(config, layer)
        self.norm_2 = NORMS[config.norm](config.n_embd, eps=config.norm_eps)
        # a family with experts may have layers without
        mlp = "LLaMAMLP" if layer in config.dense_layers else config.mlp
        self.mlp = MLPS[mlp](config)
        # the kind of rotations and the window that this block needs
        self.rope = config.rope_of(layer)
        self.window = config.window_of(layer)

    def forward(
        self,
        x: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        mask: Mask = None,
        input_pos: torch.Tensor | None = None,
        cache: LayerCache | None = None,
    ) -> torch.Tensor:
        """(B, T, C) -> (B, T, C)

        Args:
            x: The sum of the embedding and what all blocks before have added.
            cos: The cosine of each token's rotations, (T, rope_n_elem), or (B, 1, T, rope_n_elem) by rows.
            sin: Their sine, of the same shape.
            mask: Which tokens each token may see: a Layout lets it see those before it in its own record.
            input_pos: Where in the cache the tokens go, (T,) or (B, T).
            cache: This block's part of the key-value cache.
        """
        x = x + self.attn(self.norm_1(x), cos, sin, mask, input_pos, cache)
        return x + self.mlp(self.norm_2(x))


class ScaledBlock(Block):
    """What attention and MLP add is multiplied by a constant: Granite."""

    def __init__(self, config: Config, layer: int) -> None:
        super().__init__(config, layer)
        self.scale = config.residual_scale

    def forward(
        self,
        x: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        mask: Mask = None,
        input_pos: torch.Tensor | None = None,
        cache: LayerCache | None = None,
    ) -> torch.Tensor:
        x = x + self.scale * self.attn(self.norm_1(x), cos, sin, mask, input_pos, cache)
        return x + self.scale * self.mlp(self.norm_2(x))


class ParallelBlock(Block):
    """Attention and MLP side by side, each with its norm: GPT-NeoX, Falcon 40B."""

    def forward(
        self,
        x: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        mask: Mask = None,
        input_pos: torch.Tensor | None = None,
        cache: LayerCache | None = None,
    ) -> torch.Tensor:
        return x + self.attn(self.norm_1(x), cos, sin, mask, input_pos, cache) + self.mlp(self.norm_2(x))


class SharedNormBlock(Block):
    """Attention and MLP side by side on one normed input: Phi, Falcon 7B, StableLM 2 12B."""

    def __init__(self, config: Config, layer: int) -> None:
        super().__init__(config, layer)
        del self.norm_2

    def forward(
        self,
        x: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        mask: Mask = None,
        input_pos: torch.Tensor | None = None,
        cache: LayerCache | None = None,
    ) -> torch.Tensor:
        normed = self.norm_1(x)
        return x + self.attn(normed, cos, sin, mask, input_pos, cache) + self.mlp(normed)


class PostNormBlock(Block):
    """The norms come after attention and MLP: OLMo 2."""

    def forward(
        self,
        x: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        mask: Mask = None,
        input_pos: torch.Tensor | None = None,
        cache: LayerCache | None = None,
    ) -> torch.Tensor:
        x = x + self.norm_1(self.attn(x, cos, sin, mask, input_pos, cache))
        return x + self.norm_2(self.mlp(x))


class SandwichBlock(Block):
    """Norms before and after: Gemma 2 and 3."""

    def __init__(self, config: Config, layer: int) -> None:
        super().__init__(config, layer)
        self.post_norm_1 = NORMS[config.norm](config.n_embd, eps=config.norm_eps)
        self.post_norm_2 = NORMS[config.norm](config.n_embd, eps=config.norm_eps)

    def forward(
        self,
        x: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        mask: Mask = None,
        input_pos: torch.Tensor | None = None,
        cache: LayerCache | None = None,
    ) -> torch.Tensor:
        x = x + self.post_norm_1(self.attn(self.norm_1(x), cos, sin, mask, input_pos, cache))
        return x + self.post_norm_2(self.mlp(self.norm_2(x)))


class Scale(nn.Module):
    """Multiplication of the logits by a constant, which is 1 for most families."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.scale


class SoftCap(nn.Module):
    """Logits kept between -cap and cap: Gemma 2, https://arxiv.org/abs/2408.00118"""

    def __init__(self, cap: float) -> None:
        super().__init__()
        self.cap = cap

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.cap * torch.tanh(x / self.cap)


# `block` in a config -> the class
BLOCKS: dict[str, type[Block]] = {
    "sequential": Block,
    "scaled": ScaledBlock,
    "parallel": ParallelBlock,
    "shared_norm": SharedNormBlock,
    "post_norm": PostNormBlock,
    "sandwich": SandwichBlock,
}


def count_parameters(config: Config) -> int:
    """The number of a model's parameters. Only one layer of each kind is built, and that on the meta device."""
    n_dense = sum(layer in config.dense_layers for layer in range(config.n_layer))
    n_other = config.n_layer - n_dense
    with torch.device("meta"):
        # all but the blocks, then one block of a kind for all of that kind
        total = n_params(GPT(config.replace(n_layer=0)))
        for n_layers, is_dense in ((n_dense, True), (n_other, False)):
            if n_layers == 0:
                continue
            example = next(layer for layer in range(config.n_layer) if (layer in config.dense_layers) == is_dense)
            block = BLOCKS[config.block](config, example)
            total += n_layers * n_params(block)
    return total


def n_params(module: nn.Module) -> int:
    return sum(param.numel() for param in module.parameters())
