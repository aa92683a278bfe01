"""From a typed `main(...)` to a command: flags, `--config FILE`, `--help`, errors of one line. The only file that
knows jsonargparse."""

import dataclasses
import difflib
import errno
import gc
import inspect
import json
import os
import re
import select
import shlex
import sys
import traceback
from collections.abc import Callable, Sequence
from inspect import Parameter, signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, TypeVar, get_type_hints

from lit_gpt.errors import InputError, Interrupted
from lit_gpt.failures import end_failed_process, end_process, end_stopped_process, how_to_go_on, is_one_of_several
from lit_gpt.files import expand_home, write_whole
from lit_gpt.out_of_memory import explain_memory

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

Settings = TypeVar("Settings")
FLAT = "each field is a flag of its own"
Flags = Annotated[Settings, FLAT]
"""`args: Flags[RunArgs]` in a script's `main` makes every field of RunArgs a flag: --seed, and not --args.seed. A
parameter of `main` itself takes the place of a field of the same name, which then keeps its default."""

PASSED_ON = "the words that are for another script"
PassedOn = Annotated[tuple[str, ...], PASSED_ON]
"""`flags: PassedOn = ()` in a script's `main` receives, as they were typed, the flags that the script does not have:
those of another script, which it plans or runs."""

NOT_READ_BY_YAML = (ValueError, TypeError, LookupError, AttributeError)
"""What PyYAML raises, besides its own errors, for a value that is not what its form says: `!!int a`, 2020-13-45."""

DISK_FULL = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)


def run(main: Callable[..., None]) -> None:
    """Parses the command line into the parameters of `main`, and calls it.

    What the user can mend (an InputError, a flag, a file that cannot be opened, a full disk, memory that does not
    suffice) ends in one line on stderr and status 2. Anything else is a bug and keeps its traceback.
    """
    open_closed_streams()
    try:
        settings = parse(main, sys.argv[1:])
        main(**settings)
        sys.stdout.flush()
    except KeyboardInterrupt:
        fail(f"Interrupted.{how_to_go_on()}", status=130)
    except Interrupted as stop:
        end_stopped_process(str(stop), stop.status)
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


