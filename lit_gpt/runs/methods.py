"""The fine-tuning methods, and the only list of them.

A method is a function that changes a built model in place (lora.py, adapter.py, full.py), its settings, and the choice
of the tensors that train and are saved. Everything else asks this table and never for a method's name.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from lit_gpt.adapter import (
    Adapter,
    adapter_filter,
    adapter_scaled,
    adapter_v2_filter,
    apply_adapter,
    apply_adapter_v2,
    fix_adapter_scale,
    scale_adapter,
)
from lit_gpt.full import Full, mark_chosen_as_trainable
from lit_gpt.lora import LoRA, apply_lora, fix_lora_scale, lora_filter, lora_scaled, scale_lora
from lit_gpt.model.gpt import GPT


@dataclass(frozen=True)
class Method:
    """How one way of fine-tuning changes a model, and what of the model it trains."""

    name: str
    """It stands in the header of the method's files, and is the stem of its script in finetune/."""
    title: str
    """For people: the heading of a report."""
    settings: type
    """The dataclass of its settings."""
    flag: str
    """The parameter of a script's `main` that is such a dataclass."""
    apply: Callable[[GPT, Any], Any]
    """Changes a loaded model in place and returns it, or a module that is now around it."""
    filter: Callable[[str, Any], bool]
    """Whether a named parameter belongs to the method: these are saved."""
    trains_base: bool = False
    """Whether the base's own weights train. They need a dtype that can be trained, and cannot be quantized; several
    devices split them, and what is saved is a model of its own: a Hugging Face folder."""
    scale: Callable[[GPT, float], None] | None = None
    """Uses so much of what was trained, from then on: 1 is all of it, 0 the base. None if the base is gone."""
    fix_scale: Callable[[GPT], None] | None = None
    """Changes the trained weights such that they have the scale themselves, which is 1 again."""
    scaled: Callable[[GPT, float], AbstractContextManager[None]] | None = None
    """The same for a while: a context, after which all is as it was."""


def in_place(surgeon: Callable[[GPT, Any], Any]) -> Callable[[GPT, Any], GPT]:
    """`surgeon` with the model as its result, in place of the names of what it changed."""

    def apply(model: GPT, settings: Any) -> GPT:
        surgeon(model, settings)
        return model

    return apply


def every_parameter(key: str, value: Any = None) -> bool:
    return True


LORA = Method(
    name="lora",
    title="LoRA",
    settings=LoRA,
    flag="lora",
    apply=in_place(apply_lora),
    filter=lora_filter,
    scale=scale_lora,
    fix_scale=fix_lora_scale,
    scaled=lora_scaled,
)
ADAPTER = Method(
    name="adapter",
    title="LLaMA-Adapter",
    settings=Adapter,
    flag="adapter",
    apply=in_place(apply_adapter),
    filter=adapter_filter,
    scale=scale_adapter,
    fix_scale=fix_adapter_scale,
    scaled=adapter_scaled,
)
ADAPTER_V2 = Method(
    name="adapter_v2",
    title="LLaMA-Adapter v2",
    settings=Adapter,
    flag="adapter",
    apply=in_place(apply_adapter_v2),
    filter=adapter_v2_filter,
    scale=scale_adapter,
    fix_scale=fix_adapter_scale,
    scaled=adapter_scaled,
)
FULL = Method(
    name="full",
    title="Full fine-tuning",
    settings=Full,
    flag="full",
    apply=in_place(mark_chosen_as_trainable),
    filter=every_parameter,  # also the ones that were left frozen: what is saved is a whole model
    trains_base=True,
)
# a new method is a line here, and a script in finetune/
METHODS = {method.name: method for method in (LORA, ADAPTER, ADAPTER_V2, FULL)}
