"""SmolLM 3: Llama, but every fourth layer knows no positions."""

from typing import Any

from lit_gpt.families import llama, sliding

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
    found = llama.from_hf({"tie_word_embeddings": True, "rope_theta": 2000000.0} | hf)
    every = hf.get("no_rope_layer_interval", 4)
    with_rope = hf.get("no_rope_layers") or [(i + 1) % every for i in range(found["n_layer"])]  # 1: it has positions
    found["no_rope_layers"] = [i for i, on in enumerate(with_rope) if not on]
    return found | (sliding(hf) if hf.get("use_sliding_window") else {})
