"""Tiny random models of every family, as transformers saves them, and LoRA on them."""

import copy
from pathlib import Path
from typing import Any

import torch

from lit_gpt.checkpoint.load import load_model
from lit_gpt.lora import LoRA, apply_lora, lora_filter
from lit_gpt.model.gpt import GPT

COMMON: dict[str, Any] = dict(
    vocab_size=97, hidden_size=48, intermediate_size=64, num_hidden_layers=3, num_attention_heads=6,
    num_key_value_heads=2, max_position_embeddings=128, bos_token_id=None, eos_token_id=None, pad_token_id=None,
)  # fmt: skip
NEOX = {key: value for key, value in COMMON.items() if key != "num_key_value_heads"}
GPT2 = dict(vocab_size=97, n_embd=48, n_layer=3, n_head=6, n_positions=128, bos_token_id=None, eos_token_id=None)
DYNAMIC = dict(rope_type="dynamic", rope_theta=700.0, factor=4.0)
YARN = dict(rope_type="yarn", rope_theta=700.0, factor=4.0, original_max_position_embeddings=32)
LONGROPE = dict(
    rope_type="longrope", rope_theta=700.0, original_max_position_embeddings=64, short_factor=[1.0, 1.1, 1.3, 2.0],
    long_factor=[1.0, 2.0, 4.0, 9.0],
)  # fmt: skip
WINDOWS = ["full_attention", "sliding_attention", "full_attention"]


