"""Model families: how the checkpoints of each one look, as data. One file per family; no torch.

A family file defines
    MODEL_TYPES  the `model_type`s of config.json that it understands
    MODELS       published name -> arguments of Config
    WEIGHTS      the checkpoint's module name -> ours; {} stands for a number. A module that the checkpoint fuses has
                 several of ours: ("stacked" or "grouped", ours, ...), drawn in checkpoint/tensor_names.py
    from_hf      config.json -> arguments of Config
and, where it differs from DEFAULTS,
    TRANSPOSED   the checkpoint's modules whose weights are (in, out)
    IGNORED      ends of the names of tensors that some checkpoints carry and no model needs
    PREFIX       the beginning of all names, which some checkpoints leave out
    EXCEPTIONS   folder name -> arguments of Config that are missing in its config.json
    FORMER_MODEL_TYPES   former model_type -> (old key -> new key, keys to add), for the config.json of a copy
To add one, write the file and put its name into FAMILIES; see tutorials/add_a_model_family.md.
"""

import difflib
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from lit_gpt.errors import InputError

Settings = dict[str, Any]  # arguments of Config

FAMILIES = (
    "llama", "mistral", "mixtral", "qwen", "gemma", "phi", "phi3", "gpt_neox", "falcon", "gpt2", "stablelm", "olmo",
    "granite", "smollm3", "gemma2", "starcoder2",
)  # fmt: skip

DEFAULTS: dict[str, Any] = {  # of what a family file may leave out
    "TRANSPOSED": (),
    "IGNORED": (".inv_freq", ".cos_cached", ".sin_cached"),  # constants that old exports saved in every layer
    "PREFIX": "",
    "EXCEPTIONS": {},
    "FORMER_MODEL_TYPES": {},
}


def load(family: str) -> ModuleType:
    return import_module(f"lit_gpt.families.{family}")


def definition(family: str, name: str) -> Any:
    """A value that the family's file defines, such as "PREFIX", or its default."""
    return getattr(load(family), name, DEFAULTS[name])


def published() -> dict[str, tuple[str, Settings]]:
    """(family, arguments of Config) of every model in the tables, by its repository."""
    models: dict[str, tuple[str, Settings]] = {}
    for family in FAMILIES:
        models |= {repo: (family, settings) for repo, settings in load(family).MODELS.items()}
    return models


def by_name(name: str) -> tuple[str, Settings]:
    """(family, arguments of Config) of a published model, by `org/name` or by `name` alone.

    Raises:
        InputError: no such name; the nearest ones are listed.
    """
    models = {}
    for repo, model in published().items():
        models[repo] = model
        models[repo.split("/")[-1]] = model
    if name not in models:
        near = difflib.get_close_matches(name, models, n=3) or sorted(models)[:3]
        raise InputError(f"No model is called {name!r}. Near it: {', '.join(near)}.")
    return models[name]


def series(template: str, sizes: Mapping[str, Settings], kinds: Sequence[str] = ("",)) -> dict[str, Settings]:
    """Entries of MODELS for models that come in several sizes and kinds.

    `series("org/m-{size}{kind}", {"1b": ...}, ("", "-chat"))` has the keys org/m-1b and org/m-1b-chat.
    """
    models: dict[str, Settings] = {}
    for size, settings in sizes.items():
        models |= {template.format(size=size, kind=kind): settings for kind in kinds}
    return models


def from_hf(hf: dict[str, Any], path: Path) -> tuple[str, Settings]:
    """(family, arguments of Config) of a Hugging Face config.json, which was read from `path`. See `errors.reading`.

    Raises:
        InputError: no family knows the model_type, or one of the settings.
    """
    family = family_of(hf)
    if family is None:
        known = ", ".join(sorted(families_by_model_type()))
        raise InputError(f"it says model_type {hf.get('model_type')!r}; known are {known}.")
    settings = load(family).from_hf(hf)
    for key in ("layer_types", "no_rope_layers"):
        if hf.get(key) and len(hf[key]) != settings["n_layer"]:
            raise InputError(
                f"{key} has {len(hf[key])} entries, expected one for each of {settings['n_layer']} layers."
            )
    # `.` has no name, and a link may have the right one
    return family, settings | exceptions(hf, path.parent.name) | exceptions(hf, path.parent.resolve().name)


def family_of(hf: dict[str, Any]) -> str | None:
    """The family that understands the model_type of a config.json; None if no family does."""
    return families_by_model_type().get(hf.get("model_type"))


def families_by_model_type() -> dict[Any, str]:
    """Every model_type that a family understands, with the name of the family."""
    families: dict[Any, str] = {}
    for family in FAMILIES:
        families |= dict.fromkeys(load(family).MODEL_TYPES, family)
    return families


