"""OLMo 1 (norms without weights) and OLMo 2 (norms after, and on q and k)."""

from typing import Any

from lit_gpt.families import common_settings, llama

MODEL_TYPES = ("olmo", "olmo2")

OLMO = dict(norm="LayerNorm_without_weight", norm_eps=1e-5, vocab_size=50304, block_size=2048)
OLMO_2 = dict(
    block="post_norm", qk_norm="all_heads", norm_eps=1e-6, vocab_size=100352, block_size=4096, rope_base=500000
)
SIZE_1B = dict(n_layer=16, n_head=16, n_embd=2048, intermediate_size=8192)
SIZE_7B = dict(n_layer=32, n_head=32, n_embd=4096, intermediate_size=11008)
SIZE_13B = dict(n_layer=40, n_head=40, n_embd=5120, intermediate_size=13824)
SIZE_32B = dict(n_layer=64, n_head=40, n_query_groups=8, n_embd=5120, intermediate_size=27648)
MODELS: dict[str, dict[str, Any]] = {
    "allenai/OLMo-1B-hf": OLMO | SIZE_1B | dict(tie_embeddings=True),
    "allenai/OLMo-7B-hf": OLMO | SIZE_7B,
    "allenai/OLMo-7B-Instruct-hf": OLMO | SIZE_7B,
    "allenai/OLMo-1.7-7B-hf": OLMO | SIZE_7B | dict(block_size=4096, qk_norm="clip", clip_qkv=8.0),
    "allenai/OLMo-2-0425-1B": OLMO_2 | SIZE_1B,
    "allenai/OLMo-2-1124-7B": OLMO_2 | SIZE_7B,
    "allenai/OLMo-2-1124-13B": OLMO_2 | SIZE_13B,
    "allenai/OLMo-2-0325-32B": OLMO_2 | SIZE_32B,
    "allenai/OLMo-2-0425-1B-Instruct": OLMO_2 | SIZE_1B,
    "allenai/OLMo-2-1124-7B-Instruct": OLMO_2 | SIZE_7B,
    "allenai/OLMo-2-1124-13B-Instruct": OLMO_2 | SIZE_13B,
    "allenai/OLMo-2-0325-32B-Instruct": OLMO_2 | SIZE_32B,
}  # fmt: skip

WEIGHTS = llama.WEIGHTS | {
    "model.layers.{}.self_attn.q_norm": "transformer.h.{}.attn.norm_q",
    "model.layers.{}.self_attn.k_norm": "transformer.h.{}.attn.norm_k",
}
NORMS_OF_2 = {
    "model.layers.{}.post_attention_layernorm": "transformer.h.{}.norm_1",
    "model.layers.{}.post_feedforward_layernorm": "transformer.h.{}.norm_2",
}


def weights(config: Any) -> dict[str, Any]:
    """WEIGHTS, but for the norms of OLMo 2: one of Llama's names stands for another norm there."""
    if config.block != "post_norm":
        return WEIGHTS
    return {name: ours for name, ours in WEIGHTS.items() if "layernorm" not in name} | NORMS_OF_2


LEFT_OUT = {"olmo": dict(attention_bias=False, clip_qkv=None), "olmo2": dict(attention_bias=False, rms_norm_eps=1e-5)}


def from_hf(hf: dict[str, Any]) -> dict[str, Any]:
    bias = hf["attention_bias"]
    biases = dict(attn_bias=bias, proj_bias=bias)
    if hf["model_type"] == "olmo2":
        return common_settings(hf) | biases | dict(block="post_norm", qk_norm="all_heads")
    clip = hf["clip_qkv"]
    settings = common_settings(hf | {"norm_eps": OLMO["norm_eps"]}, "norm_eps")  # which is in no config.json of it
    settings |= biases | dict(norm="LayerNorm_without_weight")
    return settings if clip is None else settings | dict(qk_norm="clip", clip_qkv=clip)