def open_closed_streams() -> None:
    """Opens a stream that the shell has closed, as in `<&-` or `>&-`, for which Python has None: it is empty."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))


def line_to_mend(error: Exception) -> str | None:
    """What the user should know about an error and can mend; None for a bug."""
    if isinstance(error, InputError):
        return str(error)
    if not isinstance(error, OSError):
        return explain_memory(error)
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


def parse(main: Callable[..., None], args: Sequence[str], also: Sequence[str] = ()) -> dict[str, Any]:
    """The arguments of `main` that the command line, and the file after `--config`, ask for.

    `also` are flags that exist elsewhere, for "Did you mean": those of a script that passed `args` on.

    Raises:
        InputError: an unknown flag or key, a value of another type than the parameter's, or a text that is not
            UTF-8.
    """
    check_words(args)
    gc.freeze()  # torch's million objects stay for good; looking through them costs --help 0.2 s
    from jsonargparse import ArgumentError

    parser = make_parser(main)
    own_args = list(args)
    passed_on: list[str] = []
    receiver = receiver_of_others(main)
    if receiver:
        own_args, passed_on = split_args(args, option_strings(parser))

    own_args = join_paths(own_args, flags_of_paths(parser), first=flag_of_first_words(main))
    try:
        parsed = parser.parse_args(configs_first(own_args))
        check_groups(parser, vars(parsed))
        values = vars(parser.instantiate(parsed))
    except ArgumentError as error:
        raise InputError(explain(str(error), [*option_strings(parser), *also])) from None
    except UnicodeDecodeError as error:
        raise InputError(f"The file after --config is not UTF-8 ({error}). Save it as UTF-8.") from None
    values.pop("config", None)
    for name, value in values.items():
        check_text(f"--{name}", plain(value))
    if receiver:
        values[receiver] = tuple(passed_on)

    # the fields of a `Flags` parameter come back as values of their own: put them together again
    for name, kind in dataclasses_of_flags(main).items():
        fields = {field: values.pop(field) for field in fields_for_flags(main, kind)}
        values[name] = kind(**fields)
    return values


def configs_first(args: Sequence[str]) -> list[str]:
    """The words of a command line with its --config FILE in front, so that a flag counts wherever it was typed."""
    configs: list[str] = []
    others: list[str] = []
    for word in args:
        is_config = word.partition("=")[0] == "--config" or configs[-1:] == ["--config"]
        (configs if is_config else others).append(word)
    return configs + others


def flags_of_paths(parser: "ArgumentParser") -> set[str]:
    """The flags that take a list of paths."""
    actions = [action for action in parser._actions if getattr(action, "_typehint", None) == list[Path]]
    return {flag for action in actions for flag in action.option_strings}


def flag_of_first_words(main: Callable[..., None]) -> str:
    """The flag whose values may stand before all flags: that of a first parameter of paths that has to be given."""
    for name, parameter in signature(main).parameters.items():
        is_paths = get_type_hints(main)[name] == list[Path]
        return f"--{name}" if is_paths and parameter.default is Parameter.empty else ""
    return ""


def join_paths(args: Sequence[str], flags: set[str], first: str = "") -> list[str]:
    """The words of a command line in which each of these flags stands once, with a list.

    Paths may follow each other, as `--finetuned out/lora/*` has them, or the flag comes again. jsonargparse knows lists
    in brackets alone, which stay as they are. Words before all flags are values of `first`, if there is one.
    """
    others: list[str] = []
    paths: dict[str, list[str]] = {}
    flag = first  # whose values come next
    for word in args:
        value: str | None = word
        if word.startswith("--"):
            flag, has_value, after = word.partition("=")
            value = after if has_value else None
        if flag not in flags:
            others.append(word)
            continue
        values = paths.setdefault(flag, [])
        if value is not None:
            values.append(value)

    for flag, values in paths.items():
        others.append(flag)
        if len(values) == 1 and values[0].startswith("["):
            others.append(values[0])
        elif values:
            others.append(json.dumps(values, ensure_ascii=False))
    return others


def check_groups(parser: "ArgumentParser", values: dict[str, Any]) -> None:
    """Raises InputError if a group of flags, which the file after --config may set as a whole, is no mapping."""
    for group in groups_of(parser):
        value = values.get(group)
        if not hasattr(value, "__dict__"):
            raise InputError(
                f"{group} is a group of settings: expected a mapping. Got {value}. Leave out an empty one."
            )


def groups_of(parser: "ArgumentParser") -> set[str]:
    """The names before the dots of flags, such as train."""
    return {action.dest.split(".")[0] for action in parser._actions if "." in action.dest}


def check_words(args: Sequence[str]) -> None:
    """Raises InputError if a word of the command line is not UTF-8."""
    flag = "The command line"
    for word in args:
        if word.startswith("--"):
            flag = word.partition("=")[0]
        check_text(flag, word)


def check_text(flag: str, value: Any) -> None:
    """Raises InputError if a text, or one in a list or mapping, is not Unicode: it holds half of a surrogate pair.

    Python takes a byte that is not UTF-8 for such a half.
    """
    if isinstance(value, dict):
        check_text(flag, [*value.keys(), *value.values()])
    elif isinstance(value, list):
        for item in value:
            check_text(flag, item)
    elif isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            shown = value.encode("utf-8", "backslashreplace").decode()
            raise InputError(f"{flag} is not UTF-8: '{shown}'. Type it as UTF-8.") from None


def make_parser(main: Callable[..., None]) -> "ArgumentParser":
    """One flag for each parameter of `main`, in groups; `Flags` parameters give one for each of their fields."""
    from jsonargparse import SUPPRESS, ArgumentParser, set_loader, set_parsing_settings
    from jsonargparse.typing import register_type
    from yaml import YAMLError

    register_type(Path, deserializer=lambda path: Path(expand_home(path)), type_check=isinstance)
    set_loader("text", load_text, exceptions=(YAMLError,))
    set_parsing_settings(docstring_parse_attribute_docstrings=True)  # a field's docstring is its help
    summary = (main.__doc__ or "").split("\n    Args:")[0].strip()
    usage = "%(prog)s [--config FILE] [--FLAG VALUE ...]"
    receiver = receiver_of_others(main)
    if receiver:
        usage = "%(prog)s [--FLAG VALUE ...] [FLAGS OF THE OTHER SCRIPT ...]"
    parser = ArgumentParser(
        exit_on_error=False,
        allow_abbrev=False,
        parser_mode="text",
        usage=usage,
        description=summary,
        epilog=examples(main),
        formatter_class=help_formatter(),
    )
    if not receiver:  # else --config, too, is for the other script
        config_help = "A YAML file of settings, such as a run's hyperparameters.yaml"
        parser.add_argument("--config", action="config", help=config_help)

    # the parameters of `main` itself, then one group for each `Flags` parameter
    flat = dataclasses_of_flags(main)
    skip: set[str | int] = {*flat}
    if receiver:
        skip.add(receiver)
    parser.add_function_arguments(main, as_group=False, sub_configs=False, skip=skip)
    for name, kind in flat.items():
        fields = fields_for_flags(main, kind)
        others = {field.name for field in dataclasses.fields(kind)} - {*fields}
        parser.add_class_arguments(kind, as_group=True, sub_configs=False, skip={*others})
        default = signature(main).parameters[name].default
        if default is not Parameter.empty:
            parser.set_defaults({field: getattr(default, field) for field in fields})

    groups = groups_of(parser)
    for action in parser._actions:
        # a switch needs no value: --resume is --resume true
        if getattr(action, "_typehint", None) in (bool, bool | None):
            action.nargs = "?"
            action.const = True

        # as `join_paths` takes them; jsonargparse also names a file of paths, which this is not
        if getattr(action, "_typehint", None) == list[Path]:
            action.metavar = "PATH [PATH ...]"

        # two ways that --help need not teach: a file for a group alone (--lora FILE), and --lora.layers+ to append
        if action.dest in groups:
            action.help = SUPPRESS
        action.option_strings = [flag for flag in action.option_strings if not flag.endswith("+")]
    return parser


def dataclasses_of_flags(main: Callable[..., None]) -> dict[str, type]:
    """The parameters of `main` that are annotated `Flags[Settings]`, and their dataclasses."""
    kinds = {}
    for name, hint in get_type_hints(main, include_extras=True).items():
        if FLAT in getattr(hint, "__metadata__", ()):
            kinds[name] = hint.__origin__
    return kinds


def fields_for_flags(main: Callable[..., None], kind: type) -> list[str]:
    """The fields of a `Flags` parameter's dataclass that are flags: those for which `main` has no parameter."""
    own = signature(main).parameters
    return [field.name for field in dataclasses.fields(kind) if field.name not in own]


