"""Shows that a change of the code changed no result: the same commands in two trees, compared byte by byte.

    git worktree add ../before main
    python tests/benchmarks/nothing_moved.py run ../before /tmp/before      # about 15 minutes on two cores, each
    python tests/benchmarks/nothing_moved.py run . /tmp/after
    python tests/benchmarks/nothing_moved.py resume . /tmp/before           # goes on with runs that `before` began
    python tests/benchmarks/nothing_moved.py compare /tmp/before /tmp/after

Every command runs in the results' own folder, so that paths in settings and headers are equal. metrics.csv is compared
without its columns of seconds, tokens a second and memory; everything else byte by byte, but for the order of keys in
the header of a safetensors file; reports and printed lines are left to the eye.
"""

import csv
import hashlib
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

MEASURED = ("seconds", "memory_gb", "tokens_per_second", "tokens_per_s")  # columns that differ from run to run
SAMPLE = "checkpoints/sample/SmolLM2-135M-Instruct-Q4_1"
SHORT = "--train.eval_records 16 --train.eval_interval 4 --train.save_interval 4 --n_answers 1 --train.warmup_steps 2"
LABELS = "--data_path spam.csv --max_seq_length 64 --train.eval_interval 4 --train.save_interval 4 --train.max_steps 6"

COMMANDS = {
    "prepare": "scripts/prepare_docstrings.py --data_dir data/docstrings",
    "prepare_json": "scripts/prepare_json.py --json_path chat.jsonl --data_dir data/chat --val_fraction 0.2",
    "prepare_csv": "scripts/prepare_csv.py --csv_path pairs.csv --data_dir data/pairs --val_fraction 0.2",
    "inspect": "scripts/inspect_data.py --data_dir data/docstrings",
    "lora": f"finetune/lora.py {SHORT} --train.max_steps 8 --out_dir out/lora",
    "lora_all": f"finetune/lora.py {SHORT} --train.max_steps 4 --lora.mlp true --lora.projection true --lora.key true"
    " --lora.dropout 0.1 --train.micro_batch_size 4 --out_dir out/lora_all",
    "qlora": f"finetune/lora.py {SHORT} --train.max_steps 4 --quantize bnb.nf4 --out_dir out/qlora",
    "adapter": f"finetune/adapter.py {SHORT} --train.max_steps 6 --out_dir out/adapter",
    "adapter_v2": f"finetune/adapter_v2.py {SHORT} --train.max_steps 6 --out_dir out/adapter_v2",
    "full": f"finetune/full.py {SHORT} --train.max_steps 5 --train_only 4 --train.micro_batch_tokens 512"
    " --activation_checkpointing block --out_dir out/full",
    "two_processes": f"finetune/lora.py {SHORT} --train.max_steps 4 --devices 2 --out_dir out/two_processes",
    "sharded": f"finetune/full.py {SHORT} --train.max_steps 2 --train_only 2 --devices 2 --out_dir out/sharded",
    "features": f"finetune/classifier.py {LABELS} --method features --out_dir out/features",
    "head": f"finetune/classifier.py {LABELS} --method head --out_dir out/head",
    "last_k": f"finetune/classifier.py {LABELS} --method last_k --out_dir out/last_k",
    "classifier_lora": f"finetune/classifier.py {LABELS} --method lora --out_dir out/classifier_lora",
    "merge": "scripts/merge_lora.py --finetuned out/lora --out_dir merged",
    "generate": "generate/base.py --finetuned out/lora --prompt What? --max_new_tokens 12 --temperature 0.7",
    "generate_merged": "generate/base.py --checkpoint_dir merged --prompt What? --max_new_tokens 12 --temperature 0.7",
    "classify": "generate/classify.py --finetuned out/head --texts spam.csv",
    "peft": "scripts/convert_lit_checkpoint.py --finetuned out/lora --format peft --out_dir peft",
    "gguf": f"scripts/convert_lit_checkpoint.py --checkpoint_dir {SAMPLE} --format gguf --dtype float16 --out_dir gguf",
    "convert": f"scripts/convert_hf_checkpoint.py --checkpoint_dir {SAMPLE} --dtype bfloat16 --out_dir converted",
    "plan": "scripts/plan_memory.py",
}
INTERRUPTED = {  # killed after some steps; `resume` lets another tree end them
    "lora": f"finetune/lora.py {SHORT} --train.max_steps 8",
    "qlora": f"finetune/lora.py {SHORT} --train.max_steps 6 --quantize bnb.nf4",
    "adapter_v2": f"finetune/adapter_v2.py {SHORT} --train.max_steps 8",
    "full": f"finetune/full.py {SHORT} --train.max_steps 6 --train_only 2",
    "classifier": f"finetune/classifier.py {LABELS} --method lora --train.max_steps 8",
}