CASES: dict[str, tuple[str, dict[str, Any]]] = {  # (transformers' class, what its config says)
    "llama": ("Llama", COMMON),
    "llama, dynamic": ("Llama", COMMON | dict(max_position_embeddings=40, rope_parameters=DYNAMIC)),
    "llama, yarn": ("Llama", COMMON | dict(rope_parameters=YARN)),
    "llama, yarn with its settings": ("Llama", COMMON | dict(
        rope_parameters=YARN | dict(beta_fast=16, beta_slow=2, truncate=False, mscale=0.7, mscale_all_dim=0.9)
    )),
    "mistral": ("Mistral", COMMON | dict(sliding_window=20, head_dim=16)),
    "mistral, yarn": ("Mistral", COMMON | dict(sliding_window=None, rope_parameters=YARN)),
    "mistral, no window": ("Mistral", COMMON | dict(sliding_window=None)),
    "mixtral": ("Mixtral", COMMON | dict(num_local_experts=5, num_experts_per_tok=2)),
    "qwen2": ("Qwen2", COMMON | dict(tie_word_embeddings=True)),
    "qwen2, windows": ("Qwen2", COMMON | dict(use_sliding_window=True, sliding_window=20, max_window_layers=1)),
    "mixtral, windows": ("Mixtral", COMMON | dict(num_local_experts=4, num_experts_per_tok=2, sliding_window=20)),
    "qwen2, yarn": ("Qwen2", COMMON | dict(rope_parameters=YARN, max_position_embeddings=32)),
    "qwen3, windows": ("Qwen3", COMMON | dict(use_sliding_window=True, sliding_window=20, max_window_layers=1)),
    "qwen3": ("Qwen3", COMMON | dict(head_dim=16)),
    "qwen3_moe": ("Qwen3Moe", COMMON | dict(
        head_dim=16, num_experts=6, num_experts_per_tok=2, moe_intermediate_size=24, norm_topk_prob=True,
        mlp_only_layers=[1],
    )),
    "qwen3_moe, not renormalized": ("Qwen3Moe", COMMON | dict(
        head_dim=16, num_experts=6, num_experts_per_tok=3, moe_intermediate_size=24, decoder_sparse_step=2
    )),
    "gemma": ("Gemma", COMMON | dict(head_dim=16)),
    "gemma2": ("Gemma2", COMMON | dict(
        head_dim=16, query_pre_attn_scalar=11, sliding_window=20, attn_logit_softcapping=2.0,
        final_logit_softcapping=3.0,
    )),
    "gemma3_text": ("Gemma3Text", COMMON | dict(
        head_dim=16, query_pre_attn_scalar=11, sliding_window=20, layer_types=WINDOWS[::-1],
        rope_parameters=dict(
            full_attention=dict(rope_type="linear", factor=3.0, rope_theta=7000.0),
            sliding_attention=dict(rope_type="default", rope_theta=70.0),
        ),
    )),
    "gemma3_text, caps": ("Gemma3Text", COMMON | dict(
        head_dim=16, sliding_window=20, final_logit_softcapping=3.0, attn_logit_softcapping=2.0
    )),
    "phi": ("Phi", NEOX),
    "phi, norms": ("Phi", NEOX | dict(qk_layernorm=True)),
    "phi3": ("Phi3", COMMON | dict(sliding_window=20)),
    "phi3, longrope": ("Phi3", COMMON | dict(
        original_max_position_embeddings=64, rope_parameters=LONGROPE, sliding_window=None
    )),
    "phi3, longrope of a part": ("Phi3", COMMON | dict(
        original_max_position_embeddings=64, sliding_window=None,
        rope_parameters=LONGROPE | dict(
            partial_rotary_factor=0.75, short_factor=[1.0, 1.1, 2.0], long_factor=[1.0, 3.0, 9.0]
        ),
    )),
    "gpt_neox, linear": ("GPTNeoX", NEOX | dict(
        rope_parameters=dict(rope_type="linear", factor=3.0, rope_theta=700.0, partial_rotary_factor=0.5)
    )),
    "gpt_neox, dynamic": ("GPTNeoX", NEOX | dict(
        max_position_embeddings=40, rope_parameters=DYNAMIC | dict(partial_rotary_factor=0.5)
    )),
    "gpt_neox": ("GPTNeoX", NEOX | dict(
        rope_parameters=dict(rope_type="default", rope_theta=700.0, partial_rotary_factor=0.25)
    )),
    "gpt_neox, one after the other": ("GPTNeoX", NEOX | dict(use_parallel_residual=False, tie_word_embeddings=True)),
    "gpt_neox, no biases": ("GPTNeoX", NEOX | dict(attention_bias=False)),
    "falcon 7b": ("Falcon", NEOX),
    "falcon, dynamic": ("Falcon", NEOX | dict(max_position_embeddings=40, rope_parameters=DYNAMIC)),
    "falcon 40b": ("Falcon", NEOX | dict(new_decoder_architecture=True, num_kv_heads=2, bias=True)),
    "falcon, one norm": ("Falcon", NEOX | dict(
        new_decoder_architecture=True, num_kv_heads=2, num_ln_in_parallel_attn=1, ffn_hidden_size=80
    )),
    "falcon, one after the other": ("Falcon", NEOX | dict(
        parallel_attn=False, multi_query=False, tie_word_embeddings=False
    )),
    "gpt2": ("GPT2", GPT2),
    "gpt2, other": ("GPT2", GPT2 | dict(n_inner=80, activation_function="relu", scale_attn_weights=False)),
    "gpt2, scaled by layer": ("GPT2", GPT2 | dict(scale_attn_by_inverse_layer_idx=True)),
    "stablelm": ("StableLm", COMMON | dict(use_qkv_bias=True)),
    "stablelm, dynamic": ("StableLm", COMMON | dict(
        max_position_embeddings=40, rope_parameters=DYNAMIC | dict(partial_rotary_factor=0.5)
    )),
    "stablelm 2 12b": ("StableLm", COMMON | dict(qk_layernorm=True, use_parallel_residual=True)),
    "olmo": ("Olmo", COMMON),
    "olmo, clipped": ("Olmo", COMMON | dict(clip_qkv=0.5)),
    "olmo2": ("Olmo2", COMMON),
    "olmo2, tied": ("Olmo2", COMMON | dict(tie_word_embeddings=True, attention_bias=True)),
    "granite": ("Granite", COMMON | dict(
        embedding_multiplier=3.0, residual_multiplier=0.3, attention_multiplier=0.2, logits_scaling=4.0
    )),
    "granite, tied": ("Granite", COMMON | dict(
        tie_word_embeddings=True, attention_bias=True, mlp_bias=True, logits_scaling=2.0
    )),
    "starcoder2": ("Starcoder2", COMMON | dict(use_bias=True, sliding_window=20)),
    "starcoder2, no biases": ("Starcoder2", COMMON | dict(
        use_bias=False, sliding_window=None, tie_word_embeddings=False
    )),
    "smollm3": ("SmolLM3", COMMON | dict(no_rope_layer_interval=2)),
    "smollm3, windows": ("SmolLM3", COMMON | dict(use_sliding_window=True, sliding_window=20, layer_types=WINDOWS)),
}  # fmt: skip


def make(folder: Path, kind: str, settings: dict[str, Any]) -> Path:
    """A model whose every parameter is random, as transformers saves it."""
    import transformers

    config = getattr(transformers, f"{kind}Config")(**copy.deepcopy(settings))  # it writes into rope_parameters
    class_name = "GPT2LMHeadModel" if kind == "GPT2" else f"{kind.removesuffix('Text')}ForCausalLM"
    model = getattr(transformers, class_name)(config)
    generator = torch.Generator().manual_seed(0)
    for param in model.parameters():
        torch.nn.init.normal_(param, mean=float(param.dim() == 1), std=0.2, generator=generator)
    model.save_pretrained(folder)
    return folder


def tokens(*shape: int) -> torch.Tensor:
    """Random ids, always the same."""
    return torch.randint(0, 97, shape, generator=torch.Generator().manual_seed(1))


def trained(folder: Path, lora: LoRA) -> GPT:
    """A model with LoRA that is not zero, as if it had been trained."""
    model = load_model(folder)
    torch.manual_seed(0)
    apply_lora(model, lora)
    for name, param in model.named_parameters():
        if lora_filter(name):
            param.data += 0.2 * torch.randn_like(param)
    return model


def weights_of(model: GPT) -> dict[str, torch.Tensor]:
    """The LoRA weights, as a run would save them."""
    return {name: value for name, value in model.state_dict().items() if lora_filter(name)}
