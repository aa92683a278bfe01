"""Phi-1, 1.5 and 2: attention and MLP side by side on one norm, biases everywhere, also in the head."""

from typing import Any

from lit_gpt.errors import InputError
from lit_gpt.families import common_settings, llama

MODEL_TYPES = ("phi",)

PHI = dict(
    block="shared_norm", norm="LayerNorm", norm_eps=1e-5, mlp="GptNeoxMLP", activation="gelu_tanh", attn_bias=True,
    proj_bias=True, mlp_bias=True, lm_head_bias=True, vocab_size=51200, block_size=2048, n_head=32,
)  # fmt: skip
PHI_1 = PHI | dict(n_layer=24, n_embd=2048, rotary_percentage=0.5)
MODELS: dict[str, dict[str, Any]] = {
    "microsoft/phi-1": PHI_1,
    "microsoft/phi-1_5": PHI_1,
    "microsoft/phi-2": PHI | dict(n_layer=32, n_embd=2560, rotary_percentage=0.4),
}

LIKE_LLAMA = ("embed_tokens", "input_layernorm", "q_proj", "k_proj", "v_proj", "lm_head")
WEIGHTS = {name: ours for name, ours in llama.WEIGHTS.items() if name.endswith(LIKE_LLAMA)} | {
    "model.layers.{}.self_attn.dense": "transformer.h.{}.attn.proj",
    "model.layers.{}.self_attn.q_layernorm": "transformer.h.{}.attn.norm_q.norm",
    "model.layers.{}.self_attn.k_layernorm": "transformer.h.{}.attn.norm_k.norm",
    "model.layers.{}.mlp.fc1": "transformer.h.{}.mlp.fc",
    "model.layers.{}.mlp.fc2": "transformer.h.{}.mlp.proj",
    "model.final_layernorm": "transformer.ln_f",
}


LEFT_OUT = {
    "phi": dict(hidden_act="gelu_new", layer_norm_eps=1e-5, partial_rotary_factor=0.5, qk_layernorm=False)
}  # fmt: skip


def from_hf(hf: dict[str, Any]) -> dict[str, Any]:
    if "hidden_size" not in hf:
        raise InputError("this is the layout of 2023, with its own code. Download the model's current revision.")
    of_every_phi = ("block", "norm", "mlp", "attn_bias", "proj_bias", "mlp_bias", "lm_head_bias")
    settings = common_settings(hf, "layer_norm_eps", rotates_part=True) | {key: PHI[key] for key in of_every_phi}
    return settings | dict(qk_norm="per_head" if hf["qk_layernorm"] else None)
