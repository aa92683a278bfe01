"""From a `main(...)` to a command: `pytest tests/test_cli.py`, about 20 s"""

import errno
import os
import runpy
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import pytest
from conftest import ROOT
from helpers.shell import python
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lit_gpt import InputError
from lit_gpt.cli import OTHER_NAMES, Flags, PassedOn, flags_of, parse, read_hyperparameters, save_hyperparameters
from lit_gpt.quantize import Quantize
from lit_gpt.train import TrainArgs

SCRIPT = '''
import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lit_gpt import InputError
from lit_gpt.cli import run


@dataclass(frozen=True)
class Steps:
    rate: float = 1e-3
    """How fast, in furlongs."""
    names: list[str] | None = None
    """Who is coming."""


def main(
    what: str = "work",
    path: Path = Path("a"),
    number: int = 1,
    most: int | None = None,
    steps: Steps = Steps(),
    kind: Literal["bnb.nf4", "bnb.int8"] | None = None,
    again: bool = False,
):
    """Does one thing.

    Args:
        what: The thing.
        path: Where.
        number: How often.
        most: How often at most.
        steps: Of what size.
        kind: The kind.
        again: Once more.
    """
    if what == "bad input":
        raise InputError("The file is too old.\\n  Make a new one.")
    if what == "bug":
        number / 0
    if what == "open":
        path.open()
    if what == "full":
        raise OSError(ERRNO, "No space left on device")
    if what == "interrupt":
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job inherits that it is ignored
        os.kill(os.getpid(), signal.SIGINT)
    if what == "pipe":
        raise BrokenPipeError("of something else")
    if what == "memory":
        import torch
        raise torch.OutOfMemoryError("CUDA out of memory.\\n  Tried to allocate 2.00 GiB.")
    if what == "nameless":
        raise OSError("something about a socket")
    print(what, path, number, most, steps.rate, steps.names)
    if again:
        print("again")


run(main)
'''.replace("ERRNO", str(errno.ENOSPC))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    (folder / "script.py").write_text(SCRIPT)
    for name, text in {
        "good": "number: 7\nsteps:\n  rate: 1e-5\n",
        "unknown": "numbr: 7\n",
        "unknown_below": "steps:\n  rat: 7\n",
        "no_yaml": "number: [1\nsteps: {",
        "list": "- 1\n",
        "comment": "# all at defaults\n",
        "wrong_type": "number: many\n",
        "no_number": "number: !!int many\n",
        "empty_group": "number: 1\nsteps:\n",
    }.items():
        (folder / f"{name}.yaml").write_text(text)
    (folder / "latin1.yaml").write_bytes("what: café\n".encode("latin-1"))
    return folder


Shell = Callable[..., subprocess.CompletedProcess]


@pytest.fixture
def shell(folder: Path) -> Shell:
    return partial(python, "script.py", cwd=folder)


