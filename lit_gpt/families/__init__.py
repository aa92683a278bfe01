"""Model families: how the checkpoints of each one look, as data. One file per family; no torch.

A family file defines
    MODEL_TYPES  the `model_type`s of config.json that it understands
    MODELS       published name -> arguments of Config
    WEIGHTS      the checkpoint's module name -> ours; {} stands for a number. A module that the checkpoint fuses has
                 several of ours: ("stacked" or "grouped", ours, ...), drawn in checkpoint/tensor_names.py
    from_hf      a complete config.json, see `completed` -> arguments of Config
and, where it differs from DEFAULTS,
    TRANSPOSED   the checkpoint's modules whose weights are (in, out)
    IGNORED      ends of the names of tensors that some checkpoints carry and no model needs
    PREFIX       the beginning of all names but the head's, which some checkpoints leave out
    EXCEPTIONS   folder name -> arguments of Config that are missing in its config.json
    LEFT_OUT     model_type -> what transformers means by keys that config.json leaves out, where most families mean
                 something else (LEFT_OUT below). `from_hf` finds all of these keys, of the same kind as here
    ALIASES      model_type -> other names that transformers takes for a key
    FORMER_MODEL_TYPES   former model_type -> (old key -> new key, keys to add)
To add one, write the file and put its name into FAMILIES; see tutorials/add_a_model_family.md.
"""

import difflib
import math
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
    "PREFIX": "model.",
    "EXCEPTIONS": {},
    "LEFT_OUT": {},
    "ALIASES": {},
    "FORMER_MODEL_TYPES": {},
}

# What most config classes of transformers 5.23 mean by a key that config.json leaves out. Sizes are not here: no file
# leaves them out but by mistake. tests/test_config_keys.py asks transformers about each, and of each family's own
LEFT_OUT: dict[str, Any] = dict(
    hidden_act="silu", num_key_value_heads=None, head_dim=None, max_position_embeddings=2048, rope_theta=10000.0,
    tie_word_embeddings=False,
)  # fmt: skip

