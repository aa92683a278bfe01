"""Several machines, and processes that die or hang: `pytest tests/test_machines.py`, about 2 min

Two network namespaces stand for two machines: each has its own network, and what it calls 127.0.0.1 is not the other's.
They share this machine's disk, as the nodes of a cluster share a file system. Making them takes root. Half of the time
the tests wait: torch's launcher gives a process that has been stopped 30 s to end.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import ROOT
from helpers.methods import TRAIN, finetune
from helpers.runs import column, write_data
from safetensors.torch import load_file

from lit_gpt import InputError, distributed
from lit_gpt.distributed import is_started_from_outside, name_of_attempt, numbers_of_srun
from lit_gpt.runs.out_dir import claim_out_dir
from lit_gpt.watch import BEGINNING, Post, Watch

TORCHRUN = ("-m", "torch.distributed.run")
ON_TWO = (*TORCHRUN, "--standalone", "--nproc_per_node", "2")

# A script with a process that hangs or dies as it comes to its third step, once
TRIP = """
import os, runpy, signal, sys, time
from pathlib import Path
import lit_gpt.train

learning_rate = lit_gpt.train.learning_rate
once = Path(os.environ["TRIP_ONCE"])

def trip(step, steps, args):
    if step == 2 and os.environ.get("RANK") == os.environ["TRIP_RANK"] and not once.exists():
        once.touch()
        how = os.environ["TRIP"]
        if how == "sleep":
            time.sleep(1000)
        os.kill(os.getpid(), signal.SIGSTOP if how == "stop" else signal.SIGKILL)
    return learning_rate(step, steps, args)

lit_gpt.train.learning_rate = trip
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory, tiny_dir: Path) -> Path:
    return write_data(tmp_path_factory.mktemp("data") / "str", tiny_dir)


@pytest.fixture(scope="module")
def alone(tmp_path_factory, tiny_dir: Path, data_dir: Path) -> dict[str, Path]:
    """The out_dirs of runs of one process; the others have their settings."""
    folders = {name: tmp_path_factory.mktemp("alone") / name for name in ("full", "lora")}
    for name, folder in folders.items():
        finetune(name, tiny_dir, data_dir, folder, replace(TRAIN, save_interval=1))
    return folders


def command(name: str, alone: dict[str, Path], out_dir: Path, *flags: Any, launcher: tuple = ()) -> list[str]:
    """The command of a script with the settings of the run of one process."""
    settings = ("--config", alone[name] / "hyperparameters.yaml", "--out_dir", out_dir)
    return [*map(str, (sys.executable, *launcher, ROOT / f"finetune/{name}.py", *settings, *flags))]


def end(process: subprocess.Popen[str], seconds: float = 90) -> str:
    """What a process says until it ends."""
    try:
        return process.communicate(timeout=seconds)[1]
    except subprocess.TimeoutExpired:
        process.terminate()
        raise


# ---- a process that hangs or dies


def trip(folder: Path, how: str, arguments: list[str], rank: int = 1) -> subprocess.Popen[str]:
    """Starts a command of `command` whose process `rank` comes to harm in its third step."""
    folder.mkdir(exist_ok=True)
    script = folder / "trip.py"
    script.write_text(TRIP)
    position = next(i for i, word in enumerate(arguments) if word.startswith(f"{ROOT}/finetune"))
    arguments = [*arguments[:position], str(script), *arguments[position:]]
    return start(arguments, TRIP=how, TRIP_RANK=str(rank), TRIP_ONCE=str(folder / "once"))


def start(arguments: list[str], **environment: str) -> subprocess.Popen[str]:
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(arguments, env=os.environ | environment, stderr=subprocess.PIPE, text=True)


HANGS = {  # how, which process, and with which launcher: what is said of it
    ("stop", 1, ()): "Process 1 on HOST hangs: nothing has been heard for 12 seconds (in step 3),",
    ("sleep", 0, ON_TWO): "Process 0 on HOST hangs: nothing has been done for 12 seconds (in step 3, at trip.py line ",
}


