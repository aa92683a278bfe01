"""What the checkpoints of each model family look like, as data. One file per family; no torch.

A family file defines
    MODEL_TYPES  the `model_type`s of config.json that it understands
    MODELS       published names and their sizes
    WEIGHTS      their module names -> ours; {} stands for a number, ("stacked" or "grouped", ours ...) for a fused one
    from_hf      config.json -> arguments of Config
and, where it is not what USUAL says,
    TRANSPOSED   their modules whose weights are (in, out)
    IGNORED      tensors that some checkpoints carry and no model needs
    PREFIX       of their names, which some checkpoints leave out
    EXCEPTIONS   arguments of Config that no config.json says, by the name of the folder
    OLD          model_types of before transformers knew them -> (their keys -> its keys, what else to write)
To add one, write the file and put its name into FAMILIES; see tutorials/add_a_model_family.md.
"""

import difflib
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from lit_gpt.errors import InputError

FAMILIES = (
    "llama", "mistral", "mixtral", "qwen", "gemma", "phi", "phi3", "gpt_neox", "falcon", "gpt2", "stablelm", "olmo",
    "granite", "smollm3", "gemma2", "starcoder2",
)  # fmt: skip

USUAL: dict[str, Any] = {
    "TRANSPOSED": (),
    "IGNORED": ("rotary_emb.inv_freq",),  # old exports saved this constant in every layer
    "PREFIX": "",
    "EXCEPTIONS": {},
    "OLD": {},
}


def load(family: str) -> ModuleType:
    return import_module(f"lit_gpt.families.{family}")


def fact(family: str, name: str) -> Any:
    """What a family's file says, or what is usual."""
    return getattr(load(family), name, USUAL[name])


def published() -> dict[str, tuple[str, dict[str, Any]]]:
    """(family, arguments of Config) of every model that the tables name, by its repository."""
    return {repo: (family, sizes) for family in FAMILIES for repo, sizes in load(family).MODELS.items()}


def by_name(name: str) -> tuple[str, dict[str, Any]]:
    """(family, arguments of Config) of a published model."""
    known = {key: found for repo, found in published().items() for key in (repo, repo.split("/")[-1])}
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3) or sorted(known)[:3]
        raise InputError(f"No model is called {name!r}. Near it: {', '.join(near)}.")
    return known[name]


def from_hf(hf: dict[str, Any], path: Path) -> tuple[str, dict[str, Any]]:
    """(family, arguments of Config) of a Hugging Face config.json, which was read from `path`. See `errors.reading`."""
    kinds = {kind: family for family in FAMILIES for kind in load(family).MODEL_TYPES}
    kind = hf.get("model_type")
    if kind not in kinds:
        raise InputError(f"it says model_type {kind!r}; known are {', '.join(sorted(kinds))}.")
    settings = load(kinds[kind]).from_hf(hf)
    for key in ("layer_types", "no_rope_layers"):
        if hf.get(key) and len(hf[key]) != settings["n_layer"]:
            raise InputError(
                f"{key} has {len(hf[key])} entries, expected one for each of {settings['n_layer']} layers."
            )
    # `.` has no name, and a link may have the right one
    return kinds[kind], settings | exceptions(hf, path.parent.name) | exceptions(hf, path.parent.resolve().name)


def exceptions(hf: dict[str, Any], name: str) -> dict[str, Any]:
    """What config.json does not say of a model of this name: arguments of Config."""
    named = (fact(family, "EXCEPTIONS") for family in FAMILIES if hf.get("model_type") in load(family).MODEL_TYPES)
    return next(named, {}).get(name, {})


ACTIVATIONS = {  # Hugging Face's names of them
    "silu": "silu", "swish": "silu", "gelu": "gelu", "relu": "relu",
    "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh",
}  # fmt: skip


def activation(name: str) -> str:
    if name not in ACTIVATIONS:
        raise InputError(f"the activation {name!r} is not known; known are {', '.join(ACTIVATIONS)}.")
    return ACTIVATIONS[name]


