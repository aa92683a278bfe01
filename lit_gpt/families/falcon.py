"""Falcon: 7B has one head of keys and values and one norm, 40B and 180B have groups and two norms."""

from typing import Any

from lit_gpt.errors import InputError
from lit_gpt.families import activation, positions

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
    f"tiiuae/falcon-{size}{chat}": FALCON | sizes
    for size, sizes in SIZES.items()
    for chat in ("", "-chat" if size == "180B" else "-instruct")
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

# before transformers knew Falcon: names in config.json that have others now, and what it has to say besides
NAMES = {"n_layer": "num_hidden_layers", "n_head": "num_attention_heads", "n_head_kv": "num_kv_heads"}
NOW = {"model_type": "falcon", "architectures": ["FalconForCausalLM"]}
OLD = {"RefinedWebModel": (NAMES, NOW), "RefinedWeb": (NAMES, NOW | {"new_decoder_architecture": True})}


def weights(config: Any) -> dict[str, Any]:
    """Two norms side by side have names of their own."""
    if config.block != "parallel":
        return WEIGHTS
    return {TWO_NORMS.get(theirs, theirs): ours for theirs, ours in WEIGHTS.items()}


def from_hf(hf: dict[str, Any]) -> dict[str, Any]:
    hf = {"num_hidden_layers": hf.get("n_layer"), "num_attention_heads": hf.get("n_head")} | hf  # RefinedWeb's names
    if hf.get("alibi"):
        raise InputError("alibi is not known: of Falcon's models only those with rotary positions can be used.")
    new = hf.get("new_decoder_architecture", hf["model_type"] == "RefinedWeb")
    heads = hf["num_attention_heads"]
    groups = hf.get("num_kv_heads") or hf.get("n_head_kv") or heads
    two_norms = new and hf.get("num_ln_in_parallel_attn") != 1
    block = "sequential" if not hf.get("parallel_attn", True) else "parallel" if two_norms else "shared_norm"
    bias = hf.get("bias", False)
    return positions(hf, hf.get("max_position_embeddings", 2048)) | dict(
        block=block,
        norm="LayerNorm",
        norm_eps=hf.get("layer_norm_epsilon", 1e-5),
        mlp="GptNeoxMLP",
        activation=activation(hf.get("activation", "gelu")),
        n_layer=hf["num_hidden_layers"],
        n_head=heads,
        n_query_groups=groups if new else 1 if hf.get("multi_query", True) else heads,
        n_embd=hf["hidden_size"],
        intermediate_size=hf.get("ffn_hidden_size"),
        vocab_size=hf["vocab_size"],
        attn_bias=bias,
        proj_bias=bias,
        mlp_bias=bias,
        tie_embeddings=hf.get("tie_word_embeddings", True),
    )
