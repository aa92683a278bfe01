"""Preparing 52,000 instructions, next to litgpt and to `datasets.map` with a fast tokenizer; and a file of 2 GB.

    bash tests/benchmarks/setup_peers.sh
    python tests/benchmarks/prepare_throughput.py                     # the three, one after the other, twice
    python tests/benchmarks/prepare_throughput.py --gigabytes 2       # ours alone: the memory must not grow

Each is a process of its own, timed from start to end: reading the JSON lines, putting them into Alpaca's prompt, and
tokens with their marks; ours and datasets write them to disk. litgpt makes them anew in every epoch of every run.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from records import docstrings

ROOT = Path(__file__).resolve().parents[2]
CHECKPOINT = ROOT / "checkpoints/sample/SmolLM2-135M-Instruct-Q4_1"
DATASETS = """
import sys
from datasets import load_dataset
from transformers import AutoTokenizer
from lit_gpt.prompts import alpaca

tokenizer = AutoTokenizer.from_pretrained(sys.argv[2])

def tokenize(batch):
    rows = [dict(zip(batch, row)) for row in zip(*batch.values())]
    prompts = [alpaca([{"role": "user", "content": "", **row}])[0][0] for row in rows]
    full = [prompt + row["output"] + tokenizer.eos_token for prompt, row in zip(prompts, rows)]
    lengths = [len(ids) for ids in tokenizer(prompts)["input_ids"]]
    ids = tokenizer(full)["input_ids"]
    return {"input_ids": ids, "labels": [[-100] * n + row[n:] for n, row in zip(lengths, ids)]}

data = load_dataset("json", data_files=sys.argv[1], cache_dir=sys.argv[3])["train"]
data = data.map(tokenize, batched=True, num_proc=2, remove_columns=data.column_names)
data.save_to_disk(sys.argv[3] + "/tokens")
"""
LITGPT = """
import json, sys
from pathlib import Path
from litgpt.data.base import SFTDataset
from litgpt.tokenizer import Tokenizer

records = [json.loads(line) for line in open(sys.argv[1])]
for item in SFTDataset(records, Tokenizer(Path(sys.argv[2])), "alpaca"):
    pass
"""


def write_records(path: Path, n_bytes: float, count: int, long: bool) -> int:
    """Instructions of the sizes of Alpaca's, or ten times as long, cut out of docstrings."""
    chance, written = random.Random(1), 0
    words = " ".join(dict.fromkeys(docstrings())).split(" ")

    def some(low: int, high: int) -> str:
        n = chance.randint(low, high)
        at = chance.randrange(len(words) - n)
        return " ".join(words[at : at + n])

    with open(path, "w") as file:
        for i in range(count):
            if file.tell() > n_bytes:
                break
            more = some(5, 30) if chance.random() < 0.4 else ""
            output = some(50, 1000) if long else some(5, 100)
            file.write(json.dumps({"instruction": f"{some(5, 20)} {i}", "input": more, "output": output}) + "\n")
            written += 1
    return written


def watched(command: list, folder: Path) -> tuple[float, float]:
    """Seconds, and the most anonymous memory in GB: what the process holds, without the files that it maps."""
    peak = [0.0]
    since = time.perf_counter()
    process = subprocess.Popen(list(map(str, command)), cwd=folder, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT)

    def watch() -> None:
        while process.poll() is None:
            try:
                status = Path(f"/proc/{process.pid}/status").read_text()
                peak[0] = max(peak[0], int(status.split("RssAnon:")[1].split()[0]) / 1e6)
            except (OSError, IndexError):
                pass
            time.sleep(0.05)

    watcher = threading.Thread(target=watch)
    watcher.start()
    said = process.communicate()[0]
    watcher.join()
    if process.returncode:
        sys.exit(f"{command[0]} failed: {said}")
    return time.perf_counter() - since, peak[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--records", type=int, default=52_000)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--gigabytes", type=float)
    parser.add_argument("--litgpt_python", default=os.environ.get("PEERS_DIR", f"{ROOT}/.peers") + "/litgpt/bin/python")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder, source = Path(name), Path(name) / "records.jsonl"
        ours = [sys.executable, ROOT / "scripts/prepare_json.py", "--json_path", source, "--checkpoint_dir", CHECKPOINT]
        ours += ["--prompt_style", "alpaca", "--data_dir"]
        if args.gigabytes:
            for size in (args.gigabytes / 10, args.gigabytes):
                n = write_records(source, size * 1e9, 10**9, long=True)
                seconds, peak = watched([*ours, folder / f"data-{size}"], folder)
                print(f"{size:.1f} GB, {n:,} records: {seconds:.0f} s, {peak:.2f} GB at most", flush=True)
            return
        write_records(source, 1e18, args.records, long=False)
        programs = {
            "ours": lambda: [*ours, folder / "data"],
            "datasets.map": lambda: [sys.executable, "-c", DATASETS, source, CHECKPOINT, folder / "datasets"],
            "litgpt": lambda: [args.litgpt_python, "-c", LITGPT, source, CHECKPOINT],
        }
        for _ in range(args.repeats):
            for program, command in programs.items():
                for left in ("data", "datasets"):
                    shutil.rmtree(folder / left, ignore_errors=True)
                seconds, peak = watched(command(), folder)
                print(f"{program:>13}: {seconds:6.1f} s, {peak:.2f} GB at most", flush=True)
        seconds, _ = watched([*ours, folder / "data"], folder) and watched([*ours, folder / "data"], folder)
        print(f"{'ours again':>13}: {seconds:6.1f} s: nothing has changed")


ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
if __name__ == "__main__":
    main()
