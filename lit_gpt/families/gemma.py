"""Gemma 1: Llama's layout with another norm, scaled embeddings and a head that is the embedding."""

from typing import Any

from lit_gpt.errors import InputError
from lit_gpt.families import common_settings, llama, series

MODEL_TYPES = ("gemma",)

GEMMA = dict(
    embedding="scaled", norm="GemmaRMSNorm", norm_eps=1e-6, activation="gelu_tanh", tie_embeddings=True, head_size=256,
    vocab_size=256000, block_size=8192,
)  # fmt: skip
SIZE_2B = dict(
    n_layer=18, n_head=8, n_query_groups=1, n_embd=2048, intermediate_size=16384, embedding_scale=2048**0.5
)  # fmt: skip
SIZE_7B = dict(n_layer=28, n_head=16, n_embd=3072, intermediate_size=24576, embedding_scale=3072**0.5)
MODELS: dict[str, dict[str, Any]] = series(
    "google/gemma-{size}{kind}", {"2b": GEMMA | SIZE_2B, "7b": GEMMA | SIZE_7B}, ("", "-it")
)

WEIGHTS = llama.WEIGHTS


# transformers reads hidden_act here, and hidden_activation in Gemma 2 and 3
LEFT_OUT = {
    "gemma": dict(
        num_key_value_heads=16, head_dim=256, hidden_act="gelu_pytorch_tanh", max_position_embeddings=8192,
        rms_norm_eps=1e-6, tie_word_embeddings=True, attention_bias=False,
    )
}  # fmt: skip


def from_hf(hf: dict[str, Any]) -> dict[str, Any]:
    if hf.get("use_bidirectional_attention"):
        raise InputError("use_bidirectional_attention is not known: this model reads from left to right.")
    settings = common_settings(hf)
    # the first files say "gelu" and mean its approximation
    if hf["model_type"] == "gemma" and hf["hidden_act"] == "gelu":
        settings["activation"] = "gelu_tanh"
    bias = hf["attention_bias"]
    settings |= dict(attn_bias=bias, proj_bias=bias)
    return settings | dict(embedding="scaled", norm="GemmaRMSNorm", embedding_scale=hf["hidden_size"] ** 0.5)
