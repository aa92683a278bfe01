"""Gemma 2 (soft-capped scores and logits) and the text model of Gemma 3 (norms on q and k, two rotary bases)."""

from typing import Any

from lit_gpt.errors import InputError
from lit_gpt.families import gemma, llama, positions, sliding

MODEL_TYPES = ("gemma2", "gemma3_text", "gemma3")

GEMMA_2 = gemma.GEMMA | dict(
    block="sandwich", sliding_window=4096, attn_softcap=50.0, final_softcap=30.0, attn_scale=256**-0.5
)
GEMMA_3 = gemma.GEMMA | dict(
    block="sandwich", qk_norm="per_head", vocab_size=262144, block_size=32768, rope_base=1000000.0,
    rope_local_base=10000.0, sliding_window=512, attn_scale=256**-0.5,
)  # fmt: skip
SIZES_2 = {
    "2b": dict(n_layer=26, n_head=8, n_query_groups=4, n_embd=2304, intermediate_size=9216),
    "9b": dict(n_layer=42, n_head=16, n_query_groups=8, n_embd=3584, intermediate_size=14336),
    "27b": dict(
        n_layer=46, n_head=32, n_query_groups=16, n_embd=4608, intermediate_size=36864, head_size=128,
        attn_scale=144**-0.5,
    ),
}  # fmt: skip
SIZES_3 = {
    "270m": dict(n_layer=18, n_head=4, n_query_groups=1, n_embd=640, intermediate_size=2048),
    "1b": dict(n_layer=26, n_head=4, n_query_groups=1, n_embd=1152, intermediate_size=6912),
}
MODELS: dict[str, dict[str, Any]] = {
    f"google/{name}": common
    | sizes
    | dict(
        embedding_scale=sizes["n_embd"] ** 0.5,
        sliding_layers=[i for i in range(sizes["n_layer"]) if (i + 1) % every],
    )
    for common, every, prefix, table in ((GEMMA_2, 2, "gemma-2-", SIZES_2), (GEMMA_3, 6, "gemma-3-", SIZES_3))
    for size, sizes in table.items()
    for name in (f"{prefix}{size}{'-pt' if size == '1b' else ''}", f"{prefix}{size}-it")
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
    n_layer, third = hf["num_hidden_layers"], hf["model_type"] == "gemma3_text"
    every = hf.get("sliding_window_pattern", 6) if third else 2
    pattern = ["sliding_attention" if (i + 1) % every else "full_attention" for i in range(n_layer)]
    kinds = hf.get("layer_types") or pattern
    single = {key: value for key, value in hf.items() if key != "rope_parameters"} if third else hf
    found = gemma.from_hf(single) | sliding({"sliding_window": 4096} | hf | {"layer_types": kinds})
    found |= dict(block="sandwich", attn_scale=hf.get("query_pre_attn_scalar", 256) ** -0.5)
    if not third:
        return found | dict(
            attn_softcap=hf.get("attn_logit_softcapping", 50.0), final_softcap=hf.get("final_logit_softcapping", 30.0)
        )
    both = hf.get("rope_parameters") or {}  # transformers 5 says it for each kind of layer
    if "full_attention" in both:
        found |= positions({"rope_parameters": both["full_attention"]}, found["block_size"])
        found["rope_local_base"] = both["sliding_attention"]["rope_theta"]
    else:
        found |= positions({"rope_theta": 1000000.0} | hf, hf["max_position_embeddings"])
        found["rope_local_base"] = hf.get("rope_local_base_freq", 10000.0)
    # attn_logit_softcapping is in its config.json too; transformers does not apply it there
    return found | dict(qk_norm="per_head", final_softcap=hf.get("final_logit_softcapping"))
