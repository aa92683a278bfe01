"""Killed or stopped and resumed is never killed, bit for bit: `pytest tests/test_resume.py`, about 2 min

Every run is the real finetune/lora.py in a process of its own, which gets a signal at a chosen call: read
helpers/killable.py. The processes are forked by helpers/shell.py.
"""

import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from conftest import make_tiny
from helpers.shell import python
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lit_gpt import InputError
from lit_gpt.checkpoint.weight_files import read_metadata
from lit_gpt.data.prepare import DataArgs, prepare
from lit_gpt.files import has_content
from lit_gpt.lock import NAME as LOCK
from lit_gpt.runs.header import KEY
from lit_gpt.runs.load_finetuned import load_finetuned
from lit_gpt.runs.out_dir import command_to_go_on

KILLABLE = Path(__file__).parent / "helpers/killable.py"
FLAGS = {  # 9 steps; dropout has to be the same, too
    "lora.r": 8,
    "lora.query": "false",  # at such a rate its softmax makes the last bits decide what is learned
    "lora.key": "false",
    "lora.projection": "true",
    "lora.mlp": "false",
    "lora.dropout": 0.1,
    "train.learning_rate": 0.6,  # so high that what is learned soon harms the validation: see `data_dirs`
    "train.warmup_steps": 3,
    "train.global_batch_size": 4,
    "train.micro_batch_size": 2,
    "train.epochs": 2,
    "train.max_steps": 9,
    "train.eval_interval": 4,
    "train.save_interval": 3,
    "train.keep_steps": "true",
    "n_answers": 0,
}
TRIALS = 3  # optimizer steps before the first one of the run: one of `check_optimizer`, two of the memory plan
MOMENTS = [  # what is called, which time, and whether the process dies before it, after it or half-way
    ("backward", 8, "before"),
    ("optimizer.step", TRIALS + 8, "after"),
    ("row", 6, "half"),
    ("save .best.partial/lora.safetensors", 2, "half"),
    ("save .step-000006.partial/lora.safetensors", 1, "half"),
    ("rename .step-000006.partial step-000006", 1, "after"),
    ("save .last.partial/lora.safetensors", 1, "half"),
    ("save .last.partial/lora.safetensors", 2, "half"),
    ("save .last.partial/state.safetensors", 1, "half"),
    ("save .last.partial/state.safetensors", 2, "half"),
    ("rename last .last.old", 1, "before"),
    ("rename last .last.old", 1, "after"),
    ("rename .last.partial last", 2, "after"),
    ("delete .last.old", 1, "before"),
    ("delete .last.old", 1, "half"),
    ("write report.md", 1, "before"),
]


MOMENTS_TO_STOP = [  # for Ctrl-C and SIGTERM, which let the run finish what it is at
    ("row", 1, "after"),  # the validation before the first step
    ("backward", 1, "before"),
    ("backward", 8, "after"),
    ("optimizer.step", TRIALS + 1, "before"),
    ("optimizer.step", TRIALS + 8, "after"),
    ("row", 6, "before"),
    ("save .best.partial/lora.safetensors", 2, "before"),
    ("save .last.partial/state.safetensors", 1, "after"),
    ("rename last .last.old", 1, "before"),
    ("rename .last.partial last", 3, "after"),  # of the last step: there is nothing left to stop
]


class Outcome(NamedTuple):
    status: int
    stderr: str
    calls: dict[str, int]
    """How often each kill point was passed."""

    def go_on(self) -> subprocess.CompletedProcess[str]:
        """Types the command that the run printed, the last one if there are several."""
        command = re.findall("goes on with: (.+)", self.stderr)[-1]
        words = shlex.split(command)
        assert words[0] == "python"
        return python(*words[1:])


