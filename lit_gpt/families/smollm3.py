"""SmolLM 3: Llama, but every fourth layer knows no positions."""

from typing import Any

from lit_gpt.families import llama, window_settings

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


def from_hf(hf: dict[str, Any]) -> dict[str, Any]:
    settings = llama.from_hf({"tie_word_embeddings": True, "rope_theta": 2000000.0} | hf)
    # its no_rope_layers says for each layer whether it has positions (1, or any number but 0) or none (0)
    every = hf.get("no_rope_layer_interval", 4)
    pattern = [(i + 1) % every for i in range(settings["n_layer"])]
    has_positions = hf.get("no_rope_layers") or pattern
    settings["no_rope_layers"] = [i for i, flag in enumerate(has_positions) if not flag]
    if hf.get("use_sliding_window"):
        settings |= window_settings(hf)
    return settings
