"""Llama, and the many models that share its layout: TinyLlama, SmolLM2, CodeLlama, Vicuna, OpenLLaMA, Nous-Hermes."""

from typing import Any

from lit_gpt.families import usual

MODEL_TYPES = ("llama",)

LLAMA_3 = dict(vocab_size=128256, n_query_groups=8, rope_base=500000, norm_eps=1e-5)
LLAMA_3_SCALING = dict(
    rope_type="llama3", low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192
)
MODELS: dict[str, dict[str, Any]] = {
    "HuggingFaceTB/SmolLM2-135M": dict(
        n_layer=30, n_head=9, n_query_groups=3, n_embd=576, intermediate_size=1536, vocab_size=49152, block_size=8192,
        rope_base=100000, norm_eps=1e-5, tie_embeddings=True,
    ),
    "HuggingFaceTB/SmolLM2-360M": dict(
        n_layer=32, n_head=15, n_query_groups=5, n_embd=960, intermediate_size=2560, vocab_size=49152, block_size=8192,
        rope_base=100000, norm_eps=1e-5, tie_embeddings=True,
    ),
    "HuggingFaceTB/SmolLM2-1.7B": dict(
        n_layer=24, n_head=32, n_embd=2048, intermediate_size=8192, vocab_size=49152, block_size=8192,
        rope_base=130000, norm_eps=1e-5, tie_embeddings=True,
    ),
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": dict(
        n_layer=22, n_head=32, n_query_groups=4, n_embd=2048, intermediate_size=5632, vocab_size=32000, block_size=2048,
        norm_eps=1e-5,
    ),
    "meta-llama/Llama-2-7b-hf": dict(
        n_layer=32, n_head=32, n_embd=4096, intermediate_size=11008, vocab_size=32000, block_size=4096, norm_eps=1e-5
    ),
    "meta-llama/Llama-2-13b-hf": dict(
        n_layer=40, n_head=40, n_embd=5120, intermediate_size=13824, vocab_size=32000, block_size=4096, norm_eps=1e-5
    ),
    "meta-llama/Llama-3.2-1B": LLAMA_3 | dict(
        n_layer=16, n_head=32, n_embd=2048, intermediate_size=8192, block_size=131072, tie_embeddings=True,
        rope_scaling=LLAMA_3_SCALING | dict(factor=32.0),
    ),
    "meta-llama/Llama-3.2-3B": LLAMA_3 | dict(
        n_layer=28, n_head=24, n_embd=3072, head_size=128, intermediate_size=8192, block_size=131072,
        tie_embeddings=True, rope_scaling=LLAMA_3_SCALING | dict(factor=32.0),
    ),
    "meta-llama/Llama-3.1-8B": LLAMA_3 | dict(
        n_layer=32, n_head=32, n_embd=4096, intermediate_size=14336, block_size=131072,
        rope_scaling=LLAMA_3_SCALING | dict(factor=8.0),
    ),
}  # fmt: skip

WEIGHTS = {
    "model.embed_tokens": "transformer.wte",
    "model.layers.{}.input_layernorm": "transformer.h.{}.norm_1",
    "model.layers.{}.self_attn.q_proj": "transformer.h.{}.attn.q",
    "model.layers.{}.self_attn.k_proj": "transformer.h.{}.attn.k",
    "model.layers.{}.self_attn.v_proj": "transformer.h.{}.attn.v",
    "model.layers.{}.self_attn.o_proj": "transformer.h.{}.attn.proj",
    "model.layers.{}.post_attention_layernorm": "transformer.h.{}.norm_2",
    "model.layers.{}.mlp.gate_proj": "transformer.h.{}.mlp.fc_1",
    "model.layers.{}.mlp.up_proj": "transformer.h.{}.mlp.fc_2",
    "model.layers.{}.mlp.down_proj": "transformer.h.{}.mlp.proj",
    "model.norm": "transformer.ln_f",
    "lm_head": "lm_head",
}

TRANSPOSED = ()
IGNORED = ("rotary_emb.inv_freq",)  # old exports saved this constant in every layer

# what their config.json does not say: the positions of LongChat's first models are condensed by 8
LONGCHAT = dict(rope_scaling=dict(rope_type="linear", factor=8.0), block_size=16384)
EXCEPTIONS = {"longchat-7b-16k": LONGCHAT, "longchat-13b-16k": LONGCHAT}


def from_hf(hf: dict[str, Any]) -> dict[str, Any]:
    bias = hf.get("attention_bias", False)
    return usual(hf) | dict(attn_bias=bias, proj_bias=bias, mlp_bias=hf.get("mlp_bias", False))
