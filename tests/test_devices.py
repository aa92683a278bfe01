"""Several processes on the CPU: the same step, whole files, one last word: `pytest tests/test_devices.py`, about 2 min

What runs on GPUs differs in the kernels and in NCCL, not in this code. On one GPU it has run, in `test_gpu.py`; on
several it has not.
"""

import logging
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import ROOT
from helpers.methods import TRAIN, exact, finetune
from helpers.runs import DESCRIPTION, column, first, write_data
from helpers.shell import python, torchrun
from safetensors.torch import load_file
from torch.optim.optimizer import register_optimizer_step_pre_hook
from transformers import AutoModelForCausalLM

import lit_gpt.train
from lit_gpt import InputError
from lit_gpt.data.dataset import Dataset
from lit_gpt.device import prepare_device
from lit_gpt.distributed import is_to_split, launch, rendezvous_of_machines, when_failed
from lit_gpt.interruption import SIGNALS, Interruption
from lit_gpt.model.activation_checkpointing import recompute_blocks
from lit_gpt.quantize import QuantizedLinear
from lit_gpt.runs.load_finetuned import load_finetuned
from lit_gpt.runs.saves import Checkpoints
from lit_gpt.sharding import check_codes_can_be_split, full_tensor, local_tensor, mesh_of
from lit_gpt.train import TrainArgs

NAMES = ("lora", "lora nf4", "adapter", "adapter_v2 nf4-dq", "full", "full last")
TOGETHER = " together"  # three records at once, with the prefix they share, and blocks computed again
NAMES += tuple(name + TOGETHER for name in NAMES[:3])
OPTIMIZERS = tuple(f"torch.optim.{name}" for name in ("AdamW", "SGD", "Adafactor"))
OPTIMIZERS += ("bitsandbytes.optim.AdamW8bit", "bitsandbytes.optim.PagedAdamW8bit")
STRATEGIES = ("ddp", "fsdp")
SETTINGS = {  # the flags of METHODS that the runs below need, as a command line has them
    "full": [],
    "lora": [],
    "lora nf4": ["--quantize", "bnb.nf4"],
}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory, tiny_dir: Path) -> Path:
    return write_data(tmp_path_factory.mktemp("data") / "str", tiny_dir)


# ---- one step, in float64


def step(fabric: Any, name: str, tiny_dir: Path, data_dir: Path, out_dir: Path) -> dict[str, torch.Tensor]:
    """The gradient of the mean over 5 records, as the optimizer gets it, and the loss."""
    model, found = exact(name.removesuffix(TOGETHER), tiny_dir), {}
    recompute_blocks(model, "block" if name.endswith(TOGETHER) else "none")

    def keep(*_: Any) -> None:
        grads = {key: param.grad for key, param in model.named_parameters() if param.grad is not None}
        found.update({key: full_tensor(grad).clone() for key, grad in grads.items()})
        rows = [local_tensor(param).shape[0] for param in model.parameters() if param.dim() == 2]
        found["rows here"] = torch.tensor(float(sum(rows)))

    handle = register_optimizer_step_pre_hook(keep)
    size = 3 if name.endswith(TOGETHER) else 1
    data, args = first(Dataset(data_dir, "train"), 5), TrainArgs(global_batch_size=5, max_norm=None)
    args = replace(args, micro_batch_size=size, share_prefixes=size > 1)
    checkpoints = Checkpoints(out_dir, model, replace(DESCRIPTION, method="lora"))
    log = lit_gpt.train.fit(fabric, model, data, first(data, 0), args, checkpoints)
    handle.remove()
    return found | {"loss": torch.tensor(log.rows[-1]["loss"] if fabric.is_global_zero else 0.0).double()}


def one_of_two(tiny_dir: Path, data_dir: Path, out_dir: Path) -> None:
    found = {}
    for strategy in STRATEGIES:
        fabric = launch(2, "32-true", strategy=strategy)
        assert (mesh_of(fabric) is not None) == (strategy == "fsdp") and fabric.world_size == 2
        for name in NAMES:
            found[f"{strategy} {name}"] = step(fabric, name, tiny_dir, data_dir, out_dir / strategy / name)
        found[f"{strategy} refuses"] = [path for path in OPTIMIZERS if refusal(fabric, path)]
        if strategy == "ddp":
            found["ddp buffer"], found["ddp storages"] = buffer_and_storages(fabric)
    torch.save(found, out_dir / f"{fabric.global_rank}.pt")


