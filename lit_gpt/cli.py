"""From a typed `main(...)` to a command: flags, `--config FILE`, `--help`, errors of one line. The only file that
knows jsonargparse."""

import dataclasses
import difflib
import errno
import gc
import inspect
import os
import re
import select
import shlex
import sys
import traceback
from collections.abc import Callable
from inspect import Parameter, signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, TypeVar, get_type_hints

from lit_gpt.errors import InputError
from lit_gpt.failures import end_failed_process, end_process, is_one_of_several
from lit_gpt.files import write_whole

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

Settings = TypeVar("Settings")
FLAT = "each field is a flag of its own"
Flags = Annotated[Settings, FLAT]
"""`args: Flags[RunArgs]` in a script's `main` makes every field of RunArgs a flag: --seed, and not --args.seed."""

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
    except KeyboardInterrupt:
        fail("Interrupted.", status=130)
    except Exception as error:
        # what reads the output, such as `head`, has read enough
        if isinstance(error, BrokenPipeError) and is_stdout_closed():
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            end_process(141)  # as if by SIGPIPE

        # what the user can mend
        line = line_to_mend(error)
        if line is not None:
            fail(line)

        # a bug
        if not is_one_of_several():
            raise
        end_failed_process(traceback.format_exc().rstrip(), status=1)


def line_to_mend(error: Exception) -> str | None:
    """What the user should know about an error and can mend; None for a bug."""
    if isinstance(error, InputError):
        return str(error)
    if not isinstance(error, OSError):
        return None
    if error.errno in DISK_FULL:
        where = f": {error.filename}" if error.filename else ""
        return f"{error.strerror}{where}. Free some space and run again."
    if error.filename is None:
        return None
    return f"{error.strerror}: {error.filename}"


def is_stdout_closed() -> bool:
    """Whether nobody reads stdout any more."""
    stdout = select.poll()
    stdout.register(1, 0)  # 0: only errors
    return bool(stdout.poll(0))


def fail(line: str, status: int = 2) -> NoReturn:
    """Ends the command with one line on stderr; if it runs in several processes, that of the first one that fails."""
    sys.stdout.flush()
    line = re.sub(r"\s*\n\s*", " ", line.strip())  # a message of another library may have several
    end_failed_process(f"error: {line}", status)


def parse(main: Callable[..., None], args: list[str]) -> dict[str, Any]:
    """The arguments of `main` that the command line, and the file after `--config`, ask for.

    Raises:
        InputError: an unknown flag or key, or a value of another type than the parameter's.
    """
    gc.freeze()  # torch's million objects stay for good; looking through them costs --help 0.2 s
    from jsonargparse import ArgumentError

    parser = make_parser(main)
    try:
        values = vars(parser.instantiate(parser.parse_args(args)))
    except ArgumentError as error:
        raise InputError(explain(str(error), option_strings(parser))) from None
    except UnicodeDecodeError as error:
        raise InputError(f"The file after --config is not UTF-8 ({error}). Save it as UTF-8.") from None
    values.pop("config", None)

    # the fields of a `Flags` parameter come back as values of their own: put them together again
    for name, kind in dataclasses_of_flags(main).items():
        fields = {field.name: values.pop(field.name) for field in dataclasses.fields(kind)}
        values[name] = kind(**fields)
    return values


def make_parser(main: Callable[..., None]) -> "ArgumentParser":
    """One flag for each parameter of `main`, in groups; `Flags` parameters give one for each of their fields."""
    from jsonargparse import ArgumentParser, set_loader, set_parsing_settings
    from yaml import YAMLError

    set_loader("text", load_text, exceptions=(YAMLError,))
    set_parsing_settings(docstring_parse_attribute_docstrings=True)  # a field's docstring is its help
    summary = (main.__doc__ or "").split("\n    Args:")[0].strip()
    parser = ArgumentParser(
        exit_on_error=False,
        allow_abbrev=False,
        parser_mode="text",
        usage="%(prog)s [--config FILE] [--FLAG VALUE ...]",
        description=summary,
        epilog=examples(main),
        formatter_class=help_formatter(),
    )
    config_help = "A YAML file of settings, such as a run's hyperparameters.yaml"
    parser.add_argument("--config", action="config", help=config_help)

    # the parameters of `main` itself, then one group for each `Flags` parameter
    flat = dataclasses_of_flags(main)
    parser.add_function_arguments(main, as_group=False, sub_configs=False, skip=set(flat))
    for name, kind in flat.items():
        parser.add_class_arguments(kind, as_group=True, sub_configs=False)
        default = signature(main).parameters[name].default
        if default is not Parameter.empty:
            parser.set_defaults(vars(default))
    return parser


def dataclasses_of_flags(main: Callable[..., None]) -> dict[str, type]:
    """The parameters of `main` that are annotated `Flags[Settings]`, and their dataclasses."""
    kinds = {}
    for name, hint in get_type_hints(main, include_extras=True).items():
        if FLAT in getattr(hint, "__metadata__", ()):
            kinds[name] = hint.__origin__
    return kinds


def option_strings(parser: "ArgumentParser") -> list[str]:
    """Every flag that a parser knows, such as --seed."""
    flags: list[str] = []
    for action in parser._actions:
        flags.extend(action.option_strings)
    return flags


