"""GPT-2: learned positions, and weights that are kept as (in, out)."""

from typing import Any

from lit_gpt.errors import InputError
from lit_gpt.families import activation

MODEL_TYPES = ("gpt2",)

GPT_2 = dict(
    embedding="positions", norm="LayerNorm", norm_eps=1e-5, mlp="GptNeoxMLP", activation="gelu_tanh", attn_bias=True,
    proj_bias=True, mlp_bias=True, rotary_percentage=0.0, tie_embeddings=True, vocab_size=50257, block_size=1024,
)  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "openai-community/gpt2": GPT_2 | dict(n_layer=12, n_head=12, n_embd=768),
    "openai-community/gpt2-medium": GPT_2 | dict(n_layer=24, n_head=16, n_embd=1024),
    "openai-community/gpt2-large": GPT_2 | dict(n_layer=36, n_head=20, n_embd=1280),
    "openai-community/gpt2-xl": GPT_2 | dict(n_layer=48, n_head=25, n_embd=1600),
    "distilbert/distilgpt2": GPT_2 | dict(n_layer=6, n_head=12, n_embd=768),
}

PREFIX = "transformer."
WEIGHTS = {
    "transformer.wte": "transformer.wte",
    "transformer.wpe": "transformer.wte.positions",
    "transformer.h.{}.ln_1": "transformer.h.{}.norm_1",
    "transformer.h.{}.attn.c_attn": (
        "stacked", "transformer.h.{}.attn.q", "transformer.h.{}.attn.k", "transformer.h.{}.attn.v"
    ),
    "transformer.h.{}.attn.c_proj": "transformer.h.{}.attn.proj",
    "transformer.h.{}.ln_2": "transformer.h.{}.norm_2",
    "transformer.h.{}.mlp.c_fc": "transformer.h.{}.mlp.fc",
    "transformer.h.{}.mlp.c_proj": "transformer.h.{}.mlp.proj",
    "transformer.ln_f": "transformer.ln_f",
    "lm_head": "lm_head",
}  # fmt: skip
TRANSPOSED = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
IGNORED = (".attn.bias", ".attn.masked_bias")  # the causal mask, in old exports


LEFT_OUT = {
    "gpt2": dict(
        n_positions=1024, n_inner=None, activation_function="gelu_new", layer_norm_epsilon=1e-5,
        scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False,
        tie_word_embeddings=True,
    )
}  # fmt: skip
ALIASES = {
    "gpt2": {
        "hidden_size": "n_embd", "max_position_embeddings": "n_positions", "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
    }
}  # fmt: skip


def from_hf(hf: dict[str, Any]) -> dict[str, Any]:
    if hf["add_cross_attention"]:
        raise InputError("add_cross_attention is not known: half of a model that reads one text and writes another.")
    if hf["n_embd"] % hf["n_head"]:
        raise InputError(f"n_embd is {hf['n_embd']}, which n_head, {hf['n_head']}, does not divide.")
    return {key: GPT_2[key] for key in ("embedding", "norm", "mlp", "attn_bias", "proj_bias", "mlp_bias")} | dict(
        rotary_percentage=0.0,
        n_layer=hf["n_layer"],
        n_head=hf["n_head"],
        n_embd=hf["n_embd"],
        intermediate_size=hf["n_inner"],
        vocab_size=hf["vocab_size"],
        block_size=hf["n_positions"],
        norm_eps=hf["layer_norm_epsilon"],
        activation=activation(hf["activation_function"]),
        attn_scale=None if hf["scale_attn_weights"] else 1.0,
        attn_scale_by_layer=hf["scale_attn_by_inverse_layer_idx"],
        tie_embeddings=hf["tie_word_embeddings"],
    )