def buffer_and_storages(fabric: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """A buffer after a step, to which each process had given its rank; and how many memories the gradients are in."""
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    model.register_buffer("here", torch.zeros(()))
    wrapped = fabric.setup_module(model)
    model.here.fill_(fabric.global_rank)
    for _ in range(2):  # the first pass finds out in which order gradients are ready
        fabric.backward(wrapped(torch.ones(5, 3)).sum())
    storages = {param.grad.untyped_storage().data_ptr() for param in model.parameters()}
    return model.here, torch.tensor(len(storages))


def refusal(fabric: Any, path: str) -> str | None:
    try:
        return lit_gpt.make_optimizer.check_optimizer(path, fabric)
    except lit_gpt.InputError as error:
        assert "cannot step where weights are split" in str(error) and "another --strategy" in str(error)
        return str(error)


@pytest.fixture(scope="module")
def two(tmp_path_factory, tiny_dir, data_dir) -> list[dict[str, Any]]:
    out_dir = tmp_path_factory.mktemp("two")
    torchrun(__file__, tiny_dir, data_dir, out_dir)
    return [torch.load(out_dir / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", NAMES)
def test_a_step_is_that_of_one_process(name, strategy, two, tiny_dir, data_dir, tmp_path) -> None:
    """Five records on two: the last pass of one is empty. Split, each holds half of the rows."""
    expected = step(launch(1, "32-true"), name.removesuffix(TOGETHER), tiny_dir, data_dir, tmp_path)
    for rank in two:
        found = rank[f"{strategy} {name}"]
        assert found.keys() == expected.keys() and len(found) > 3
        for key in found.keys() - {"loss", "rows here"}:
            assert (found[key] - expected[key]).abs().max() <= 1e-10 * expected[key].abs().max(), key
        assert found["rows here"] / expected["rows here"] == pytest.approx(0.5 if strategy == "fsdp" else 1, abs=0.01)
    assert two[0][f"{strategy} {name}"]["loss"].item() == pytest.approx(expected["loss"].item(), rel=1e-6)


def test_optimizers_that_cannot_step_with_split_weights_are_refused(two) -> None:
    for rank in two:
        assert rank["ddp refuses"] == [] and rank["fsdp refuses"] == list(OPTIMIZERS[2:])


def test_ddp_sends_no_buffers_and_keeps_each_gradient_once(two) -> None:
    assert [rank["ddp buffer"].item() for rank in two] == [0, 1]
    assert [rank["ddp storages"].item() for rank in two] == [1, 1], "a bucket for all"


# ---- whole runs

# Python runs this as it starts, and what is registered first comes last
SITECUSTOMIZE = """
import atexit, os, sys
from pathlib import Path

def tell() -> None:
    if "LOCAL_RANK" in os.environ:
        is_open = sys.modules["torch"].distributed.is_initialized()
        path = Path(__file__).with_name(f"{os.getpid()}.partial")
        path.write_text("open" if is_open else "closed")
        path.rename(path.with_suffix(".txt"))

atexit.register(tell)
"""


@pytest.fixture
def connections(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[str]]:
    """What the connections of each process that a launcher has started were at its very end, "closed" or "open".

    NCCL complains of those that are open, and may wait for them. A process that is ended by a signal says nothing.
    """
    folder = tmp_path / "connections"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(SITECUSTOMIZE)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]))
    return lambda: [path.read_text() for path in folder.glob("*.txt")]


def settings_of(name: str, tiny_dir: Path, data_dir: Path, out_dir: Path, *flags: Any) -> list[Any]:
    """A script and its flags, which are those of METHODS and TRAIN."""
    train = [
        *("--train.learning_rate", TRAIN.learning_rate, "--train.global_batch_size", 4, "--train.micro_batch_size", 4),
        *("--train.max_steps", 4, "--train.warmup_steps", 1, "--train.eval_interval", 2, "--train.save_interval", 2),
    ]
    where = ["--checkpoint_dir", tiny_dir, "--data_dir", data_dir, "--out_dir", out_dir, "--n_answers", 0]
    script = ROOT / f"finetune/{name.split()[0]}.py"
    return [script, *where, "--precision", "32-true", *train, *SETTINGS[name], *flags]


