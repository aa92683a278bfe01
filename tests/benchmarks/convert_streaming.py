"""Converting a 7B-shaped checkpoint of 13.5 GB: peak memory, time next to a plain copy, and what a kill leaves.

    python tests/benchmarks/convert_streaming.py --folder /tmp/streaming        # needs 42 GB there for a while

Memory is what only this process holds (USS): pages of mapped files are not counted, as the kernel takes them back when
it needs them. Everything is deleted at the end.
"""

import argparse
import json
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

from lit_gpt import Config
from lit_gpt.checkpoint.fingerprint import model_fingerprint, tensor_digest
from lit_gpt.checkpoint.load import build_model, checked_tensors
from lit_gpt.checkpoint.save import SafetensorsWriter
from lit_gpt.checkpoint.tensor_names import to_hf

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts/convert_hf_checkpoint.py"
HF = dict(
    model_type="llama", vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
    num_attention_heads=32, num_key_value_heads=32, max_position_embeddings=4096, rms_norm_eps=1e-5,
    tie_word_embeddings=False, torch_dtype="bfloat16",
)  # fmt: skip


def make(folder: Path) -> int:
    """Llama 2 7B's shapes in shards of at most 5 GB, random; returns the largest shard's bytes."""
    folder.mkdir(parents=True)
    model = build_model(Config.from_name("Llama-2-7b-hf"))
    # one small random part over and over: the time of making 13.5 GB anew is of no interest
    noise = torch.randn(2**20, generator=torch.Generator().manual_seed(0)).bfloat16() * 0.02
    tensors = (
        (name, noise.repeat(-(-param.numel() // len(noise)))[: param.numel()].view(param.shape) + 1e-3 * i)
        for i, (name, param) in enumerate(model.named_parameters())
    )
    shards: list[SafetensorsWriter] = []
    for name, tensor in to_hf(tensors, model.config):
        if not shards or shards[-1].size + tensor.nbytes > 5e9:
            shards.append(SafetensorsWriter(folder / f"{len(shards)}.safetensors", {}, 400))
        shards[-1].add(name, tensor)
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    weight_map = {}
    for i, (shard, name) in enumerate(zip(shards, names)):
        shard.close()
        (folder / f"{i}.safetensors").rename(folder / name)
        weight_map |= {key: name for key in shard.header if key != "__metadata__"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(HF))
    return max(shard.size for shard in shards)


def uss(pid: int) -> int:
    """Bytes that only this process holds; 0 when it has ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith(("Private_", "Swap:")))


def run(source: Path, target: Path, kill_after: float | None = None) -> tuple[float, int]:
    """Seconds and peak bytes of a conversion."""
    flags = ["--checkpoint_dir", str(source), "--out_dir", str(target)]
    since, peak = time.perf_counter(), 0
    process = subprocess.Popen([sys.executable, str(SCRIPT), *flags])
    while process.poll() is None:
        peak = max(peak, uss(process.pid))
        if kill_after is not None and time.perf_counter() - since > kill_after:
            process.kill()
        time.sleep(0.05)
    seconds = time.perf_counter() - since
    if kill_after is None and process.returncode:
        raise SystemExit("The conversion failed.")
    return seconds, peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/streaming"))
    parser.add_argument("--kills", type=int, default=4)
    args = parser.parse_args()
    free = shutil.disk_usage(args.folder.parent).free
    if free < 42e9:
        raise SystemExit(f"{args.folder.parent} has {free / 1e9:.0f} GB free, expected 42. Name another --folder.")
    source, target = args.folder / "source", args.folder / "target"
    try:
        largest = make(source)
        since = time.perf_counter()
        shutil.copytree(source, args.folder / "copy")
        subprocess.run(["sync"], check=True)
        copy = time.perf_counter() - since
        shutil.rmtree(args.folder / "copy")
        seconds, peak = run(source, target)
        print(
            f"Largest shard {largest / 1e9:.2f} GB, peak {peak / 1e9:.2f} GB ({peak / largest:.2f} of it);"
            f" {seconds:.0f} s, a copy and sync {copy:.0f} s ({seconds / copy:.2f})."
        )
        expected = load_fingerprint(source)
        assert load_fingerprint(target) == expected
        shutil.rmtree(target)
        chance = random.Random(0)
        for _ in range(args.kills):
            after = chance.uniform(3, seconds)
            run(source, target, kill_after=after)
            whole = target.is_dir()
            print(f"Killed after {after:.1f} s: {'the whole' if whole else 'no'} folder under the final name.")
            if whole:
                assert load_fingerprint(target) == expected
                shutil.rmtree(target)
        run(source, target)
        assert load_fingerprint(target) == expected
        print("Run again after the last kill: whole, with the same fingerprint.")
    finally:
        shutil.rmtree(args.folder, ignore_errors=True)


def load_fingerprint(folder: Path) -> str:
    """Of the weights as they are read; a torn file is refused."""
    model = build_model(Config.from_checkpoint(folder))
    return model_fingerprint({name: tensor_digest(name, tensor) for name, tensor in checked_tensors(model, folder)})


if __name__ == "__main__":
    main()
