"""Phi-3 and Phi-4: Llama with q, k and v fused, and both inputs of the MLP."""

from typing import Any

from lit_gpt.errors import InputError
from lit_gpt.families import common_settings, llama

MODEL_TYPES = ("phi3",)

PHI_3 = dict(norm_eps=1e-5, vocab_size=32064, n_embd=3072, n_head=32, n_layer=32, intermediate_size=8192)
PHI_4 = dict(
    n_layer=40, n_head=40, n_query_groups=10, n_embd=5120, intermediate_size=17920, vocab_size=100352, norm_eps=1e-5,
    block_size=16384, rope_base=250000,
)  # fmt: skip
LONGROPE = dict(  # factors to two decimals; the checkpoint's own config.json has seven
    rope_type="longrope", original_max_position_embeddings=4096,
    short_factor=[
        1.0, 1.02, 1.03, 1.03, 1.05, 1.05, 1.05, 1.05, 1.05, 1.07, 1.10, 1.11, 1.16, 1.16, 1.17, 1.29, 1.34,
        1.68, 1.79, 1.82, 1.85, 1.88, 1.91, 1.94, 1.99, 2.02, 2.02, 2.02, 2.02, 2.02, 2.02, 2.03, 2.03, 2.03,
        2.03, 2.03, 2.03, 2.03, 2.03, 2.03, 2.08, 2.09, 2.19, 2.22, 2.59, 2.73, 2.75, 2.84,
    ],
    long_factor=[
        1.08, 1.11, 1.14, 1.34, 1.59, 1.60, 1.62, 2.62, 3.23, 3.23, 4.79, 7.40, 7.70, 9.09, 12.20, 17.67, 24.46,
        28.57, 30.42, 30.84, 32.59, 32.93, 42.32, 44.96, 50.34, 50.45, 57.55, 57.93, 58.21, 60.14, 62.61, 62.62,
        62.71, 63.14, 63.14, 63.77, 63.93, 63.96, 63.97, 64.03, 64.07, 64.08, 64.12, 64.41, 64.48, 64.51, 64.53,
        64.84,
    ],
)  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "microsoft/Phi-3-mini-4k-instruct": PHI_3 | dict(block_size=4096, sliding_window=2047),
    "microsoft/Phi-3-medium-4k-instruct": PHI_3 | dict(
        n_layer=40, n_head=40, n_query_groups=10, n_embd=5120, intermediate_size=17920, block_size=4096,
        sliding_window=2047,
    ),
    "microsoft/Phi-3.5-mini-instruct": PHI_3 | dict(block_size=131072, sliding_window=262144, rope_scaling=LONGROPE),
    "microsoft/phi-4": PHI_4,
    "microsoft/Phi-4-reasoning": PHI_4 | dict(block_size=32768, rope_base=500000),
    "microsoft/Phi-4-reasoning-plus": PHI_4 | dict(block_size=32768, rope_base=500000),
}  # fmt: skip

WEIGHTS = {name: ours for name, ours in llama.WEIGHTS.items() if not name.endswith("_proj")} | {
    "model.layers.{}.self_attn.qkv_proj": (
        "stacked", "transformer.h.{}.attn.q", "transformer.h.{}.attn.k", "transformer.h.{}.attn.v"
    ),
    "model.layers.{}.self_attn.o_proj": "transformer.h.{}.attn.proj",
    "model.layers.{}.mlp.gate_up_proj": ("stacked", "transformer.h.{}.mlp.fc_1", "transformer.h.{}.mlp.fc_2"),
    "model.layers.{}.mlp.down_proj": "transformer.h.{}.mlp.proj",
}  # fmt: skip


LEFT_OUT = {
    "phi3": dict(
        rms_norm_eps=1e-5, max_position_embeddings=4096, partial_rotary_factor=1.0, sliding_window=None,
    )
}  # fmt: skip
ORIGINAL_LENGTH = "original_max_position_embeddings"


def from_hf(hf: dict[str, Any]) -> dict[str, Any]:
    # transformers reads this length at the top alone. Left out, it is 4096, whatever the scaling says
    if hf.get(ORIGINAL_LENGTH) is None:
        for place in ("rope_scaling", "rope_parameters"):
            form = hf.get(place)
            if form and isinstance(form, dict):
                hf = hf | {place: form | {ORIGINAL_LENGTH: 4096}}
    settings = common_settings(hf, rotates_part=True) | dict(sliding_window=hf["sliding_window"])
    scaling = settings["rope_scaling"]
    if scaling is not None and scaling["rope_type"] != "longrope":
        raise InputError(f"a phi3 model with the rotary scaling {scaling['rope_type']!r}; expected longrope.")
    return settings
