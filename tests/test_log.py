"""What a run shows and writes: `pytest tests/test_log.py`, about 15 s"""

import math
import os
import random
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from lit_gpt.device import peak_memory_gb
from lit_gpt.display.words import duration
from lit_gpt.errors import InputError
from lit_gpt.runs.log import COLUMNS, HEADER, Log, read_metrics
from lit_gpt.runs.report import loss_figure, show_answers, write_report

HOSTILE = [
    "a | b || c |\n|---|---|\n| 1 | 2 |",
    "```python\ndef f(x):\n    return x  # two  spaces\n\n\nprint(f(1))\n```",
    "````\n```\n``` `` ` ~~~~\n````",
    "</samp></td></table><script>alert(1)</script> &amp; &nbsp; <!-- <b>no",
    "\n\n  leading and trailing blank lines\n\n",
    "# heading\n* list\n> quote\n[link](x) ![image](y) $x^2$ _a_ **b** \\ \\|",
    "",
    "one\r\ntwo\rthree\ttab",
    "Ünïcode 🙂 中文",
]


def figures(step: int) -> dict[str, float]:
    noise = random.Random(step)
    return {
        "loss": 3 / (1 + step / 50) + noise.gauss(0, 0.1),
        "learning_rate": noise.random() * 1e-4,
        "grad_norm": noise.random(),
        "tokens": noise.randint(100, 2000),
        "trained_tokens": noise.randint(50, 100),
        "seconds": noise.random(),
        "epoch": step / 7,
        "memory_gb": 1.5,
    }


def train(out_dir: Path, total_steps: int, first_step: int = 0, stop: int | None = None, **kwargs) -> Log:
    log = Log(out_dir, total_steps, first_step=first_step, **kwargs)
    for step in range(first_step + 1, (stop or total_steps) + 1):
        log.step(step, **figures(step))
        if step % 5 == 0:
            log.val(step, 2 + 1 / step)
    return log


def test_rows_read_back_exactly(tmp_path: Path) -> None:
    log = Log(tmp_path / "new" / "run", 4)
    log.val(0, 1 / 3)
    log.step(1, **figures(1))
    log.step(2, **(figures(2) | {"loss": math.nan, "grad_norm": math.inf, "learning_rate": 5e-324}))
    log.val(2, 0.1 + 0.2)
    log.step(3, loss=-1e300)
    rows = read_metrics(tmp_path / "new" / "run" / "metrics.csv")  # before close: each row is on disk at once
    log.close()
    log.close()

    assert repr(rows) == repr(log.rows)  # as text, since NaN differs from itself
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert rows[1] == dict.fromkeys(COLUMNS) | {"step": 1} | figures(1)
    assert (
        rows[0]["val_loss"] == 1 / 3 and rows[2]["val_loss"] == 0.1 + 0.2 and rows[2]["tokens"] == log.rows[2]["tokens"]
    )
    assert (tmp_path / "new" / "run" / "metrics.csv").read_text().count(HEADER) == 1


def test_numbers_of_other_packages_are_written_as_plain_floats(tmp_path: Path) -> None:
    import numpy as np
    import torch

    log = Log(tmp_path, 1)
    log.step(1, loss=torch.tensor(0.1), grad_norm=np.float64(0.1), seconds=np.float32(0.5))
    log.close()
    row = read_metrics(tmp_path / "metrics.csv")[0]
    assert row["loss"] == torch.tensor(0.1).item() and row["grad_norm"] == 0.1 and row["seconds"] == 0.5


def test_an_unknown_figure_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="perplexity"):
        Log(tmp_path, 1).step(1, perplexity=2.0)


@pytest.mark.parametrize("torn", [0, 1, 7, 40])
@pytest.mark.parametrize("saved", [5, 6, 12])
def test_killed_and_resumed_is_never_killed(tmp_path: Path, saved: int, torn: int) -> None:
    """The checkpoint is of step `saved`, the process died in the middle of writing row 12."""
    train(tmp_path / "never", 20).close()
    train(tmp_path / "killed", 20, stop=12).file.close()
    path = tmp_path / "killed" / "metrics.csv"
    path.write_bytes(path.read_bytes()[: -torn or None])

    log = Log(tmp_path / "killed", 20, first_step=saved)
    kept = saved - (1 if torn and saved == 12 else 0)
    assert [row["step"] for row in log.rows] == list(range(1, kept + 1))
    assert log.rows == read_metrics(path)
    log.file.close()
    train(tmp_path / "killed", 20, first_step=saved).close()

    expected = (tmp_path / "never" / "metrics.csv").read_text().splitlines()
    if kept < saved:  # a row that was lost stays lost; nothing else is missing
        expected.pop(saved)
    assert path.read_text().splitlines() == expected
    assert sorted(p.name for p in path.parent.iterdir()) == ["metrics.csv"]