@pytest.fixture(scope="module")
def hung(tmp_path_factory, alone) -> dict[tuple, tuple[int, str]]:
    """All at once: most of the time they wait."""
    folder = tmp_path_factory.mktemp("hangs")
    runs = {}
    for i, (how, rank, launcher) in enumerate(HANGS):
        flags = ("--timeout_minutes", 0.2, *(() if launcher else ("--devices", 2)))
        line = command("lora", alone, folder / f"out{i}", *flags, launcher=launcher)
        runs[how, rank, launcher] = trip(folder / str(i), how, line, rank)
    texts = {key: end(process) for key, process in runs.items()}
    return {key: (process.returncode, texts[key]) for key, process in runs.items()}


@pytest.mark.parametrize("key", HANGS, ids=str)
def test_a_process_that_hangs_is_named(key, hung) -> None:
    status, said = hung[key]
    expected = HANGS[key].replace("HOST", os.uname().nodename)
    assert status == 1 and said.count("error: ") == 1, said
    line = next(line for line in said.splitlines() if line.startswith("error: "))
    assert line.startswith(f"error: {expected}") and " It goes on with: " in line, line
    assert not re.search("gloo|Traceback", said, re.IGNORECASE) or key[2], said


# ---- two machines


@pytest.fixture(scope="module")
def machines() -> Iterator[list[tuple[str, ...]]]:
    """What a command begins with to run on the one or the other; 10.77.0.1 and 10.77.0.2 are their addresses."""
    names = [f"lit_gpt_{os.getpid()}_{i}" for i in range(2)]
    steps = [f"ip netns add {name}" for name in names]
    steps.append(f"ip link add eth0 netns {names[0]} type veth peer name eth0 netns {names[1]}")
    for i, name in enumerate(names):
        steps += [f"ip -n {name} address add 10.77.0.{i + 1}/24 dev eth0"]
        steps += [f"ip -n {name} link set {interface} up" for interface in ("lo", "eth0")]
    try:
        for step in steps:
            try:
                subprocess.run(step.split(), check=True, capture_output=True, text=True)
            except (OSError, subprocess.CalledProcessError) as error:
                pytest.skip(f"no network namespaces here: {getattr(error, 'stderr', error)}")
        yield [("ip", "netns", "exec", name) for name in names]
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


def test_torchrun_on_two_machines_goes_on_after_a_kill(machines, alone, tmp_path) -> None:
    """The same losses and weights as those of one process; a process that is killed is named on the other machine."""
    runs = []
    for i, machine in enumerate(machines):
        launcher = (*TORCHRUN, "--nnodes", 2, "--node_rank", i, "--master_addr", "10.77.0.1", "--master_port", 29500)
        flags = ("--strategy", "fsdp", "--resume")
        line = command("full", alone, tmp_path / "out", *flags, launcher=(*launcher, "--max_restarts", 2))
        runs.append(trip(tmp_path / "trip", "kill", [*machine, *line]))
    said = [end(process) for process in runs]
    assert [process.returncode for process in runs] == [0, 0], said
    assert "Continuing after step 2" in said[0]
    assert f"Before that, process 1 on {os.uname().nodename} ended without a word" in said[0]
    folders = [alone["full"], tmp_path / "out"]
    losses = [column(folder, "loss") for folder in folders]
    assert len(losses[0]) == 4 and losses[1] == pytest.approx(losses[0], rel=1e-5)
    one, two = (load_file(folder / "last/model.safetensors") for folder in folders)
    assert all(torch.allclose(one[key], two[key], rtol=0, atol=2e-3) for key in one)


