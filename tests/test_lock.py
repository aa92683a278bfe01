"""One writer for a folder, and what --overwrite keeps until it has saved: `pytest tests/test_lock.py`, about 10 s

The other process is forked, and killed as `kill -9` does.
"""

import errno
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from helpers.methods import finetune
from helpers.runs import write_data
from helpers.scripts import script

from lit_gpt import InputError, files, lock
from lit_gpt.checkpoint.hub import download
from lit_gpt.checkpoint.save import convert_checkpoint
from lit_gpt.data.prepare import DataArgs, prepare
from lit_gpt.files import new_folder
from lit_gpt.formats.gguf_reader import convert_gguf
from lit_gpt.formats.gguf_writer import export_gguf
from lit_gpt.formats.merge import export_merged, export_peft
from lit_gpt.lock import hold, lock_beside, lock_in, only_writer
from lit_gpt.runs import overwrite
from lit_gpt.runs.out_dir import is_first_by_environment

RECORDS = [{"instruction": f"What is {i}?", "output": f"It is {i}."} for i in range(40)]


@contextmanager
def another_process(work: Callable[[], None]) -> Iterator[int]:
    """A process that has done `work` and waits. It is killed at the end of the block, unless it has been before."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        work()
        os.write(write, b"done")
        time.sleep(60)
        os._exit(0)
    os.close(write)
    assert os.read(read, 4) == b"done"
    os.close(read)
    try:
        yield child
    finally:
        kill(child)


def kill(child: int) -> None:
    try:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    except (ProcessLookupError, ChildProcessError):
        pass


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory, tiny_dir: Path) -> Path:
    return write_data(tmp_path_factory.mktemp("data") / "data", tiny_dir)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_dir: Path, data_dir: Path) -> Path:
    out_dir = tmp_path_factory.mktemp("finished") / "run"
    finetune("lora", tiny_dir, data_dir, out_dir)
    return out_dir


def content(folder: Path) -> dict[str, bytes | None]:
    """Every file below a folder, and every folder."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


# ---- a live run


def test_a_run_is_alone_in_its_out_dir(finished, tiny_dir, data_dir, tmp_path) -> None:
    """The second one stops at once, whatever flag it has; and goes on at once when the first was killed."""
    out_dir = shutil.copytree(finished, tmp_path / "run")
    before = content(out_dir)
    with another_process(lambda: hold(out_dir)) as other:
        for flags in ({}, {"resume": True}, {"overwrite": True}):
            with pytest.raises(InputError, match=rf"run is in use: process {other} on .+ since 20\d\d-"):
                finetune("lora", tiny_dir, data_dir, out_dir, **flags)
            with pytest.raises(InputError, match=f"run is in use: process {other}"):
                finetune("full", tiny_dir, data_dir, out_dir, **flags)
        for folder in ("best", "last"):  # of the live run
            with pytest.raises(InputError, match=f"{folder} is in use: process {other}"):
                finetune("lora", tiny_dir, data_dir, out_dir / folder, overwrite=True)
        assert content(out_dir) == before | {".lock": lock_in(out_dir).read_bytes()}
        script("scripts/merge_lora.py").main(out_dir, tmp_path / "merged")  # reading is no writing
        kill(other)
        finetune("lora", tiny_dir, data_dir, out_dir, resume=True)
    assert {name for name in content(out_dir)} == {*before, "loss.png", "report.md"}


def test_nothing_of_a_lock_is_left(tmp_path) -> None:
    with another_process(lambda: hold(tmp_path / "a/b/run")):
        assert (tmp_path / "a/b/run/.lock").is_file()
    lock.clear_stale(tmp_path / "a/b/run/.lock")
    assert list((tmp_path / "a/b/run").iterdir()) == []
    hold(tmp_path / "c/d/run")
    (tmp_path / "c/mine").touch()
    lock.release_all()
    assert sorted(str(path.relative_to(tmp_path)) for path in (tmp_path / "c").rglob("*")) == ["c/mine"]


