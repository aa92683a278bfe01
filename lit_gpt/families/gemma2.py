"""Gemma 2 (soft-capped scores and logits) and the text model of Gemma 3 (norms on q and k, two rotary bases)."""

from typing import Any

from lit_gpt.errors import InputError
from lit_gpt.families import check_kind, gemma, llama, rope_form, series, window_settings

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


COMMON_LEFT_OUT = dict(
    num_key_value_heads=4, head_dim=256, hidden_activation="gelu_pytorch_tanh", rms_norm_eps=1e-6,
    tie_word_embeddings=True, attention_bias=False,
    query_pre_attn_scalar=256, sliding_window=4096, layer_types=None,
)  # fmt: skip
LEFT_OUT = {
    "gemma2": COMMON_LEFT_OUT | dict(
        max_position_embeddings=8192, attn_logit_softcapping=50.0, final_logit_softcapping=30.0
    ),
    "gemma3_text": COMMON_LEFT_OUT | dict(
        max_position_embeddings=131072, final_logit_softcapping=None, sliding_window_pattern=6, rope_theta=1000000.0,
        rope_local_base_freq=10000.0,
    ),
}  # fmt: skip


def from_hf(hf: dict[str, Any]) -> dict[str, Any]:
    if hf["model_type"] == "gemma3":
        raise InputError(
            "this Gemma 3 also reads images. Only those of text alone can be used: 270m, 1b, and what says model_type"
            " gemma3_text."
        )
    is_third = hf["model_type"] == "gemma3_text"
    hf = hf | {"hidden_act": hf["hidden_activation"]}
    local_base: dict[str, Any] = {}
    if is_third:
        global_form, local_base = rope_of_both_kinds(hf)
        # a length at the top is not read there
        hf |= {"rope_parameters": global_form, "rope_scaling": None, "original_max_position_embeddings": None}

    # which layers have a sliding window
    every = hf["sliding_window_pattern"] if is_third else 2
    pattern = ["sliding_attention" if (i + 1) % every else "full_attention" for i in range(hf["num_hidden_layers"])]
    windows = window_settings(hf, hf["sliding_window"], pattern)

    # attn_logit_softcapping is in the third's config.json too; transformers does not apply it there
    settings = gemma.from_hf(hf) | windows | local_base
    settings |= dict(
        block="sandwich",
        attn_scale=hf["query_pre_attn_scalar"] ** -0.5,
        final_softcap=hf["final_logit_softcapping"],
    )
    if is_third:
        return settings | dict(qk_norm="per_head")
    return settings | dict(attn_softcap=hf["attn_logit_softcapping"])


def rope_of_both_kinds(hf: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The rotary parameters of Gemma 3's full layers, and the argument of Config for those with a window.

    transformers 5 writes both into rope_parameters. Before, rope_scaling and rope_theta were for the full layers, and
    rope_local_base_freq for the others.

    Raises:
        InputError: the parameters are of no kind of layer, contradict rope_scaling, or scale the layers with a window.
    """
    hf = hf | {"original_max_position_embeddings": None}  # read within the parameters alone
    if "type" in (hf.get("rope_scaling") or {}):
        raise InputError("rope_scaling of a gemma3_text model has the key 'type', expected 'rope_type'.")
    by_layer_type = hf.get("rope_parameters") or {}
    if by_layer_type and not {"full_attention", "sliding_attention"} & by_layer_type.keys():
        raise InputError("rope_parameters of a gemma3_text model has full_attention and sliding_attention; neither is.")

    # the full layers; in the old place, a base may stand within the scaling
    place = by_layer_type.get("full_attention")
    new = rope_form(hf | {"rope_parameters": place}, "rope_parameters")
    old = rope_form(hf, "rope_scaling")
    if new and old and new != old:
        raise InputError("rope_scaling and rope_parameters contradict each other. Keep one of them.")

    # those with a window
    place = by_layer_type.get("sliding_attention") or {"rope_type": "default"}
    local = rope_form({"rope_theta": hf["rope_local_base_freq"], "rope_parameters": place}, "rope_parameters")
    if local["rope_type"] != "default":
        raise InputError(f"layers with a window have the rotary scaling {local['rope_type']!r}, expected none.")
    check_kind("rope_theta", local["rope_theta"], 1.0)
    return old or new, dict(rope_local_base=local["rope_theta"])
