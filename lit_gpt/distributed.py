"""The processes of a run, one per device: how they start, and how they end together.

`launch` returns in each of them. If nobody else has started them, the process of the user's command does, and then only
waits for them:

    python finetune/lora.py --devices 2         supervisor: checks the flags and the data, starts the others, waits
     ├─ python finetune/lora.py --devices 2     process 0: the same command again; `launch` returns
     └─ python finetune/lora.py --devices 2     process 1

    torchrun --nproc_per_node 2 finetune/lora.py      torchrun is the supervisor, and `launch` returns in its processes
"""

import atexit
import logging
import os
import secrets
import signal
import socket
import struct
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal, NoReturn

import torch

from lit_gpt.device import (
    Precision,
    accelerator,
    default_device,
    precision_plugin,
    prepare_device,
    resolve_precision,
)
from lit_gpt.errors import InputError
from lit_gpt.failures import SUPERVISOR, is_supervised
from lit_gpt.interruption import STOP_FILE, Interruption, supervisor_asks_to_stop
from lit_gpt.packages import import_fabric
from lit_gpt.sharding import mesh_of, shard_weights
from lit_gpt.watch import start_watch, stop_watch

if TYPE_CHECKING:
    from lightning_fabric import Fabric
    from torch.distributed import Store
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure
    from torch.distributed.launcher.api import LaunchConfig

Strategy = Literal["auto", "ddp", "fsdp"]


def launch(
    devices: int = 1,
    precision: Precision = "auto",
    seed: int = 0,
    loggers: Sequence[Any] = (),
    num_nodes: int = 1,
    strategy: Strategy = "auto",
    shard: bool = False,
    timeout_minutes: float = 30.0,
) -> "Fabric":
    """Starts the processes of a run, one per device, and returns in each of them, with the same seed.

    The process that started them ends here, when they have ended: what a script checks before `launch` is checked, and
    what it prints is printed, there and again in each of the others. Under torchrun the processes are there already.

    Args:
        devices: Processes on each machine.
        precision: Dtype of weights and arithmetic; see lit_gpt/device.py.
        seed: Seed of torch's random numbers.
        loggers: Fabric's, from lit_gpt/runs/loggers.py.
        num_nodes: Machines. Without torchrun the command has to be typed on each; see `rendezvous_of_machines`.
        strategy: How several devices share the work.
        shard: What strategy "auto" means for several devices: split all weights (True), or give each a copy.
        timeout_minutes: For how long nothing may move before the run ends, and names the process that hangs.

    Raises:
        InputError: there are fewer devices, torchrun was told another number, or the machines cannot find each other.
    """
    # how many processes
    if "TORCHELASTIC_RUN_ID" in os.environ:
        devices, num_nodes = numbers_of_torchrun(devices, num_nodes)
    elif is_started_by_srun():
        devices, num_nodes = numbers_of_srun(devices, num_nodes)
    kind = accelerator()
    check_devices(kind, devices, num_nodes)
    n_processes = devices * num_nodes

    # the supervisor ends here; the processes that it starts come by again
    if n_processes > 1 and not is_started_from_outside():
        supervise(devices, num_nodes)

    # one of its processes
    if SUPERVISOR in os.environ:
        end_with_supervisor()
        share_cores(devices)

    # join the other processes
    if num_nodes > 1 and kind == "cpu":
        choose_interface()
    if n_processes > 1 and may_be_started_again():
        join_this_attempt(kind, longest_wait(timeout_minutes))
    import_fabric()
    from lightning_fabric import Fabric
    from lightning_fabric.plugins.environments import LightningEnvironment

    # it announces each process in a box of lines, and advises on an Ampere to multiply float32 with fewer bits
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
    plugins: list[Any] = [precision_plugin(resolve_precision(precision), kind)]
    if not is_started_from_outside():
        # it would take SLURM's variables in an interactive shell for a srun, and wait for processes that never come
        plugins.append(LightningEnvironment())
    fabric = Fabric(
        accelerator=kind,
        devices=devices,
        num_nodes=num_nodes,
        strategy=fabric_strategy(n_processes, is_to_split(strategy, n_processes, shard), timeout_minutes),
        plugins=plugins,
        loggers=list(loggers),
    )
    fabric.launch()
    prepare_device(kind)
    if fabric.world_size > 1:
        atexit.register(close_connections)
        watch_others(fabric, num_nodes, timeout_minutes)
        fabric.barrier()  # if one failed while others still connect to it, gloo would print an error of theirs
    torch.manual_seed(seed)
    return fabric


