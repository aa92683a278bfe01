"""Every printed command is run, of README.md and tutorials/: `pytest tests/test_documented_commands.py`, about 4 min

The commands of a page run one after the other in a clone of the repository, in the form in which they are printed. In
the clone the sample model is a tiny one under its name, with the first tokens of its tokenizer and four blocks, and the
quick start has been made: its commands are not run again where they are printed. `SMALLER` is all that is changed of a
command, `NOT_RUN` all that is left out.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT, make_tiny
from helpers.shell import python

PAGES = ["README.md", *sorted(f"tutorials/{path.name}" for path in (ROOT / "tutorials").glob("*.md"))]

SMALLER = [  # what is printed -> what is typed here, where the printed one would take minutes
    # a few steps; flags that are printed come later, and win. A run that goes on has its own
    (
        r"finetune/(lora|full|adapter|adapter_v2)\.py(?!.*--resume)",
        r"\g<0> --train.max_steps 2 --train.eval_records 4 --n_answers 0",
    ),
    (r"finetune/classifier\.py", r"\g<0> --train.max_steps 2"),
    (r"\[8, 64, 512\]", "[4, 8]"),
    (r"--config finetune/recipes/quickstart.yaml", r"\g<0> --train.max_steps 3 --train.eval_interval 3 --n_answers 1"),
    (r"--max_new_tokens \d+", "--max_new_tokens 8"),
    (r"scripts/evaluate\.py", r"\g<0> --max_new_tokens 8"),
    (r"--limit 50", "--limit 4"),
    # a model of 4 blocks
    (r"transformer\.h\.2\[0-9\]", "transformer.h.[23]"),
    (r"start_layer 8", "start_layer 2"),
    # whose matrices have 48 columns
    (r"--quantize cpu\.int4", "--quantize cpu.int8"),
    # machines of two cores
    (r"--devices [48]", "--devices 2"),
    (r"--nproc_per_node [48]", "--nproc_per_node 2"),
    # a plan takes a tenth of a second a block, and a full card of small records minutes
    (r"--model_name \S+", "--model_name pythia-14m"),
    (r"--tokens \d{4}\b", "--tokens 64"),
    (r"micro_batch_tokens 2400", "micro_batch_tokens 256"),
    (r"--config finetune/recipes/mistral-7b-qlora-24gb.yaml", r"\g<0> --train.micro_batch_tokens 128"),
    (r"--card_gb 24", "--card_gb 1.1"),
    (r"--fit$", r"\g<0> --train.global_batch_size 2"),
    # a model that is on the hub alone
    (r"checkpoints/Qwen/Qwen3-4B", "checkpoints/sample/SmolLM2-135M-Instruct-Q4_1"),
    # comparisons
    (r"compare_config_keys\.py", r"\g<0> --keys removed --cases olmo2,"),
    (r"compare_methods\.py(?! --)", r"\g<0> --steps 1"),
    (r"--minutes \d+|--tokens \d{5,}", "--steps 1"),
    (r"(compare_methods\.py(?!.*--methods).*)", r"""\1 --methods '["LoRA, r 8, all linears"]'"""),
]

NOT_RUN = [  # pages, commands, why not
    (
        ".*",
        r"bash scripts/(setup|quickstart|test)\.sh|source .venv|python -m pytest|ruff|mypy",
        "sets up .venv, or is the tests",
    ),
    (".*", r"download\.py --repo_id|prepare_(alpaca|dolly|lima|longform)\.py|org/name|ORG/NAME", "needs the hub"),
    (".*", r"checkpoints/bigcode|arc_easy", "needs the hub"),
    (".*", r"download_spam\.py", "needs npm: the fixture writes the file"),
    (".*", r"generate/serve\.py", "goes on until it is ended; test_serve.py"),
    (".*", r"scripts/check_server\.py", "needs a server that runs; test_check_server.py"),
    ("tutorials/(serve|generate_and_chat).md", r"pip install", "installs"),
    ("tutorials/serve.md", r"curl ", "needs a server that runs; test_serve.py"),
    (".*", r"HOST|--nnodes", "needs two machines; test_machines.py has two in namespaces"),
    ("tutorials/rented_gpu.md", r"nvidia-smi|\.venv/bin|git clone|rsync|tmux|ssh ", "needs a rented machine"),
    ("tutorials/rented_gpu.md", r"convert_hf_to_gguf\.py", "is a script of llama.cpp's"),
    ("tutorials/gpu.md", ".*", "needs a GPU; REHEARSE_ON_CPU=1 in test_gpu.py"),
    ("tutorials/development.md", r"git worktree|nothing_moved\.py", "half an hour, two trees"),
    (".*", r"tests/benchmarks/", "minutes, and peers"),
    ("tutorials/methods.md", r"compare_methods\.py$|--train\.seed 1", "is the second command, longer; test_compare.py"),
]


PROGRAMS = "python|bash|torchrun|ruff|mypy|git|export|source"
SCRIPT = r"(?:finetune|scripts|generate)/\w+\.py"


def printed_commands(page: str) -> Iterator[str]:
    """The commands of a page, in its order: of sh blocks, of indented lines, and of code in the text."""
    text = (ROOT / page).read_text(encoding="utf-8")
    block = None  # the language of the fenced block that a line is in
    paragraph = ""
    lines = iter(text.split("\n"))
    for line in lines:
        indented = re.match(rf"    (?:\$ )?((?:{PROGRAMS}) .*)", line)
        if line.startswith("```"):
            block = line.removeprefix("```") if block is None else None
        elif block == "sh":
            yield from whole_command(line, lines)
        elif block is None and indented:
            yield from whole_command(indented[1], lines)
        elif block is None and line.strip():
            paragraph += f"{line} "
            continue
        yield from mentioned_commands(paragraph)
        paragraph = ""


def mentioned_commands(paragraph: str) -> Iterator[str]:
    """The commands in a paragraph of text: `python ...`, or `finetune/lora.py --flag value`.

    A mention has no out_dir of its own: a training command gets --overwrite.
    """
    for code in re.findall(rf"`((?:{PROGRAMS}|{SCRIPT}) [^`]+)`", paragraph):
        command = re.sub(rf"^{SCRIPT}", r"python \g<0>", code)
        trains = re.search(r"finetune/", command) and "--out_dir" not in command and "plan_memory" not in command
        yield f"{command} --overwrite" if trains else command


def whole_command(line: str, lines: Iterator[str]) -> Iterator[str]:
    """A command with the lines that belong to it; nothing for a comment or a blank line."""
    command = line
    while command.endswith("\\"):
        command = command[:-1] + next(lines).strip()
    here_document = re.search(r"<<\s*'?(\w+)'?", command)
    if here_document:
        for more in lines:
            command += f"\n{more}"
            if more == here_document[1]:
                break
    else:
        command = re.sub(r"\s+#( .*)?$", "", command)
    if command.strip() and not command.startswith("#"):
        yield command.strip()


def reason_not_to_run(page: str, command: str) -> str | None:
    for pages, commands, reason in NOT_RUN:
        if re.fullmatch(pages, page) and re.search(commands, command):
            return reason
    return None


def made_smaller(command: str) -> str:
    for printed, typed in SMALLER:
        command = re.sub(printed, typed, command)
    return command


@pytest.fixture(scope="module")
def quick_start(tmp_path_factory, sample_dir: Path) -> tuple[Path, set[str]]:
    """A clone after the quick start, and the commands that were run in it."""
    clone = tmp_path_factory.mktemp("clone")
    for name in ("lit_gpt", "scripts", "finetune", "generate", "tests", "tutorials", "README.md", "pyproject.toml"):
        (clone / name).symlink_to(ROOT / name)
    folder = clone / "checkpoints" / "sample" / sample_dir.name
    folder.parent.mkdir(parents=True)
    make_tiny(
        folder, sample_dir, num_hidden_layers=4, num_attention_heads=3, num_key_value_heads=1, initializer_range=0.02
    )
    shutil.copy(sample_dir / "generation_config.json", folder)
    commands = set()
    for command in printed_commands("tutorials/quickstart.md"):
        if "docstrings.py" in command or "quickstart.yaml" in command:
            run(command, clone)
            commands.add(command)
    mails = ["text,label"] + [
        f"This is mail {i} about {('money', 'lunch')[i % 2]},{('spam', 'ham')[i % 2]}" for i in range(40)
    ]
    for name in ("spam.csv", "spam-200.csv"):
        (clone / "data" / name).write_text("\n".join(mails) + "\n")
    return clone, commands


def run(command: str, folder: Path) -> None:
    """Types a command in a folder; it has to end with status 0."""
    typed = made_smaller(command)
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    words = [] if needs_a_shell(typed) else shlex.split(typed)
    if words[:1] == ["python"] and words[1].endswith(".py"):
        result = python(*words[1:], cwd=folder, env=environment)
    else:
        result = subprocess.run(
            ["bash", "-c", typed], cwd=folder, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL
        )
    assert result.returncode == 0, f"{command}\n{typed}\n{result.stdout[-1000:]}\n{result.stderr[-3000:]}"


def needs_a_shell(command: str) -> bool:
    """Whether a command has more to it than a program and its arguments."""
    outside_quotes = re.sub(r"'[^']*'|\"[^\"]*\"", "", command)
    return re.search(r"[|<>&;$\n]|^\w+=", outside_quotes) is not None


@pytest.mark.parametrize("page", PAGES)
def test_every_command_runs(page: str, quick_start: tuple[Path, set[str]], tmp_path: Path) -> None:
    clone, were_run = tmp_path / "clone", quick_start[1]
    shutil.copytree(quick_start[0], clone, symlinks=True)
    for command in printed_commands(page):
        if reason_not_to_run(page, command) is None and command not in were_run:
            run(command, clone)


def test_no_page_is_in_the_way_of_another() -> None:
    """Whoever reads several pages one after the other finds no folder that a page before has filled."""
    pages_of: dict[str, set[str]] = {}
    for page in PAGES:
        for command in printed_commands(page):
            flag = "--data_dir" if "prepare_json" in command else "--out_dir"
            written = re.search(rf"{flag} (\S+)", command)
            if written:
                pages_of.setdefault(written[1], set()).add(page)
    shared = {folder: pages for folder, pages in pages_of.items() if len(pages) > 1}
    assert not shared


def test_the_list_of_exceptions_is_short_and_used() -> None:
    """Each row leaves something out, and most commands are run."""
    commands = [(page, command) for page in PAGES for command in printed_commands(page)]
    left_out = [(page, command) for page, command in commands if reason_not_to_run(page, command)]
    for pages, pattern, reason in NOT_RUN:
        assert any(re.fullmatch(pages, page) and re.search(pattern, command) for page, command in commands), reason
    for printed, _ in SMALLER:
        assert any(re.search(printed, command) for _, command in commands), f"{printed} is not printed any more"
    assert len(left_out) < len(commands) / 2, left_out