def receiver_of_others(main: Callable[..., None]) -> str | None:
    """The parameter of `main` that is annotated `PassedOn`; None if `main` has none, and refuses flags of others."""
    for name, hint in get_type_hints(main, include_extras=True).items():
        if PASSED_ON in getattr(hint, "__metadata__", ()):
            return name
    return None


def split_args(args: Sequence[str], flags: Sequence[str]) -> tuple[list[str], list[str]]:
    """The words that belong to `flags`, and all others. A word that is no flag goes with the flag before it."""
    own: list[str] = []
    others: list[str] = []
    belongs_to = others
    for word in args:
        if word in flags or word.startswith("--"):
            name = word.partition("=")[0]
            belongs_to = own if name in flags else others
        belongs_to.append(word)
    return own, others


def flags_of(main: Callable[..., None]) -> list[str]:
    """Every flag of a script, such as --seed."""
    return option_strings(make_parser(main))


def option_strings(parser: "ArgumentParser") -> list[str]:
    """Every flag that a parser knows."""
    flags: list[str] = []
    for action in parser._actions:
        flags.extend(action.option_strings)
    return flags


def load_text(text: str) -> Any:
    """A flag's text as YAML. YAML takes "# Be brief." for a comment: such a text, which has no value, is itself."""
    from jsonargparse import get_loader
    from yaml import YAMLError

    try:
        value = get_loader("yaml")(text)
    except NOT_READ_BY_YAML as error:
        raise YAMLError(f"{type(error).__name__}: {error}") from None
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
    """jsonargparse's, but types stand there in words, and the examples at the end keep their lines."""
    from jsonargparse import DefaultHelpFormatter

    class Formatter(DefaultHelpFormatter):
        def _expand_help(self, action: Any) -> str:
            return help_in_words(super()._expand_help(action))

        def _fill_text(self, text: str, width: int, indent: str) -> str:
            if text.startswith("examples:"):
                return text
            return super()._fill_text(text, width, indent)

    return Formatter


# jsonargparse's types -> words, where a value was of another one
TYPES = {
    "int": "an integer",
    "float": "a number",
    "bool": "true or false",
    "str": "a text",
    "Path": "a path",
    "dict": "a mapping",
    "list[int]": "a list of integers",
    "list[str]": "a list of texts",
    "list[Path]": "paths",
    "NoneType": "null",
}


