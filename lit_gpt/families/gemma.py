"""Gemma 1: Llama's layout with another norm, scaled embeddings and a head that is the embedding."""

from typing import Any

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


def from_hf(hf: dict[str, Any]) -> dict[str, Any]:
    # the first files say "gelu" and mean its approximation, as does transformers where hidden_activation is missing
    act = hf.get("hidden_activation") or "gelu_pytorch_tanh"
    settings = common_settings(hf | {"hidden_act": act}, tie_word_embeddings=True, rms_norm_eps=1e-6)
    bias = hf.get("attention_bias", False)
    settings |= dict(attn_bias=bias, proj_bias=bias, head_size=hf.get("head_dim", 256))
    return settings | dict(embedding="scaled", norm="GemmaRMSNorm", embedding_scale=hf["hidden_size"] ** 0.5)