def test_a_validation_after_resuming_joins_the_last_row(tmp_path: Path) -> None:
    train(tmp_path, 9, stop=6).close()
    log = Log(tmp_path, 9, first_step=5)
    log.val(5, 1 / 3)
    log.val(5, 1.0)  # shorter than what stood there
    log.step(6, **figures(6))
    log.close()
    rows = read_metrics(tmp_path / "metrics.csv")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6] and rows[4] == log.rows[4]
    assert rows[4] == dict.fromkeys(COLUMNS) | {"step": 5, "val_loss": 1.0} | figures(5)


@pytest.mark.parametrize("content", [b"\xff\xfe\n", f"{HEADER}\n1,abc\n".encode(), f"{HEADER}\n1\n".encode()])
def test_a_damaged_file_is_refused_in_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "metrics.csv").write_bytes(content)
    with pytest.raises(InputError, match="metrics.csv is damaged"):
        Log(tmp_path, 9, first_step=1)


@pytest.mark.parametrize("content", ["", "step,epo"])
def test_a_file_that_was_killed_before_its_header_has_no_rows(tmp_path: Path, content: str) -> None:
    (tmp_path / "metrics.csv").write_text(content)
    assert read_metrics(tmp_path / "metrics.csv") == []


def test_resuming_without_a_file_and_starting_over_one(tmp_path: Path) -> None:
    train(tmp_path, 4, first_step=2).close()
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.csv")] == [3, 4]
    train(tmp_path, 2).close()
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.csv")] == [1, 2]


def test_plain_lines_when_stderr_is_no_terminal(tmp_path: Path, capfd: pytest.CaptureFixture, monkeypatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    log = train(tmp_path, 200)
    log.note("[bold]as it stands[/bold]")
    log.close()
    out, err = capfd.readouterr()
    assert out == "" and "\x1b" not in err and "\r" not in err
    lines = err.splitlines()
    assert lines[-1] == "[bold]as it stands[/bold]"
    steps = [line for line in lines if "tokens/s" in line]
    assert [line.split()[1] for line in steps] == ["1/200", "2/200", "3/200", "200/200"]  # quicker than 10 s
    row = log.rows[-1]
    for figure in (
        f"loss {row['loss']:.4f}",
        f"val loss {2 + 1 / 195:.4f}",
        f"learning rate {row['learning_rate']:.2e}",
        f"{row['tokens'] / row['seconds']:,.0f} tokens/s",
        "1.50 GB",
        "0.0 s left",
    ):
        assert figure in steps[-1]


def test_a_run_that_ends_early_shows_its_last_step(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    train(tmp_path, 200, stop=33).close()
    assert capfd.readouterr().err.splitlines()[-1].startswith("step 33/200")


def test_other_ranks_write_nothing(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    log = train(tmp_path / "run", 5, main_process=False)
    log.note("nothing")
    log.close()
    assert capfd.readouterr() == ("", "") and log.rows == [] and not (tmp_path / "run").exists()


def test_fabric_loggers_get_the_same_figures(tmp_path: Path) -> None:
    from lightning_fabric.loggers import CSVLogger

    logger = CSVLogger(tmp_path, name="fabric", flush_logs_every_n_steps=1)
    log = train(tmp_path, 6, loggers=[logger])
    log.close()
    text = (Path(logger.log_dir) / "metrics.csv").read_text()
    assert all(repr(row["loss"]) in text for row in log.rows) and repr(2 + 1 / 5) in text


RUN = """
import sys
from pathlib import Path
from lit_gpt.display.words import duration
from lit_gpt.runs.log import Log
log = Log(Path(sys.argv[1]), 2)
log.step(1, loss=1.25, tokens=100, seconds=0.5)
log.note("a [red]note[/red] of " + "many words " * 20)
print("to stdout")
if len(sys.argv) > 2:
    raise RuntimeError("crash")
log.step(2, loss=1.0, tokens=100, seconds=0.5)
log.val(2, 1.5)
log.close()
"""


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="needs pseudo-terminals")
@pytest.mark.parametrize("crash", [False, True])
def test_a_bar_on_a_terminal_that_is_given_back(tmp_path: Path, crash: bool) -> None:
    import pty

    ours, theirs = pty.openpty()
    arguments = [sys.executable, "-c", RUN, str(tmp_path), *(["crash"] if crash else [])]
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "80", "LINES": "30"}
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=theirs, env=environment)
    os.close(theirs)
    seen = b""
    while True:
        try:
            chunk = os.read(ours, 4096)
        except OSError:  # Linux's way to say that the other end is closed
            break
        if not chunk:
            break
        seen += chunk
    stdout, _ = process.communicate()
    os.close(ours)

    text = seen.decode()
    assert stdout == b"to stdout\n"  # piped output stays out of the bar
    assert "a [red]note[/red] of " + "many words " * 20 in text
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 1  # the cursor comes back
    if crash:
        assert "RuntimeError: crash" in text and process.returncode == 1
    else:
        assert "step 2/2" in text and "loss 1.0000  val loss 1.5000  200 tokens/s" in text


