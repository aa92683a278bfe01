"""Falcon: 7B has one head of keys and values and one norm, 40B and 180B have groups and two norms."""

from typing import Any

from lit_gpt.errors import InputError
from lit_gpt.families import check_head_dim, common_settings

MODEL_TYPES = ("falcon", "RefinedWeb", "RefinedWebModel")

FALCON = dict(
    norm="LayerNorm", norm_eps=1e-5, mlp="GptNeoxMLP", activation="gelu", vocab_size=65024, block_size=2048,
    head_size=64,
)  # fmt: skip
SIZES = {
    "7b": dict(block="shared_norm", n_layer=32, n_head=71, n_query_groups=1, n_embd=4544, tie_embeddings=True),
    "40b": dict(block="parallel", n_layer=60, n_head=128, n_query_groups=8, n_embd=8192, tie_embeddings=True),
    "180B": dict(block="parallel", n_layer=80, n_head=232, n_query_groups=8, n_embd=14848, tie_embeddings=True),
}
MODELS: dict[str, dict[str, Any]] = {
    "tiiuae/falcon-7b": FALCON | SIZES["7b"],
    "tiiuae/falcon-7b-instruct": FALCON | SIZES["7b"],
    "tiiuae/falcon-40b": FALCON | SIZES["40b"],
    "tiiuae/falcon-40b-instruct": FALCON | SIZES["40b"],
    "tiiuae/falcon-180B": FALCON | SIZES["180B"],
    "tiiuae/falcon-180B-chat": FALCON | SIZES["180B"],
}

PREFIX = "transformer."
WEIGHTS = {
    "transformer.word_embeddings": "transformer.wte",
    "transformer.h.{}.input_layernorm": "transformer.h.{}.norm_1",
    "transformer.h.{}.self_attention.query_key_value": (
        "grouped", "transformer.h.{}.attn.q", "transformer.h.{}.attn.k", "transformer.h.{}.attn.v"
    ),
    "transformer.h.{}.self_attention.dense": "transformer.h.{}.attn.proj",
    "transformer.h.{}.post_attention_layernorm": "transformer.h.{}.norm_2",
    "transformer.h.{}.mlp.dense_h_to_4h": "transformer.h.{}.mlp.fc",
    "transformer.h.{}.mlp.dense_4h_to_h": "transformer.h.{}.mlp.proj",
    "transformer.ln_f": "transformer.ln_f",
    "lm_head": "lm_head",
}  # fmt: skip
TWO_NORMS = {
    "transformer.h.{}.input_layernorm": "transformer.h.{}.ln_attn",
    "transformer.h.{}.post_attention_layernorm": "transformer.h.{}.ln_mlp",
}

LEFT_OUT = {
    "falcon": dict(
        activation="gelu", layer_norm_epsilon=1e-5, tie_word_embeddings=True, bias=False, alibi=False,
        new_decoder_architecture=False, multi_query=True, parallel_attn=True, num_kv_heads=None,
        num_ln_in_parallel_attn=None, ffn_hidden_size=None,
    )
}  # fmt: skip
ALIASES = {"falcon": {"n_embed": "hidden_size"}}

# before transformers knew Falcon, its model_type was RefinedWebModel (7B) or RefinedWeb (40B)
RENAMED_KEYS = {"n_layer": "num_hidden_layers", "n_head": "num_attention_heads", "n_head_kv": "num_kv_heads"}
ADDED_KEYS = {"model_type": "falcon", "architectures": ["FalconForCausalLM"]}
FORMER_MODEL_TYPES = {
    "RefinedWebModel": (RENAMED_KEYS, ADDED_KEYS),
    "RefinedWeb": (RENAMED_KEYS, ADDED_KEYS | {"new_decoder_architecture": True}),
}


def weights(config: Any) -> dict[str, Any]:
    """WEIGHTS, with other names for the two norms of a block that has two."""
    if config.block != "parallel":
        return WEIGHTS
    return {TWO_NORMS.get(name, name): ours for name, ours in WEIGHTS.items()}


def from_hf(hf: dict[str, Any]) -> dict[str, Any]:
    if hf["alibi"]:
        raise InputError("alibi is not known: of Falcon's models only those with rotary positions can be used.")
    check_head_dim(hf)
    is_new = hf["new_decoder_architecture"]  # that of 40B and 180B
    bias = hf["bias"]

    # how many heads of keys and values
    groups = 1 if hf["multi_query"] else None
    if is_new:
        groups = hf["num_kv_heads"]

    # one norm or two, side by side or one after the other
    n_norms = hf["num_ln_in_parallel_attn"] or (2 if is_new else 1)
    if not hf["parallel_attn"]:
        block = "sequential"
    elif n_norms == 2:
        block = "parallel"
    else:
        block = "shared_norm"
    if block == ("sequential" if is_new else "parallel"):
        said = f"new_decoder_architecture is {is_new}, parallel_attn {hf['parallel_attn']}"
        raise InputError(f"{said} and num_ln_in_parallel_attn {n_norms}: there is no such Falcon.")

    own_names = {
        "num_key_value_heads": groups,
        "head_dim": None,
        "hidden_act": hf["activation"],
        "intermediate_size": hf["ffn_hidden_size"],
    }
    return common_settings(hf | own_names, "layer_norm_epsilon") | dict(
        block=block,
        norm="LayerNorm",
        mlp="GptNeoxMLP",
        attn_bias=bias,
        proj_bias=bias,
        mlp_bias=bias,
    )
