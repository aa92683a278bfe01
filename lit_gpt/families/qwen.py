"""Qwen 2 and 2.5 (biases on q, k and v), Qwen 3 (norms on q and k), and Qwen 3's mixtures of experts."""

from typing import Any

from lit_gpt.families import common_settings, llama, series, window_settings

MODEL_TYPES = ("qwen2", "qwen3", "qwen3_moe")

QWEN_2 = dict(attn_bias=True, norm_eps=1e-6, rope_base=1000000.0, vocab_size=151936, block_size=32768)
SIZES_2: dict[str, dict[str, Any]] = {
    "0.5B": dict(n_layer=24, n_head=14, n_query_groups=2, n_embd=896, intermediate_size=4864, tie_embeddings=True),
    "1.5B": dict(n_layer=28, n_head=12, n_query_groups=2, n_embd=1536, intermediate_size=8960, tie_embeddings=True),
    "3B": dict(n_layer=36, n_head=16, n_query_groups=2, n_embd=2048, intermediate_size=11008, tie_embeddings=True),
    "7B": dict(n_layer=28, n_head=28, n_query_groups=4, n_embd=3584, intermediate_size=18944, vocab_size=152064),
    "14B": dict(n_layer=48, n_head=40, n_query_groups=8, n_embd=5120, intermediate_size=13824, vocab_size=152064),
    "32B": dict(n_layer=64, n_head=40, n_query_groups=8, n_embd=5120, intermediate_size=27648, vocab_size=152064),
    "72B": dict(n_layer=80, n_head=64, n_query_groups=8, n_embd=8192, intermediate_size=29568, vocab_size=152064),
}
LONG = ("7B", "14B", "32B", "72B")  # bases that were trained on 131,072 positions
CODER_SIZES = ("0.5B", "1.5B", "3B", "7B", "14B", "32B")
QWEN_3 = dict(
    qk_norm="per_head", norm_eps=1e-6, rope_base=1000000.0, vocab_size=151936, block_size=40960, head_size=128,
    n_query_groups=8,
)  # fmt: skip
QWEN_3_MOE = dict(mlp="LLaMAMoE", n_expert=128, n_expert_per_token=8, n_query_groups=4)
SIZES_3: dict[str, dict[str, Any]] = {
    "0.6B": dict(n_layer=28, n_head=16, n_embd=1024, intermediate_size=3072, tie_embeddings=True),
    "1.7B": dict(n_layer=28, n_head=16, n_embd=2048, intermediate_size=6144, tie_embeddings=True),
    "4B": dict(n_layer=36, n_head=32, n_embd=2560, intermediate_size=9728, tie_embeddings=True),
    "8B": dict(n_layer=36, n_head=32, n_embd=4096, intermediate_size=12288),
    "14B": dict(n_layer=40, n_head=40, n_embd=5120, intermediate_size=17408),
    "32B": dict(n_layer=64, n_head=64, n_embd=5120, intermediate_size=25600),
    "30B-A3B": QWEN_3_MOE | dict(
        moe_intermediate_size=768, n_layer=48, n_head=32, n_embd=2048, intermediate_size=6144
    ),
    "235B-A22B": QWEN_3_MOE | dict(
        moe_intermediate_size=1536, n_layer=94, n_head=64, n_embd=4096, intermediate_size=12288
    ),
}  # fmt: skip
WITH_BASE = ("0.6B", "1.7B", "4B", "8B", "14B", "30B-A3B")  # Qwen 3 without instruction tuning
MODELS: dict[str, dict[str, Any]] = {
    **{f"Qwen/Qwen2-{size}": QWEN_2 | SIZES_2[size] | dict(block_size=131072)
       for size in ("0.5B", "1.5B", "7B", "72B")},
    **{f"Qwen/Qwen2-{size}-Instruct": QWEN_2 | SIZES_2[size] for size in ("0.5B", "1.5B", "7B", "72B")},
    **{f"Qwen/Qwen2.5-{size}": QWEN_2 | sizes | (dict(block_size=131072) if size in LONG else {})
       for size, sizes in SIZES_2.items()},
    **{f"Qwen/Qwen2.5-{size}-Instruct": QWEN_2 | sizes for size, sizes in SIZES_2.items()},
    **series(
        "Qwen/Qwen2.5-Coder-{size}{kind}", {size: QWEN_2 | SIZES_2[size] for size in CODER_SIZES}, ("", "-Instruct")
    ),
    **{f"Qwen/Qwen3-{size}": QWEN_3 | sizes for size, sizes in SIZES_3.items()},
    **{f"Qwen/Qwen3-{size}-Base": QWEN_3 | SIZES_3[size] | dict(block_size=32768) for size in WITH_BASE},
}  # fmt: skip

