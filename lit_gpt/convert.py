"""Hugging Face's tensor names and ours, both directions from the family's one map."""

import re

import torch

from lit_gpt import families
from lit_gpt.config import Config


def to_lit(name: str, tensor: torch.Tensor, config: Config) -> list[tuple[str, torch.Tensor]]:
    """A checkpoint's tensor under our names; nothing for what no model needs (IGNORED, the head of a tied model).

    Raises:
        KeyError: the family does not know the name.
    """
    family = families.load(config.family)
    if name.endswith(family.IGNORED):
        return []
    ours = translate(name, family.WEIGHTS)
    return [] if config.tie_embeddings and ours.startswith("lm_head.") else [(ours, tensor)]


def to_hf(name: str, config: Config) -> str:
    """The checkpoint's name of our tensor."""
    return translate(name, {ours: theirs for theirs, ours in families.load(config.family).WEIGHTS.items()})


def translate(name: str, names: dict[str, str]) -> str:
    """`model.layers.3.mlp.up_proj.weight` -> `transformer.h.3.mlp.fc_2.weight`."""
    module, _, leaf = name.rpartition(".")
    number = r"(?<=\.)\d+(?=\.|$)"
    return names[re.sub(number, "{}", module)].format(*re.findall(number, module)) + f".{leaf}"
