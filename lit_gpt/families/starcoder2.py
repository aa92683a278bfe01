"""Starcoder 2: Llama's order, with layer norms, an MLP without a gate, biases everywhere, and a sliding window."""

from typing import Any

from lit_gpt.families import common_settings, llama

MODEL_TYPES = ("starcoder2",)

STARCODER_2 = dict(
    norm="LayerNorm", mlp="GptNeoxMLP", activation="gelu_tanh", attn_bias=True, proj_bias=True, mlp_bias=True,
    norm_eps=1e-5, vocab_size=49152, block_size=16384, sliding_window=4096, tie_embeddings=True,
)  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "bigcode/starcoder2-3b": STARCODER_2 | dict(
        n_layer=30, n_head=24, n_query_groups=2, n_embd=3072, intermediate_size=12288, rope_base=999999.4420358813
    ),
    "bigcode/starcoder2-7b": STARCODER_2 | dict(
        n_layer=32, n_head=36, n_query_groups=4, n_embd=4608, intermediate_size=18432, rope_base=1000000
    ),
    "bigcode/starcoder2-15b": STARCODER_2 | dict(
        n_layer=40, n_head=48, n_query_groups=4, n_embd=6144, intermediate_size=24576, rope_base=100000,
        tie_embeddings=False,
    ),
}  # fmt: skip

WEIGHTS = {name: ours for name, ours in llama.WEIGHTS.items() if ".mlp." not in name} | {
    "model.layers.{}.mlp.c_fc": "transformer.h.{}.mlp.fc",
    "model.layers.{}.mlp.c_proj": "transformer.h.{}.mlp.proj",
}


LEFT_OUT = {
    "starcoder2": dict(
        num_key_value_heads=2, hidden_act="gelu_pytorch_tanh", max_position_embeddings=4096, norm_epsilon=1e-5,
        sliding_window=None, use_bias=True, tie_word_embeddings=True,
    )
}  # fmt: skip


def from_hf(hf: dict[str, Any]) -> dict[str, Any]:
    bias = hf["use_bias"]
    return common_settings(hf, "norm_epsilon") | dict(
        norm="LayerNorm",
        mlp="GptNeoxMLP",
        sliding_window=hf["sliding_window"],
        attn_bias=bias,
        proj_bias=bias,
        mlp_bias=bias,
    )
