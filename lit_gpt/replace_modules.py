"""Swap modules of a built model in place: the one tree walk behind LoRA, adapters and quantization."""

from collections.abc import Callable

from torch import nn


def replace_modules(model: nn.Module, swap: Callable[[str, nn.Module], nn.Module | None]) -> list[str]:
    """Offers every submodule to `swap(name, module)`; what it returns, if anything, takes the module's place.

    `name` is the path that the state dict uses, such as `transformer.h.3.attn.q`. The walk does not enter a module
    that was just put in, so `swap` may wrap what it was given. Returns the names that were swapped.
    """
    swapped = []

    def walk(parent: nn.Module, path: str) -> None:
        # a list, since the loop replaces children while it runs
        for key, child in list(parent.named_children()):
            name = f"{path}.{key}" if path else key
            new = swap(name, child)
            if new is None:
                walk(child, name)
            else:
                setattr(parent, key, new)
                swapped.append(name)

    walk(model, "")
    return swapped