def test_durations_and_memory() -> None:
    seconds = [0, 4.24, 9.96, 59.4, 59.6, 185, 3599.6, 7620, 360_000]
    expected = [
        "0.0 s",
        "4.2 s",
        "10 s",
        "59 s",
        "1 min 00 s",
        "3 min 05 s",
        "1 h 00 min",
        "2 h 07 min",
        "100 h 00 min",
    ]
    assert [duration(value) for value in seconds] == expected
    if Path("/proc/self/status").exists():
        kib = int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])
        assert peak_memory_gb(torch.device("cpu")) == pytest.approx(kib * 1024 / 1e9, rel=0.02)
    assert 0.01 < peak_memory_gb(torch.device("cpu")) < 1000


def test_the_plot_draws_the_rows(tmp_path: Path) -> None:
    log = Log(tmp_path, 150)
    log.val(0, 3.0)
    for step in range(1, 151):
        log.step(step, **(figures(step) | ({"loss": math.nan} if step in (40, 41) else {})))
        if step % 50 == 0:
            log.val(step, 2 + 1 / step)
    log.close()
    (axes,) = loss_figure(log.rows).axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
    each, mean, validation = lines.values()
    assert repr(each) == repr([[float(row["step"]), row["loss"]] for row in log.rows if row["loss"] is not None])
    assert validation == [[float(row["step"]), row["val_loss"]] for row in log.rows if row["val_loss"] is not None]
    assert list(lines) == ["training, each step", "training, mean of 10 steps", "validation"]

    rows = [row for row in log.rows[1:] if 95 <= row["step"] < 105]  # far from edges and NaN: the mean over the tokens
    tokens = sum(row["trained_tokens"] for row in rows)
    assert mean[99] == [
        100,
        pytest.approx(sum(row["loss"] * row["trained_tokens"] for row in rows) / tokens, rel=1e-12),
    ]
    assert "2 steps without a finite loss" in axes.get_title(loc="right")
    assert axes.get_ylim()[0] < min(y for _, y in each) and axes.get_ylim()[1] > 3.0


@pytest.mark.parametrize("losses", [[], [1.0], [2.0, 2.0, 2.0], [math.nan] * 40, [math.inf, 1.0], [1.0] * 99 + [1e9]])
def test_a_plot_of_any_run(tmp_path: Path, losses: list[float]) -> None:
    log = Log(tmp_path, len(losses))
    for step, loss in enumerate(losses, 1):
        log.step(step, loss=loss)
    log.close()
    report(tmp_path)
    data = (tmp_path / "loss.png").read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert int.from_bytes(data[16:20], "big") == 900 and int.from_bytes(data[20:24], "big") == 450