@pytest.mark.parametrize("name", ["full", "lora nf4"])
def test_a_run_goes_on_with_another_number_of_processes(name, tiny_dir, data_dir, tmp_path, connections) -> None:
    """One process, two with half of the weights, one, two with all of them: each takes over after a step."""
    finetune(name, tiny_dir, data_dir, tmp_path / "one")
    soon = replace(TRAIN, max_hours=1e-9)
    finetune(name, tiny_dir, data_dir, tmp_path / "two", soon)
    go_on = settings_of(name, tiny_dir, data_dir, tmp_path / "two", "--devices", 2, "--resume", "true", "--strategy")
    if name == "full":
        torchrun(*go_on, "fsdp", "--train.max_hours", 1e-9)
        finetune(name, tiny_dir, data_dir, tmp_path / "two", soon, resume=True)
        python(*go_on, "ddp", check=True)
    else:
        python(*go_on, "fsdp", check=True)

    folders = [tmp_path / "one", tmp_path / "two"]
    losses = [column(folder, "loss") for folder in folders]
    assert len(losses[0]) == 4 and losses[0] == pytest.approx(losses[1], rel=1e-5)
    one, two = (load_finetuned(None, folder / "last")[0].state_dict() for folder in folders)
    assert all(torch.allclose(one[key], two[key], rtol=0, atol=2e-3) for key in one)
    shapes = [
        {key: (tensor.shape, tensor.dtype) for key, tensor in load_file(file).items()}
        for folder in folders
        for file in sorted((folder / "last").glob("*.safetensors"))
    ]
    assert shapes[:2] == shapes[2:], "weights and the optimizer's state"
    assert connections() == ["closed", "closed"]


def test_torchrun_and_what_auto_means(tiny_dir, data_dir, tmp_path, connections) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2]
    finetune("full", tiny_dir, data_dir, tmp_path / "one")
    command = [*launcher, *settings_of("full", tiny_dir, data_dir, tmp_path / "two")]
    subprocess.run([*map(str, command)], check=True)
    assert column(tmp_path / "one", "loss") == pytest.approx(column(tmp_path / "two", "loss"), rel=1e-5)
    report = (tmp_path / "two/report.md").read_text()
    assert "Optimizer steps | 4" in report
    AutoModelForCausalLM.from_pretrained(tmp_path / "two/last")  # whole, though no process ever had it whole
    assert connections() == ["closed", "closed"]


def test_split_in_bfloat16(tiny_dir, data_dir, tmp_path) -> None:
    """Weights in bfloat16 and LoRA in float32 in the same blocks."""
    finetune("lora", tiny_dir, data_dir, tmp_path / "one", precision="bf16-true")
    flags = ("--precision", "bf16-true", "--devices", 2, "--strategy", "fsdp")
    torchrun(*settings_of("lora", tiny_dir, data_dir, tmp_path / "two", *flags))
    assert column(tmp_path / "one", "loss") == pytest.approx(column(tmp_path / "two", "loss"), rel=0.02)
    assert {tensor.dtype for tensor in load_file(tmp_path / "two/last/lora.safetensors").values()} == {torch.float32}


def test_two_machines(tiny_dir, data_dir, tmp_path) -> None:
    """One process of each, with the variables that two torchruns set; `test_machines.py` has two torchruns."""
    finetune("full", tiny_dir, data_dir, tmp_path / "one")
    settings = ["--config", tmp_path / "one/hyperparameters.yaml", "--out_dir", tmp_path / "two"]
    torchrun(ROOT / "finetune/full.py", *settings, n_machines=2)
    assert column(tmp_path / "one", "loss") == pytest.approx(column(tmp_path / "two", "loss"), rel=1e-5)


# ---- ends

FAILING = """
import os, sys, time
from lit_gpt import InputError
from lit_gpt.cli import run
from lit_gpt.distributed import launch

def main(how: str, devices: int = 2) -> None:
    fabric = launch(devices, "32-true")
    if how == "input everywhere":
        raise InputError("This cannot be. Type something else.")
    if how == "input in the first" and fabric.is_global_zero:
        raise InputError("The first cannot go on.")
    if not fabric.is_global_zero:
        if how == "kill":
            os.kill(os.getpid(), 9)
        if how == "raise":
            raise RuntimeError("a bug in the second")
        if how == "input":
            raise InputError("The second cannot go on.")
    fabric.barrier()
    os.write(2, b"waiting\\n")  # in one piece: print writes the line's end apart, and another process may come between
    time.sleep(60)

if __name__ == "__main__":
    run(main)
"""
ENDS = {  # how it fails: exit status, the last line, how many lines begin with "error:"
    "input everywhere": (2, "error: This cannot be. Type something else.", 1),
    "input in the first": (2, "error: The first cannot go on.", 1),
    "kill": (1, "error: process 1 was ended by signal 9.", 1),
    "raise": (1, "RuntimeError: a bug in the second", 0),
    "input": (2, "error: The second cannot go on.", 1),
}