def devices_for_answers(devices: int, precision: Precision, seed: int) -> "tuple[torch.device, DeviceMesh | None]":
    """The device of this process; and all of them, if there are several, which then split the model among them.

    Raises:
        InputError: see `launch`.
    """
    if devices == 1 and "TORCHELASTIC_RUN_ID" not in os.environ:
        return default_device(), None
    fabric = launch(devices, precision, seed, strategy="fsdp")
    return fabric.device, mesh_of(fabric)


def check_one_device(flag: str, devices: int, num_nodes: int, strategy: Strategy) -> None:
    """Raises InputError if `flag`, which is for a model that is too large for its one device, meets several of them."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        devices, num_nodes = numbers_of_torchrun(devices, num_nodes)
    if devices * num_nodes > 1 or strategy == "fsdp":
        raise InputError(
            f"{flag} is for one device, but there are {devices * num_nodes}, with --strategy {strategy}. Leave it out:"
            " with several devices, --strategy fsdp splits the weights among them."
        )


def numbers_of_torchrun(devices: int, num_nodes: int) -> tuple[int, int]:
    """The processes of each machine and the machines that torchrun, or our own supervisor, has started.

    Raises:
        InputError: --devices or --num_nodes ask for another number.
    """
    local_size = int(os.environ["LOCAL_WORLD_SIZE"])
    machines = int(os.environ["WORLD_SIZE"]) // local_size
    if devices not in (1, local_size) or num_nodes not in (1, machines):
        raise InputError(
            f"torchrun started {local_size} processes on each of {machines} machines, but --devices is {devices}"
            f" and --num_nodes {num_nodes}. Leave both flags out."
        )
    return local_size, machines


def check_devices(kind: str, devices: int, num_nodes: int) -> None:
    """Raises InputError if this machine has fewer devices of this kind than it is asked for."""
    if min(devices, num_nodes) < 1:
        raise InputError(f"--devices {devices} --num_nodes {num_nodes}, expected 1 or more.")
    if kind == "cuda" and devices > torch.cuda.device_count():
        raise InputError(f"--devices {devices}, but this machine has {torch.cuda.device_count()} GPUs.")
    if kind == "mps" and devices * num_nodes > 1:
        raise InputError(f"--devices {devices}, but PyTorch drives one Apple GPU only.")
    # a few processes on fewer cores are slow, and a way to try out what several GPUs will do
    if kind == "cpu" and devices > max(8, count_cores()):
        raise InputError(f"--devices {devices}, but this machine has {count_cores()} CPU cores: one for each process.")


def is_started_by_srun() -> bool:
    """Whether SLURM's srun has started several processes, of which this is one.

    All of a job's shells and scripts have SLURM's variables. Only srun says how many tasks its step has, and the shell
    of an interactive job is a step of one.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:  # srun has started torchrun
        return False
    return int(os.environ.get("SLURM_STEP_NUM_TASKS") or 1) > 1


def numbers_of_srun(devices: int, num_nodes: int) -> tuple[int, int]:
    """The processes of each machine and the machines that srun has started.

    Raises:
        InputError: --devices or --num_nodes ask for another number, or machines have not the same one.
    """
    n_tasks = int(os.environ["SLURM_STEP_NUM_TASKS"])
    machines = int(os.environ.get("SLURM_STEP_NUM_NODES") or os.environ.get("SLURM_NNODES") or 1)
    local_size = n_tasks // machines
    if local_size * machines != n_tasks or devices not in (1, local_size) or num_nodes not in (1, machines):
        raise InputError(
            f"srun started {n_tasks} processes on {machines} machines, but --devices is {devices} and --num_nodes"
            f" {num_nodes}. Leave both flags out, and give srun --ntasks-per-node."
        )
    # Fabric insists on it, and srun sets it only if it was typed
    os.environ.setdefault("SLURM_NTASKS_PER_NODE", str(local_size))
    return local_size, machines


