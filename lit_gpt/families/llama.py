"""Llama, and the many models that share its layout: TinyLlama, SmolLM2, CodeLlama, Vicuna, OpenLLaMA, Nous-Hermes."""

from typing import Any

from lit_gpt.families import common_settings, series

MODEL_TYPES = ("llama",)

SMOL = dict(vocab_size=49152, block_size=8192, rope_base=100000, norm_eps=1e-5, tie_embeddings=True)
SMOL_SIZES = {
    "135M": SMOL | dict(n_layer=30, n_head=9, n_query_groups=3, n_embd=576, intermediate_size=1536),
    "360M": SMOL | dict(n_layer=32, n_head=15, n_query_groups=5, n_embd=960, intermediate_size=2560),
    "1.7B": SMOL | dict(n_layer=24, n_head=32, n_embd=2048, intermediate_size=8192, rope_base=130000),
}
TINY = dict(n_layer=22, n_head=32, n_query_groups=4, n_embd=2048, intermediate_size=5632, block_size=2048)
SIZES = {  # of Llama 1 and 2; the vocabulary of both has 32,000 tokens
    "3b": dict(n_layer=26, n_head=32, n_embd=3200, intermediate_size=8640),  # OpenLLaMA's
    "7b": dict(n_layer=32, n_head=32, n_embd=4096, intermediate_size=11008),
    "13b": dict(n_layer=40, n_head=40, n_embd=5120, intermediate_size=13824),
    "30b": dict(n_layer=60, n_head=52, n_embd=6656, intermediate_size=17920),
    "65b": dict(n_layer=80, n_head=64, n_embd=8192, intermediate_size=22016),
    "34b": dict(n_layer=48, n_head=64, n_query_groups=8, n_embd=8192, intermediate_size=22016),  # Code Llama's
    "70b": dict(n_layer=80, n_head=64, n_query_groups=8, n_embd=8192, intermediate_size=28672),
}
LLAMA_1 = dict(block_size=2048, norm_eps=1e-6)
LLAMA_2 = dict(block_size=4096, norm_eps=1e-5)
CODE = dict(block_size=16384, norm_eps=1e-5, rope_base=1000000)
CONDENSED_4 = dict(rope_scaling=dict(rope_type="linear", factor=4.0))
CONDENSED_8 = dict(rope_scaling=dict(rope_type="linear", factor=8.0))
LLAMA_3 = dict(vocab_size=128256, n_query_groups=8, rope_base=500000, norm_eps=1e-5)
SIZES_3 = {
    "1B": dict(n_layer=16, n_head=32, n_embd=2048, intermediate_size=8192, tie_embeddings=True),
    "3B": dict(n_layer=28, n_head=24, n_embd=3072, head_size=128, intermediate_size=8192, tie_embeddings=True),
    "8B": dict(n_layer=32, n_head=32, n_embd=4096, intermediate_size=14336),
    "70B": dict(n_layer=80, n_head=64, n_embd=8192, intermediate_size=28672),
    "405B": dict(n_layer=126, n_head=128, n_embd=16384, intermediate_size=53248),
}


def sizes_of(common: dict[str, Any], *sizes: str) -> dict[str, dict[str, Any]]:
    """Llama 1 or 2 in some of the sizes above."""
    return {size: common | SIZES[size] for size in sizes}


def llama_3(size: str, factor: float) -> dict[str, Any]:
    """Llama 3.1 and later, whose positions are stretched by `factor`."""
    scaling = dict(rope_type="llama3", low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192)
    return LLAMA_3 | SIZES_3[size] | dict(block_size=131072, rope_scaling=scaling | dict(factor=factor))


LLAMA_3_0 = LLAMA_3 | dict(block_size=8192)
LLAMA_3_1 = {size: llama_3(size, 8.0) for size in ("8B", "70B", "405B")}
LLAMA_3_2 = {size: llama_3(size, 32.0) for size in ("1B", "3B")}
WITH_INSTRUCT = ("", "-Instruct")
MORE_TOKENS = dict(vocab_size=32016)  # Code Llama's, to fill in the middle of a text
VICUNA_1_3 = {"7b": LLAMA_1 | SIZES["7b"], "13b": LLAMA_1 | SIZES["13b"], "33b": LLAMA_1 | SIZES["30b"]}
LONG_VICUNA = LLAMA_2 | CONDENSED_4 | dict(block_size=16384)
LONG_LLAMA_1 = LLAMA_1 | CONDENSED_8 | dict(block_size=16384)
PLATYPUS_2 = {size: LLAMA_2 | SIZES[size.lower()] for size in ("7B", "13B", "70B")}

