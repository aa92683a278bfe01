"""Granite: Llama with a factor on embeddings, attention, residuals and logits."""

from typing import Any

from lit_gpt.families import llama

MODEL_TYPES = ("granite",)

GRANITE_3 = dict(
    block="scaled", embedding="scaled", embedding_scale=12.0, residual_scale=0.22, norm_eps=1e-5, tie_embeddings=True,
    n_layer=40, n_head=32, n_query_groups=8,
)  # fmt: skip
SIZE_2B = dict(n_embd=2048, intermediate_size=8192, attn_scale=0.015625, logit_scale=1 / 8)
SIZE_8B = dict(n_embd=4096, intermediate_size=12800, attn_scale=0.0078125, logit_scale=1 / 16)
V_3_1 = dict(block_size=131072, rope_base=5000000.0, vocab_size=49155)
MODELS: dict[str, dict[str, Any]] = {
    "ibm-granite/granite-3.1-2b-base": GRANITE_3 | SIZE_2B | V_3_1 | dict(vocab_size=49152),
    "ibm-granite/granite-3.1-2b-instruct": GRANITE_3 | SIZE_2B | V_3_1,
    "ibm-granite/granite-3.1-8b-base": GRANITE_3 | SIZE_8B | V_3_1 | dict(vocab_size=49152),
    "ibm-granite/granite-3.1-8b-instruct": GRANITE_3 | SIZE_8B | V_3_1,
    "ibm-granite/granite-3.3-8b-instruct": GRANITE_3 | SIZE_8B | V_3_1 | dict(rope_base=10000000.0, vocab_size=49159),
}

WEIGHTS = llama.WEIGHTS


LEFT_OUT = {
    "granite": dict(
        rms_norm_eps=1e-6, attention_bias=False, mlp_bias=False, embedding_multiplier=1.0, residual_multiplier=1.0,
        attention_multiplier=1.0, logits_scaling=1.0,
    )
}  # fmt: skip


def from_hf(hf: dict[str, Any]) -> dict[str, Any]:
    return llama.from_hf(hf) | dict(
        block="scaled",
        embedding="scaled",
        embedding_scale=hf["embedding_multiplier"],
        residual_scale=hf["residual_multiplier"],
        attn_scale=hf["attention_multiplier"],
        logit_scale=1 / hf["logits_scaling"],
    )
