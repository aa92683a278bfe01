"""Scripts as modules, so that a test can call their `main` in its own process."""

import dataclasses
import functools
import importlib.util
import inspect
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from lit_gpt.cli import dataclasses_of_flags, fields_for_flags
from lit_gpt.lock import release_all

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted(path for folder in ("scripts", "finetune", "generate") for path in (ROOT / folder).glob("*.py"))


def load(path: Path) -> ModuleType:
    """A new module of a script, as it is."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def script(path: str) -> ModuleType:
    """A new module of the script at this path below the repository. Its `main` takes flags one by one: `by_flags`."""
    module = load(ROOT / path)
    module.main = by_flags(module.main)
    return module


def by_flags(main: Callable[..., None]) -> Callable[..., None]:
    """A `main` that takes the fields of its `Flags` parameters one by one: main(seed=3) is --seed 3.

    A field that is not given keeps the value that the script's default has. Positional arguments are the parameters
    that are no `Flags`, in their order.
    """
    flat = dataclasses_of_flags(main)
    parameters = inspect.signature(main).parameters
    positional = [name for name in parameters if name not in flat]
    defaults = {name: parameters[name].default for name in flat}
    defaults = {name: default for name, default in defaults.items() if default is not inspect.Parameter.empty}

    @functools.wraps(main)
    def called(*args: Any, **settings: Any) -> None:
        settings |= dict(zip(positional, args, strict=False))
        for name, kind in flat.items():
            fields = {*fields_for_flags(main, kind)} & settings.keys()
            values = {field: settings.pop(field) for field in fields}
            if name not in defaults:
                settings[name] = kind(**values)
            elif values:
                settings[name] = dataclasses.replace(defaults[name], **values)
        try:
            main(**settings)
        finally:
            release_all()  # as at the end of the script's process

    return called


lora = script("finetune/lora.py")