def is_started_from_outside() -> bool:
    """Whether somebody starts all processes of the run: torchrun, SLURM, LSF, MPI, or a user who sets LOCAL_RANK."""
    if "TORCHELASTIC_RUN_ID" in os.environ or "LOCAL_RANK" in os.environ or is_started_by_srun():
        return True
    # Fabric knows for certain. Without a trace of a cluster it is not asked: importing it takes the supervisor longer
    # than all else that it does
    if not any(name.startswith(CLUSTER_VARIABLES) for name in os.environ):
        return False
    import_fabric()
    from lightning_fabric.plugins import environments

    return environments.LSFEnvironment.detect() or environments.MPIEnvironment.detect()


CLUSTER_VARIABLES = ("LSB_", "JSM_", "OMPI_", "PMI", "MPI", "MV2_", "I_MPI_")
"""How the names of environment variables begin that LSF and the kinds of MPI set."""


def is_first() -> bool:
    """Whether this process is the first of its run, or the only one. Before `launch` that is the supervisor."""
    if torch.distributed.is_initialized():
        return torch.distributed.get_rank() == 0
    return not is_supervised() and int(os.environ.get("RANK") or 0) == 0


def watch_others(fabric: "Fabric", num_nodes: int, timeout_minutes: float) -> None:
    """Lets the processes watch each other, so that one that hangs is named: see lit_gpt/watch.py."""
    from torch.distributed.distributed_c10d import _get_default_store

    start_watch(_get_default_store(), fabric.global_rank, fabric.world_size, num_nodes, timeout_minutes)


def check_alike(fabric: "Fabric", facts: Mapping[str, Any]) -> None:
    """Compares what each process has found. All processes must call it; it costs one small exchange.

    Raises:
        InputError: one has found something else than process 0. All of them raise it.
    """
    if fabric.world_size == 1:
        return
    everywhere: list[Any] = [None] * fabric.world_size
    torch.distributed.all_gather_object(everywhere, (socket.gethostname(), dict(facts)))
    first_host, first = everywhere[0]
    for rank, (host, found) in enumerate(everywhere):
        for what in facts:
            if found[what] != first[what]:
                raise InputError(
                    f"{what} is {first[what]} for process 0 on {first_host}, and {found[what]} for process {rank} on"
                    f" {host}. Type the same flags on all machines, and give all of them the same files."
                )


def close_connections() -> None:
    """Ends the watch, and closes the connections to the other processes, as the interpreter ends.

    So ends a process of a run that went well, that had no time left, that was finished when it was resumed, or that all
    processes have agreed to stop. NCCL waits here until all have come, and says so on stderr if it is left out. Gloo's
    threads would outlive the interpreter and abort it, about every second time with torch 2.13:
    https://github.com/pytorch/pytorch/issues/190489. A failed process ends by `failures.end_process`, without this:
    the others do not come.
    """
    stop_watch()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


# ---- strategies


def is_to_split(strategy: Strategy, n_processes: int, shard: bool) -> bool:
    """Whether the weights are to be split among devices; `shard` is what "auto" means for several of them."""
    if strategy == "auto":
        return shard and n_processes > 1
    return strategy == "fsdp"


