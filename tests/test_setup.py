"""The shell scripts: their --help, and what setup.sh refuses: `pytest tests/test_setup.py`, about 2 s"""

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


def test_setup_explains_every_extra() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    help = bash(ROOT / "scripts/setup.sh", "--help").stdout
    for extra in extras:
        assert f"\n    {extra} " in help


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["report,smaple"], "There is no extra smaple. Known are sample, report, data, classify, loggers, test"),
        (["--quick"], "There is no extra --quick."),
        (["sample", "report"], "2 arguments found, expected one"),
    ],
)
def test_setup_refuses(args: list[str], message: str) -> None:
    result = bash(ROOT / "scripts/setup.sh", *args)
    assert result.returncode == 2 and result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ") and message in line
