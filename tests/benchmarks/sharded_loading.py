"""What each process holds while a model is loaded that they split among them, and how long that takes.

    python tests/benchmarks/sharded_loading.py                        # the sample model, one process and two
    python tests/benchmarks/sharded_loading.py --checkpoint_dir checkpoints/mine --processes 1 4 --precision bf16-true

A process is to hold its share of the model and one tensor at most, besides what Python and the libraries take. The
memory is all that Linux counts as the process' own, mapped files included (VmHWM of /proc/self/status).
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from lit_gpt import Config
from lit_gpt.checkpoint.load import build_model, load_weights
from lit_gpt.config import SAMPLE
from lit_gpt.device import weight_dtype
from lit_gpt.distributed import launch
from lit_gpt.full import Full, mark_chosen_as_trainable
from lit_gpt.lora import LoRA, apply_lora, mark_only_lora_as_trainable
from lit_gpt.quantize import QuantizedLinear, import_bitsandbytes, quantize_linears
from lit_gpt.sharding import as_slice, full_tensor, local_tensor, mesh_of, split_among_devices

RUNS = {"full": None, "lora": None, "qlora nf4": "bnb.nf4", "qlora nf4-dq": "bnb.nf4-dq", "qlora int8": "bnb.int8"}
MB = 10**6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint_dir", type=Path, default=SAMPLE)
    parser.add_argument("--precision", default="32-true")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--runs", nargs="+", default=list(RUNS), choices=RUNS)
    parser.add_argument("--worker", type=Path, help="Used by the program itself.")
    args = parser.parse_args()
    if args.worker is not None:
        work(args)
        return

    print("| MB | processes | kept by each | largest tensor | most held | of it allowed | seconds |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for name in args.runs:
        for processes in args.processes:
            rows = []
            for _ in range(args.repeats):
                rows += measure(name, processes, args.checkpoint_dir, args.precision)
            most = max(rows, key=lambda row: row["held"] - row["kept"])
            share = most["held"] / (most["kept"] + most["largest"])
            seconds = statistics.median(row["seconds"] for row in rows)
            print(
                f"| {name} | {processes} | {most['kept'] / MB:.0f} | {most['largest'] / MB:.0f} |"
                f" {most['held'] / MB:.0f} | {share:.0%} | {seconds:.2f} |",
                flush=True,
            )


def measure(name: str, processes: int, checkpoint_dir: Path, precision: str) -> list[dict]:
    """What each of so many new processes has found; memory that an earlier run had left would be used again."""
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--runs", name, "--checkpoint_dir", checkpoint_dir, "--precision", precision, "--worker", folder]
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", processes]
        subprocess.run([str(word) for word in (*torchrun, __file__, *flags)], check=True, stderr=subprocess.DEVNULL)
        files = sorted(Path(folder).glob("*.json"))
        return [json.loads(file.read_text()) for file in files]


def work(args: argparse.Namespace) -> None:
    """One of the processes: loads the model and writes what it took."""
    fabric = launch(1, args.precision, strategy="fsdp")
    # what is imported at the first use, and stays
    import_bitsandbytes("bnb.nf4")
    QuantizedLinear(64, 64, None, "bnb.nf4-dq").load_weight(torch.ones(64, 64))
    mesh = mesh_of(fabric)
    if mesh is not None:
        full_tensor(as_slice(torch.ones(1, 64), fabric.world_size, mesh))
    file = args.worker / f"{fabric.global_rank}.json"
    file.write_text(json.dumps(load(args.runs[0], fabric, args)))


def load(name: str, fabric: Any, args: argparse.Namespace) -> dict:
    """Loads and adapts a model, and returns the bytes it held at most, those that stay, and the seconds."""
    fabric.barrier()
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    began = time.perf_counter()

    # the acts of a recipe
    model = build_model(Config.from_checkpoint(args.checkpoint_dir))
    quantize_linears(model, RUNS[name])
    load_weights(model, args.checkpoint_dir, weight_dtype(args.precision), fabric.device, mesh_of(fabric))
    seconds = time.perf_counter() - began
    if name == "full":
        mark_chosen_as_trainable(model, Full())
    else:
        apply_lora(model, LoRA())
        mark_only_lora_as_trainable(model)
    split_among_devices(fabric, model)
    held = memory("VmHWM") - before

    params = list(model.parameters())
    return {
        "name": name,
        "kept": sum(local_tensor(param).nbytes for param in params),
        "largest": max(param.numel() for param in params) * torch.float32.itemsize,
        "held": held,
        "seconds": seconds,
    }


def memory(key: str) -> int:
    """Bytes that Linux says of this process: VmRSS now, VmHWM at most."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


if __name__ == "__main__":
    main()
