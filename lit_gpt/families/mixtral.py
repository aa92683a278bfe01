"""Mixtral: Mistral with a mixture of experts."""

from typing import Any

from lit_gpt.families import common_settings, llama

MODEL_TYPES = ("mixtral",)

MIXTRAL = dict(
    mlp="LLaMAMoE", n_expert=8, n_expert_per_token=2, n_layer=32, n_head=32, n_query_groups=8, n_embd=4096,
    intermediate_size=14336, vocab_size=32000, block_size=32768, norm_eps=1e-5, rope_base=1000000.0,
)  # fmt: skip
SIZE_22B = dict(n_layer=56, n_head=48, n_embd=6144, intermediate_size=16384, block_size=65536)
MODELS: dict[str, dict[str, Any]] = {
    "mistralai/Mixtral-8x7B-v0.1": MIXTRAL,
    "mistralai/Mixtral-8x7B-Instruct-v0.1": MIXTRAL,
    "mistralai/Mixtral-8x22B-v0.1": MIXTRAL | SIZE_22B,
    "mistralai/Mixtral-8x22B-Instruct-v0.1": MIXTRAL | SIZE_22B | dict(vocab_size=32768),
}  # fmt: skip

WEIGHTS = {name: ours for name, ours in llama.WEIGHTS.items() if ".mlp." not in name} | {
    "model.layers.{}.block_sparse_moe.gate": "transformer.h.{}.mlp.gate",
    "model.layers.{}.block_sparse_moe.experts.{}.w1": "transformer.h.{}.mlp.experts.{}.fc_1",
    "model.layers.{}.block_sparse_moe.experts.{}.w3": "transformer.h.{}.mlp.experts.{}.fc_2",
    "model.layers.{}.block_sparse_moe.experts.{}.w2": "transformer.h.{}.mlp.experts.{}.proj",
}


LEFT_OUT = {
    "mixtral": dict(
        num_key_value_heads=8, max_position_embeddings=131072, rms_norm_eps=1e-5, rope_theta=1000000.0,
        sliding_window=None, num_local_experts=8, num_experts_per_tok=2,
    )
}  # fmt: skip
ALIASES = {"mixtral": {"num_experts": "num_local_experts"}}


def from_hf(hf: dict[str, Any]) -> dict[str, Any]:
    experts = dict(n_expert=hf["num_local_experts"], n_expert_per_token=hf["num_experts_per_tok"])
    return common_settings(hf) | dict(sliding_window=hf["sliding_window"]) | experts | dict(mlp="LLaMAMoE")
