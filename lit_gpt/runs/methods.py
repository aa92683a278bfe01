"""The fine-tuning methods: one line each, and the only list of them.

A method is a surgeon (lora.py, adapter.py, full.py), its settings, and the answer to 'which tensors train and are
saved'. Everything else asks this table and never for a method's name.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from lit_gpt.adapter import Adapter, adapter_filter, adapter_v2_filter, apply_adapter, apply_adapter_v2
from lit_gpt.full import Full, mark_chosen_as_trainable
from lit_gpt.lora import LoRA, apply_lora, lora_filter
from lit_gpt.model.gpt import GPT


@dataclass(frozen=True)
class Method:
    """How one way of fine-tuning changes a model, and what of the model it trains."""

    name: str
    """In the header of its files, and the stem of the script in finetune/."""
    title: str
    settings: type
    """A dataclass; a script's parameter `flag` is one."""
    flag: str
    apply: Callable[[GPT, Any], nn.Module]
    """Changes a loaded model in place and returns it, or the module that is now around it."""
    filter: Callable[[str, Any], bool]
    """Whether a named parameter belongs to the method: these are saved."""
    trains_base: bool = False
    """The base's own weights train. They need a dtype that can be trained and cannot be quantized; several devices
    split them, and what is saved is a model of its own: a Hugging Face folder."""


def in_place(surgeon: Callable[[GPT, Any], Any]) -> Callable[[GPT, Any], GPT]:
    """A surgeon that returns the model, not the names of what it changed."""

    def apply(model: GPT, settings: Any) -> GPT:
        surgeon(model, settings)
        return model

    return apply


def every_parameter(key: str, value: Any = None) -> bool:
    return True


METHODS = {
    method.name: method
    for method in (
        Method("lora", "LoRA", LoRA, "lora", in_place(apply_lora), lora_filter),
        Method("adapter", "LLaMA-Adapter", Adapter, "adapter", in_place(apply_adapter), adapter_filter),
        Method("adapter_v2", "LLaMA-Adapter v2", Adapter, "adapter", in_place(apply_adapter_v2), adapter_v2_filter),
        Method("full", "Full fine-tuning", Full, "full", in_place(mark_chosen_as_trainable), every_parameter, True),
    )
}
