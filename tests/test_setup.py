"""The shell scripts: their --help, what setup.sh refuses, and test.sh --gpu: `pytest tests/test_setup.py`, about 2 s"""

import os
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SHELL_SCRIPTS = sorted((ROOT / "scripts").glob("*.sh"))


def bash(script: Path, *args: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["bash", script, *args], capture_output=True, text=True, cwd=cwd, timeout=60)


@pytest.mark.parametrize("script", SHELL_SCRIPTS, ids=lambda path: path.name)
def test_help_is_the_comment_at_the_top(script: Path, tmp_path: Path) -> None:
    (tmp_path / "scripts").mkdir()
    copy = tmp_path / "scripts" / script.name  # next to nothing that it could start
    copy.write_text(script.read_text())
    for flag in ("--help", "-h"):
        result = bash(copy, flag, cwd=tmp_path)
        assert (result.returncode, result.stderr) == (0, "")
        assert f"bash scripts/{script.name}" in result.stdout and "set -euo" not in result.stdout


PYTHON = """#!/bin/sh
[ "$1" = --version ] && echo Python 3.12.3 && exit
[ "$1" = scripts/download_sample.py ] && exit 1
echo "{name} $*; ${PYTHONPATH:-}"
"""


@pytest.mark.parametrize(
    ("packed", "installed", "which", "said"),
    [
        (False, True, "of .venv", "Without the sample model: its tests are skipped."),
        (False, False, "at hand", "With the Python at hand: {bin}/python3, Python 3.12.3."),
        (True, True, "at hand", "With the Python at hand: {bin}/python3, Python 3.12.3."),
    ],
)
def test_gpu_tests_run_with_and_without_a_network(packed, installed, which, said, tmp_path: Path) -> None:
    """Nothing is installed where packages are packed; where that fails, what the machine has is taken."""
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "scripts/test.sh", tmp_path / "scripts")
    (tmp_path / "scripts/setup.sh").write_text(f"exit {0 if installed else 1}\n")
    for folder, name in ((".venv/bin", "of .venv"), ("bin", "at hand")):
        python = tmp_path / folder / "python3"
        python.parent.mkdir(parents=True)
        python.write_text(PYTHON.replace("{name}", name))
        python.chmod(0o755)
    if packed:
        (tmp_path / ".gpu/site").mkdir(parents=True)
    environment = {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "PYTHONPATH": "/before"}
    command = ["bash", str(tmp_path / "scripts/test.sh"), "--gpu"]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
    path = "/before" if which == "of .venv" else f"{tmp_path}:{tmp_path}/.gpu/site:/before"
    assert result.stdout == f"{which} -m pytest -m gpu -s -q tests/test_gpu.py; {path}\n"
    assert result.stderr == said.format(bin=tmp_path / "bin") + "\n"


def test_setup_explains_every_extra() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    help = bash(ROOT / "scripts/setup.sh", "--help").stdout
    for extra in extras:
        assert f"\n    {extra} " in help


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ["report,smaple"],
            "There is no extra smaple. Known are sample, report, data, classify, serve, json, eval, loggers, test",
        ),
        (["--quick"], "There is no extra --quick."),
        (["sample", "report"], "2 arguments found, expected one"),
    ],
)
def test_setup_refuses(args: list[str], message: str) -> None:
    result = bash(ROOT / "scripts/setup.sh", *args)
    assert result.returncode == 2 and result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ") and message in line