def test_a_lock_stays_with_its_process_and_not_with_those_it_forks(tmp_path) -> None:
    """A loader of data that outlives its run must not keep the folder."""

    def hold_and_fork() -> None:
        hold(tmp_path)
        if os.fork() == 0:
            (tmp_path / "pid").write_text(str(os.getpid()))
            time.sleep(60)
            os._exit(0)
        while not (tmp_path / "pid").exists():
            time.sleep(0.01)

    with another_process(hold_and_fork) as other:
        with pytest.raises(InputError, match="in use"):
            hold(tmp_path)
        kill(other)
        hold(tmp_path)
        lock.release_all()
        os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)


def test_a_file_system_without_locks_is_told(tmp_path, monkeypatch, capsys) -> None:
    import fcntl

    def flock(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    hold(tmp_path)
    with new_folder(tmp_path / "new") as folder:
        (folder / "file").touch()
    assert capsys.readouterr().err.count("has no locks") == 2
    assert content(tmp_path) == {"new": None, "new/file": b""}


@pytest.mark.parametrize(
    "environment, is_first",
    [
        ({}, True),
        ({"RANK": "0", "LOCAL_RANK": "0", "GROUP_RANK": "0"}, True),
        ({"RANK": "1", "LOCAL_RANK": "0", "GROUP_RANK": "1"}, False),
        ({"LOCAL_RANK": "1"}, False),
        ({"NODE_RANK": "1"}, False),  # --num_nodes 2, on the second machine
        ({"SLURM_PROCID": "0"}, True),
        ({"SLURM_PROCID": "1"}, False),
        ({"OMPI_COMM_WORLD_RANK": "2"}, False),
    ],
)
def test_one_process_of_a_run_claims_its_out_dir(environment, is_first, monkeypatch) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert is_first_by_environment() == is_first


# ---- folders that are written as a whole


def exports(finished: Path, tiny_dir: Path, out_dir: Path) -> list[Callable[[], None]]:
    """Everything that writes a folder."""
    return [
        lambda: prepare(RECORDS, DataArgs(checkpoint_dir=tiny_dir, data_dir=out_dir)),
        lambda: prepare(RECORDS, DataArgs(checkpoint_dir=tiny_dir, data_dir=out_dir, overwrite=True)),
        lambda: convert_checkpoint(tiny_dir, out_dir, hugging_face=False),
        lambda: script("scripts/convert_lit_checkpoint.py").main(out_dir, checkpoint_dir=tiny_dir),
        lambda: export_merged(finished, None, out_dir),
        lambda: export_peft(finished, None, out_dir),
        lambda: export_gguf(tiny_dir, out_dir, "float16"),
        lambda: convert_gguf(Path("any.gguf"), out_dir),
        lambda: download("org/name", out_dir, None, None, tokenizer_only=False),
        lambda: script("scripts/download_sample.py").main(out_dir),
        lambda: hold(out_dir),  # a run
    ]


def test_a_folder_has_one_writer(finished, tiny_dir, tmp_path) -> None:
    """The second stops before it reads a weight, and touches nothing of what the first has written so far."""
    out_dir = tmp_path / "out"

    def write() -> None:
        context = new_folder(out_dir)
        partial = context.__enter__()
        (partial / "half").write_text("half")
        lock.HELD[lock_beside(out_dir)].at_end.append(lambda: context)  # keeps it open

    with another_process(write) as other:
        for export in exports(finished, tiny_dir, out_dir):
            with pytest.raises(InputError, match=f"out is in use: process {other}"):
                export()
        assert {name for name in content(tmp_path)} == {".out.lock", ".out.partial", ".out.partial/half"}
        kill(other)
        prepare(RECORDS, DataArgs(checkpoint_dir=tiny_dir, data_dir=out_dir))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_run_keeps_others_from_its_out_dir(finished, tiny_dir, tmp_path) -> None:
    out_dir = tmp_path / "out"
    with another_process(lambda: hold(out_dir)) as other:
        for export in exports(finished, tiny_dir, out_dir):
            with pytest.raises(InputError, match=f"out is in use: process {other}"):
                export()


def test_many_writers_at_once_leave_one_whole_folder(tmp_path) -> None:
    folder = tmp_path / "out"
    children = []
    for number in range(8):
        child = os.fork()
        if child == 0:
            try:
                for _ in range(20):
                    with new_folder(folder) as new:
                        for name in "abc":
                            (new / name).write_text(str(number))
            except InputError:
                os._exit(2)
            finally:
                os._exit(0)
        children.append(child)
    assert {os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children} <= {0, 2}
    texts = {path.read_text() for path in folder.iterdir()}
    assert len(texts) == 1 and len(list(folder.iterdir())) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_folder_that_may_not_be_written_says_so(tmp_path) -> None:
    """A prepared folder on a disk that can only be read is used as it is: see `only_writer`."""
    with only_writer(Path("/sys/out")):  # where not even root can make a file
        pass
    with pytest.raises(InputError, match="/sys/out cannot be written to"):
        hold(Path("/sys/out"))


# ---- --overwrite


OLD = {"last": None, "last/w": b"old", "best": None, "best/w": b"old", "metrics.csv": b"old", "notes.txt": b"mine"}
NEW = {"last": None, "last/w": b"new", "best": None, "best/w": b"new", "metrics.csv": b"new", "notes.txt": b"mine"}


def write_run(out_dir: Path, text: str, is_saved: bool = True) -> None:
    """What a run leaves: first its figures and `best`, and in the end its first save of `last`."""
    (out_dir / "metrics.csv").write_text(text)
    for name in ("best", "last") if is_saved else ("best",):
        with new_folder(out_dir / name, lock=False) as folder:
            (folder / "w").write_text(text)


def overwrite_run(out_dir: Path, is_saved: bool) -> None:
    """A run with --overwrite, as `start_run` and `Checkpoints` make it, that ends before or after its first save."""
    overwrite.recover_aside(out_dir)
    overwrite.set_aside(out_dir)
    overwrite.keep_until_saved(out_dir, "the command")
    write_run(out_dir, "new", is_saved)
    if is_saved:
        overwrite.drop_earlier_run()
    overwrite.recover_aside(out_dir)
    overwrite.bring_back(out_dir)


def die_at_call(number: int) -> None:
    """Lets this process die as if killed when it has moved or deleted something for the n-th time, or before that."""
    n_calls = 0

    def watch(owner: object, name: str) -> None:
        original = getattr(owner, name)

        def watched(*args: object, **kwargs: object) -> object:
            nonlocal n_calls
            n_calls += 1
            if n_calls == number:
                os._exit(9)
            return original(*args, **kwargs)

        setattr(owner, name, watched)

    for name in ("rename", "unlink", "rmdir", "mkdir"):
        watch(os, name)


@pytest.mark.parametrize("is_saved", [False, True])
def test_killed_at_any_moment_of_overwriting_a_run_is_old_or_new(is_saved: bool, tmp_path) -> None:
    """Never a mixture, never nothing; and while it is old it is read as old."""
    status = 9
    number = 0
    while status:
        number += 1
        out_dir = tmp_path / str(number)
        out_dir.mkdir()
        (out_dir / "notes.txt").write_text("mine")
        write_run(out_dir, "old")
        child = os.fork()
        if child == 0:
            die_at_call(number)
            overwrite_run(out_dir, is_saved)
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert status in (0, 9)

        # what a reader finds, and what the next command makes of it
        texts = set()
        for name in ("last", "best"):
            path = overwrite.as_it_was(out_dir / name)
            whole = path if path.exists() else files.partial_and_old(path)[1]
            texts.add((whole / "w").read_bytes())
        overwrite.recover_aside(out_dir)
        overwrite.bring_back(out_dir)
        for name in ("last", "best"):
            files.recover(out_dir / name)
        assert content(out_dir) in ((OLD, NEW) if is_saved else (OLD,))
        assert texts <= {b"old", b"new"} if is_saved else texts == {b"old"}
    assert number > 10 and content(out_dir) == (NEW if is_saved else OLD)