WEIGHTS = llama.WEIGHTS | {
    "model.layers.{}.self_attn.q_norm": "transformer.h.{}.attn.norm_q.norm",
    "model.layers.{}.self_attn.k_norm": "transformer.h.{}.attn.norm_k.norm",
    "model.layers.{}.mlp.gate": "transformer.h.{}.mlp.gate",
    "model.layers.{}.mlp.experts.{}.gate_proj": "transformer.h.{}.mlp.experts.{}.fc_1",
    "model.layers.{}.mlp.experts.{}.up_proj": "transformer.h.{}.mlp.experts.{}.fc_2",
    "model.layers.{}.mlp.experts.{}.down_proj": "transformer.h.{}.mlp.experts.{}.proj",
}


COMMON_LEFT_OUT = dict(
    max_position_embeddings=32768, rms_norm_eps=1e-6, use_sliding_window=False, sliding_window=4096
)  # fmt: skip
QWEN_2_LEFT_OUT = COMMON_LEFT_OUT | dict(num_key_value_heads=32, max_window_layers=28, layer_types=None)
LEFT_OUT = {
    "qwen2": QWEN_2_LEFT_OUT,
    "qwen3": QWEN_2_LEFT_OUT | dict(head_dim=128, attention_bias=False),
    "qwen3_moe": COMMON_LEFT_OUT | dict(
        num_key_value_heads=4, attention_bias=False, num_experts=128, num_experts_per_tok=8,
        moe_intermediate_size=768, norm_topk_prob=False, decoder_sparse_step=1, mlp_only_layers=None,
    ),
}  # fmt: skip
ALIASES = {"qwen3_moe": {"num_local_experts": "num_experts"}}


def from_hf(hf: dict[str, Any]) -> dict[str, Any]:
    settings = common_settings(hf)
    n_layer = settings["n_layer"]
    window = hf["sliding_window"] if hf["use_sliding_window"] else None

    # norms on queries and keys, or biases
    if hf["model_type"] == "qwen2":
        settings |= dict(attn_bias=True)
    else:
        bias = hf["attention_bias"]
        settings |= dict(qk_norm="per_head", attn_bias=bias, proj_bias=bias)

    # a mixture of experts; the window is that of all layers
    if hf["model_type"] == "qwen3_moe":
        dense = hf["mlp_only_layers"] or ()
        every = hf["decoder_sparse_step"]
        return settings | dict(
            sliding_window=window,
            mlp="LLaMAMoE",
            n_expert=hf["num_experts"],
            n_expert_per_token=hf["num_experts_per_tok"],
            renormalize_experts=hf["norm_topk_prob"],
            moe_intermediate_size=hf["moe_intermediate_size"],
            dense_layers=[i for i in range(n_layer) if i in dense or (i + 1) % every],
        )

    # the upper layers have the window, unless layer_types says otherwise
    first = n_layer if window is None else hf["max_window_layers"]
    pattern = ["full_attention" if i < first else "sliding_attention" for i in range(n_layer)]
    return settings | window_settings(hf, window, pattern)
