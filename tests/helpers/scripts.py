"""Scripts as modules, so that a test can call their `main` in its own process."""

import dataclasses
import functools
import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from lit_gpt.cli import dataclasses_of_flags

ROOT = Path(__file__).parents[2]


def script(path: str) -> ModuleType:
    """The script at this path below the repository; its `main` takes flags as a command line does, one by one."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main = by_flags(module.main)
    return module


def by_flags(main: Callable[..., None]) -> Callable[..., None]:
    """`main`, with the fields of its `Flags` parameters given one by one, as in main(seed=3) for --seed 3."""
    flat = dataclasses_of_flags(main)
    parameters = main.__code__.co_varnames[: main.__code__.co_argcount]
    defaults = dict(zip(reversed(parameters), reversed(main.__defaults__ or ()), strict=False))

    @functools.wraps(main)
    def called(*args: Any, **settings: Any) -> None:
        settings |= dict(zip([name for name in parameters if name not in flat], args, strict=False))
        for name, kind in flat.items():
            given = {field.name for field in dataclasses.fields(kind)} & settings.keys()
            values = {key: settings.pop(key) for key in given}
            if values or name not in defaults:
                settings[name] = dataclasses.replace(defaults[name], **values) if name in defaults else kind(**values)
        main(**settings)

    return called


lora = script("finetune/lora.py")