def load_text(text: str) -> Any:
    """A flag's text as YAML. YAML takes "# Be brief." for a comment: such a text, which has no value, is itself."""
    from jsonargparse import get_loader

    value = get_loader("yaml")(text)
    return text if value is None else value  # jsonargparse sees to `null` before it comes here


def examples(main: Callable[..., None]) -> str | None:
    """The commands in the docstring of the script, for the end of --help."""
    docstring = inspect.cleandoc(main.__globals__.get("__doc__") or "")
    first_words = re.compile(r"\s*(python|bash|echo|--)")
    commands = [f"  {line.strip()}" for line in docstring.split("\n") if first_words.match(line)]
    if not commands:
        return None
    return "\n".join(["examples:", *commands])


def help_formatter() -> type:
    """jsonargparse's, but the examples at the end keep their lines."""
    from jsonargparse import DefaultHelpFormatter

    class Formatter(DefaultHelpFormatter):
        def _fill_text(self, text: str, width: int, indent: str) -> str:
            if text.startswith("examples:"):
                return text
            return super()._fill_text(text, width, indent)

    return Formatter


# jsonargparse's English -> ours, one after the other. Seen in version 4.49; a pattern that no longer matches changes
# nothing.
REWRITES = (
    # errors of YAML have several lines
    (r"\s+", " "),
    (r"^ | $", ""),
    # "Parser key "number":" is a flag, for who typed one
    (r"^Parser key ", ""),
    (r"^\"([\w.]+)\":", r"--\1:"),
    # a Union's error lists the errors of all its types: only the types and the value are of use
    (r"Does not validate .* Subtypes: \[(.+)\] Errors: .* Given value: (.*)", r"Expected \1. Got \2"),
    # types as they are written in YAML
    (r"<class '(\w+)'>", r"\1"),
    (r"NoneType", "null"),
    # a sentence follows, after a point of our own
    (r"\.+$", ""),
)
# What was mistyped, in the words of jsonargparse: a flag, a key of the file, or a key below another one of the file
UNKNOWN_FLAG = r"unrecognized arguments: ([^\s=]+)"
UNKNOWN_KEY = r"(?:Group '(?P<group>.+)' does not accept o|O)ption '(?P<key>.+?)'"
GIVEN_LIST = r"Got (?:value: )?([\[{].*)"


def explain(message: str, flags: list[str]) -> str:
    """jsonargparse's message in one line, and what to type next: the nearest of `flags` if one was mistyped."""
    line = message
    for pattern, replacement in REWRITES:
        line = re.sub(pattern, replacement, line)

    hint = "See --help."
    nearest = difflib.get_close_matches(mistyped_flag(line), flags, n=1)
    if nearest:
        hint = f"Did you mean {nearest[0]}?"
    given = re.search(GIVEN_LIST, line)
    if given and not is_yaml(given[1]):
        hint = """In a list or mapping, what holds brackets needs quotes of its own: '["mlp.fc_[12]", lm_head]'."""
    return f"{line}. {hint}"


def mistyped_flag(line: str) -> str:
    """The flag that does not exist, or the one that a key of the file would be; empty if it is another error."""
    flag = re.search(UNKNOWN_FLAG, line)
    if flag:
        return flag[1]
    key = re.search(UNKNOWN_KEY, line)
    if key is None:
        return ""
    return f"--{key['group']}.{key['key']}" if key["group"] else f"--{key['key']}"


def is_yaml(text: str) -> bool:
    import yaml

    try:
        yaml.safe_load(text)
    except yaml.YAMLError:
        return False
    return True


# ---- hyperparameters.yaml


def command() -> str:
    """The command line as it can be typed again."""
    script = os.path.relpath(sys.argv[0])
    return shlex.join(["python", script, *sys.argv[1:]])


def save_hyperparameters(path: Path, settings: dict[str, Any]) -> None:
    """Writes the arguments of a `main` such that `--config path` repeats the run.

    `resume` and `overwrite` are left out: they say what to do with a folder, and have to be asked for each time.
    """
    settings = {name: value for name, value in settings.items() if name not in ("resume", "overwrite")}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, f"# {command()}\n{as_yaml(settings)}")


def read_hyperparameters(path: Path) -> dict[str, Any]:
    """The settings that `save_hyperparameters` wrote, as YAML has them.

    Raises:
        InputError: the file has been edited and is no YAML now.
    """
    import yaml

    try:
        return yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not readable as YAML ({error}).") from None


def as_yaml(settings: dict[str, Any]) -> str:
    """Settings as YAML, in their order."""
    import yaml

    class Dumper(yaml.SafeDumper):
        """A class of our own, since a resolver is added to a class."""

    # jsonargparse reads 1e-5 as a number, which YAML 1.1 does not: a text that looks like it needs quotes
    Dumper.add_implicit_resolver(
        tag="tag:yaml.org,2002:float",
        regexp=re.compile(r"[-+]?\d[\d_]*[eE][-+]?\d+$"),
        first=list("+-0123456789"),
    )
    settings = {name: plain(value) for name, value in settings.items()}
    return yaml.dump(settings, Dumper=Dumper, sort_keys=False, allow_unicode=True)


def plain(value: Any) -> Any:
    """A setting as YAML knows it: dataclasses as mappings, tuples as lists, paths as text."""
    if dataclasses.is_dataclass(value):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    return value