def in_words(types: str) -> str:
    """Types, or the values of a Literal, as a user writes them: "bnb.nf4, bnb.int8 or null"."""
    words = [TYPES.get(name, name) for name in types.split(", ")]
    *first, last = words
    return f"{', '.join(first)} or {last}" if first else last


def help_in_words(text: str) -> str:
    """The help of a flag, which ends with its type and its default, in words: "(an integer or null; default: null)"."""
    for pattern, replacement in HELP_REWRITES:
        text = re.sub(pattern, replacement, text, flags=re.DOTALL)
    return text


def type_and_default(found: re.Match) -> str:
    """What stands at the end of a flag's help."""
    required, types, default = found.groups()
    parts = ["required" if required else ""]
    if types != "bool":  # --resume [{true,false}] says it already
        parts.append(in_words(types))
    if default:
        parts.append(f"default: {default}")
    return f"({'; '.join(filter(None, parts))})"


# jsonargparse's help -> ours, one after the other
HELP_REWRITES: tuple[tuple[str, str | Callable[[re.Match], str]], ...] = (
    # as it is typed
    (r"\bNone\b", "null"),
    (r"default: (True|False)\)$", lambda switch: f"default: {switch[1].lower()})"),
    # types: all of a Union in one row
    (r"<class '(\w+)'>", r"\1"),
    (r"dict\[\w+, \w+\]", "dict"),
    (r"Optional\[(.+)\](?=[,)])", r"\1, null"),
    (r"Union\[(.+)\](?=[,)])", r"\1"),
    (r"Literal\[(.+?)\]", lambda values: values[1].replace("'", "")),
    (r" \| null", ", null"),
    (r"\((required, )?type: (.+?)(?:, default: (.*))?\)$", type_and_default),
)


def with_dashes(names: re.Match) -> str:
    """Flags that were left out and have no default, as they are typed."""
    flags = [f"--{name}" for name in names[1].split(", ")]
    return f"Missing: {', '.join(flags)}"


# jsonargparse's English -> ours, one after the other. Seen in version 4.53; a pattern that no longer matches changes
# nothing.
REWRITES: tuple[tuple[str, str | Callable[[re.Match], str]], ...] = (
    # errors of YAML have several lines
    (r"\s+", " "),
    (r"^ | $", ""),
    # "Parser key "number":" is a flag, for who typed one
    (r"^Parser key ", ""),
    (r"^\"([\w.]+)\":", r"--\1:"),
    # a Union's error lists the errors of all its types: only the types and the value are of use
    (r"Does not validate .* Subtypes: \[(.+)\] Errors: .* Given value: ?(.*)", r"Expected \1. Got \2"),
    (r"Expected a (.+)\. Got value: ?", r"Expected \1. Got "),
    (r"Got $", "Got an empty text"),
    # types in words
    (r"<class '([\w.]+)'>", r"\1"),
    (r"typing\.Literal\[(.+?)\]", lambda values: values[1].replace("'", "")),
    (r"Expected (.+)\.(?= Got )", lambda types: f"Expected {in_words(types[1])}."),
    # flags that do not exist, that have no value, that are missing, or that are several
    (r"^unrecognized arguments: (--[^\s=]+).*", r"There is no flag \1"),
    (r"^unrecognized arguments: (.+)", r"No flag stands before: \1"),
    (r"^argument (--\S+): expected one argument", r"\1: Expected a value behind it"),
    (r"^the following arguments are required: (.+)", with_dashes),
    (r"^--(\w+): Unable to load config .*", r"--\1 is a group of flags. Expected one of them, such as --\1.FIELD"),
    (r"^Unexpected config: .*", "The file after --config holds no settings: expected lines such as seed: 1"),
    # a sentence follows, after a point of our own
    (r"\.+$", ""),
)
# What was mistyped, in the words of jsonargparse: a flag, a key of the file, or a key below another one of the file
UNKNOWN_FLAG = r"There is no flag (\S+)"
UNKNOWN_KEY = r"(?:Group '(?P<group>.+)' does not accept o|O)ption '(?P<key>.+?)'"
GIVEN_LIST = r"Got ([\[{].*)"
GIVEN_WORD = r"Expected (.+)\. Got (\S+)$"

