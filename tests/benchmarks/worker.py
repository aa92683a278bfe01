"""Both ends of the pipe between a benchmark and the programs it compares.

A benchmark starts one process per program, each with its own Python, and asks them in turn, so that only one computes
at any time while all models stay in memory. A question is one line of JSON on the worker's standard input, the answer
one line on its standard output; what the program prints goes to standard error.

    worker starts       {"versions": {...}, "threads": 2}
    train a few steps   {"setting": "lean", "micro_batch": 4, "first": 0, "steps": 2, "update": true}
                        {"seconds": 9.1, "losses": [2.1, 2.0], "records": 32, "tokens": 3040, "peak_gb": 2.3}
    decode              {"setting": "static", "prompt": [1, 2, ...], "new_tokens": 100}
                        {"seconds": 3.1, "tokens": [5, 6, ...], "peak_gb": 1.1}
    count operations    {"setting": "lean", "micro_batch": 4}
                        {"forward": {"frozen": 31e12, ...}, "backward": {...}, "peak_gb": 0.6}
"""

import argparse
import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
# what is compared -> the file that runs it, and its environment of setup_peers.sh; None is that of the benchmark
PROGRAMS = {
    "ours": ("ours.py", None),
    "hf": ("peer_hf.py", "hf"),
    "trainer": ("peer_hf.py", "hf"),  # transformers once more, as its stock Trainer trains
    "litgpt": ("peer_litgpt.py", "litgpt"),
    "llama_cpp": ("peer_llama_cpp.py", "llama"),
}
RANK, ALPHA = 8, 16
# AdamW, as lit_gpt's TrainArgs have it; the rates are the defaults of --train.learning_rate, see finetune/full.py
LEARNING_RATES = {"lora": 3e-4, "qlora": 3e-4, "full": 5e-5}
BETAS = (0.9, 0.95)
WEIGHT_DECAY = 0.01  # of matrices; norms and biases do not decay


@dataclass(frozen=True)
class Record:
    ids: list[int]
    trained: list[int]
    """1 where the token is a target, 0 in the prompt."""

    def targets(self) -> list[bool]:
        """For each position, whether the *next* token is trained: nothing predicts a record's first token."""
        return [bool(flag) for flag in self.trained[1:]] + [False]


def read_records(path: Path) -> list[Record]:
    return [Record(**json.loads(line)) for line in path.read_text().splitlines()]


# The worker's end. Only these functions need torch.


def serve(
    tasks: dict[str, Callable[[argparse.Namespace], Callable[[dict], dict]]],
    packages: list[str],
    n_threads: int | None = None,
) -> None:
    """Loads what the task needs, then answers until standard input ends. `n_threads` None: torch computes, as it does.

    The answers tell the versions of `packages`, and that of torch where it computes.
    """
    if n_threads is None:
        import torch

        n_threads = torch.get_num_threads()
        packages = ["torch", *packages]
    parser = argparse.ArgumentParser()
    parser.add_argument("task", choices=tasks)
    parser.add_argument("--checkpoint_dir", type=Path)
    parser.add_argument("--work_dir", type=Path, help="has records.jsonl, lora.safetensors; a place for conversions")
    parser.add_argument("--records_per_step", type=int, default=16)
    args = parser.parse_args()
    pipe, sys.stdout = sys.stdout, sys.stderr
    task = tasks[args.task](args)
    if args.task == "qlora":
        packages = [*packages, "bitsandbytes"]
    versions = {name: version(name) for name in packages}
    print(json.dumps({"versions": versions, "threads": n_threads}), file=pipe, flush=True)
    for line in sys.stdin:
        print(json.dumps({**task(json.loads(line)), "peak_gb": peak_gb()}), file=pipe, flush=True)


def peak_gb() -> float:
    """The most memory this process ever held. (getrusage would also count the parent's at the fork.)"""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 2**20


def optimizer_steps(
    args: argparse.Namespace,
    optimizer: Any,
    micro_batches: Callable[[list[int], str, int], list[Any]],
    micro_batch_loss: Callable[[Any, str, int], Any],
) -> Callable[[dict], dict]:
    """The optimizer steps that every program does alike.

    Args:
        args: `work_dir` has the records, `records_per_step` says how many a step takes.
        optimizer: Has the parameters that train.
        micro_batches: The records of these numbers, in a setting, as batches of at most so many records.
        micro_batch_loss: The sum of the loss over a batch's targets, in a setting, divided by a number: that of the
            targets of the whole step. So the losses of a step add up to its mean over all trained tokens.
    """
    records = read_records(args.work_dir / "records.jsonl")

    def train(question: dict) -> dict:
        losses, n_tokens, n = [], 0, args.records_per_step
        setting = question["setting"]
        start = time.perf_counter()
        for step in range(question["first"], question["first"] + question["steps"]):
            numbers = [i % len(records) for i in range(step * n, (step + 1) * n)]
            trained = sum(sum(records[i].targets()) for i in numbers)
            loss = 0.0
            for batch in micro_batches(numbers, setting, question["micro_batch"]):
                share = micro_batch_loss(batch, setting, trained)
                share.backward()
                loss += share.item()
            if question["update"]:
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss)
            n_tokens += sum(len(records[i].ids) for i in numbers)
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "losses": losses, "records": n * question["steps"], "tokens": n_tokens}

    return train


