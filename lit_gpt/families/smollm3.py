"""SmolLM 3: Llama, but every fourth layer knows no positions."""

from typing import Any

from lit_gpt.families import check_length, llama, window_settings

MODEL_TYPES = ("smollm3",)

SMOLLM3_3B = dict(
    n_layer=36, n_head=16, n_query_groups=4, n_embd=2048, intermediate_size=11008, vocab_size=128256, block_size=65536,
    norm_eps=1e-6, rope_base=5000000.0, tie_embeddings=True, no_rope_layers=list(range(3, 36, 4)),
)  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "HuggingFaceTB/SmolLM3-3B": SMOLLM3_3B,
    "HuggingFaceTB/SmolLM3-3B-Base": SMOLLM3_3B,
}

WEIGHTS = llama.WEIGHTS


LEFT_OUT = {
    "smollm3": dict(
        num_key_value_heads=4, max_position_embeddings=32768, rms_norm_eps=1e-6, rope_theta=2000000.0,
        tie_word_embeddings=True, attention_bias=False, mlp_bias=False,
        use_sliding_window=False, sliding_window=None, layer_types=None, no_rope_layers=None, no_rope_layer_interval=4,
    )
}  # fmt: skip


def from_hf(hf: dict[str, Any]) -> dict[str, Any]:
    settings = llama.from_hf(hf)
    n_layer = settings["n_layer"]

    # its no_rope_layers says for each layer whether it has positions (1, or any number but 0) or none (0)
    has_positions = hf["no_rope_layers"]
    if has_positions is None:
        has_positions = [(i + 1) % hf["no_rope_layer_interval"] for i in range(n_layer)]
    check_length("no_rope_layers", has_positions, hf)
    settings["no_rope_layers"] = [i for i, flag in enumerate(has_positions) if not flag]

    # without layer_types, only layers that know no positions have a window; with them, use_sliding_window is not asked
    window = hf["sliding_window"]
    windows_on = hf["use_sliding_window"] and window is not None
    pattern = ["full_attention" if flag or not windows_on else "sliding_attention" for flag in has_positions]
    return settings | window_settings(hf, window, pattern)