def report(out_dir: Path, **kwargs) -> str:
    settings = {"out_dir": out_dir, "learning_rate": 1e-5, "targets": ("q", "v"), "limit": None}
    arguments = {
        "title": "A *run*",
        "command": "python finetune/lora.py --prompt 'a\n```\nb'",
        "settings": settings,
        "facts": {"peak | memory": "1.5 GB", "a_b_c": "<b>3 min 05 s</b>\nand more", "C:\\x": "`x` | y \\| z"},
        "answers": [],
    }
    path = write_report(out_dir, **(arguments | kwargs))
    assert path == out_dir / "report.md"
    return path.read_text(encoding="utf-8")


class Page(HTMLParser):
    """What a browser shows of a rendered report: the cells' text by row, code blocks, and every tag."""

    def __init__(self, markdown: str) -> None:
        from markdown_it import MarkdownIt

        super().__init__()
        self.cells: list[str] = []
        self.codes: list[str] = []
        self.tags: set[str] = set()
        self.inside: list[str] | None = None
        self.feed(MarkdownIt("commonmark", {"html": True}).enable("table").render(markdown))

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.add(tag)
        if tag in ("samp", "td", "code"):
            self.inside = []
        elif tag == "br" and self.inside is not None:
            self.inside.append("\n")

    def handle_data(self, data: str) -> None:
        if self.inside is None:
            return
        if self.lasttag != "code":  # in HTML a line end is a space, several are one, and none begins a line
            data = re.sub("[ \n]+", " ", data)
            data = data.lstrip(" ") if "".join(self.inside)[-1:] in ("", "\n") else data
        self.inside.append(data)

    def handle_endtag(self, tag: str) -> None:
        if tag in ("samp", "td", "code") and self.inside is not None:
            (self.codes if tag == "code" else self.cells).append("".join(self.inside))
            self.inside = None


def test_the_report_keeps_hostile_answers_intact(tmp_path: Path) -> None:
    Log(tmp_path, 0).close()
    answers = [tuple(HOSTILE[(i + j) % len(HOSTILE)] for j in range(4)) for i in range(len(HOSTILE))]
    page = Page(report(tmp_path, answers=answers))
    shown = [cell.replace("\xa0", " ") for cell in page.cells][6:]  # after three facts of two cells
    expected = [re.sub("\r\n?", "\n", text).expandtabs(4) for answer in answers for text in answer]
    assert shown == expected
    assert "script" not in page.tags and {"details", "summary", "table", "img"} <= page.tags


def test_the_report_says_what_was_run(tmp_path: Path) -> None:
    import yaml

    Log(tmp_path, 0).close()
    text = report(tmp_path)
    page = Page(text)
    command, settings = page.codes
    assert command.strip() == "python finetune/lora.py --prompt 'a\n```\nb'"
    assert yaml.safe_load(settings) == {
        "out_dir": str(tmp_path),
        "learning_rate": 1e-5,
        "targets": ["q", "v"],
        "limit": None,
    }
    assert page.cells == [
        *("peak | memory", "1.5 GB"),
        *("a_b_c", "<b>3 min 05 s</b> and more"),
        *("C:\\x", "`x` | y \\| z"),
    ]
    assert text.startswith("# A \\*run\\*\n") and "b" not in page.tags
    assert sorted(path.name for path in tmp_path.iterdir()) == ["loss.png", "metrics.csv", "report.md"]


def test_the_report_without_matplotlib_says_what_to_type(tmp_path: Path) -> None:
    Log(tmp_path, 0).close()
    code = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "from pathlib import Path; from lit_gpt.runs.report import write_report\n"
        "write_report(Path(sys.argv[1]), title='t', command='c', settings={}, facts={'a': '1 s'}, answers=[])"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    assert "pip install -e '.[report]'" in (tmp_path / "report.md").read_text()
    assert not (tmp_path / "loss.png").exists()


def test_answers_side_by_side_on_stdout(capfd: pytest.CaptureFixture, monkeypatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    show_answers([("What is [bold]2[/bold]?", "4", "five\nor\x1b[31m six", "4 | four\n\n    indented")])
    out, err = capfd.readouterr()
    assert err == "" and "\x1b" not in out and max(map(len, out.splitlines())) == 100
    assert "What is [bold]2[/bold]?" in out and "expected: 4" in out
    assert any("five" in line and "4 | four" in line for line in out.splitlines())  # side by side
    assert any("    indented" in line for line in out.splitlines())