@pytest.fixture(scope="module")
def ended(tmp_path_factory) -> dict[str, tuple[int, str]]:
    """All at once: most of their time is that of starting three Pythons each."""
    script = tmp_path_factory.mktemp("ends") / "failing.py"
    script.write_text(FAILING)
    runs = {
        how: subprocess.Popen([sys.executable, script, "--how", how], stderr=subprocess.PIPE, text=True) for how in ENDS
    }
    found = {}
    for how, process in runs.items():
        stderr = process.communicate(timeout=300)[1]  # they would wait for each other for half an hour
        found[how] = (process.returncode, stderr)
    return found


@pytest.mark.parametrize("how", ENDS)
def test_who_fails_has_the_last_word(how, ended) -> None:
    status, stderr = ended[how]
    lines = stderr.strip().splitlines()
    assert (status, lines[-1], sum(line.startswith("error:") for line in lines)) == ENDS[how], stderr
    assert stderr.count("Traceback") == (how == "raise")


def left(script: str) -> str:
    """The ids of all processes with this script in their command."""
    return subprocess.run(["pgrep", "-f", script], capture_output=True, text=True).stdout


def test_nobody_is_left(ended) -> None:
    assert left("failing.py") == ""


@pytest.mark.parametrize(
    ("sent", "status", "last_line"),
    [
        (signal.SIGTERM, 143, "error: Interrupted."),
        (signal.SIGKILL, -signal.SIGKILL, ""),
        (signal.SIGINT, 130, "error: Interrupted."),
    ],
)
def test_a_signal_ends_all_processes(sent, status, last_line, tmp_path) -> None:
    """Sent to the command that the user typed, which does not train; the processes that it started must not go on."""
    script = tmp_path / "waiting.py"
    script.write_text(FAILING)
    command = [sys.executable, script, "--how", "wait"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    for _ in range(2):
        assert process.stderr.readline() == "waiting\n", "it ended by itself"
    assert len(left(str(script)).split()) == 3
    process.send_signal(sent)
    stderr = process.communicate(timeout=60)[1]  # ends when nobody is left who could write there
    lines = stderr.strip().strip("-").splitlines() or [""]
    assert (process.returncode, lines[-1]) == (status, last_line), stderr
    assert left(str(script)) == ""


def test_a_signal_that_comes_when_all_have_agreed_kills_nobody() -> None:
    """A process learns of a stop from another one, and is done before what asks it for the same gets there."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        with Interruption() as interruption:
            interruption.settle()
        assert interruption.asked and interruption.status == 143
        for number in SIGNALS:
            signal.raise_signal(number)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.mark.parametrize("launcher", [(), ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")])
def test_a_signal_to_a_run_that_trains_finishes_the_step(launcher, tiny_dir, data_dir, tmp_path, connections) -> None:
    """All processes end after the same step, which is saved; the command that is printed goes on."""
    finetune("lora", tiny_dir, data_dir, tmp_path / "one", replace(TRAIN, max_steps=40, epochs=4))
    devices = [] if launcher else ["--devices", "2"]
    settings = ["--config", tmp_path / "one/hyperparameters.yaml", "--out_dir", tmp_path / "two", *devices]
    command = [sys.executable, *launcher, ROOT / "finetune/lora.py", *settings]
    process = subprocess.Popen([*map(str, command)], stderr=subprocess.PIPE, text=True)
    said = ""
    while "step 2/40" not in said:
        line = process.stderr.readline()
        assert line, said
        said += line
    process.send_signal(signal.SIGTERM)
    said += process.communicate(timeout=120)[1]
    assert process.returncode == 143 or launcher, said
    assert re.search(r"of 40, which is saved(; `best` is of step \d+.*)?\. It goes on with: ", said)
    assert "Traceback" not in said or launcher, "torchrun ends with one of its own"
    stopped_after = len(column(tmp_path / "two", "loss"))
    assert stopped_after < 40
    assert set(connections()) == {"closed"}, "of those that the launcher, which ends them all, has let come so far"

    settings = ["--config", tmp_path / "two/hyperparameters.yaml", "--resume"]
    assert python(ROOT / "finetune/lora.py", *settings, "--devices", "1").returncode == 0
    assert column(tmp_path / "one", "loss") == pytest.approx(column(tmp_path / "two", "loss"), rel=1e-5)


def test_what_the_command_finds_wrong_is_found_once(tmp_path) -> None:
    """Before any process is started, and by the command that was typed."""
    script = tmp_path / "early.py"
    script.write_text(FAILING.replace("fabric = launch", 'raise InputError("Too early.")\n    fabric = launch'))
    result = subprocess.run([sys.executable, script, "--how", ""], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (2, "error: Too early.\n")


def test_the_cause_is_told_from_what_follows() -> None:
    """By the clock; but a process that was killed could not look at it, and one that is told to end is no cause."""

    def failure(status: int, nanoseconds: int | None = None) -> SimpleNamespace:
        record = {"message": "<NONE>"} if nanoseconds is None else {"nanoseconds": nanoseconds}
        return SimpleNamespace(exitcode=status, error_file_data=record)

    early, late = failure(1, 5), failure(1, 6)
    abort, end, kill = (failure(-number) for number in (signal.SIGABRT, signal.SIGTERM, signal.SIGKILL))
    silent = failure(141)
    for cause, *others in [(early, late, abort, end), (kill, early, abort, end), (silent, early, end)]:
        assert min(reversed([cause, *others]), key=when_failed) is cause


def test_machines_need_an_address(monkeypatch) -> None:
    monkeypatch.delenv("MASTER_PORT", raising=False)
    with pytest.raises(lit_gpt.InputError, match="needs MASTER_ADDR, MASTER_PORT and NODE_RANK"):
        rendezvous_of_machines()


@pytest.mark.parametrize(
    ("environment", "settings", "message"),
    [
        ({}, dict(devices=0), "--devices 0 --num_nodes 1, expected 1 or more"),
        ({}, dict(devices=9_999_999), "--devices 9999999, but this machine has .* CPU cores"),
        (dict(LOCAL_WORLD_SIZE="2", WORLD_SIZE="4"), dict(devices=3), "started 2 processes on each of 2 machines, but"),
        (dict(LOCAL_WORLD_SIZE="2", WORLD_SIZE="4"), dict(num_nodes=3), "--num_nodes 3. Leave both flags out"),
    ],
)
def test_numbers_that_do_not_fit(environment, settings, message, monkeypatch) -> None:
    for key, value in (environment | {"TORCHELASTIC_RUN_ID": "x"} if environment else {}).items():
        monkeypatch.setenv(key, value)
    with pytest.raises(lit_gpt.InputError, match=message):
        launch(**settings)


@pytest.mark.parametrize("shard", [False, True])
def test_what_is_to_be_split(shard) -> None:
    assert is_to_split("fsdp", 1, shard) and not is_to_split("ddp", 2, shard) and not is_to_split("auto", 1, shard)
    assert is_to_split("auto", 2, shard) == shard


def test_attention_of_cudnn_is_off_on_a_gpu() -> None:
    """It would plan anew for every length; `test_gpu.py` measures it."""
    before = torch.backends.cuda.cudnn_sdp_enabled()
    try:
        torch.backends.cuda.enable_cudnn_sdp(True)
        prepare_device("cpu")
        assert torch.backends.cuda.cudnn_sdp_enabled()
        prepare_device("cuda")
        assert not torch.backends.cuda.cudnn_sdp_enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def test_fabric_gives_no_advice(monkeypatch) -> None:
    """Of a card of the kind of an A100 it says, on stderr, that float32 could be multiplied with fewer bits."""
    from lightning_fabric.accelerators import cuda

    launch(1, "32-true")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a card")
    monkeypatch.setattr(cuda, "_is_ampere_or_later", lambda _: True)
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append
    logger = logging.getLogger("lightning_fabric")
    logger.addHandler(handler)
    for level, n in ((logger.level, 0), (logging.INFO, 1)):
        with monkeypatch.context() as patch:
            patch.setattr(logger, "level", level)
            logger.manager._clear_cache()
            cuda._check_cuda_matmul_precision.__wrapped__(torch.device("cuda"))
            assert len(records) == n
    logger.removeHandler(handler)
    logger.manager._clear_cache()


def test_an_old_torch_cannot_split_codes(monkeypatch) -> None:
    """It would say that only floating point tensors can require gradients."""
    quantized = torch.nn.Sequential(QuantizedLinear(64, 64, None, "bnb.nf4"))
    plain = torch.nn.Sequential(torch.nn.Linear(64, 64))
    check_codes_can_be_split(quantized)  # this torch can
    monkeypatch.setattr(torch, "__version__", "2.11.0+cu130")
    check_codes_can_be_split(plain)
    with pytest.raises(InputError, match=r"torch 2\.11\.0\+cu130 cannot split quantized weights.*2\.13"):
        check_codes_can_be_split(quantized)


if __name__ == "__main__":
    one_of_two(*map(Path, sys.argv[1:]))
