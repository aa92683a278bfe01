"""A plugin of mypy, named in pyproject.toml: attributes of a torch module that mypy cannot see are Any.

torch declares such an attribute, a buffer or a module that is found by its name, as Tensor | Module. mypy then refuses
`model.transformer.h[0]` and every use of a buffer.
"""

from collections.abc import Callable

from mypy.plugin import AttributeContext, Plugin
from mypy.types import AnyType, Type, TypeOfAny, UnionType, get_proper_type

MODULE = "torch.nn.modules.module.Module."  # where __getattr__ is defined, before the name that is asked for


class ModuleAttributes(Plugin):
    def get_attribute_hook(self, fullname: str) -> Callable[[AttributeContext], Type] | None:
        return hidden_attribute if fullname.startswith(MODULE) else None


def hidden_attribute(context: AttributeContext) -> Type:
    """Any in the place of Tensor | Module; what Module itself declares, such as `training`, keeps its type."""
    if isinstance(get_proper_type(context.default_attr_type), UnionType):
        return AnyType(TypeOfAny.special_form)
    return context.default_attr_type


def plugin(version: str) -> type[Plugin]:
    return ModuleAttributes
