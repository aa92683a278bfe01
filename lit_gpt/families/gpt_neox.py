"""GPT-NeoX and what shares its layout: Pythia, Dolly 2, RedPajama-INCITE, StableLM-alpha, StableCode-alpha."""

from typing import Any

from lit_gpt.families import check_head_dim, common_settings, series

MODEL_TYPES = ("gpt_neox",)

NEOX = dict(
    block="parallel", norm="LayerNorm", norm_eps=1e-5, mlp="GptNeoxMLP", activation="gelu", attn_bias=True,
    proj_bias=True, mlp_bias=True, vocab_size=50304, block_size=2048, rotary_percentage=0.25,
)  # fmt: skip
TINY_PYTHIA = {  # without a twin that was trained on deduplicated text
    "14m": NEOX | dict(n_layer=6, n_head=4, n_embd=128),
    "31m": NEOX | dict(n_layer=6, n_head=8, n_embd=256),
}
PYTHIA = {
    "70m": NEOX | dict(n_layer=6, n_head=8, n_embd=512),
    "160m": NEOX | dict(n_layer=12, n_head=12, n_embd=768),
    "410m": NEOX | dict(n_layer=24, n_head=16, n_embd=1024),
    "1b": NEOX | dict(n_layer=16, n_head=8, n_embd=2048),
    "1.4b": NEOX | dict(n_layer=24, n_head=16, n_embd=2048),
    "2.8b": NEOX | dict(n_layer=32, n_head=32, n_embd=2560),
    "6.9b": NEOX | dict(n_layer=32, n_head=32, n_embd=4096, vocab_size=50432),
    "12b": NEOX | dict(n_layer=36, n_head=40, n_embd=5120, vocab_size=50688),
}
REDPAJAMA = NEOX | dict(block="sequential", vocab_size=50432, rotary_percentage=1.0)
RED_3B = dict(n_layer=32, n_head=32, n_embd=2560)
RED_7B = dict(n_layer=32, n_head=32, n_embd=4096)
STABLELM = NEOX | dict(vocab_size=50432, block_size=4096)
STABLE_3B = dict(n_layer=16, n_head=32, n_embd=4096)
STABLE_7B = dict(n_layer=16, n_head=48, n_embd=6144)
STABLECODE = NEOX | dict(vocab_size=49152, n_layer=32, n_head=32, n_embd=2560)
MODELS: dict[str, dict[str, Any]] = {
    **series("EleutherAI/pythia-{size}", TINY_PYTHIA),
    **series("EleutherAI/pythia-{size}", PYTHIA),
    **series("EleutherAI/pythia-{size}-deduped", PYTHIA),
    "EleutherAI/gpt-neox-20b": NEOX | dict(n_layer=44, n_head=64, n_embd=6144, vocab_size=50432),
    "databricks/dolly-v2-3b": PYTHIA["2.8b"] | dict(vocab_size=50280),
    "databricks/dolly-v2-7b": PYTHIA["6.9b"] | dict(vocab_size=50280),
    "databricks/dolly-v2-12b": PYTHIA["12b"] | dict(vocab_size=50280),
    "togethercomputer/RedPajama-INCITE-Base-3B-v1": REDPAJAMA | RED_3B,
    "togethercomputer/RedPajama-INCITE-Chat-3B-v1": REDPAJAMA | RED_3B,
    "togethercomputer/RedPajama-INCITE-Instruct-3B-v1": REDPAJAMA | RED_3B,
    "togethercomputer/RedPajama-INCITE-7B-Base": REDPAJAMA | RED_7B,
    "togethercomputer/RedPajama-INCITE-7B-Chat": REDPAJAMA | RED_7B,
    "togethercomputer/RedPajama-INCITE-7B-Instruct": REDPAJAMA | RED_7B,
    "stabilityai/stablelm-base-alpha-3b": STABLELM | STABLE_3B | dict(vocab_size=50688),
    "stabilityai/stablelm-tuned-alpha-3b": STABLELM | STABLE_3B | dict(vocab_size=50688),
    "stabilityai/stablelm-base-alpha-7b": STABLELM | STABLE_7B,
    "stabilityai/stablelm-tuned-alpha-7b": STABLELM | STABLE_7B,
    "stabilityai/stablecode-instruct-alpha-3b": STABLECODE | dict(block_size=4096),
    "stabilityai/stablecode-completion-alpha-3b": STABLECODE | dict(block_size=16384),
    "stabilityai/stablecode-completion-alpha-3b-4k": STABLECODE | dict(block_size=4096),
}

PREFIX = "gpt_neox."
WEIGHTS = {
    "gpt_neox.embed_in": "transformer.wte",
    "gpt_neox.layers.{}.input_layernorm": "transformer.h.{}.norm_1",
    "gpt_neox.layers.{}.attention.query_key_value": (
        "grouped", "transformer.h.{}.attn.q", "transformer.h.{}.attn.k", "transformer.h.{}.attn.v"
    ),
    "gpt_neox.layers.{}.attention.dense": "transformer.h.{}.attn.proj",
    "gpt_neox.layers.{}.post_attention_layernorm": "transformer.h.{}.norm_2",
    "gpt_neox.layers.{}.mlp.dense_h_to_4h": "transformer.h.{}.mlp.fc",
    "gpt_neox.layers.{}.mlp.dense_4h_to_h": "transformer.h.{}.mlp.proj",
    "gpt_neox.final_layer_norm": "transformer.ln_f",
    "embed_out": "lm_head",
}  # fmt: skip
# constants of old exports
IGNORED = (".inv_freq", ".cos_cached", ".sin_cached", "attention.bias", "attention.masked_bias")


# transformers reads neither rope_theta nor partial_rotary_factor here, unless they are in rope_parameters
LEFT_OUT = {
    "gpt_neox": dict(
        hidden_act="gelu", layer_norm_eps=1e-5, attention_bias=True, use_parallel_residual=True, rotary_emb_base=10000,
        rotary_pct=0.25,
    )
}  # fmt: skip


def from_hf(hf: dict[str, Any]) -> dict[str, Any]:
    base_and_share = {"rope_theta": hf["rotary_emb_base"], "partial_rotary_factor": hf["rotary_pct"]}
    heads = {"num_key_value_heads": None, "head_dim": None}
    check_head_dim(hf)
    bias = hf["attention_bias"]
    return common_settings(hf | base_and_share | heads, "layer_norm_eps", rotates_part=True) | dict(
        block="parallel" if hf["use_parallel_residual"] else "sequential",
        norm="LayerNorm",
        mlp="GptNeoxMLP",
        attn_bias=bias,
        proj_bias=bias,
        mlp_bias=True,
    )