def exceptions(hf: dict[str, Any], name: str) -> Settings:
    """Arguments of Config that config.json leaves out and only the model's name tells; empty for most models."""
    family = family_of(hf)
    return {} if family is None else definition(family, "EXCEPTIONS").get(name, {})


# Hugging Face's names -> ours. A new one needs its function, too: ACTIVATION_FUNCTIONS in lit_gpt/model/mlp.py.
ACTIVATIONS = {
    "silu": "silu", "swish": "silu", "gelu": "gelu", "relu": "relu",
    "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh",
}  # fmt: skip


def activation(name: str) -> str:
    """Our name of an activation that a config.json names."""
    if name not in ACTIVATIONS:
        raise InputError(f"the activation {name!r} is not known; known are {', '.join(ACTIVATIONS)}.")
    return ACTIVATIONS[name]


def common_settings(hf: dict[str, Any], **defaults: Any) -> Settings:
    """The arguments of Config that most families name alike. `defaults` stand for keys that config.json leaves out."""
    hf = defaults | {key: value for key, value in hf.items() if value is not None}
    return position_settings(hf, hf["max_position_embeddings"]) | dict(
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


def position_settings(hf: dict[str, Any], length: int) -> Settings:
    """The rotary arguments of Config, and block_size.

    `length` is max_position_embeddings. For some kinds of scaling that is the length before the stretching, and the
    model takes longer records.
    """
    settings = rope_settings(hf)
    scaling = settings["rope_scaling"] or {}
    length = max(length, hf.get("max_sequence_length") or 0)  # Vicuna's name of it
    if scaling.get("rope_type") == "dynamic":
        scaling["original_max_position_embeddings"] = length
        length = int(length * scaling["factor"])
    if scaling.get("rope_type") == "yarn":  # Qwen's model cards add it, and leave max_position_embeddings
        stretched = (scaling.get("factor") or 1) * scaling["original_max_position_embeddings"]
        length = max(length, int(stretched))
    return settings | {"block_size": length}


def window_settings(hf: dict[str, Any], by_default: bool = True) -> Settings:
    """The sliding-window arguments of Config. Without `layer_types`, all layers have the window, or none has."""
    window = hf.get("sliding_window")
    layer_types = hf.get("layer_types")
    if layer_types is None:
        return dict(sliding_window=window) if by_default else {}

    unknown = set(layer_types) - {"full_attention", "sliding_attention"}
    if unknown:
        raise InputError(f"layers of the kind {sorted(unknown)[0]!r} are not known.")
    layers = [layer for layer, kind in enumerate(layer_types) if kind == "sliding_attention"]
    return dict(sliding_window=window, sliding_layers=layers) if layers else {}


# The kinds of rotary scaling, and the numbers that each must have. A new one needs its function, too:
# SCALING_FUNCTIONS in lit_gpt/model/rope.py, and an entry in `Rope.by_length` there if it depends on the length of a
# record. If it stretches max_position_embeddings, `position_settings` above has to know.
ROPE_TYPES = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("original_max_position_embeddings",),
    "longrope": ("short_factor", "long_factor", "original_max_position_embeddings"),
}
FORMER_ROPE_TYPES = {"su": "longrope"}  # names that early checkpoints use -> those of today


def rope_settings(hf: dict[str, Any]) -> Settings:
    """The rotary arguments of Config, from where transformers 4 (rope_scaling) or 5 (rope_parameters) writes them.

    Raises:
        InputError: a kind of scaling that the model does not know.
        KeyError: a number that this kind needs is missing.
    """
    # the kind
    parameters = hf.get("rope_parameters") or {}
    written = hf.get("rope_scaling") or parameters
    scaling = {key: value for key, value in written.items() if value is not None}
    rope_type = scaling.pop("type", None) or scaling.get("rope_type") or "default"
    rope_type = FORMER_ROPE_TYPES.get(rope_type, rope_type)
    scaling["rope_type"] = rope_type
    if rope_type not in ROPE_TYPES:
        raise InputError(f"the rotary scaling {rope_type!r} is not known; known are {', '.join(ROPE_TYPES)}.")

    # its numbers
    if hf.get("original_max_position_embeddings") and rope_type in ("yarn", "longrope"):
        scaling.setdefault("original_max_position_embeddings", hf["original_max_position_embeddings"])
    for key in ROPE_TYPES[rope_type]:
        scaling[key]  # the caller turns a KeyError into a sentence, see `errors.reading`

    # base and share of each head: the last place that says something counts
    base_and_share = {"rope_theta": 10000, "partial_rotary_factor": 1.0}
    for place in (hf, parameters, scaling):
        base_and_share |= {key: place[key] for key in base_and_share if place.get(key) is not None}
    scaling = {key: value for key, value in scaling.items() if key not in base_and_share}
    return dict(
        rope_scaling=None if rope_type == "default" else scaling,
        rope_base=base_and_share["rope_theta"],
        rotary_percentage=base_and_share["partial_rotary_factor"],
    )