# what to type here -> what it is called in other tools
OTHER_NAMES = {
    "--checkpoint_dir": "model base_model model_name model_name_or_path pretrained_model_name_or_path",
    "--data_dir": "data dataset dataset_name train_file",
    "--out_dir": "output output_dir save_dir",
    "--finetuned": "adapter adapter_path adapter_name_or_path lora lora_path peft",
    "--train.learning_rate": "lr",
    "--train.global_batch_size": "batch_size train_batch_size",
    "--train.micro_batch_size": "per_device_train_batch_size micro_batch",
    "--train.epochs": "num_epochs num_train_epochs n_epochs",
    "--train.max_steps": "steps iters max_iters num_steps",
    "--train.optimizer_in_backward": "optimizer_in_bwd",
    "--train.max_norm": "max_grad_norm gradient_clip_val clip_grad",
    "--lora.r": "lora_r lora_rank rank",
    "--lora.alpha": "lora_alpha",
    "--lora.dropout": "lora_dropout",
    "--quantize bnb.nf4": "load_in_4bit qlora",
    "--quantize bnb.int8": "load_in_8bit",
    "--precision bf16-true": "bf16 bfloat16",
    "--activation_checkpointing block": "gradient_checkpointing",
    "--resume": "resume_from_checkpoint",
}


def explain(message: str, flags: list[str]) -> str:
    """jsonargparse's message in one line, and what to type next: the nearest of `flags` if one was mistyped."""
    line = message
    for pattern, replacement in REWRITES:
        line = re.sub(pattern, replacement, line)

    hint = "See --help."
    nearest = nearest_flag(mistyped_flag(line), flags) or nearest_value(line)
    if nearest:
        hint = f"Did you mean {nearest}?"
    given = re.search(GIVEN_LIST, line)
    if given and not is_yaml(given[1]):
        hint = """In a list or mapping, what holds brackets needs quotes of its own: '["mlp.fc_[12]", lm_head]'."""
    return f"{line}. {hint}"


def nearest_flag(mistyped: str, flags: list[str]) -> str | None:
    """What to type in place of a flag that does not exist; None if nothing is near."""
    # the name that another tool has for it
    name = mistyped.lstrip("-").split(".")[-1].replace("-", "_")
    for ours, names in OTHER_NAMES.items():
        if name in names.split() and ours.split()[0] in flags:
            return ours

    # a flag of a group, without its group
    for flag in flags:
        if flag.endswith(f".{name}"):
            return flag

    nearest = difflib.get_close_matches(mistyped, flags, n=1)
    return nearest[0] if nearest else None


def nearest_value(line: str) -> str | None:
    """The one of several expected values that is most like the one which was given; None if there is none."""
    wrong = re.search(GIVEN_WORD, line)
    if wrong is None:
        return None
    values = [value for value in re.split(", | or ", wrong[1]) if " " not in value]
    nearest = difflib.get_close_matches(wrong[2], values, n=1, cutoff=0.5)
    return nearest[0] if nearest else None


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


def command(flags: Sequence[str] | None = None, script: Path | None = None) -> str:
    """The command line as it can be typed again; or the same script, or another one, with other flags."""
    path = os.path.relpath(sys.argv[0] if script is None else script)
    return shlex.join(["python", path, *(sys.argv[1:] if flags is None else flags)])


def save_hyperparameters(path: Path, settings: dict[str, Any]) -> None:
    """Writes the arguments of a `main` such that `--config path` repeats the run.

    `resume` and `overwrite` are left out: they say what to do with a folder, and have to be asked for each time.
    """
    settings = {name: value for name, value in settings.items() if name not in ("resume", "overwrite")}
    path.parent.mkdir(parents=True, exist_ok=True)
    comment = "".join(f"# {line}\n" for line in command().splitlines())  # a value may have several lines
    write_whole(path, f"{comment}{as_yaml(settings)}")


def read_hyperparameters(path: Path) -> dict[str, Any]:
    """The settings that `save_hyperparameters` wrote, as YAML has them.

    Raises:
        InputError: the file has been edited and is no YAML now.
    """
    import yaml

    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, *NOT_READ_BY_YAML) as error:
        raise InputError(f"{path} is not readable as YAML ({error}).") from None
    if not isinstance(settings, dict):
        raise InputError(f"{path} holds {type(settings).__name__}, expected settings, such as seed: 1.")
    return settings


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
