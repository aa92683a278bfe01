"""What a step takes in each of two processes that split a model, beside what plan_memory.py says: the page on memory.

    python tests/benchmarks/sharded_plan.py                 # a minute; 8 blocks in float32, two processes, gloo
    python tests/benchmarks/sharded_plan.py --processes 4

The memory is that of the whole process (VmHWM of Linux), less what it held before there was a model. malloc is told to
give back what is freed. A step with a small model before has loaded what a step needs.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from fit_never_over import prepared
from sharded_loading import memory

from lit_gpt import Config
from lit_gpt.distributed import launch
from lit_gpt.full import Full
from lit_gpt.lora import LoRA
from lit_gpt.make_optimizer import TRIAL_SETTINGS, make_optimizer
from lit_gpt.memory.plan import Setup, batch_of
from lit_gpt.memory.sharded import sharded_peak

SIZES = dict(n_head=8, n_query_groups=4, n_embd=512, intermediate_size=1408, vocab_size=8000, block_size=1024)
CONFIG = Config(name="eight blocks", n_layer=8, **SIZES)
LORA = Setup(CONFIG, "lora", LoRA(), torch.float32, lengths=(500, 500))
SETUPS = {
    "LoRA": LORA,
    "LoRA, blocks recomputed": replace(LORA, activation_checkpointing="block"),
    "full": replace(LORA, method="full", settings=Full()),
    "full, blocks recomputed": replace(LORA, method="full", settings=Full(), activation_checkpointing="block"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--worker", type=Path, help="Used by the program itself.")
    args = parser.parse_args()
    if args.worker is not None:
        work(args.worker)
        return

    with tempfile.TemporaryDirectory() as folder:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command = [*torchrun, "--nproc_per_node", str(args.processes), __file__, "--worker", folder]
        environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
        subprocess.run(command, check=True, stderr=subprocess.DEVNULL, env=environment)
        found = [json.loads(file.read_text()) for file in Path(folder).glob("*.json")]
    assert len(found) == args.processes
    for name, setup in SETUPS.items():
        taken = max(peaks[name] for peaks in found) / 1e9
        planned = sharded_peak(setup, args.processes) / 1e9
        print(f"{name:25} took {taken:.3f} GB, planned {planned:.3f}: {planned / taken - 1:+.0%}")


def work(folder: Path) -> None:
    """One of the processes: writes the peak of each step, in bytes."""
    fabric = launch(1, "32-true", strategy="fsdp")
    small = replace(LORA, config=CONFIG.replace(n_layer=1), lengths=(8,))
    peak_of_a_step(fabric, small)
    peaks = {name: peak_of_a_step(fabric, setup) for name, setup in SETUPS.items()}
    (folder / f"{fabric.global_rank}.json").write_text(json.dumps(peaks))


def peak_of_a_step(fabric: Any, setup: Setup) -> int:
    """The bytes that two steps take at most."""
    gc.collect()  # wrapped methods of models are cycles
    before = memory("VmRSS")
    wrapped = fabric.setup_module(prepared(setup, fabric.device))
    optimizer = fabric.setup_optimizers(make_optimizer(wrapped, TRIAL_SETTINGS))
    idx, layout = batch_of(setup.lengths)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    for _ in range(2):
        fabric.backward(wrapped(idx, layout=layout))
        optimizer.step()
        optimizer.zero_grad()
    return memory("VmHWM") - before


if __name__ == "__main__":
    main()
