"""Phi-3 and Phi-4: Llama with q, k and v fused, and both inputs of the MLP."""

from typing import Any

from lit_gpt.families import llama, sliding, usual

MODEL_TYPES = ("phi3",)

PHI_3 = dict(norm_eps=1e-5, vocab_size=32064, n_embd=3072, n_head=32, n_layer=32, intermediate_size=8192)
PHI_4 = dict(
    n_layer=40, n_head=40, n_query_groups=10, n_embd=5120, intermediate_size=17920, vocab_size=100352, norm_eps=1e-5,
    block_size=16384, rope_base=250000,
)  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "microsoft/Phi-3-mini-4k-instruct": PHI_3 | dict(block_size=4096, sliding_window=2047),
    "microsoft/Phi-3-medium-4k-instruct": PHI_3 | dict(
        n_layer=40, n_head=40, n_query_groups=10, n_embd=5120, intermediate_size=17920, block_size=4096,
        sliding_window=2047,
    ),
    "microsoft/phi-4": PHI_4,
    "microsoft/Phi-4-reasoning": PHI_4 | dict(block_size=32768, rope_base=500000),
    "microsoft/Phi-4-reasoning-plus": PHI_4 | dict(block_size=32768, rope_base=500000),
}  # fmt: skip

WEIGHTS = {key: value for key, value in llama.WEIGHTS.items() if not key.endswith("_proj")} | {
    "model.layers.{}.self_attn.qkv_proj": (
        "stacked", "transformer.h.{}.attn.q", "transformer.h.{}.attn.k", "transformer.h.{}.attn.v"
    ),
    "model.layers.{}.self_attn.o_proj": "transformer.h.{}.attn.proj",
    "model.layers.{}.mlp.gate_up_proj": ("stacked", "transformer.h.{}.mlp.fc_1", "transformer.h.{}.mlp.fc_2"),
    "model.layers.{}.mlp.down_proj": "transformer.h.{}.mlp.proj",
}  # fmt: skip


def from_hf(hf: dict[str, Any]) -> dict[str, Any]:
    return usual(hf) | sliding(hf)