def fabric_strategy(n_processes: int, split: bool, timeout_minutes: float) -> Any:
    """How Fabric runs so many processes: with a copy of the weights in each, or with slices of them."""
    if n_processes == 1:
        return "auto"
    from lightning_fabric.strategies import DDPStrategy, ModelParallelStrategy

    timeout = longest_wait(timeout_minutes)
    if not split:
        # Buffers, such as the frequencies of positions, never change, and DDP would send them before each forward pass.
        # Gradients lie in the memory in which they are summed, and not there and once more
        return DDPStrategy(broadcast_buffers=False, gradient_as_bucket_view=True, timeout=timeout)
    return ModelParallelStrategy(shard_weights, data_parallel_size=n_processes, tensor_parallel_size=1, timeout=timeout)


def longest_wait(timeout_minutes: float) -> timedelta:
    """After which time NCCL and gloo end an exchange. They name nobody: the watch is to speak first."""
    return timedelta(minutes=timeout_minutes + 5)


# ---- started again by torchrun


def may_be_started_again() -> bool:
    """Whether torchrun starts the processes of this run again if one fails: --max_restarts, by default 0."""
    return int(os.environ.get("TORCHELASTIC_MAX_RESTARTS") or 0) > 0


def join_this_attempt(kind: str, timeout: timedelta) -> None:
    """Joins the other processes that torchrun has started with this one, and none that have failed.

    What torchrun starts again after a failure finds each other in the same store, where the addresses of the processes
    that have failed still stand; who reads them first waits for the dead. With torch 2.13 about every second restart
    failed of it: https://github.com/pytorch/pytorch/issues/135712. So each attempt gets names of its own.

    Raises:
        InputError: a process has not come in time.
    """
    from torch.distributed import PrefixStore, init_process_group
    from torch.distributed.rendezvous import rendezvous

    store, rank, n_processes = next(iter(rendezvous("env://", timeout=timeout)))
    attempt = name_of_attempt(store, rank, n_processes, timeout)
    backend = "nccl" if kind == "cuda" else "gloo"
    # Fabric takes a group that is there
    store = PrefixStore(attempt, store)
    init_process_group(backend, store=store, rank=rank, world_size=n_processes, timeout=timeout)


def name_of_attempt(store: "Store", rank: int, n_processes: int, timeout: timedelta) -> str:
    """A name that process 0 makes up, and that all processes of this attempt know, and no others.

    The machines count their restarts each for itself, so that a number would not do. Each process asks by a name of its
    own, which no earlier one has had:

        process 1     "process 1" = b7          waits for "b7 joins" ...            "b7 knows a4" = ""
        process 0              reads b7 there, "b7 joins" = a4     ... until "b7 knows a4" is there

    Raises:
        InputError: a process has not come in time.
    """
    own_name = secrets.token_hex(8)
    if rank > 0:
        store.set(f"process {rank}", own_name)
        attempt = store.get(f"{own_name} joins").decode()
        store.set(f"{own_name} knows {attempt}", "")
        return attempt

    waiting = set(range(1, n_processes))
    gives_up_at = time.monotonic() + timeout.total_seconds()
    while waiting:
        for other in sorted(waiting):
            if not store.check([f"process {other}"]):
                continue
            name = store.get(f"process {other}").decode()  # it may still be that of one that has failed
            store.set(f"{name} joins", own_name)
            if store.check([f"{name} knows {own_name}"]):
                waiting.remove(other)
        if waiting and time.monotonic() > gives_up_at:
            late = ", ".join(str(other) for other in sorted(waiting))
            raise InputError(
                f"Of {n_processes} processes these have not come in time: {late}. See what their torchrun says."
            )
        time.sleep(0.05)
    return own_name


# ---- the supervisor