SIZES = (  # keys that no config.json leaves out
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "n_embd", "n_layer",
    "n_head",
)  # fmt: skip
MAY_BE_NULL = (
    "num_key_value_heads", "rope_theta", "sliding_window", "attn_logit_softcapping", "final_logit_softcapping",
)  # fmt: skip
LISTS = ("layer_types", "no_rope_layers", "mlp_only_layers")
MAY_BE_ZERO = (
    "rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "partial_rotary_factor", "rotary_pct",
    "max_window_layers",
)  # fmt: skip
NOT_KNOWN_ANYWHERE = ("per_layer_config", "text_config")  # keys that change a model of any family


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
        InputError: no family knows the model_type, or one of the settings; or settings contradict each other.
        KeyError: a size is missing.
    """
    family = family_of(hf)
    if family is None:
        known = ", ".join(sorted(families_by_model_type()))
        raise InputError(f"it says model_type {hf.get('model_type')!r}; known are {known}.")
    settings = load(family).from_hf(completed(hf, family))
    for key in NOT_KNOWN_ANYWHERE:
        if hf.get(key):
            raise InputError(f"{key} is not known: all settings of a model are at the top here, and for all layers.")
    # `.` has no name, and a link may have the right one
    return family, settings | exceptions(hf, path.parent.name) | exceptions(hf, path.parent.resolve().name)


def completed(hf: dict[str, Any], family: str) -> dict[str, Any]:
    """A config.json under the names of today, with all keys that it leaves out, and each of the right kind.

    Raises:
        InputError: a key is of another kind than it has to be, or contradicts another one.
    """
    hf = in_todays_names(hf, family)
    left_out = LEFT_OUT | definition(family, "LEFT_OUT").get(hf["model_type"], {})
    for key in (*SIZES, *left_out):
        if key in hf:
            check_kind(key, hf[key], left_out.get(key, 1))
    check_layer_types(hf)
    return left_out | hf


def in_todays_names(hf: dict[str, Any], family: str) -> dict[str, Any]:
    """A config.json with the names of today, of its model_type and of its keys, and each thing under one name.

    Raises:
        InputError: two names of one thing have different values.
    """
    model_type = hf["model_type"]
    former_names, added_keys = definition(family, "FORMER_MODEL_TYPES").get(model_type, ({}, {}))
    other_names = former_names | definition(family, "ALIASES").get(model_type, {})
    hf = dict(hf)
    for other_name, name in other_names.items():
        if other_name in hf:
            value = hf.pop(other_name)
            if hf.setdefault(name, value) != value:
                raise InputError(f"{name} is {hf[name]!r} and {other_name} is {value!r}, expected the same of both.")
    return hf | added_keys


def check_kind(key: str, value: Any, default: Any) -> None:
    """Raises InputError if a value is of another kind than `default`, or a number that makes no sense.

    A default of None stands for a list or a number, or neither. null means something only there, and in MAY_BE_NULL.
    """
    if value is None and (default is None or key in MAY_BE_NULL):
        return
    said = "null" if value is None else repr(value)
    if isinstance(default, bool | str):
        expected = "true or false" if isinstance(default, bool) else "a name"
        if not isinstance(value, type(default)):
            raise InputError(f"{key} is {said}, expected {expected}.")
    elif key in LISTS:
        if not isinstance(value, list):
            raise InputError(f"{key} is {said}, expected a list.")
    else:
        number = int if isinstance(default, int) else int | float
        if isinstance(value, bool) or not isinstance(value, number):
            raise InputError(f"{key} is {said}, expected {'a whole number' if number is int else 'a number'}.")
        if key != "sliding_window":  # which may be switched off
            check_size(key, value)


def check_size(key: str, value: Any) -> None:
    """Raises InputError if a number is negative, infinite or none, or 0 where that makes no sense."""
    may_be_zero = key in MAY_BE_ZERO
    if not 0 <= value < math.inf or (value == 0 and not may_be_zero):
        raise InputError(f"{key} is {value!r}, expected {'0 or more' if may_be_zero else 'more than 0'}, and finite.")


def check_layer_types(hf: dict[str, Any]) -> None:
    """Raises InputError if `layer_types` is no list with an entry for each layer.

    transformers refuses that in every family, also where nothing reads it.
    """
    layer_types = hf.get("layer_types")
    if layer_types is not None:
        check_kind("layer_types", layer_types, None)
        check_length("layer_types", layer_types, hf)


def check_length(key: str, entries: list[Any], hf: dict[str, Any]) -> None:
    """Raises InputError if a list has not one entry for each layer."""
    n_layer = hf.get("num_hidden_layers", hf.get("n_layer"))
    if len(entries) != n_layer:
        raise InputError(f"{key} has {len(entries)} entries, expected one for each of {n_layer} layers.")


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


# Hugging Face's names -> ours. A new one needs its function, too: ACTIVATIONS in lit_gpt/model/fused.py.
ACTIVATIONS = {
    "silu": "silu", "swish": "silu", "gelu": "gelu", "relu": "relu",
    "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh",
}  # fmt: skip


def activation(name: str) -> str:
    """Our name of an activation that a config.json names."""
    if name not in ACTIVATIONS:
        raise InputError(f"the activation {name!r} is not known; known are {', '.join(ACTIVATIONS)}.")
    return ACTIVATIONS[name]


def common_settings(hf: dict[str, Any], norm_eps: str = "rms_norm_eps", rotates_part: bool = False) -> Settings:
    """The arguments of Config that most families name alike.

    `hf` is complete, see `completed`. `norm_eps` is the family's name of the norms' epsilon. For `rotates_part` see
    `rope_settings`.
    """
    check_heads(hf)
    return position_settings(hf, rotates_part) | dict(
        n_layer=hf["num_hidden_layers"],
        n_head=hf["num_attention_heads"],
        n_query_groups=hf["num_key_value_heads"],
        n_embd=hf["hidden_size"],
        head_size=hf["head_dim"],
        intermediate_size=hf["intermediate_size"],
        vocab_size=hf["vocab_size"],
        norm_eps=hf[norm_eps],
        activation=activation(hf["hidden_act"]),
        tie_embeddings=hf["tie_word_embeddings"],
    )


def check_heads(hf: dict[str, Any]) -> None:
    """Raises InputError if the width cannot be divided into the heads, or the heads into groups."""
    heads = hf["num_attention_heads"]
    groups = hf["num_key_value_heads"] or heads
    if hf["head_dim"] is None and hf["hidden_size"] % heads:
        raise InputError(f"hidden_size is {hf['hidden_size']}, which num_attention_heads, {heads}, does not divide.")
    if heads % groups:
        raise InputError(f"num_attention_heads is {heads}, which num_key_value_heads, {groups}, does not divide.")


def check_head_dim(hf: dict[str, Any]) -> None:
    """Raises InputError if a family whose heads share the width is told another size of a head."""
    head_dim = hf["head_dim"]
    if head_dim is not None and head_dim * hf["num_attention_heads"] != hf["hidden_size"]:
        expected = f"hidden_size / num_attention_heads in a {hf['model_type']} model"
        raise InputError(f"head_dim is {head_dim}, expected {expected}, or no such key.")


def position_settings(hf: dict[str, Any], rotates_part: bool = False) -> Settings:
    """The rotary arguments of Config, and block_size. For `rotates_part` see `rope_settings`.

    For some kinds of scaling max_position_embeddings is the length before the stretching, and the model takes longer
    records.
    """
    settings = rope_settings(hf, rotates_part)
    scaling = settings["rope_scaling"] or {}
    length = hf["max_position_embeddings"]
    block_size = max(length, hf.get("max_sequence_length") or 0)  # Vicuna's name of it
    if scaling.get("rope_type") == "dynamic":
        scaling["original_max_position_embeddings"] = length
        block_size = max(block_size, int(length * scaling["factor"]))
    if scaling.get("rope_type") == "yarn":  # Qwen's model cards add it, and leave max_position_embeddings
        stretched = scaling["factor"] * scaling["original_max_position_embeddings"]
        block_size = max(block_size, int(stretched))
    return settings | {"block_size": block_size}


def window_settings(hf: dict[str, Any], window: int | None, pattern: Sequence[str]) -> Settings:
    """The sliding-window arguments of Config, for families in which layers differ.

    `pattern` says of each layer what it is, if config.json has no `layer_types`.

    Raises:
        InputError: layers are of another kind, or have a window of no size.
    """
    layer_types = pattern if hf["layer_types"] is None else hf["layer_types"]
    unknown = [kind for kind in layer_types if kind not in ("full_attention", "attention", "sliding_attention")]
    if unknown:
        raise InputError(f"layer_types has {unknown[0]!r}; known are full_attention and sliding_attention.")
    layers = [layer for layer, kind in enumerate(layer_types) if kind == "sliding_attention"]
    if not layers:
        return {}
    if window is None:
        said = f"sliding_window is {hf['sliding_window']}, use_sliding_window {hf.get('use_sliding_window', True)}"
        raise InputError(f"layer_types has sliding_attention, but there is no window: {said}.")
    return dict(sliding_window=window, sliding_layers=layers)


# The kinds of rotary scaling, and the numbers that each must have. A new one needs its function, too:
# SCALING_FUNCTIONS in lit_gpt/model/rope.py, and an entry in `Rope.by_length` there if it depends on the length of a
# record. If it stretches max_position_embeddings, `position_settings` above has to know.
ROPE_TYPES = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
    "longrope": ("short_factor", "long_factor", "original_max_position_embeddings"),
}
ROPE_OPTIONS = {  # numbers that a kind may have
    "yarn": ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    "longrope": ("factor", "attention_factor"),
}
FORMER_ROPE_TYPES = {"su": "longrope"}  # names that early checkpoints use -> those of today


def rope_settings(hf: dict[str, Any], rotates_part: bool = False) -> Settings:
    """The rotary arguments of Config, from where transformers 4 (rope_scaling) or 5 (rope_parameters) writes them.

    Models that rotate a part of each head read its share, partial_rotary_factor. `rotates_part` False: others do not,
    and transformers reads past it.

    Raises:
        InputError: a kind of scaling that the model does not know, or two places that contradict each other.
        KeyError: a number that this kind needs is missing.
    """
    # the two places
    new = rope_form(hf, "rope_parameters")
    old = rope_form(hf, "rope_scaling")
    if new and old and new != old:
        raise InputError(
            "rope_scaling and rope_parameters contradict each other. Keep one of them, with the rope_theta in it."
        )
    form = old or new or rope_form(hf | {"rope_scaling": {"rope_type": "default"}}, "rope_scaling")
    rope_type = form["rope_type"]

    # its base, and the share of each head
    base = form["rope_theta"]  # the caller turns a KeyError into a sentence, see `errors.reading`
    share = form.get("partial_rotary_factor", 1.0)
    for key, value in (("rope_theta", base), ("partial_rotary_factor", share)):
        check_kind(key, value, 1.0)
    if not rotates_part:
        if rope_type != "default" and share != 1:
            raise InputError(f"partial_rotary_factor is {share}, but a {hf['model_type']} model rotates whole heads.")
        share = 1.0

    # its numbers
    numbers = (*ROPE_TYPES[rope_type], *ROPE_OPTIONS.get(rope_type, ()))
    scaling = {key: form[key] for key in numbers if form.get(key) is not None}
    length = hf["max_position_embeddings"]
    if "original_max_position_embeddings" in numbers:
        original = scaling.setdefault("original_max_position_embeddings", length)
        check_kind("original_max_position_embeddings", original, 1)
    if rope_type == "longrope" or (rope_type == "yarn" and "factor" in form):
        # null stands for how much longer the context has become; in longrope, so does silence
        scaling.setdefault("factor", length / scaling["original_max_position_embeddings"])
    for key in ROPE_TYPES[rope_type]:
        scaling[key]  # a KeyError, too
    return dict(
        rope_scaling=None if rope_type == "default" else {"rope_type": rope_type} | scaling,
        rope_base=base,
        rotary_percentage=share,
    )


BASE_AND_SHARE = ("rope_theta", "partial_rotary_factor")  # at the top, before transformers 5


def rope_form(hf: dict[str, Any], place: str) -> dict[str, Any]:
    """What rope_scaling or rope_parameters says, with its kind and its base; empty if it says nothing.

    Raises:
        InputError: it is no mapping, or one for each kind of layer, or says two things of one.
    """
    written = hf.get(place)
    if not written:
        return {}
    if not isinstance(written, dict):
        raise InputError(f"{place} is {written!r}, expected a mapping.")
    nested = [key for key, value in written.items() if isinstance(value, dict)]
    if nested:
        raise InputError(f"{place} has {nested[0]!r}, but all layers of a {hf['model_type']} model rotate alike.")

    # the kind, under two names
    form = dict(written)
    names = [form.pop(key) for key in ("rope_type", "type") if key in form] or ["default"]
    names = [FORMER_ROPE_TYPES.get(name, name) for name in names]
    if names[0] not in ROPE_TYPES:
        raise InputError(f"the rotary scaling {names[0]!r} is not known; known are {', '.join(ROPE_TYPES)}.")
    if names[-1] != names[0]:
        raise InputError(f"{place} has rope_type {names[0]!r} and type {names[-1]!r}, expected the same of both.")
    form["rope_type"] = names[0]

    # what also stands at the top
    for key in BASE_AND_SHARE:
        if hf.get(key) is not None:
            form.setdefault(key, hf[key])
    original = hf.get("original_max_position_embeddings")
    if original is not None and names[0] in ("llama3", "yarn", "longrope"):
        key = "original_max_position_embeddings"
        if form.setdefault(key, original) != original:
            raise InputError(f"{key} is {original!r}, and {form[key]!r} in {place}, expected the same of both.")
    return form