def adamw(model: Any, method: str) -> Any:
    """A peer's optimizer for what trains in `model`: that of the others, by PyTorch's fused kernel, its fastest."""
    import torch

    params = [param for param in model.parameters() if param.requires_grad]
    groups = [
        {"params": [param for param in params if param.ndim >= 2], "weight_decay": WEIGHT_DECAY},
        {"params": [param for param in params if param.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=LEARNING_RATES[method], betas=BETAS, fused=True)


def in_slices(
    records: list[Record], by_length: tuple[str, ...] = ()
) -> Callable[[list[int], str, int], list[list[Record]]]:
    """A peer's micro-batches: the records in their order, or those of like length together in these settings."""

    def micro_batches(numbers: list[int], setting: str, size: int) -> list[list[Record]]:
        chosen = [records[i] for i in numbers]
        if setting in by_length:
            chosen.sort(key=lambda record: len(record.ids))
        return [chosen[i : i + size] for i in range(0, len(chosen), size)]

    return micro_batches


def padded(records: list[Record]) -> tuple[Any, Any, Any]:
    """Ids, whether the next token is a target, whether there is a token: each (B, T), padded on the right."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    ids = pad_sequence([torch.tensor(record.ids) for record in records], batch_first=True)
    targets = pad_sequence([torch.tensor(record.targets()) for record in records], batch_first=True)
    present = pad_sequence([torch.ones(len(record.ids), dtype=torch.long) for record in records], batch_first=True)
    return ids, targets, present


def decoder(generate: Callable[[Any, int, str], Any]) -> Callable[[dict], dict]:
    """`generate(prompt, new_tokens, setting)` continues prompt (T,) greedily and gives the new ids, prompt excluded."""
    import torch

    def decode(question: dict) -> dict:
        prompt = torch.tensor(question["prompt"])
        start = time.perf_counter()
        tokens = generate(prompt, question["new_tokens"], question["setting"])
        return {"seconds": time.perf_counter() - start, "tokens": tokens.tolist()}

    return decode


# The benchmark's end.


class Worker:
    """One program in its own process."""

    def __init__(self, program: str, task: str, args: argparse.Namespace, work_dir: Path) -> None:
        file, environment = PROGRAMS[program]
        python = Path(sys.executable) if environment is None else args.peers_dir / environment / "bin" / "python"
        if not python.exists():
            sys.exit(f"{python} is missing: run PEERS_DIR={args.peers_dir} bash {HERE}/setup_peers.sh")
        self.log = work_dir / f"{program}.log"
        command = [python, HERE / file, task, "--checkpoint_dir", args.checkpoint_dir.resolve()]
        command += ["--work_dir", work_dir, "--records_per_step", str(getattr(args, "records_per_step", 0))]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self.log.open("w")}
        self.process = subprocess.Popen(command, text=True, **pipes)
        self.about = self._answer()

    def ask(self, **question: Any) -> dict:
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"{self.process.args[1]} ended without an answer:\n{self.log.read_text()[-3000:]}")
        return json.loads(line)

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: Any) -> None:
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait()


def peers_dir() -> Path:
    """Where setup_peers.sh makes its environments, if nobody says otherwise."""
    return Path(os.environ.get("PEERS_DIR", HERE.parents[1] / ".peers"))


def benchmark_arguments(description: str, programs: list[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    sample = HERE.parents[1] / "checkpoints/sample/SmolLM2-135M-Instruct-Q4_1"
    parser.add_argument("--checkpoint_dir", type=Path, default=sample, help="a Hugging Face folder, float32")
    parser.add_argument("--peers_dir", type=Path, default=peers_dir())
    parser.add_argument("--programs", nargs="+", choices=programs, default=programs)
    parser.add_argument("--data", type=Path, help='JSON lines {"ids": [...], "trained": [0, 1, ...]}')
    kinds = "without --data: records.py; those of chat begin with the same template, the others share nothing"
    parser.add_argument("--kind", choices=["short", "chat", "long"], default="short", help=kinds)
    parser.add_argument("--rounds", type=int, default=5, help="how often each program has its turn")
    parser.add_argument("--out", type=Path, help="write all measurements to this JSON file")
    parser.add_argument("--force", action="store_true", help="run although the machine is busy")
    return parser


def check_quiet(force: bool) -> None:
    load = os.getloadavg()[0]
    if load > 0.5:
        print(f"The load average of the last minute is {load:.2f}, above 0.5: the timings will not mean much.")
        if not force:
            sys.exit("Wait until the machine is quiet, or pass --force.")


def machine() -> str:
    models = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{models[0]}, {os.cpu_count()} cores, {gib:.0f} GiB, {platform.system()} {platform.release()}"


def about(worker: Worker) -> str:
    versions = (f"{name} {number}" for name, number in worker.about["versions"].items())
    return f"{', '.join(versions)}; {worker.about['threads']} threads"


def spread(values: list[float], digits: int) -> str:
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f}..{max(values):.{digits}f})"


def print_table(rows: list[list[str]]) -> None:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip(), flush=True)