def supervise(devices: int, num_nodes: int) -> NoReturn:
    """Starts this command again, once per device of this machine, waits for all, and ends as the run ended.

    torch's elastic launcher, which torchrun is made of, starts the processes and ends all of them if one fails or if
    another machine is gone. Only the first failure is printed: see lit_gpt/failures.py. Ctrl-C and SIGTERM are passed
    on, so that a run that trains can finish its step and save; a second one ends all processes at once.

    Raises:
        InputError: the machines cannot find each other, or there is no command to start again.
    """
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import elastic_launch

    if hasattr(sys, "ps1"):
        raise InputError(f"--devices {devices} needs a script: an interactive Python cannot be started again.")

    # say nothing from here on but the last word: the launcher logs a page about each failure
    logging.disable()
    sys.stdout.flush()

    # the processes inherit whom to report to
    os.environ[SUPERVISOR] = str(os.getpid())

    # start them and wait
    with TemporaryDirectory(prefix="lit_gpt_failures_") as folder:
        stop_file = Path(folder) / "stop"
        os.environ[STOP_FILE] = str(stop_file)
        start = elastic_launch(launch_config(devices, num_nodes, folder), sys.executable)
        with Interruption(when_asked=stop_file.touch) as interruption:
            try:
                start(*sys.orig_argv[1:])
            except ChildFailedError as error:
                failures = error.failures
            else:
                sys.exit(0)

    # end as they ended
    end_as_first(failures, interruption)


def launch_config(devices: int, num_nodes: int, folder: str) -> "LaunchConfig":
    """What torch's launcher is to start. The processes write records of their failures to `folder`."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.launcher.api import LaunchConfig

    rendezvous = rendezvous_of_machines() if num_nodes > 1 else RENDEZVOUS_HERE
    return LaunchConfig(
        min_nodes=num_nodes,
        max_nodes=num_nodes,
        nproc_per_node=devices,
        run_id="lit_gpt",
        max_restarts=0,
        logs_specs=DefaultLogsSpecs(log_dir=folder),
        # Ctrl-C and SIGTERM are ours. The launcher's default also takes SIGHUP, and takes it even under nohup, which
        # ignores it: https://github.com/pytorch/pytorch/issues/67538
        signals_to_handle="",
        **rendezvous,
    )


RENDEZVOUS_HERE: dict[str, Any] = {"rdzv_backend": "c10d", "rdzv_endpoint": "127.0.0.1:0", "local_addr": "127.0.0.1"}
"""How the processes of one machine find each other: at a free port of it, that the launcher chooses."""


def rendezvous_of_machines() -> dict[str, Any]:
    """How the processes of several machines find each other: at MASTER_ADDR:MASTER_PORT, which is on machine 0.

    NODE_RANK counts the machines from 0. On machine 0 it may be missing, and so may MASTER_ADDR.

    Raises:
        InputError: there is no MASTER_PORT.
    """
    if "MASTER_PORT" not in os.environ:
        raise InputError(
            "--num_nodes needs MASTER_ADDR, MASTER_PORT and NODE_RANK in the environment of the command on each"
            " machine. Or start it with torchrun, as tutorials/several_devices.md shows."
        )
    address = os.environ.get("MASTER_ADDR", "127.0.0.1")
    rank = int(os.environ.get("NODE_RANK") or os.environ.get("GROUP_RANK") or 0)
    return {
        "rdzv_backend": "static",
        "rdzv_endpoint": f"{address}:{os.environ['MASTER_PORT']}",
        "rdzv_configs": {"rank": rank},
    }


def choose_interface() -> None:
    """Tells gloo the network interface that leads to machine 0, unless GLOO_SOCKET_IFNAME does. NCCL finds its own.

    Left to itself gloo takes the interface of this machine's name, which /etc/hosts often gives to the machine itself:
    127.0.1.1 on Debian. No other machine can reach that.

    Raises:
        InputError: MASTER_ADDR is a name that means this machine itself here.
    """
    host = os.environ.get("MASTER_ADDR")
    if host is None or "GLOO_SOCKET_IFNAME" in os.environ:
        return
    address = own_address_towards(host)
    if address is None:  # unknown, or of IPv6
        return
    is_meant = host == "localhost" or host.startswith("127.")  # several "machines" on one, to try it out
    if address.startswith("127.") and not is_meant:
        raise InputError(
            f"MASTER_ADDR {host} is {address} on this machine, where no other one can reach it. Give its address in the"
            " network, or name the interface: GLOO_SOCKET_IFNAME=eth0."
        )
    interface = interface_of(address)
    if interface is not None:
        os.environ["GLOO_SOCKET_IFNAME"] = interface


def own_address_towards(host: str) -> str | None:
    """The address that this machine has for one that wants to answer it; None if it cannot be told."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((host, 9))  # sends nothing: it looks the way up
        except OSError:
            return None
        return probe.getsockname()[0]


