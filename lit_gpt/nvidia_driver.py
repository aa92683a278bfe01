"""Why torch does not see the NVIDIA card of a machine: its driver, torch itself, or the container is the reason.

A run on the CPU instead takes a hundred times as long, so `device.accelerator` stops with the line that is made here. A
torch without CUDA stops it, too: it may have been installed by mistake, or on the login node of a cluster, which has
no card. Who means the CPU says so: CUDA_VISIBLE_DEVICES="".
"""

import ctypes
import os
import re
import shutil
import subprocess
from pathlib import Path

import torch

DEVICE_NODES = ("/dev/nvidiactl", "/dev/nvidia0")
"""Where Linux has an NVIDIA card; one is enough."""
WSL_NODE = "/dev/dxg"
"""Where Linux inside Windows has a card of any maker. It is NVIDIA's if WSL_FOLDER has LIBCUDA."""
WSL_FOLDER = Path("/usr/lib/wsl/lib")
LIBCUDA = "libcuda.so.1"
"""The library of the driver that CUDA calls. A container gets it from the host."""
VERSION_FILE = Path("/proc/driver/nvidia/version")

# CUDA's major version -> the oldest driver that serves all of its minor versions, and the first part of its version:
# https://docs.nvidia.com/deploy/cuda-compatibility/minor-version-compatibility.html
OLDEST_DRIVER = {13: 580, 12: 525}
# CUDA's major version -> the kind of PyTorch's wheels for it. All releases from 2.11 have both; those for CUDA 12 end
# with 2.14: https://github.com/pytorch/pytorch/issues/190385
WHEELS = {13: "cu130", 12: "cu126"}
LAST_WITH_CUDA_12 = (2, 14)

ON_THE_CPU = 'CUDA_VISIBLE_DEVICES="" before the command runs it on the CPU.'


def explain_unseen_card(said_by_torch: str = "") -> str | None:
    """Why torch, which sees no GPU, does not see the NVIDIA card of this machine, and what to type, in a line.

    None if there is no card, if CUDA_VISIBLE_DEVICES hides it, or if nothing here could use it: a torch without CUDA in
    a container without the driver.

    Args:
        said_by_torch: Its own warning, if there was one.
    """
    node = find_device_node()
    if node is None or is_hidden(os.environ.get("CUDA_VISIBLE_DEVICES")):
        return None
    obstacle = obstacle_to_driver(node)
    if obstacle is not None and torch.version.cuda is None:
        return None
    reason = obstacle or explain_version(driver_version(), said_by_torch)
    found = f"This machine has an NVIDIA card ({node}), and torch {torch.__version__} does not see it"
    return f"{found}: {reason} {ON_THE_CPU}"


def find_device_node() -> str | None:
    """The path of the NVIDIA card that Linux has found; None without one."""
    for node in DEVICE_NODES:
        if Path(node).exists():
            return node
    if Path(WSL_NODE).exists() and (WSL_FOLDER / LIBCUDA).exists():
        return WSL_NODE
    return None


def is_hidden(visible_devices: str | None) -> bool:
    """Whether CUDA_VISIBLE_DEVICES says that there is no GPU for this process; NoDevFiles is how SLURM says it."""
    if visible_devices is None:
        return False
    return visible_devices.strip() in ("", "NoDevFiles") or visible_devices.strip().startswith("-")


def obstacle_to_driver(node: str) -> str | None:
    """What keeps this process from the driver, whatever its version, and what to do; None if nothing does."""
    try:
        os.close(os.open(node, os.O_RDONLY))
    except OSError as error:
        return (
            f"this process cannot open it ({error.strerror}). Ask the scheduler for a GPU, or start the container with"
            " --gpus all."
        )
    try:
        ctypes.CDLL(LIBCUDA)
    except OSError:
        return (
            f"{LIBCUDA} of its driver cannot be loaded. In a container, start that with --gpus all; else install the"
            f" driver, {OLDEST_DRIVER[13]} or newer."
        )
    return None


def explain_version(driver: str | None, said_by_torch: str) -> str:
    """Why a driver that this process may use does not show its card to this torch, and what to do.

    `driver` is its version, None if it could not be found.
    """
    wheel = wheel_for(driver)

    # no CUDA in torch
    cuda = torch.version.cuda
    if cuda is None:
        advice = f"Install one that fits its driver, {driver or 'whose version is unknown'}"
        if wheel is None:
            advice = f"Update the driver, {driver}, to {OLDEST_DRIVER[13]} or newer, and install one that fits it"
        return f"it is built without CUDA. {advice}: {pip_command(wheel or WHEELS[13])}."

    # an old driver
    oldest = OLDEST_DRIVER.get(int(cuda.split(".")[0]))
    if driver is not None and oldest is not None and first_part(driver) < oldest:
        advice = "Update the driver."
        if wheel is not None:
            advice = f"Update the driver, or install a torch for this one{but_blackwell(driver)}: {pip_command(wheel)}."
        return f"its driver is {driver}, expected {oldest} or newer for CUDA {cuda}. {advice}"

    # something else
    found = f"its driver, {driver}, is new enough for CUDA {cuda}" if driver else "the version of its driver is unknown"
    clues = []
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        clues.append(f"CUDA_VISIBLE_DEVICES is {os.environ['CUDA_VISIBLE_DEVICES']}.")
    if said_by_torch:
        clues.append(f"torch says: {said_by_torch.rstrip('.')}.")
    advice = "See what nvidia-smi finds; after an update of the driver the machine has to be started anew."
    return " ".join([f"{found}.", *clues, advice])


def wheel_for(driver: str | None) -> str | None:
    """The kind of wheel, such as cu126, that serves this release of torch with this driver; None if there is none.

    An unknown driver counts as a new one.
    """
    major, minor = torch.__version__.split(".")[:2]
    for cuda, oldest in OLDEST_DRIVER.items():
        is_published = cuda != 12 or (int(major), int(minor)) <= LAST_WITH_CUDA_12
        if is_published and (driver is None or first_part(driver) >= oldest):
            return WHEELS[cuda]
    return None


def but_blackwell(driver: str) -> str:
    """Words about the cards that CUDA 12.6 has no kernels for; empty if this driver is older than those cards."""
    return " (not for RTX 50, B200 and newer)" if first_part(driver) >= 570 else ""


def pip_command(wheel: str) -> str:
    """The command that installs this release of torch as another kind of wheel, such as cu126.

    It names the kind twice: to pip a torch 2.13.0 of another kind is a torch 2.13.0, and there would be nothing to do.
    """
    release = torch.__version__.split("+")[0]
    return f"pip install --index-url https://download.pytorch.org/whl/{wheel} 'torch=={release}+{wheel}'"


def driver_version() -> str | None:
    """The version of the NVIDIA driver, such as 550.90.07; None if neither the kernel nor nvidia-smi says it."""
    if VERSION_FILE.is_file():
        # "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.90.07  Fri May 31 09:35:42 UTC 2024"
        found = re.search(r"^NVRM version:.*?\s(\d+\.\d+(?:\.\d+)?)\s", VERSION_FILE.read_text(), re.MULTILINE)
        if found:
            return found[1]
    program = shutil.which("nvidia-smi") or str(WSL_FOLDER / "nvidia-smi")
    command = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    found = re.match(r"\d+\.\d+(\.\d+)?", answer.stdout)
    return found[0] if found else None


def first_part(version: str) -> int:
    """550 of 550.90.07."""
    return int(version.split(".")[0])