def test_two_machines_without_torchrun(machines, alone, tmp_path) -> None:
    """The same losses as those of one process. The second machine has a disk of its own: that is said."""
    runs = []
    for i, machine in enumerate(machines):
        line = command("lora", alone, tmp_path / f"disk{i}", "--num_nodes", 2, "--strategy", "ddp")
        where = dict(MASTER_ADDR="10.77.0.1", MASTER_PORT="29501", NODE_RANK=str(i))
        runs.append(start([*machine, *line], **where))
    said = [end(process) for process in runs]
    assert [process.returncode for process in runs] == [0, 0], said
    assert f"Not all machines see {tmp_path / 'disk0'} of" in said[0] and "Not all" not in said[1]
    assert column(tmp_path / "disk0", "loss") == pytest.approx(column(alone["lora"], "loss"), rel=1e-5)
    assert not (tmp_path / "disk1").exists()


def posts(**changes: Any) -> dict[int, Post]:
    """Three processes, of which the last differs."""
    now = time.monotonic()
    same = dict(heartbeat=9, begun=20, place="step 7", line="train.py line 1", host="a", heard=now, moved=now - 100)
    if changes == dict(place=BEGINNING):
        same |= changes
    return {rank: Post(**same | (changes if rank == 2 else {})) for rank in range(3)}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (dict(moved=time.monotonic() + 10**6), None),  # it works
        (dict(place=BEGINNING), None),  # all read a large model, and exchange nothing meanwhile
        (dict(place="ended"), None),  # it has ended as it should: nobody waits for it
        (dict(begun=19, host="b"), "process 2 on b hangs: nothing has been done for 1 minute (in step 7, at train.py"),
        (dict(begun=21), "process 0 on a and process 1 on a hang: nothing has been done"),
        (dict(heard=0.0), "process 2 on a hangs: nothing has been heard for 1 minute (in step 7), and"),
        ({}, "All 3 processes have waited for each other for 1 minute (in step 7): a device or the network hangs."),
    ],
)
def test_who_hangs(changes, expected) -> None:
    """Nothing has moved for the limit: the others wait for the one with the fewest exchanges, or that says nothing."""
    watch = Watch(torch.distributed.HashStore(), rank=0, n_processes=3, n_machines=1, limit=60)
    watch.posts = posts(**changes)
    said = watch.verdict()
    assert (said is None) == (expected is None) and (said or "").startswith(expected or "")
    if said:
        watch.posts = posts(moved=time.monotonic())
        assert watch.verdict() == said, "what one process has said counts for all"


# ---- what is refused, and who has started the processes


def test_what_torchrun_starts_again_has_to_resume(tmp_path, monkeypatch) -> None:
    """And to resume what has not begun is no mistake then: the command is the same for the first start."""
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    out_dir = tmp_path / "out"
    for overwrite in (False, True):
        with pytest.raises(InputError, match="--max_restarts starts this command again .* add --resume"):
            claim_out_dir(out_dir, resume=False, overwrite=overwrite, checkpoint_dir=tmp_path)
    claim_out_dir(out_dir, resume=True, overwrite=False, checkpoint_dir=tmp_path)
    (tmp_path / "other").mkdir()
    (tmp_path / "other/letters.txt").touch()
    with pytest.raises(InputError, match="holds no run, expected a run to resume"):
        claim_out_dir(tmp_path / "other", resume=True, overwrite=False, checkpoint_dir=tmp_path)


def test_an_attempt_has_a_name_that_those_of_before_do_not_know() -> None:
    """A process of an attempt that failed has left its own name in the store, which process 0 may read first."""
    store = torch.distributed.HashStore()
    store.set("process 1", "dead")
    names: dict[int, str] = {}

    def join(rank: int) -> None:
        names[rank] = name_of_attempt(store, rank, 2, timedelta(seconds=20))

    first = threading.Thread(target=join, args=(0,))
    first.start()
    time.sleep(0.2)
    assert first.is_alive(), "it waits for a living one"
    join(1)
    first.join(timeout=20)
    assert names[0] == names[1] and names[0] != "dead"
    with pytest.raises(InputError, match="Of 3 processes these have not come in time: 1, 2"):
        name_of_attempt(torch.distributed.HashStore(), 0, 3, timedelta(seconds=0.1))