class Lora:
    """Starts runs that share their flags."""

    def __init__(self, flags: dict[str, Any]) -> None:
        self.flags = flags

    def run(self, out_dir: Path, kill: tuple | None = None, limit: int | None = None, **flags: Any) -> Outcome:
        flags = self.flags | {"out_dir": out_dir} | {name.replace("__", "."): value for name, value in flags.items()}
        words = [word for name, value in flags.items() for word in (f"--{name}", value)]
        with tempfile.NamedTemporaryFile("r") as calls:
            env = {"KILL": json.dumps(kill), "CALLS": calls.name} | ({"LIMIT": str(limit)} if limit else {})
            result = python(KILLABLE, *words, env=os.environ | env)
            outcome = Outcome(result.returncode, result.stderr, json.loads(calls.read() or "{}"))
        assert outcome.status in (0, 2, 130, 143, -signal.SIGTERM, -signal.SIGKILL), outcome.stderr
        return outcome


@pytest.fixture(scope="module")
def data_dirs(tmp_path_factory, tiny_dir: Path) -> list[Path]:
    """Two of the same size: the second has other records for validation.

    What is trained in the first is one letter, and what is validated is sentences: the validation loss falls as weights
    leave their random beginning, and then rises, whatever is rounded how.
    """
    methods = [name for name in dir(str) if not name.startswith("_")]
    folder = tmp_path_factory.mktemp("data")
    for number, data in enumerate(("one", "two")):
        records = []
        for i, name in enumerate(methods[:28]):
            sentence = getattr(str, name).__doc__.split("\n")[0]
            output = sentence if i % 7 == 0 else "z z z z z z z z"
            split = "val" if i % 7 == number else "train"
            records.append({"instruction": f"What does str.{name} do?", "output": output, "split": split})
        prepare(records, DataArgs(checkpoint_dir=tiny_dir, data_dir=folder / data))
    return [folder / "one", folder / "two"]


@pytest.fixture(scope="module")
def lora(tiny_dir: Path, data_dirs: list[Path]) -> Lora:
    return Lora({"checkpoint_dir": tiny_dir, "data_dir": data_dirs[0]} | FLAGS)


@pytest.fixture(scope="module")
def never_killed(lora: Lora, tmp_path_factory) -> tuple[Path, Outcome]:
    out_dir = tmp_path_factory.mktemp("whole") / "run"
    return out_dir, lora.run(out_dir)


def parsed(metadata: dict[str, str]) -> dict[str, Any]:
    """With its JSON as values: a number that has been through a YAML file is 16.0 where it was 16."""
    return {key: json.loads(value) if value.startswith("{") else value for key, value in metadata.items()}


def contents(out_dir: Path) -> dict[str, Any]:
    """All that a run leaves, but for what the clock and the memory say."""
    found: dict[str, Any] = {}
    for path in out_dir.rglob("*"):
        if path.name == LOCK:  # of a process that was killed
            continue
        name = path.relative_to(out_dir).as_posix()
        found[name] = None
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                tensors = {key: (str(tensor.dtype), tensor.tolist()) for key, tensor in load_file(path).items()}
                found[name] = tensors, parsed(file.metadata())
        elif name == "metrics.csv":
            found[name] = [line.split(",")[:-2] for line in path.read_text().splitlines()]
        elif name == "val_losses.csv":
            found[name] = path.read_text()
        elif name == "hyperparameters.yaml":
            found[name] = yaml.safe_load(path.read_text()) | {"out_dir": None}
    return found


# ---- killed


def test_every_moment_is_in_the_run(never_killed) -> None:
    """Otherwise nothing below would be killed."""
    calls = never_killed[1].calls
    assert never_killed[1].status == 0 and calls["optimizer.step"] == TRIALS + 9 and calls["backward"] == 18
    assert all(calls[called] >= nth for called, nth, _ in MOMENTS), calls
    losses = [float(line[3]) for line in contents(never_killed[0])["metrics.csv"][1:] if line[3]]
    assert min(losses) == losses[1] < losses[2] <= losses[3], "of steps 0, 4, 8 and 9: the best has to be remembered"


