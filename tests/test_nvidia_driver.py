"""A card that torch does not see stops every script, with the reason: `pytest tests/test_nvidia_driver.py`, about 10 s

The device nodes, the files of the driver and nvidia-smi are real ones in a folder of the test. No card is needed: this
is about a torch that sees none.
"""

import os
import re
import shutil
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from helpers.scripts import script

from lit_gpt import InputError, nvidia_driver
from lit_gpt.device import accelerator, default_device, resolve_precision
from lit_gpt.distributed import launch

KERNEL_MODULES = (  # /proc/driver/nvidia/version of the closed and of the open kernel module
    "NVRM version: NVIDIA UNIX x86_64 Kernel Module  {}  Fri May 31 09:35:42 UTC 2024\nGCC version:  gcc 12.2.0\n",
    "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  {}  Release Build  (abuild@host)  Thu Jul 11\n",
)
CU126 = "pip install --index-url https://download.pytorch.org/whl/cu126 'torch==2.13.0+cu126'."
CU130 = "pip install --index-url https://download.pytorch.org/whl/cu130 'torch==2.13.0+cu130'."
ON_THE_CPU = 'CUDA_VISIBLE_DEVICES="" before the command runs it on the CPU.'

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="torch sees a card here")


class Machine:
    """What a machine has of NVIDIA's, in a folder, where `nvidia_driver` looks for it; nothing at first."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root = root
        self.patch = monkeypatch
        self.node = root / "nvidiactl"
        monkeypatch.setattr(nvidia_driver, "DEVICE_NODES", (str(self.node), str(root / "nvidia0")))
        monkeypatch.setattr(nvidia_driver, "WSL_NODE", str(root / "dxg"))
        monkeypatch.setattr(nvidia_driver, "WSL_FOLDER", root / "wsl")
        monkeypatch.setattr(nvidia_driver, "VERSION_FILE", root / "version")
        monkeypatch.setattr(nvidia_driver, "LIBCUDA", "libc.so.6")  # a library that can be loaded
        monkeypatch.setenv("PATH", str(root))
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        self.has_torch("2.13.0+cu130", "13.0")

    def has_torch(self, version: str, cuda: str | None) -> None:
        self.patch.setattr(torch, "__version__", version)
        self.patch.setattr(torch.version, "cuda", cuda)

    def has_driver(self, version: str, kernel_module: str = KERNEL_MODULES[0]) -> None:
        self.node.touch()
        (self.root / "version").write_text(kernel_module.format(version))

    def has_nvidia_smi(self, answer: str, folder: str = ".") -> None:
        path = self.root / folder / "nvidia-smi"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/sh\necho '{answer}'\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)

    def stops(self) -> str:
        """What `accelerator` says of the machine, without what all lines have in common."""
        with pytest.raises(InputError) as stop:
            accelerator()
        line = str(stop.value)
        assert "\n" not in line
        beginning = (
            rf"This machine has an NVIDIA card \(\S+\), and torch {re.escape(torch.__version__)} does not see it: "
        )
        assert re.match(beginning, line) and line.endswith(f" {ON_THE_CPU}")
        return re.sub(beginning, "", line).removesuffix(f" {ON_THE_CPU}")


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(tmp_path, monkeypatch)


@pytest.mark.parametrize("kernel_module", KERNEL_MODULES)
def test_an_old_driver(kernel_module: str, machine: Machine) -> None:
    machine.has_driver("550.90.07", kernel_module)
    advice = f"Update the driver, or install a torch for this one: {CU126}"
    assert machine.stops() == f"its driver is 550.90.07, expected 580 or newer for CUDA 13.0. {advice}"


@pytest.mark.parametrize(
    ("driver", "version", "cuda", "said"),
    [
        # 570 serves Blackwell cards, CUDA 12.6 does not
        (
            "570.124.06",
            "2.13.0+cu130",
            "13.0",
            f"install a torch for this one (not for RTX 50, B200 and newer): {CU126}",
        ),
        ("515.65.01", "2.13.0+cu130", "13.0", "expected 580 or newer for CUDA 13.0. Update the driver."),
        ("515.65.01", "2.13.0+cu126", "12.6", "expected 525 or newer for CUDA 12.6. Update the driver."),
        # no wheels for CUDA 12 any more
        ("550.90.07", "2.15.0+cu132", "13.2", "expected 580 or newer for CUDA 13.2. Update the driver."),
        # the wheel of pip's own index has no suffix
        ("550.90.07", "2.13.0", "13.0", f"install a torch for this one: {CU126}"),
    ],
)
def test_other_old_drivers(driver: str, version: str, cuda: str, said: str, machine: Machine) -> None:
    machine.has_driver(driver)
    machine.has_torch(version, cuda)
    assert machine.stops().endswith(said)


def test_every_way_in_stops(machine: Machine, tiny_dir: Path, tmp_path: Path) -> None:
    machine.has_driver("550.90.07")
    for way_in in (launch, default_device, lambda: resolve_precision("auto")):
        with pytest.raises(InputError, match=r"its driver is 550\.90\.07, expected 580"):
            way_in()
    with pytest.raises(InputError, match=r"its driver is 550\.90\.07, expected 580"):
        script("generate/base.py").main(prompt="Hello", checkpoint_dir=tiny_dir)


@pytest.mark.parametrize(
    ("driver", "said"),
    [
        ("580.65.06", f"Install one that fits its driver, 580.65.06: {CU130}"),
        ("535.129.03", f"Install one that fits its driver, 535.129.03: {CU126}"),
        ("470.82", f"Update the driver, 470.82, to 580 or newer, and install one that fits it: {CU130}"),
    ],
)
def test_a_torch_without_cuda(driver: str, said: str, machine: Machine) -> None:
    machine.has_torch("2.13.0+cpu", None)
    machine.has_driver(driver)
    assert machine.stops() == f"it is built without CUDA. {said}"


def test_nvidia_smi_says_the_version_where_the_kernel_does_not(machine: Machine) -> None:
    machine.node.touch()
    machine.has_nvidia_smi("545.23.08")
    assert "its driver is 545.23.08, expected 580 or newer" in machine.stops()


def test_linux_inside_windows(machine: Machine, tmp_path: Path) -> None:
    """Its cards are NVIDIA's if there is NVIDIA's library."""
    (tmp_path / "dxg").touch()
    assert accelerator() == "cpu"
    machine.has_nvidia_smi("546.33", folder="wsl")
    (tmp_path / "wsl/libc.so.6").touch()
    assert "its driver is 546.33, expected 580 or newer" in machine.stops()


def test_a_container_without_the_driver(machine: Machine) -> None:
    """The kernel says a version there, too; but it is not the reason."""
    machine.has_driver("550.90.07")
    machine.patch.setattr(nvidia_driver, "LIBCUDA", "libthat_is_not_there.so.1")
    said = machine.stops()
    assert said.startswith(
        "libthat_is_not_there.so.1 of its driver cannot be loaded. In a container, start that with --gpus"
    )
    assert "550" not in said
    # neither torch nor the container is made for the card: nobody means it
    machine.has_torch("2.13.0+cpu", None)
    assert accelerator() == "cpu"


def test_a_node_that_cannot_be_opened(machine: Machine) -> None:
    """As in a job of a cluster that has not asked for a GPU. Root may open everything but a socket."""
    machine.patch.chdir(machine.root)  # the path of a socket may have some 100 characters
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(machine.node.name)
    assert machine.stops().startswith("this process cannot open it (No such device or address). Ask the scheduler")


def test_a_driver_that_is_new_enough(machine: Machine) -> None:
    machine.has_driver("580.95.05")
    advice = "See what nvidia-smi finds; after an update of the driver the machine has to be started anew."
    assert machine.stops() == f"its driver, 580.95.05, is new enough for CUDA 13.0. {advice}"
    machine.patch.setenv("CUDA_VISIBLE_DEVICES", "7")
    assert machine.stops() == f"its driver, 580.95.05, is new enough for CUDA 13.0. CUDA_VISIBLE_DEVICES is 7. {advice}"
    said = nvidia_driver.explain_unseen_card("CUDA initialization: CUDA unknown error.")
    assert f"torch says: CUDA initialization: CUDA unknown error. {advice}" in said


def test_a_driver_without_a_version(machine: Machine) -> None:
    machine.node.touch()
    assert machine.stops().startswith("the version of its driver is unknown. See what nvidia-smi finds")


@pytest.mark.parametrize("visible", ["", "-1", "NoDevFiles"])
def test_who_means_the_cpu_says_so(visible: str, machine: Machine) -> None:
    machine.has_driver("550.90.07")
    machine.patch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert accelerator() == "cpu" and resolve_precision("auto") == "32-true"


def test_no_card_no_word(machine: Machine) -> None:
    assert accelerator() == "cpu"


SETUP_PYTHON = """#!/bin/sh
[ "$1" = -m ] && exit 0  # pip
exec {python} -c "
import torch
from lit_gpt import nvidia_driver
torch.__version__, torch.version.cuda = '2.13.0+cu130', '13.0'
nvidia_driver.DEVICE_NODES, nvidia_driver.LIBCUDA = ('/dev/null',), 'libc.so.6'
nvidia_driver.VERSION_FILE = nvidia_driver.Path('version')
$2"
"""


def test_setup_says_it_after_installing(tmp_path: Path) -> None:
    """And ends well all the same: the driver may be updated later."""
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / "version").write_text(KERNEL_MODULES[0].format("550.90.07"))
    python = tmp_path / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(SETUP_PYTHON.format(python=sys.executable))
    python.chmod(0o755)
    environment = os.environ | {"PYTHON": sys.executable, "PYTHONPATH": str(ROOT)}
    environment.pop("CUDA_VISIBLE_DEVICES", None)
    result = subprocess.run(
        ["bash", "scripts/setup.sh"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0
    *_, warning, installed = result.stderr.splitlines()
    assert warning.startswith("warning: This machine has an NVIDIA card (/dev/null), and torch 2.13.0+cu130 does not")
    assert "its driver is 550.90.07, expected 580 or newer" in warning and installed.startswith("Installed: ")