def test_the_interface_that_leads_to_machine_0(monkeypatch) -> None:
    """A name that /etc/hosts gives to the machine itself is refused: no other machine would reach it."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "remember")
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    distributed.choose_interface()
    assert os.environ["GLOO_SOCKET_IFNAME"] == "lo"
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    monkeypatch.setenv("MASTER_ADDR", "node0")
    monkeypatch.setattr(distributed, "own_address_towards", lambda host: "127.0.1.1")
    with pytest.raises(InputError, match="MASTER_ADDR node0 is 127.0.1.1 on this machine"):
        distributed.choose_interface()


ALLOCATED = dict(SLURM_JOB_ID="7", SLURM_JOB_NAME="train.sh", SLURM_NTASKS="4", SLURM_NNODES="2", SLURM_PROCID="0")


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, False),  # a batch script, or a shell, in which no srun was typed
        (dict(SLURM_STEP_NUM_TASKS="1"), False),  # the step of an interactive shell
        (dict(SLURM_STEP_NUM_TASKS="4", SLURM_STEP_NUM_NODES="2"), True),
        (dict(SLURM_STEP_NUM_TASKS="2", LOCAL_RANK="0", TORCHELASTIC_RUN_ID="x"), True),  # srun torchrun
    ],
)
def test_a_srun_is_told_from_a_shell_of_slurm(environment, expected, monkeypatch) -> None:
    for key, value in (ALLOCATED | environment).items():
        monkeypatch.setenv(key, value)
    assert is_started_from_outside() == expected
    if "SLURM_STEP_NUM_NODES" in environment:
        monkeypatch.setenv("SLURM_NTASKS_PER_NODE", "2")  # so that it is as before afterwards
        assert numbers_of_srun(1, 1) == numbers_of_srun(2, 2) == (2, 2)
        with pytest.raises(InputError, match="srun started 4 processes on 2 machines, but --devices is 4"):
            numbers_of_srun(4, 1)


def test_srun_of_processes_that_do_not_see_the_same_folder(alone, tmp_path) -> None:
    """SLURM's variables tell two processes their places. One would have gone on, and the other begun at step 0."""
    shutil.copytree(alone["lora"], tmp_path / "disk0")
    runs = []
    for i in "01":
        step = dict(SLURM_STEP_NUM_TASKS="2", SLURM_STEP_NUM_NODES="1", SLURM_NODELIST="127.0.0.1", SLURM_NTASKS="2")
        place = dict(SLURM_PROCID=i, SLURM_LOCALID=i, SLURM_NODEID="0", SLURM_NNODES="1")
        port = str(20_000 + os.getpid() % 20_000)
        line = command("lora", alone, tmp_path / f"disk{i}", "--resume")
        runs.append(start(line, **ALLOCATED | step | place, MASTER_PORT=port))
    said = [end(process) for process in runs]
    host = os.uname().nodename
    expected = f"is there for process 0 on {host}, and not there for process 1 on {host}. Type the same flags on all"
    assert [process.returncode for process in runs] == [2, 2] and all(expected in text for text in said), said
    assert not (tmp_path / "disk1").exists()


def test_the_files_for_clusters_can_be_parsed() -> None:
    """No more than that: there is no cluster here."""
    folder = ROOT / "finetune/clusters"
    subprocess.run(["bash", "-n", str(folder / "slurm.sh")], check=True)
    job = yaml.safe_load((folder / "pytorchjob.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    (container,) = job["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]["containers"]
    for words in (container["command"], shlex.split((folder / "slurm.sh").read_text(), comments=True)):
        assert "finetune/full.py" in " ".join(words) and "--resume" in " ".join(words)
