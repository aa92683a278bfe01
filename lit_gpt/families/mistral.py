"""Mistral: Llama's layout, with a sliding window in its first version."""

from typing import Any

from lit_gpt.families import common_settings, llama, window_settings

MODEL_TYPES = ("mistral",)

MISTRAL_7B = dict(
    n_layer=32, n_head=32, n_query_groups=8, n_embd=4096, intermediate_size=14336, vocab_size=32000, block_size=32768,
    norm_eps=1e-5,
)  # fmt: skip
NEMO = MISTRAL_7B | dict(
    n_layer=40, n_embd=5120, head_size=128, vocab_size=131072, block_size=131072, rope_base=1000000.0
)  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "mistralai/Mistral-7B-v0.1": MISTRAL_7B | dict(sliding_window=4096),
    "mistralai/Mistral-7B-Instruct-v0.1": MISTRAL_7B | dict(sliding_window=4096),
    "mistralai/Mistral-7B-Instruct-v0.2": MISTRAL_7B | dict(rope_base=1000000.0),
    "mistralai/Mistral-7B-v0.3": MISTRAL_7B | dict(rope_base=1000000.0, vocab_size=32768),
    "mistralai/Mistral-7B-Instruct-v0.3": MISTRAL_7B | dict(rope_base=1000000.0, vocab_size=32768),
    "mistralai/Mistral-Nemo-Base-2407": NEMO,
    "mistralai/Mistral-Nemo-Instruct-2407": NEMO,
    "HuggingFaceH4/zephyr-7b-beta": MISTRAL_7B | dict(sliding_window=4096),
}

WEIGHTS = llama.WEIGHTS


LEFT_OUT = {
    "mistral": dict(
        num_key_value_heads=8, max_position_embeddings=131072, rms_norm_eps=1e-6, sliding_window=4096, layer_types=None,
    )
}  # fmt: skip


def from_hf(hf: dict[str, Any]) -> dict[str, Any]:
    settings = common_settings(hf)
    window = hf["sliding_window"]
    if hf["layer_types"] is None:
        return settings | dict(sliding_window=window)
    # transformers takes a Mistral with layer_types for a Ministral, whose layers differ
    return settings | window_settings(hf, window, pattern=())