@pytest.mark.parametrize("moment", MOMENTS, ids=lambda moment: f"{moment[2]}-{moment[0]}-{moment[1]}")
def test_killed_and_resumed_is_never_killed(moment: tuple, lora: Lora, never_killed, tmp_path) -> None:
    killed = lora.run(tmp_path / "run", kill=moment)
    assert killed.status == -signal.SIGKILL
    assert killed.go_on().returncode == 0
    assert contents(tmp_path / "run") == contents(never_killed[0])


@pytest.mark.parametrize("name, status", [("SIGINT", 130), ("SIGTERM", 143)])
@pytest.mark.parametrize("moment", MOMENTS_TO_STOP, ids=lambda moment: f"{moment[2]}-{moment[0]}-{moment[1]}")
def test_stopped_and_resumed_is_never_stopped(
    moment: tuple, name: str, status: int, lora: Lora, never_killed, tmp_path
) -> None:
    """The step is finished and saved: where the run goes on, none is trained twice."""
    stopped = lora.run(tmp_path / "run", kill=(*moment, name))
    assert stopped.status == status and "Traceback" not in stopped.stderr
    promise, last_line = stopped.stderr.strip().splitlines()[-2:]
    said = re.match(
        r"Stopped after step (\d) of 9, which is saved(; `best` is of step \d.*)?\. It goes on with: ", last_line
    )
    rows = contents(tmp_path / "run")["metrics.csv"]
    assert said and int(said[1]) == int(rows[-1][0]) and stopped.calls["optimizer.step"] == TRIALS + int(said[1])

    assert stopped.go_on().returncode == 0
    assert contents(tmp_path / "run") == contents(never_killed[0])


@pytest.mark.parametrize("name, status", [("SIGINT", 130), ("SIGTERM", -signal.SIGTERM)])
def test_stopped_outside_of_the_loop_ends_at_once(name: str, status: int, lora: Lora, never_killed, tmp_path) -> None:
    """When all is trained and saved, and only the report is missing."""
    stopped = lora.run(tmp_path / "run", kill=("write report.md", 1, "before", name))
    assert stopped.status == status
    if status > 0:
        assert stopped.stderr.splitlines()[-1].startswith("error: Interrupted. It goes on with: python ")
    assert stopped.go_on().returncode == 0
    assert contents(tmp_path / "run") == contents(never_killed[0])