MODELS: dict[str, dict[str, Any]] = {
    **series("HuggingFaceTB/SmolLM2-{size}{kind}", SMOL_SIZES, WITH_INSTRUCT),
    "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T": TINY | dict(norm_eps=1e-5),
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": TINY | dict(norm_eps=1e-5),
    **series("huggyllama/llama-{size}", sizes_of(LLAMA_1, "7b", "13b", "30b", "65b")),
    **series("meta-llama/Llama-2-{size}{kind}-hf", sizes_of(LLAMA_2, "7b", "13b", "70b"), ("", "-chat")),
    "meta-llama/Meta-Llama-3-8B": LLAMA_3_0 | SIZES_3["8B"],
    "meta-llama/Meta-Llama-3-8B-Instruct": LLAMA_3_0 | SIZES_3["8B"],
    "meta-llama/Meta-Llama-3-70B": LLAMA_3_0 | SIZES_3["70B"],
    "meta-llama/Meta-Llama-3-70B-Instruct": LLAMA_3_0 | SIZES_3["70B"],
    **series("meta-llama/Llama-3.1-{size}{kind}", LLAMA_3_1, WITH_INSTRUCT),
    **series("meta-llama/Llama-3.2-{size}{kind}", LLAMA_3_2, WITH_INSTRUCT),
    "meta-llama/Llama-3.3-70B-Instruct": llama_3("70B", 8.0),
    "deepseek-ai/DeepSeek-R1-Distill-Llama-8B": llama_3("8B", 8.0),
    "deepseek-ai/DeepSeek-R1-Distill-Llama-70B": llama_3("70B", 8.0),
    **series("lmsys/vicuna-{size}-v1.3", VICUNA_1_3),
    **series("lmsys/vicuna-{size}-v1.5", sizes_of(LLAMA_2, "7b", "13b")),
    **series("lmsys/vicuna-{size}-v1.5-16k", sizes_of(LONG_VICUNA, "7b", "13b")),
    **series("lmsys/longchat-{size}-16k", sizes_of(LONG_LLAMA_1, "7b", "13b")),
    **series("openlm-research/open_llama_{size}", sizes_of(LLAMA_1, "3b", "7b", "13b")),
    "garage-bAInd/Platypus-30B": LLAMA_1 | SIZES["30b"],
    **series("garage-bAInd/Platypus2-{size}", PLATYPUS_2),
    "garage-bAInd/Camel-Platypus2-13B": PLATYPUS_2["13B"],
    "garage-bAInd/Camel-Platypus2-70B": PLATYPUS_2["70B"],
    "garage-bAInd/Stable-Platypus2-13B": PLATYPUS_2["13B"],
    "garage-bAInd/Platypus2-70B-instruct": PLATYPUS_2["70B"],
    "NousResearch/Nous-Hermes-13b": LLAMA_1 | SIZES["13b"] | dict(vocab_size=32001),
    "NousResearch/Nous-Hermes-llama-2-7b": LLAMA_2 | SIZES["7b"],
    "NousResearch/Nous-Hermes-Llama2-13b": LLAMA_2 | SIZES["13b"] | dict(vocab_size=32032),
    "stabilityai/FreeWilly2": LLAMA_2 | SIZES["70b"],
    "stabilityai/StableBeluga2": LLAMA_2 | SIZES["70b"],  # its later name
    "togethercomputer/LLaMA-2-7B-32K": LLAMA_2 | SIZES["7b"] | CONDENSED_8 | dict(block_size=32768),
    "codellama/CodeLlama-70b-hf": CODE | SIZES["70b"] | MORE_TOKENS,
    "codellama/CodeLlama-7b-hf": CODE | SIZES["7b"] | MORE_TOKENS,
    "codellama/CodeLlama-7b-Python-hf": CODE | SIZES["7b"],
    "codellama/CodeLlama-7b-Instruct-hf": CODE | SIZES["7b"] | MORE_TOKENS,
    "codellama/CodeLlama-13b-hf": CODE | SIZES["13b"] | MORE_TOKENS,
    "codellama/CodeLlama-13b-Python-hf": CODE | SIZES["13b"],
    "codellama/CodeLlama-13b-Instruct-hf": CODE | SIZES["13b"] | MORE_TOKENS,
    **series("codellama/CodeLlama-{size}{kind}-hf", sizes_of(CODE, "34b"), ("", "-Python", "-Instruct")),
}

WEIGHTS = {
    "model.embed_tokens": "transformer.wte",
    "model.layers.{}.input_layernorm": "transformer.h.{}.norm_1",
    "model.layers.{}.self_attn.q_proj": "transformer.h.{}.attn.q",
    "model.layers.{}.self_attn.k_proj": "transformer.h.{}.attn.k",
    "model.layers.{}.self_attn.v_proj": "transformer.h.{}.attn.v",
    "model.layers.{}.self_attn.o_proj": "transformer.h.{}.attn.proj",
    "model.layers.{}.post_attention_layernorm": "transformer.h.{}.norm_2",
    "model.layers.{}.mlp.gate_proj": "transformer.h.{}.mlp.fc_1",
    "model.layers.{}.mlp.up_proj": "transformer.h.{}.mlp.fc_2",
    "model.layers.{}.mlp.down_proj": "transformer.h.{}.mlp.proj",
    "model.norm": "transformer.ln_f",
    "lm_head": "lm_head",
}


# LongChat's first models: no config.json says that their positions are condensed by 8. (StableLM-alpha needs no entry:
# it is a GPT-NeoX whose config.json says all that the table in gpt_neox.py does.)
LONGCHAT = CONDENSED_8 | dict(block_size=16384)
EXCEPTIONS = {"longchat-7b-16k": LONGCHAT, "longchat-13b-16k": LONGCHAT}


LEFT_OUT = {"llama": dict(rms_norm_eps=1e-6, attention_bias=False, mlp_bias=False)}


def from_hf(hf: dict[str, Any]) -> dict[str, Any]:
    bias = hf["attention_bias"]
    return common_settings(hf) | dict(attn_bias=bias, proj_bias=bias, mlp_bias=hf["mlp_bias"])