def interface_of(address: str) -> str | None:
    """The network interface that has this IPv4 address; None where that cannot be asked."""
    if sys.platform != "linux":
        return None
    import fcntl

    get_address = 0x8915  # SIOCGIFADDR, of netdevice(7)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode())
            try:
                answer = fcntl.ioctl(probe, get_address, request)
            except OSError:  # it has none
                continue
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return None


def end_as_first(failures: Mapping[int, "ProcessFailure"], interruption: Interruption) -> NoReturn:
    """Prints why the first process failed, and ends with its status.

    Args:
        failures: The failures by global rank, with the records that the processes wrote.
        interruption: Whether the user has asked for it.
    """
    rank = min(failures, key=lambda rank: when_failed(failures[rank]))
    failure = failures[rank]
    record = failure.error_file_data

    # it said why, in a record
    if "status" in record:
        print(record["message"], file=sys.stderr)
        sys.exit(interruption.status if interruption.asked else record["status"])

    # it was asked to end before it trained, or could not finish its step
    if interruption.asked:
        print("error: Interrupted.", file=sys.stderr)
        sys.exit(interruption.status)

    # it was killed
    if failure.exitcode < 0:
        print(f"error: process {rank} was ended by signal {-failure.exitcode}.", file=sys.stderr)
        sys.exit(1)

    # it said why itself, such as that a module cannot be imported
    sys.exit(failure.exitcode)


def when_failed(failure: "ProcessFailure") -> tuple[int, int]:
    """A key that sorts failures by their time, as far as it is known.

    A process that left no record was killed, or left by a status of its own: the errors of the others follow from
    that. Not so if it was ended by SIGTERM, as the launcher ends those that are left, or aborted, as the threads of
    NCCL and gloo do when a connection breaks. Nor if somebody has named the cause: the launcher kills a process that
    hangs.
    """
    record = failure.error_file_data
    if record.get("names_cause"):
        return -1, record["nanoseconds"]
    if "nanoseconds" in record:
        return 1, record["nanoseconds"]
    if -failure.exitcode in (signal.SIGTERM, signal.SIGABRT):
        return 2, 0
    return 0, 0


def end_with_supervisor() -> None:
    """Ends this process within a second of its supervisor, even if that was killed and could not end it.

    If the supervisor asks to stop, the process gets SIGTERM: see lit_gpt/interruption.py.

    Raises:
        InputError: the supervisor is gone already.
    """
    supervisor = int(os.environ[SUPERVISOR])
    if not is_supervised():
        raise InputError(f"Process {supervisor}, which started this one for its run, is gone. Start the run again.")

    def watch() -> None:
        is_asked = False
        while os.getppid() == supervisor:
            if supervisor_asks_to_stop() and not is_asked:
                is_asked = True
                os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGKILL)

    # A process that loses its parent gets another one: that can be asked for on Linux and on macOS, but nothing tells
    # it. A thread asks, since the main one may wait for another process, in C++, for half an hour.
    threading.Thread(target=watch, name="end_with_supervisor", daemon=True).start()


def share_cores(n_processes: int) -> None:
    """Gives the first process of a machine its share of the cores, unless the user has set OMP_NUM_THREADS.

    The others keep torch's default, all cores. That is how Fabric starts processes itself, and it is kept because sums
    are rounded in another way with another number of threads: the runs of before can be repeated to the bit.
    """
    if "OMP_NUM_THREADS" in os.environ or os.environ["LOCAL_RANK"] != "0":
        return
    n_threads = max(1, count_cores() // n_processes)
    torch.set_num_threads(n_threads)
    os.environ["OMP_NUM_THREADS"] = str(n_threads)


def count_cores() -> int:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # macOS has none
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
