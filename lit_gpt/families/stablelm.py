"""StableLM 3B and 2: Llama's layout with LayerNorm, and only a quarter of each head rotated."""

from typing import Any

from lit_gpt.families import check_head_dim, common_settings, llama

MODEL_TYPES = ("stablelm", "stablelm_epoch")

STABLELM = dict(norm="LayerNorm", norm_eps=1e-5, rotary_percentage=0.25, block_size=4096)
STABLELM_2 = STABLELM | dict(vocab_size=100352)
SIZE_1_6B = dict(n_layer=24, n_head=32, n_embd=2048, intermediate_size=5632, attn_bias=True)
SIZE_12B = dict(
    n_layer=40, n_head=32, n_query_groups=8, n_embd=5120, intermediate_size=13824, block="shared_norm",
    qk_norm="each_head",
)  # fmt: skip
SIZE_3B = dict(n_layer=32, n_head=32, n_embd=2560, intermediate_size=6912, vocab_size=50304)
MODELS: dict[str, dict[str, Any]] = {
    "stabilityai/stablelm-3b-4e1t": STABLELM | SIZE_3B,
    "stabilityai/stablelm-zephyr-3b": STABLELM | SIZE_3B,
    "stabilityai/stable-code-3b": STABLELM | SIZE_3B | dict(block_size=16384, rope_base=1000000),
    "stabilityai/stablelm-2-1_6b": STABLELM_2 | SIZE_1_6B,
    "stabilityai/stablelm-2-zephyr-1_6b": STABLELM_2 | SIZE_1_6B,
    "stabilityai/stablelm-2-12b": STABLELM_2 | SIZE_12B,
    "stabilityai/stablelm-2-12b-chat": STABLELM_2 | SIZE_12B,
}

WEIGHTS = llama.WEIGHTS | {
    "model.layers.{}.self_attn.q_layernorm.norms.{}": "transformer.h.{}.attn.norm_q.norms.{}",
    "model.layers.{}.self_attn.k_layernorm.norms.{}": "transformer.h.{}.attn.norm_k.norms.{}",
}

# before transformers knew StableLM
FORMER_MODEL_TYPES = {
    "stablelm_epoch": (
        {"rope_pct": "partial_rotary_factor", "norm_eps": "layer_norm_eps"},
        {"model_type": "stablelm", "architectures": ["StableLmForCausalLM"]},
    )
}


LEFT_OUT = {
    "stablelm": dict(
        num_key_value_heads=32, max_position_embeddings=4096, layer_norm_eps=1e-5, partial_rotary_factor=0.25,
        use_qkv_bias=False, qk_layernorm=False, use_parallel_residual=False,
    )
}  # fmt: skip


def from_hf(hf: dict[str, Any]) -> dict[str, Any]:
    check_head_dim(hf)
    return common_settings(hf, "layer_norm_eps", rotates_part=True) | dict(
        norm="LayerNorm",
        block="shared_norm" if hf["use_parallel_residual"] else "sequential",
        qk_norm="each_head" if hf["qk_layernorm"] else None,
        attn_bias=hf["use_qkv_bias"],
    )
