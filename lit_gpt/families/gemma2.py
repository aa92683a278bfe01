"""Gemma 2 (soft-capped scores and logits) and the text model of Gemma 3 (norms on q and k, two rotary bases)."""

from typing import Any

from lit_gpt.errors import InputError
from lit_gpt.families import gemma, llama, position_settings, series, window_settings

MODEL_TYPES = ("gemma2", "gemma3_text", "gemma3")

GEMMA_2 = gemma.GEMMA | dict(
    block="sandwich", sliding_window=4096, attn_softcap=50.0, final_softcap=30.0, attn_scale=256**-0.5
)
GEMMA_3 = gemma.GEMMA | dict(
    block="sandwich", qk_norm="per_head", vocab_size=262144, block_size=32768, rope_base=1000000.0,
    rope_local_base=10000.0, sliding_window=512, attn_scale=256**-0.5,
)  # fmt: skip


def sized(settings: dict[str, Any], every: int) -> dict[str, Any]:
    """Adds what follows from the sizes. All layers but each `every`th have a sliding window."""
    return settings | dict(
        embedding_scale=settings["n_embd"] ** 0.5,
        sliding_layers=[i for i in range(settings["n_layer"]) if (i + 1) % every],
    )


SIZE_2B = dict(n_layer=26, n_head=8, n_query_groups=4, n_embd=2304, intermediate_size=9216)
SIZE_9B = dict(n_layer=42, n_head=16, n_query_groups=8, n_embd=3584, intermediate_size=14336)
SIZE_27B = dict(
    n_layer=46, n_head=32, n_query_groups=16, n_embd=4608, intermediate_size=36864, head_size=128, attn_scale=144**-0.5
)  # fmt: skip
SIZES_2 = {
    "2b": sized(GEMMA_2 | SIZE_2B, every=2),
    "9b": sized(GEMMA_2 | SIZE_9B, every=2),
    "27b": sized(GEMMA_2 | SIZE_27B, every=2),
}
SIZE_270M = dict(n_layer=18, n_head=4, n_query_groups=1, n_embd=640, intermediate_size=2048)
SIZE_1B = dict(n_layer=26, n_head=4, n_query_groups=1, n_embd=1152, intermediate_size=6912)
GEMMA_3_270M = sized(GEMMA_3 | SIZE_270M, every=6)
GEMMA_3_1B = sized(GEMMA_3 | SIZE_1B, every=6)
MODELS: dict[str, dict[str, Any]] = {
    **series("google/gemma-2-{size}{kind}", SIZES_2, ("", "-it")),
    "google/gemma-3-270m": GEMMA_3_270M,
    "google/gemma-3-270m-it": GEMMA_3_270M,
    "google/gemma-3-1b-pt": GEMMA_3_1B,
    "google/gemma-3-1b-it": GEMMA_3_1B,
}

WEIGHTS = llama.WEIGHTS | {
    "model.layers.{}.post_attention_layernorm": "transformer.h.{}.post_norm_1",
    "model.layers.{}.pre_feedforward_layernorm": "transformer.h.{}.norm_2",
    "model.layers.{}.post_feedforward_layernorm": "transformer.h.{}.post_norm_2",
    "model.layers.{}.self_attn.q_norm": "transformer.h.{}.attn.norm_q.norm",
    "model.layers.{}.self_attn.k_norm": "transformer.h.{}.attn.norm_k.norm",
}


def from_hf(hf: dict[str, Any]) -> dict[str, Any]:
    if hf["model_type"] == "gemma3":
        raise InputError(
            "this Gemma 3 also reads images. Only those of text alone can be used: 270m, 1b, and what says model_type"
            " gemma3_text."
        )
    if hf.get("use_bidirectional_attention"):
        raise InputError("use_bidirectional_attention is not known: this model reads from left to right.")
    is_third = hf["model_type"] == "gemma3_text"

    # which layers have a sliding window
    every = hf.get("sliding_window_pattern", 6) if is_third else 2
    n_layer = hf["num_hidden_layers"]
    pattern = ["sliding_attention" if (i + 1) % every else "full_attention" for i in range(n_layer)]
    windows = window_settings({"sliding_window": 4096} | hf | {"layer_types": hf.get("layer_types") or pattern})

    # what both have in common; the rotary parameters of the third are read below
    without_rope = {key: value for key, value in hf.items() if key != "rope_parameters"}
    settings = gemma.from_hf(without_rope if is_third else hf) | windows
    settings |= dict(block="sandwich", attn_scale=hf.get("query_pre_attn_scalar", 256) ** -0.5)
    if not is_third:
        return settings | dict(
            attn_softcap=hf.get("attn_logit_softcapping", 50.0), final_softcap=hf.get("final_logit_softcapping", 30.0)
        )

    # two rotary bases: transformers 5 has parameters for each kind of layer, 4 a second key
    by_layer_type = hf.get("rope_parameters") or {}
    if "full_attention" in by_layer_type:
        settings |= position_settings({"rope_parameters": by_layer_type["full_attention"]}, settings["block_size"])
        settings["rope_local_base"] = by_layer_type["sliding_attention"]["rope_theta"]
    else:
        settings |= position_settings({"rope_theta": 1000000.0} | hf, hf["max_position_embeddings"])
        settings["rope_local_base"] = hf.get("rope_local_base_freq", 10000.0)
    # attn_logit_softcapping is in its config.json too; transformers does not apply it there
    return settings | dict(qk_norm="per_head", final_softcap=hf.get("final_logit_softcapping"))
