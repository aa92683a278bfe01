"""What the checkpoints of each model family look like, as data. One file per family; no torch.

A family file defines
    MODEL_TYPES  the `model_type`s of config.json that it understands
    MODELS       published names and their sizes
    WEIGHTS      their module names -> ours; {} stands for a number
    IGNORED      tensors that some checkpoints carry and no model needs
    from_hf      config.json -> arguments of Config
To add one, write the file and put its name into FAMILIES.
"""

import difflib
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from lit_gpt.errors import InputError

FAMILIES = ("llama",)


def load(family: str) -> ModuleType:
    return import_module(f"lit_gpt.families.{family}")


def by_name(name: str) -> tuple[str, dict[str, Any]]:
    """(family, arguments of Config) of a published model."""
    known = {}
    for family in FAMILIES:
        for repo, sizes in load(family).MODELS.items():
            known[repo] = known[repo.split("/")[-1]] = (family, sizes)
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3) or sorted(known)[:3]
        raise InputError(f"No model is called {name!r}. Near it: {', '.join(near)}.")
    return known[name]


def from_hf(hf: dict[str, Any], path: Path) -> tuple[str, dict[str, Any]]:
    """(family, arguments of Config) of a Hugging Face config.json, which was read from `path`."""
    kinds = {kind: family for family in FAMILIES for kind in load(family).MODEL_TYPES}
    kind = hf.get("model_type")
    if kind not in kinds:
        raise InputError(f"{path} says model_type {kind!r}; known are {', '.join(sorted(kinds))}.")
    try:
        return kinds[kind], load(kinds[kind]).from_hf(hf)
    except KeyError as error:
        raise InputError(f"{path} has no {error}, which a {kind} model needs. Copy or download it again.") from None
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


ROPE_SCALINGS = {  # known kinds, and what each must say
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


def rope(hf: dict[str, Any]) -> dict[str, Any]:
    """The rotary arguments of Config, from where transformers 4 or 5 writes them.

    Raises:
        InputError: a kind of scaling that the model does not know.
        KeyError: a number that this kind needs is missing.
    """
    parameters = hf.get("rope_parameters") or {}
    scaling = dict(hf.get("rope_scaling") or parameters)
    scaling["rope_type"] = kind = scaling.pop("type", None) or scaling.get("rope_type") or "default"
    if kind not in ROPE_SCALINGS:
        raise InputError(f"the rotary scaling {kind!r} is not known; known are {', '.join(ROPE_SCALINGS)}.")
    for key in ROPE_SCALINGS[kind]:
        scaling[key]
    base = scaling.pop("rope_theta", None) or hf.get("rope_theta") or 10000
    return {"rope_base": base, "rope_scaling": None if kind == "default" else scaling}