def usual(hf: dict[str, Any], **missing: Any) -> dict[str, Any]:
    """The arguments that most families name alike. `missing` is what the family means where config.json is silent."""
    hf = missing | {key: value for key, value in hf.items() if value is not None}
    return positions(hf, hf["max_position_embeddings"]) | dict(
        n_layer=hf["num_hidden_layers"],
        n_head=hf["num_attention_heads"],
        n_query_groups=hf.get("num_key_value_heads"),
        n_embd=hf["hidden_size"],
        head_size=hf.get("head_dim"),
        intermediate_size=hf.get("intermediate_size"),
        vocab_size=hf["vocab_size"],
        norm_eps=hf.get("rms_norm_eps", hf.get("layer_norm_eps", 1e-5)),
        activation=activation(hf.get("hidden_act", "silu")),
        tie_embeddings=hf.get("tie_word_embeddings", False),
    )


def positions(hf: dict[str, Any], length: int) -> dict[str, Any]:
    """The rotary arguments of Config, and block_size. `length` is max_position_embeddings, which may be what the model
    was made for, before its positions were stretched."""
    found = rope(hf)
    scaling, length = found["rope_scaling"] or {}, max(length, hf.get("max_sequence_length") or 0)  # Vicuna's word
    if scaling.get("rope_type") == "dynamic":
        scaling["original_max_position_embeddings"] = length
        length = int(length * scaling["factor"])
    if scaling.get("rope_type") == "yarn":  # Qwen's model cards add it, and leave max_position_embeddings
        length = max(length, int((scaling.get("factor") or 1) * scaling["original_max_position_embeddings"]))
    return found | {"block_size": length}


def sliding(hf: dict[str, Any], on: bool = True) -> dict[str, Any]:
    """Sliding windows: `on` is whether they are without a word of `layer_types`."""
    window, kinds = hf.get("sliding_window"), hf.get("layer_types")
    if kinds is not None:
        if unknown := set(kinds) - {"full_attention", "sliding_attention"}:
            raise InputError(f"layers of the kind {sorted(unknown)[0]!r} are not known.")
        layers = [layer for layer, kind in enumerate(kinds) if kind == "sliding_attention"]
        return dict(sliding_window=window, sliding_layers=layers) if layers else {}
    return dict(sliding_window=window) if on else {}


ROPE_SCALINGS = {  # known kinds, and what each must say
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("original_max_position_embeddings",),
    "longrope": ("short_factor", "long_factor", "original_max_position_embeddings"),
}
KINDS = {"su": "longrope"}  # names of their own that early checkpoints used


def rope(hf: dict[str, Any]) -> dict[str, Any]:
    """The rotary arguments of Config, from where transformers 4 or 5 writes them.

    Raises:
        InputError: a kind of scaling that the model does not know.
        KeyError: a number that this kind needs is missing.
    """
    parameters = hf.get("rope_parameters") or {}
    scaling = {key: value for key, value in (hf.get("rope_scaling") or parameters).items() if value is not None}
    kind = scaling.pop("type", None) or scaling.get("rope_type") or "default"
    scaling["rope_type"] = kind = KINDS.get(kind, kind)
    if kind not in ROPE_SCALINGS:
        raise InputError(f"the rotary scaling {kind!r} is not known; known are {', '.join(ROPE_SCALINGS)}.")
    if hf.get("original_max_position_embeddings") and kind in ("yarn", "longrope"):
        scaling.setdefault("original_max_position_embeddings", hf["original_max_position_embeddings"])
    for key in ROPE_SCALINGS[kind]:
        scaling[key]
    found = {"rope_theta": 10000, "partial_rotary_factor": 1.0}
    for place in (hf, parameters, scaling):  # the last that says something counts
        found |= {key: place[key] for key in found if place.get(key) is not None}
    scaling = {key: value for key, value in scaling.items() if key not in found}
    scaling = None if kind == "default" else scaling
    return dict(rope_scaling=scaling, rope_base=found["rope_theta"], rotary_percentage=found["partial_rotary_factor"])
