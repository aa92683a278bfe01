"""Packages that only some scripts need: one check, and one sentence that says how to install them."""

from importlib.util import find_spec

from lit_gpt.errors import InputError


def is_installed(package: str) -> bool:
    return find_spec(package) is not None


def require(package: str, extra: str, purpose: str) -> None:
    """Makes sure that an optional package is there, before any work is done that would need it.

    Args:
        package: The name that is imported, such as "sklearn".
        extra: The extra of pyproject.toml that brings it, such as "classify".
        purpose: What needs it, as the subject of a sentence: "The plot".

    Raises:
        InputError: it is not installed.
    """
    if not is_installed(package):
        raise InputError(f"{purpose} needs the package {package}: pip install -e '.[{extra}]'")