def run(tree: Path, out: Path) -> None:
    """All commands in this tree's code, their files and output in `out`."""
    tree, out = tree.resolve(), out.resolve()
    out.mkdir(parents=True)
    (out / "checkpoints").symlink_to(Path("checkpoints").resolve())
    (out / "spam.csv").symlink_to(Path("data/spam.csv").resolve())
    write_inputs(out)
    for name, line in COMMANDS.items():
        execute(tree, out, name, line)
    for name, line in INTERRUPTED.items():
        kill_after_a_save(tree, out, f"begun_{name}", f"{line} --out_dir begun/{name}")


def resume(tree: Path, out: Path) -> None:
    """Ends the interrupted runs in `out` twice: with this tree's code in resumed/, and in the tree that began them."""
    for name, line in INTERRUPTED.items():
        folder = out / "resumed" / name
        shutil.copytree(out / "begun" / name, folder, dirs_exist_ok=True)
        execute(tree.resolve(), out.resolve(), f"resumed_{name}", f"{line} --out_dir resumed/{name} --resume true")


def compare(before: Path, after: Path) -> None:
    """Prints what differs, and exits with 1 if anything does."""
    different = []
    n_files = 0
    for file in sorted(before.rglob("*")):
        name = file.relative_to(before)
        if not is_result(name) or not file.is_file():
            continue
        n_files += 1
        other = after / name
        if not other.is_file():
            different.append(f"{name}: missing after")
        elif content(file) != content(other):
            different.append(f"{name}: differs")
    print(f"{n_files} files compared, {len(different)} different")
    print("\n".join(different))
    sys.exit(bool(different) or not n_files)


def is_result(name: Path) -> bool:
    if name.parts[0] in ("checkpoints", "begun", "resumed"):
        return False
    return name.suffix in (".safetensors", ".bin", ".csv", ".gguf", ".json", ".jinja", ".txt")


def content(file: Path) -> str:
    if file.name == "metrics.csv":
        rows = list(csv.DictReader(file.open(encoding="utf-8")))
        return json.dumps([{key: value for key, value in row.items() if key not in MEASURED} for row in rows])
    content = file.read_bytes()
    if file.suffix == ".safetensors":
        # the library writes the two keys of the header's metadata in an order that changes from process to process
        size = struct.unpack("<Q", content[:8])[0]
        header = json.loads(content[8 : 8 + size])
        header.get("__metadata__", {}).pop("seconds", None)  # of a classifier's hidden states
        content = json.dumps(header, sort_keys=True).encode() + content[8 + size :]
    return hashlib.sha256(content).hexdigest()


def write_inputs(out: Path) -> None:
    with (out / "chat.jsonl").open("w", encoding="utf-8") as file:
        for i in range(40):
            turns = [{"role": "user", "content": f"What is {i} + {i}?"}, {"role": "assistant", "content": str(2 * i)}]
            file.write(json.dumps({"messages": turns * (1 + i % 2)}) + "\n")
    with (out / "pairs.csv").open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["instruction", "input", "output"])
        rows.writerows([f"Say {i}.", "aloud" if i % 3 else "", f"{i}!"] for i in range(40))


def command(tree: Path, line: str) -> list[str]:
    script, *flags = line.split()
    return [sys.executable, str(tree / script), *flags]


def environment(tree: Path) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(tree), "OMP_WAIT_POLICY": "PASSIVE"}


def execute(tree: Path, out: Path, name: str, line: str) -> None:
    began = time.perf_counter()
    done = subprocess.run(command(tree, line), cwd=out, env=environment(tree), capture_output=True, text=True)
    (out / f"{name}.stdout").write_text(done.stdout)
    (out / f"{name}.stderr").write_text(done.stderr)
    print(f"{name}: status {done.returncode}, {time.perf_counter() - began:.0f} s", flush=True)
    if done.returncode:
        print(done.stderr[-2000:])


def kill_after_a_save(tree: Path, out: Path, name: str, line: str) -> None:
    """Ends the run with SIGKILL, some time after it saved for the first time and before it has ended."""
    folder = out / line.split("--out_dir ")[1]
    with (out / f"{name}.stderr").open("w") as log:
        process = subprocess.Popen(command(tree, line), cwd=out, env=environment(tree), stdout=log, stderr=log)
        while process.poll() is None and not (folder / "last/state.safetensors").is_file():
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.wait()
    print(f"{name}: killed, status {process.returncode}", flush=True)


if __name__ == "__main__":
    if {"-h", "--help"} & set(sys.argv):
        print(__doc__)
        sys.exit()
    acts = {"run": run, "resume": resume, "compare": compare}
    if len(sys.argv) != 4 or sys.argv[1] not in acts:
        sys.exit(__doc__)
    acts[sys.argv[1]](Path(sys.argv[2]), Path(sys.argv[3]))