@pytest.mark.parametrize(
    "args, said",
    [
        (["--what", "bad input"], "The file is too old. Make a new one."),
        (["--what", "open", "--path", "no such.txt"], "No such file or directory: no such.txt"),
        (["--what", "full"], "No space left on device. Free some space and run again."),
        (
            ["--what", "memory"],
            "This command does not fit: the memory of the GPU is full, and 2.15 GB more were",
        ),
        (["--numbr", "2"], "There is no flag --numbr. Did you mean --number?"),
        (["--steps.rat=2"], "Did you mean --steps.rate?"),
        (["--rate", "2"], "There is no flag --rate. Did you mean --steps.rate?"),
        (["--zzz", "2"], "There is no flag --zzz. See --help."),
        (["zzz"], "No flag stands before: zzz. See --help."),
        (["--number", "many"], "--number: Expected an integer. Got many. See --help."),
        (["--most", "many"], "--most: Expected an integer or null. Got many. See --help."),
        (["--most", ""], "--most: Expected an integer or null. Got an empty text. See --help."),
        (["--number", ""], "--number: Expected an integer. Got an empty text. See --help."),
        (["--kind", "nf4"], "--kind: Expected bnb.nf4, bnb.int8 or null. Got nf4. Did you mean bnb.nf4?"),
        (["--again", "ture"], "--again: Expected true or false. Got ture. Did you mean true?"),
        (["--number"], "--number: Expected a value behind it. See --help."),
        (["--steps", "2"], "--steps is a group of flags. Expected one of them, such as --steps.FIELD. See --help."),
        (["--steps.names", "[h.[01], b]"], """[h.[01], b]. In a list or mapping, what holds brackets needs quotes"""),
        (["--most", "[1]"], "--most: Expected an integer or null. Got [1]. See --help."),
        (["--config", "gone.yaml"], "gone.yaml"),
        (["--config", "unknown.yaml"], "Did you mean --number?"),
        (["--config", "unknown_below.yaml"], "Did you mean --steps.rate?"),
        (["--config", "no_yaml.yaml"], "Problems parsing config"),
        (["--config", "list.yaml"], "The file after --config holds no settings: expected lines such as seed: 1."),
        (["--config", "comment.yaml"], "The file after --config holds no settings"),
        (["--config", "wrong_type.yaml"], "--number: Expected an integer. Got many."),
        (["--config", "no_number.yaml"], "Problems parsing config: ValueError: invalid literal"),
        (["--config", "empty_group.yaml"], "steps is a group of settings: expected a mapping. Got None."),
        (["--config", "latin1.yaml"], "not UTF-8"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_what_the_user_can_mend_is_one_line_and_status_2(shell: Shell, args: list[str], said: str) -> None:
    result = shell(*args)
    assert result.returncode == 2 and result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ") and said in line


def test_streams_that_the_shell_has_closed_are_empty(folder: Path) -> None:
    command = f"{sys.executable} script.py --what work <&- >&-"
    result = subprocess.run(["bash", "-c", command], cwd=folder, stderr=subprocess.PIPE, text=True)
    assert result.returncode == 0 and "Traceback" not in result.stderr


@pytest.mark.parametrize("what", ["work", "pipe"])
def test_who_has_read_enough_is_told_nothing(folder: Path, what: str) -> None:
    """As with `| head`. Any other pipe that breaks is a bug."""
    command = [sys.executable, "script.py", "--what", what]
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    if what == "work":
        process.stdout.close()
    said = process.stderr.read()
    assert (process.wait(), said) == (141, "") if what == "work" else "BrokenPipeError: of something else" in said


@pytest.mark.parametrize("what, name", [("bug", "ZeroDivisionError"), ("nameless", "OSError")])
def test_a_bug_keeps_its_traceback_and_status_1(shell: Shell, what: str, name: str) -> None:
    result = shell("--what", what)
    assert result.returncode == 1
    assert result.stderr.startswith("Traceback") and result.stderr.splitlines()[-1].startswith(name)


def test_flags_and_files(shell: Shell) -> None:
    """Later words win over earlier ones, and a file says only what differs."""
    assert shell("--config", "good.yaml", "--number", "8").stdout == "work a 8 None 1e-05 None\n"
    both = shell("--config=good.yaml", "--path=b c", "--steps.names", "[Ada, Bob]", "--most=3")
    assert both.stdout == "work b c 7 3 1e-05 ['Ada', 'Bob']\n"


@pytest.mark.parametrize(
    "args, again", [("--again", True), ("--again true", True), ("--again false", False), ("--again=false", False)]
)
def test_a_switch_needs_no_value(shell: Shell, args: str, again: bool) -> None:
    """And takes none of the flag that comes after it."""
    said = f"work a 8 None 0.001 None\n{'again' if again else ''}"
    assert shell(*args.split(), "--number", "8").stdout.rstrip("\n") == said.rstrip("\n")
    assert shell("--number", "8", *args.split()).stdout.rstrip("\n") == said.rstrip("\n")
    assert "--again [{true,false}]" in shell("--help").stdout


@dataclass(frozen=True)
class Elsewhere:
    checkpoint_dir: Path = Path("base")
    resume: bool = False


def elsewhere(
    args: Flags[Elsewhere] = Elsewhere(), train: TrainArgs = TrainArgs(), quantize: Quantize | None = None
) -> None:
    """Some of the flags of finetune/lora.py."""


@pytest.mark.parametrize(
    "flag, ours",
    [
        ("--lr", "--train.learning_rate"),
        ("--learning-rate", "--train.learning_rate"),
        ("--train.lr", "--train.learning_rate"),
        ("--num_train_epochs", "--train.epochs"),
        ("--epochs", "--train.epochs"),
        ("--model_name_or_path", "--checkpoint_dir"),
        ("--load_in_4bit", "--quantize bnb.nf4"),
        ("--resum", "--resume"),
    ],
)
def test_names_of_other_tools_lead_to_ours(flag: str, ours: str) -> None:
    with pytest.raises(InputError, match=rf"There is no flag {flag}. Did you mean {ours}\?"):
        parse(elsewhere, [flag, "3"])
    with pytest.raises(InputError, match=rf"There is no flag {flag}\. "):
        parse(main, [flag, "3"])  # which has none of those


def test_hints_exist() -> None:
    """Each of them is a flag of some script, with a value that it takes."""
    scripts = [*(ROOT / "finetune").glob("*.py"), *(ROOT / "generate").glob("*.py")]
    mains = [runpy.run_path(str(path))["main"] for path in scripts]
    for ours in OTHER_NAMES:
        takes = [script for script in mains if ours.split()[0] in flags_of(script)]
        assert takes, ours
        if " " in ours:
            parse(takes[0], ours.split())


def planner(text: str = "", number: int = 1, others: PassedOn = ()) -> None:
    """Takes a script, and its flags."""


@pytest.mark.parametrize(
    "words, number, others",
    [
        ("", 1, ""),
        ("lora.py --number 3 --seed 4", 3, "lora.py --seed 4"),
        ("--seed=4 --number=3 --names [1] --resume", 3, "--seed=4 --names [1] --resume"),
        ("--resume --number 3", 3, "--resume"),
        ("--config a.yaml --resume", 1, "--config a.yaml --resume"),
    ],
)
def test_flags_of_another_script_are_passed_on(words: str, number: int, others: str) -> None:
    assert parse(planner, words.split()) == {"text": "", "number": number, "others": tuple(others.split())}


@dataclass(frozen=True)
class Trip:
    """Where to."""

    places: Path | None = None
    """The place."""
    rate: float = 1.0
    """How fast."""


def travel(places: list[Path] = [], number: int = 1, trip: Flags[Trip] = Trip(rate=2.0)) -> None:  # noqa: B006
    """Takes a parameter of its own in the place of a field."""


@pytest.mark.parametrize(
    "words, places",
    [
        ("--number 1", []),
        ("--places a", ["a"]),
        ("--places=a --number 1 --places b", ["a", "b"]),
        ("--places a b --number 1", ["a", "b"]),
        ("--number 1 --places a,b ü😀", ["a,b", "ü😀"]),
        ("--places [a,b]", ["a", "b"]),
        ("--places ~/a b", [Path("~/a").expanduser(), "b"]),
    ],
)
def test_a_list_of_paths(words: str, places: list[str]) -> None:
    settings = parse(travel, words.split())
    assert settings == {"places": [Path(place) for place in places], "number": 1, "trip": Trip(rate=2.0)}


def test_a_list_of_paths_needs_one() -> None:
    with pytest.raises(InputError, match="--places"):
        parse(travel, ["--places", "--number", "1"])


def test_what_neither_script_knows_is_refused() -> None:
    """By the other script, which is told what the first one knows."""
    for word, nearest in (("--numbr", "--number"), ("--resum", "--resume")):
        words = parse(planner, [word, "3"])["others"]
        with pytest.raises(InputError, match=f"There is no flag {word}. Did you mean {nearest}?"):
            parse(elsewhere, words, also=flags_of(planner))
    with pytest.raises(InputError, match="--number: Expected an integer. Got x."):
        parse(planner, ["--seed", "4", "--number", "x"])


def test_help_says_what_docstrings_say(shell: Shell) -> None:
    result = shell("--help")
    assert result.returncode == 0 and result.stderr == ""
    text = " ".join(result.stdout.split())
    assert "Does one thing." in text and "Args:" not in text
    for flag, sentence in {
        "--number NUMBER": "How often.",
        "--path PATH": "Where.",
        "--steps.rate RATE": "How fast, in furlongs.",
        "--steps.names NAMES": "Who is coming.",
    }.items():
        assert f"{flag} {sentence}" in text


def test_interrupted_is_no_traceback(shell: Shell) -> None:
    result = shell("--what", "interrupt")
    assert (result.returncode, result.stderr) == (130, "error: Interrupted.\n")


@dataclass(frozen=True)
class Part:
    rate: float = 1e-3
    names: list[str] | None = None
    style: Literal["auto", "none"] = "auto"


@dataclass(frozen=True)
class Everything:
    path: Path
    maybe_path: Path | None
    text: str
    maybe_text: str | None
    number: int
    maybe_number: int | None
    maybe_rate: float | None
    switch: bool
    numbers: list[int]
    part: Part


def main(
    path: Path = Path("a"),
    maybe_path: Path | None = None,
    text: str = "",
    maybe_text: str | None = "x",
    number: int = 0,
    maybe_number: int | None = 3,
    maybe_rate: float | None = 0.5,
    switch: bool = False,
    numbers: list[int] = [1],  # noqa: B006
    part: Part = Part(),
) -> None:
    """What scripts take."""


# YAML cannot hold control characters as they are; and no way to spell the text "null" is left for what may be None
TEXT = st.text(st.characters(exclude_categories=["Cc", "Cs"])) | st.sampled_from(
    ["1e-5", "1", "true", "off", "~", "a: b", "- a", "[1]", "{a: 1}", "# x", " a ", "x\n", "'", '"', "!!python/name:os"]
    + ["&a", "*a", "2020-01-01", "0x10", "1_0", "1:30", "=", "<<", ".nan", "\\n", "${a}", "%a", "@a", "`", "...", "é🙂"]
)
FLOATS = st.floats(allow_nan=False) | st.sampled_from([1e-5, 2e-4, 1.0, 0.0])
PATHS = TEXT.map(Path) | st.sampled_from([Path("a b/c"), Path("/ä/ö"), Path("out/1e-5")])


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.builds(
        Everything,
        path=PATHS,
        maybe_path=st.none() | PATHS,
        text=TEXT,
        maybe_text=st.none() | TEXT,
        number=st.integers(),
        maybe_number=st.none() | st.integers(),
        maybe_rate=st.none() | FLOATS,
        switch=st.booleans(),
        numbers=st.lists(st.integers(), max_size=3),
        part=st.builds(Part, rate=FLOATS, names=st.none() | st.lists(TEXT, max_size=3), style=st.just("none")),
    ).filter(lambda values: "null" not in (values.maybe_text, str(values.maybe_path)))
)
def test_saved_settings_read_back_the_same(tmp_path: Path, values: Everything) -> None:
    wanted = dict(vars(values))
    save_hyperparameters(tmp_path / "sub folder" / "hyperparameters.yaml", wanted)
    found = parse(main, ["--config", str(tmp_path / "sub folder" / "hyperparameters.yaml")])
    assert found == wanted
    assert {key: type(value) for key, value in found.items()} == {key: type(value) for key, value in wanted.items()}


@pytest.mark.parametrize("config", [["--config", "{}"], ["--config={}"]])
def test_a_flag_counts_before_and_behind_the_file_of_settings(config: list[str], tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("number: 3\nmaybe_number: 5\n")
    (tmp_path / "b.yaml").write_text("maybe_number: 6\n")
    a, b = ([word.format(tmp_path / name) for word in config] for name in ("a.yaml", "b.yaml"))
    flag = ["--number", "4"]
    for args in ([*flag, *a, *b], [*a, *flag, *b], [*a, *b, *flag]):
        values = parse(main, args)
        assert values["number"] == 4 and values["maybe_number"] == 6, "of two files, the second one"


def test_a_path_may_begin_at_home(tmp_path: Path, monkeypatch) -> None:
    """As bash leaves it in --path=~/x, and in a file of settings. A text stays as it is typed."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.yaml").write_text("path: ~/ä b\nmaybe_path: ~/c\n")
    found = parse(main, ["--config", str(tmp_path / "a.yaml"), "--text=~/x"])
    assert found["path"] == tmp_path / "ä b" and found["maybe_path"] == tmp_path / "c" and found["text"] == "~/x"
    assert parse(main, ["--path=~/x"])["path"] == tmp_path / "x"
    assert parse(main, ["--path", "~x"])["path"] == Path("~x")


def test_saved_settings_begin_with_the_command(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", [os.path.join(tmp_path, "lora.py"), "--prompt", "two words"])
    monkeypatch.chdir(tmp_path)
    save_hyperparameters(Path("out/h.yaml"), {"number": 3})
    assert Path("out/h.yaml").read_text() == "# python lora.py --prompt 'two words'\nnumber: 3\n"


@pytest.mark.parametrize("line_break", ["\n", "\r", "\r\n", "\x85", "\u2028"])
def test_a_value_of_several_lines_stays_in_the_comment(line_break: str, tmp_path: Path, monkeypatch) -> None:
    """In a script of the shell, a mapping or a list is often written so."""
    monkeypatch.setattr(sys, "argv", ["lora.py", "--lora.rank_pattern", f"{{attn.q: 16,{line_break}number: 4}}"])
    save_hyperparameters(tmp_path / "h.yaml", {"number": 3})
    assert read_hyperparameters(tmp_path / "h.yaml") == {"number": 3}


@pytest.mark.parametrize("text", ["- a", "hello", "number: !!int many", "number: ["])
def test_a_damaged_file_of_settings_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "h.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match="is not readable as YAML|expected settings"):
        read_hyperparameters(path)


@pytest.mark.parametrize("text", ["# Be brief.", "~", "", "a: b", "1", "!!int", "!!timestamp x"])
def test_text_on_the_command_line_stays_text(text: str) -> None:
    found = parse(main, ["--maybe_text", text, "--text", text])
    assert found["text"] == found["maybe_text"] == text
    assert parse(main, ["--maybe_text", "null"])["maybe_text"] is None