@pytest.mark.parametrize("seed", range(2))
def test_killed_at_random_five_times_and_resumed(seed: int, lora: Lora, never_killed, tmp_path) -> None:
    """Resumed runs are killed, too. One that reached its end is compared, and the next begins."""
    whole, calls = contents(never_killed[0]), never_killed[1].calls
    chance, kills, runs = random.Random(seed), 0, 0
    while kills < 5:
        called = chance.choice(sorted(calls))
        first = not (tmp_path / f"{runs}").exists()
        nth = chance.randint(1, calls[called] if first else max(1, calls[called] // 3))
        moment = (called, nth, chance.choice(["before", "after"]))
        if lora.run(tmp_path / f"{runs}", kill=moment, resume=has_begun(tmp_path / f"{runs}")).status == 0:
            assert contents(tmp_path / f"{runs}") == whole
            runs += 1
        else:
            kills += 1
    assert lora.run(tmp_path / f"{runs}", resume=has_begun(tmp_path / f"{runs}")).status == 0
    assert contents(tmp_path / f"{runs}") == whole


def has_begun(out_dir: Path) -> str:
    """What to say to --resume: a run that was killed at once has written nothing to go on with."""
    return str(has_content(out_dir)).lower()


@pytest.mark.parametrize(
    "limit, what", [(20_000, "state.safetensors"), (8_000, "lora.safetensors"), (700, "File too large")]
)
def test_full_disk(limit: int, what: str, lora: Lora, never_killed, tmp_path) -> None:
    """One line, status 2, and the last good checkpoint is whole. The limits hit `last`, `best` and metrics.csv."""
    lora.run(tmp_path / "run", kill=("backward", 8, "before"))
    good = contents(tmp_path / "run/last")
    outcome = lora.run(tmp_path / "run", limit=limit, resume="true")
    errors = [line for line in outcome.stderr.splitlines() if line.startswith("error: ")]
    assert outcome.status == 2 and len(errors) == 1 and what in errors[0] and "Free some space" in errors[0]
    assert "Traceback" not in outcome.stderr and outcome.stderr.endswith(errors[0] + "\n")
    assert contents(tmp_path / "run/last") == good
    assert lora.run(tmp_path / "run", resume="true").status == 0
    assert contents(tmp_path / "run") == contents(never_killed[0])


# ---- whose folder is whose


@pytest.fixture(scope="module")
def stopped(lora: Lora, tmp_path_factory) -> Path:
    """A run that was killed between its sixth and its ninth step. To be copied."""
    out_dir = tmp_path_factory.mktemp("stopped") / "run"
    assert lora.run(out_dir, kill=("optimizer.step", TRIALS + 7, "before")).status == -signal.SIGKILL
    return out_dir


def refused(outcome: Outcome, *parts: str) -> bool:
    *before, line = outcome.stderr.splitlines()
    return outcome.status == 2 and line.startswith("error: ") and all(part in line for part in parts)


@pytest.mark.parametrize(
    "change, named",
    [
        ({"train__global_batch_size": 8}, "train.global_batch_size was 4, now 8"),
        ({"train__seed": 1}, "train.seed was 1337, now 1"),
        ({"train__weight_decay": 1.0}, "train.weight_decay was 0.01, now 1.0"),
        ({"lora__r": 4, "lora__key": "true"}, "lora.r was 8, now 4, lora.key was False, now True"),
        ({"data_dir": 1}, "another data"),
        ({"checkpoint_dir": 1}, "another base"),
    ],
)
def test_another_run_cannot_be_resumed(
    change: dict, named: str, lora, stopped, data_dirs, sample_dir, tmp_path
) -> None:
    out_dir = shutil.copytree(stopped, tmp_path / "run")
    if "data_dir" in change:
        change = {"data_dir": data_dirs[1]}
    if "checkpoint_dir" in change:
        change = {"checkpoint_dir": make_tiny(tmp_path / "tiny", sample_dir, initializer_range=0.1)}
    (out_dir / "last").rename(out_dir / ".last.old")  # where a kill between two renames leaves it
    assert refused(lora.run(out_dir, resume="true", **change), named)
    assert contents(out_dir) == contents(stopped), "nothing was touched, hyperparameters.yaml neither"


def test_what_may_change_on_resuming(lora, stopped, never_killed, tiny_dir, data_dirs, tmp_path) -> None:
    """Where things are, and what changes no result."""
    out_dir = shutil.copytree(stopped, tmp_path / "run")
    moved = {"checkpoint_dir": shutil.copytree(tiny_dir, tmp_path / "moved")}
    moved["data_dir"] = shutil.copytree(data_dirs[0], tmp_path / "data")
    assert lora.run(out_dir, resume="true", train__save_interval=5, train__patience=5, **moved).status == 0
    expected, found = (load_file(folder / "last/lora.safetensors") for folder in (never_killed[0], out_dir))
    assert all(torch.equal(expected[key], found[key]) for key in expected) and expected.keys() == found.keys()


def test_nothing_to_resume_is_refused(lora, tmp_path) -> None:
    """A name that was mistyped must not begin a run. Nothing is written."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "others").mkdir()
    (tmp_path / "others/notes.txt").touch()
    before = sorted(tmp_path.rglob("*"))
    assert refused(lora.run(tmp_path / "empty", resume="true"), f"{tmp_path}/empty is empty", "leave out --resume")
    assert refused(lora.run(tmp_path / "others", resume="true"), f"{tmp_path}/others holds no run")
    assert refused(lora.run(tmp_path / "gone/deep", resume="true"), f"{tmp_path}/gone/deep is not there")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_last_without_its_state_does_not_begin_anew(lora, never_killed, tmp_path) -> None:
    out_dir = shutil.copytree(never_killed[0], tmp_path / "run")
    (out_dir / "last/state.safetensors").unlink()
    before = contents(out_dir)
    assert refused(lora.run(out_dir, resume="true"), "last has no state.safetensors", "begin anew with --overwrite")
    assert contents(out_dir)["best/lora.safetensors"] == before["best/lora.safetensors"]

    # that of another run, whose optimizer trains other parameters
    assert lora.run(tmp_path / "other", lora__r=2, train__max_steps=1).status == 0
    shutil.copy(tmp_path / "other/last/state.safetensors", out_dir / "last")
    said = "state.safetensors is of another run", "begin anew with --overwrite"
    assert refused(lora.run(out_dir, resume="true"), *said)


def test_a_finished_run_keeps_its_files(lora, never_killed, tmp_path) -> None:
    out_dir = shutil.copytree(never_killed[0], tmp_path / "run")
    files = [path for path in out_dir.rglob("*") if path.suffix in (".safetensors", ".csv", ".yaml")]
    before = {path: path.read_bytes() for path in files}
    outcome = lora.run(out_dir, resume="true")
    assert outcome.status == 0 and outcome.calls.get("backward", 0) == 0
    assert before == {path: path.read_bytes() for path in files} and contents(out_dir) == contents(never_killed[0])


def test_folder_in_use_is_refused(lora, stopped, tmp_path) -> None:
    out_dir = shutil.copytree(stopped, tmp_path / "run")
    assert refused(lora.run(out_dir), str(out_dir), "--resume", "--overwrite")
    assert refused(lora.run(out_dir, resume="true", overwrite="true"), "--resume", "--overwrite", "choose")
    (tmp_path / "file").touch()
    assert refused(lora.run(tmp_path / "file"), "is a file")
    assert contents(out_dir) == contents(stopped)


@pytest.mark.parametrize("base", ["best", "last/../best", "link"])
def test_overwrite_spares_the_base_of_the_new_run(base: str, lora: Lora, stopped, tiny_dir, tmp_path) -> None:
    """Full fine-tuning leaves checkpoints in its out_dir. LoRA on one of them reads it once, and would delete it."""
    out_dir = shutil.copytree(stopped, tmp_path / "out")
    shutil.copytree(tiny_dir, out_dir / "best", dirs_exist_ok=True)
    (out_dir / "link").symlink_to(out_dir / "best")
    files = set(out_dir.rglob("*"))
    outcome = lora.run(out_dir, overwrite="true", checkpoint_dir=out_dir / base)
    assert (
        refused(outcome, "--overwrite would delete", base, "Name another --out_dir")
        and set(out_dir.rglob("*")) == files
    )


def test_overwrite_replaces_the_run_and_nothing_else(lora, stopped, never_killed, tmp_path) -> None:
    out_dir = shutil.copytree(stopped, tmp_path / "run")
    assert lora.run(out_dir, overwrite="true", checkpoint_dir="nowhere").status == 2
    assert contents(out_dir) == contents(stopped), "a run that cannot begin replaces nothing"
    for name in (".last.old", ".step-000099.partial", "step-000099"):
        shutil.copytree(out_dir / "last", out_dir / name)
    mine = ["notes.txt", ".bashrc.old", ".cache.partial", "step-by-step.md", "step-000001-notes", "last.txt"]
    for name in mine:
        (out_dir / name).write_text(name)
    assert lora.run(out_dir, overwrite="true").status == 0
    assert [(out_dir / name).read_text() for name in mine] == mine
    assert contents(out_dir) == contents(never_killed[0]) | dict.fromkeys(mine)


@pytest.mark.parametrize("limit", [300, 6_000, 12_000])
def test_a_run_that_fails_before_it_saves_leaves_the_one_that_it_was_to_replace(limit, lora, stopped, tmp_path) -> None:
    """The disk is full when hyperparameters.yaml, `best` or `last` are written."""
    out_dir = shutil.copytree(stopped, tmp_path / "run")
    assert refused(lora.run(out_dir, overwrite="true", lora__r=4, limit=limit), "Free some space")
    assert contents(out_dir) == contents(stopped)


def test_killed_before_it_saved_the_earlier_run_is_read_and_goes_on(lora, stopped, never_killed, tmp_path) -> None:
    """Or the new one does, by its command."""
    out_dir = shutil.copytree(stopped, tmp_path / "run")
    killed = lora.run(out_dir, kill=("optimizer.step", TRIALS + 3, "before"), overwrite="true", lora__r=4)
    assert killed.status == -signal.SIGKILL
    assert load_finetuned(None, out_dir)[1].settings["r"] == 8
    assert load_finetuned(None, out_dir / "last")[1].settings["r"] == 8
    again = shutil.copytree(out_dir, tmp_path / "again")
    assert lora.run(out_dir, resume="true").status == 0
    assert contents(out_dir) == contents(never_killed[0])

    assert refused(lora.run(again, resume="true", lora__r=16), "lora.r was 8, now 16")
    assert contents(again) == contents(stopped)
    assert lora.run(again, kill=("backward", 1, "before"), overwrite="true", lora__r=4).status == -signal.SIGKILL
    assert lora.run(again, resume="true", lora__r=4).status == 0
    assert load_finetuned(None, again)[1].settings["r"] == 4
    assert contents(again).keys() == contents(never_killed[0]).keys()


# ---- using what was trained


def test_another_base_is_refused(never_killed, tied_dir, tmp_path) -> None:
    with pytest.raises(InputError, match="trained on another base"):
        load_finetuned(tied_dir, never_killed[0])

    # of the same path
    out_dir = shutil.copytree(never_killed[0], tmp_path / "out")
    weights = out_dir / "best/lora.safetensors"
    metadata = read_metadata(weights)
    header = json.loads(metadata[KEY]) | {"checkpoint_dir": str(tied_dir)}
    save_file(load_file(weights), weights, metadata | {KEY: json.dumps(header)})
    with pytest.raises(InputError, match="are not those that .* was trained on: they have changed since"):
        load_finetuned(None, out_dir)


def test_reading_disturbs_no_run(never_killed, tmp_path) -> None:
    """Someone asks `best` while its run is saving: between two renames it has another name for an instant."""
    out_dir = shutil.copytree(never_killed[0], tmp_path / "run")
    shutil.copytree(out_dir / "last", out_dir / ".best.partial")
    load_finetuned(None, out_dir)
    (out_dir / "best").rename(out_dir / ".best.old")
    load_finetuned(None, out_dir)
    assert {".best.partial", ".best.old"} <= {path.name for path in out_dir.iterdir()}


@pytest.mark.parametrize("damage", ["truncated", "missing", "extra", "shape", "header", "gone"])
def test_damaged_weights_are_refused(damage: str, never_killed, tmp_path) -> None:
    folder = shutil.copytree(never_killed[0] / "best", tmp_path / "best")
    file = folder / "lora.safetensors"
    with safe_open(file, "pt") as opened:
        header = opened.metadata()
    tensors = load_file(file)
    first = next(iter(tensors))
    if damage == "truncated":
        os.truncate(file, file.stat().st_size // 2)
    elif damage == "gone":
        file.unlink()
    else:
        changed = {
            "missing": {key: value for key, value in tensors.items() if key != first},
            "extra": tensors | {"transformer.h.9.attn.q.lora_A": tensors[first].clone()},
            "shape": tensors | {first: tensors[first][:1].clone()},
            "header": tensors,
        }
        save_file(changed[damage], file, None if damage == "header" else header)
    with pytest.raises(InputError, match=str(folder)):
        load_finetuned(None, folder)


def test_the_command_to_go_on_names_a_file_and_no_flag() -> None:
    assert shlex.split(command_to_go_on(Path("-o")))[-3:] == ["--config", "./-o/hyperparameters.yaml", "--resume"]
