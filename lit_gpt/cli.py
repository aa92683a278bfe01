"""From a typed `main(...)` to a command: flags, `--config FILE`, `--help`, errors of one line. The only file that
knows jsonargparse."""

import dataclasses
import difflib
import errno
import gc
import os
import re
import select
import shlex
import sys
import time
from collections.abc import Callable
from inspect import signature
from pathlib import Path
from typing import Any, get_type_hints

from lit_gpt.errors import InputError

DISK_FULL = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)


def run(main: Callable[..., None]) -> None:
    """Parses the command line into the parameters of `main`, and calls it.

    What the user can mend (an InputError, a flag, a file that cannot be opened, a full disk) ends in one line on
    stderr and status 2. Anything else is a bug and keeps its traceback.
    """
    try:
        settings = parse(main, sys.argv[1:])
        main(**settings)
        sys.stdout.flush()
    except InputError as error:
        fail(str(error))
    except BrokenPipeError:
        stdout = select.poll()
        stdout.register(1, 0)
        if not stdout.poll(0):  # it was another pipe
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what reads the output, such as `head`, has read enough
        sys.exit(141)  # as if by SIGPIPE
    except OSError as error:
        if error.errno in DISK_FULL:
            fail(f"{error.strerror}{f': {error.filename}' if error.filename else ''}. Free some space and run again.")
        if error.filename is None:
            raise
        fail(f"{error.strerror}: {error.filename}")
    except KeyboardInterrupt:
        fail("Interrupted.", status=130)


def fail(line: str, status: int = 2) -> None:
    sys.stdout.flush()
    if int(os.environ.get("LOCAL_RANK") or 0):
        time.sleep(10)  # what all processes of a run find wrong the first one says, and ends the others
    line = re.sub(r"\s*\n\s*", " ", line.strip())  # a message of another library may have several
    print(f"error: {line}", file=sys.stderr, flush=True)
    sys.exit(status)


def parse(main: Callable[..., None], args: list[str]) -> dict[str, Any]:
    """The arguments of `main` that the command line, and the file after `--config`, ask for."""
    gc.freeze()  # torch's million objects stay for good; looking through them costs --help 0.2 s
    from jsonargparse import ArgumentError, ArgumentParser, get_loader, set_loader, set_parsing_settings
    from yaml import YAMLError

    def load(text: str) -> Any:  # YAML takes "# Be brief." for a comment: without a value, such a text is itself
        value = get_loader("yaml")(text)
        return text if value is None else value  # jsonargparse sees to `null` before it comes here

    set_loader("text", load, exceptions=(YAMLError,))
    set_parsing_settings(docstring_parse_attribute_docstrings=True)  # a field's docstring is its help
    summary = (main.__doc__ or "").split("\n    Args:")[0].strip()
    parser = ArgumentParser(exit_on_error=False, allow_abbrev=False, parser_mode="text", description=summary)
    parser.add_argument(
        "--config", action="config", help="A YAML file of settings, such as a run's hyperparameters.yaml"
    )
    own, shared = signature(main).parameters, shared_settings(main)
    for kind in shared:
        parser.add_class_arguments(kind, as_group=False, sub_configs=False, skip={*own})
    fields = {field.name for kind in shared for field in dataclasses.fields(kind)}
    parser.add_function_arguments(main, as_group=False, sub_configs=False, skip=fields - {*own})
    try:
        settings = vars(parser.instantiate(parser.parse_args(args)))
    except ArgumentError as error:
        known = [option for action in parser._actions for option in action.option_strings]
        raise InputError(explain(str(error), known)) from None
    except UnicodeDecodeError as error:
        raise InputError(f"The file after --config is not UTF-8 ({error}). Save it as UTF-8.") from None
    settings.pop("config", None)
    return settings


def shared_settings(main: Callable[..., None]) -> list[type]:
    """The dataclasses whose fields `main` takes as flags of its own, by `**shared: Annotated[Any, Settings]`."""
    rest = [param for param in signature(main).parameters.values() if param.kind is param.VAR_KEYWORD]
    return [kind for param in rest for kind in get_type_hints(main, include_extras=True)[param.name].__metadata__]


def explain(message: str, known: list[str]) -> str:
    """jsonargparse's message in one line, with the nearest flag where one, or a key of the file, was mistyped."""
    line = re.sub(r"\s+", " ", message.removeprefix("Parser key ")).strip().rstrip(".")
    line = re.sub(r"Does not validate .* Subtypes: \[(.+)\] Errors: .* Given value: (.*)", r"Expected \1. Got \2", line)
    line = re.sub(r"^\"([\w.]+)\":", r"--\1:", re.sub(r"<class '(\w+)'>", r"\1", line)).replace("NoneType", "null")
    unknown = ""
    if found := re.search(r"unrecognized arguments: ([^\s=]+)", line):
        unknown = found[1]
    elif found := re.search(r"(?:Group '(.+)' does not accept o|O)ption '(.+?)'", line):
        unknown = "--" + ".".join(filter(None, found.groups()))
    near = difflib.get_close_matches(unknown, known, n=1)
    hint = f"Did you mean {near[0]}?" if near else "See --help."
    if (found := re.search(r"Got (?:value: )?([\[{].*)", line)) and not is_yaml(found[1]):
        hint = """In a list or mapping, what holds brackets needs quotes of its own: '["mlp.fc_[12]", lm_head]'."""
    return f"{line}. {hint}"


def is_yaml(text: str) -> bool:
    import yaml

    try:
        yaml.safe_load(text)
    except yaml.YAMLError:
        return False
    return True


def command() -> str:
    """The command line as it can be typed again."""
    return shlex.join(["python", os.path.relpath(sys.argv[0]), *sys.argv[1:]])


def save_hyperparameters(path: Path, settings: dict[str, Any]) -> None:
    """Writes the arguments of a `main` such that `--config path` repeats the run.

    `resume` and `overwrite` are left out: they say what to do with a folder, and have to be asked for each time.
    """
    settings = {name: value for name, value in settings.items() if name not in ("resume", "overwrite")}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"# {command()}\n{as_yaml(settings)}", encoding="utf-8")


def read_hyperparameters(path: Path) -> dict[str, Any]:
    import yaml

    try:
        return yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not readable as YAML ({error}).") from None


def as_yaml(settings: dict[str, Any]) -> str:
    import yaml

    class Dumper(yaml.SafeDumper):
        pass

    # jsonargparse reads 1e-5 as a number, which YAML 1.1 does not: a text that looks like it needs quotes
    Dumper.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?\d[\d_]*[eE][-+]?\d+$"), [*"+-0123456789"]
    )
    settings = {key: plain(value) for key, value in settings.items()}
    return yaml.dump(settings, Dumper=Dumper, sort_keys=False, allow_unicode=True)


def plain(value: Any) -> Any:
    """A setting as YAML knows it: dataclasses as mappings, paths as text."""
    if dataclasses.is_dataclass(value):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
