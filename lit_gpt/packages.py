"""Packages that only some scripts need: one check, and one sentence that says how to install them."""

import importlib
from importlib.util import find_spec
from types import ModuleType

from lit_gpt.errors import InputError

# pip's name for what is imported under another one, or has to be new enough
PIP_NAMES = {"sklearn": "scikit-learn", "bitsandbytes": "bitsandbytes>=0.50"}


def is_installed(package: str) -> bool:
    """Whether a package can be imported. "pyarrow.parquet" asks for pyarrow."""
    name = top_level(package)
    return find_spec(name) is not None


def require(package: str, extra: str | None, purpose: str) -> None:
    """Makes sure that an optional package is there, before any work is done that would need it.

    Args:
        package: The name that is imported, such as "sklearn".
        extra: The extra of pyproject.toml that brings it, such as "classify". None is a package of the core, which
            may be missing all the same.
        purpose: What needs it, as the subject of a sentence: "The plot".

    Raises:
        InputError: it is not installed.
    """
    if not is_installed(package):
        command = how_to_install(package, extra)
        raise InputError(f"{purpose} needs {command}")


def import_optional(package: str, extra: str | None, purpose: str) -> ModuleType:
    """The module of an optional package, imported only now. The arguments are those of `require`.

    Raises:
        InputError: it is not installed, or its own import fails.
    """
    require(package, extra, purpose)
    try:
        return importlib.import_module(package)
    except ImportError as error:
        # it is there, and lacks a library of its own: perhaps a file of CUDA
        command = how_to_install(package, extra)
        raise InputError(f"{purpose} needs {command} ({error})") from error


def import_fabric() -> None:
    """Imports lightning_fabric without torchmetrics, so that an import statement after this one takes no time.

    lightning_fabric 2.6 imports torchmetrics to compare its version, and torchmetrics imports scipy, matplotlib and
    transformers: three to six seconds of each start. The answer is for a detector of spikes, which nothing here uses.
    """
    from lightning_utilities.core import imports

    compare_version = imports.compare_version
    imports.compare_version = lambda name, *args: name != "torchmetrics" and compare_version(name, *args)
    try:
        importlib.import_module("lightning_fabric")
    finally:
        imports.compare_version = compare_version


def how_to_install(package: str, extra: str | None) -> str:
    """A package by pip's name, and the command: "matplotlib: pip install -e '.[report]'"."""
    name = top_level(package)
    name = PIP_NAMES.get(name, name)
    if extra is None:
        return f"{name}: pip install '{name}'"
    return f"{name}: pip install -e '.[{extra}]'"


def top_level(package: str) -> str:
    # find_spec("pyarrow.parquet") would import pyarrow, and fail if there is none
    return package.split(".")[0]
