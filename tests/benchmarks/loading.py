"""From a new process to the first token, next to transformers: the sample model, and one of Llama 3.2 1B's shapes.

    python tests/benchmarks/loading.py                        # both models, 3 times each, alternating

The 1B-shaped checkpoint is random bfloat16 on disk; both compute in float32, so that a CPU without bfloat16 units does
the same. Everything that was imported, read and computed until the first token is there counts.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from lit_gpt import Config
from lit_gpt.checkpoint.load import build_model
from lit_gpt.checkpoint.save import SafetensorsWriter
from lit_gpt.checkpoint.tensor_names import to_hf

ROOT = Path(__file__).resolve().parents[2]
SAMPLE = ROOT / "checkpoints/sample/SmolLM2-135M-Instruct-Q4_1"
OURS = """
import sys, torch
from pathlib import Path
from lit_gpt import Tokenizer
from lit_gpt.checkpoint import load_model
folder = Path(sys.argv[1])
model, tokenizer = load_model(folder, torch.float32), Tokenizer(folder)
with torch.inference_mode():
    print(model(tokenizer.encode("The capital of France is")[None])[0, -1].argmax().item())
"""
THEIRS = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
with torch.inference_mode():
    print(model(**tokenizer("The capital of France is", return_tensors="pt")).logits[0, -1].argmax().item())
"""


def make(folder: Path) -> Path:
    """Llama 3.2 1B's shapes with the sample's tokenizer."""
    config = Config.from_name("Llama-3.2-1B")
    noise = torch.randn(2**20, generator=torch.Generator().manual_seed(0)).bfloat16() * 0.02
    tensors = (
        (name, noise.repeat(-(-param.numel() // len(noise)))[: param.numel()].view(param.shape))
        for name, param in build_model(config).named_parameters()
    )
    writer = SafetensorsWriter(folder / "model.safetensors", {}, 400)
    for name, tensor in to_hf(tensors, config):
        writer.add(name, tensor)
    writer.close()
    hf = dict(
        model_type="llama", architectures=["LlamaForCausalLM"], vocab_size=128256, hidden_size=2048,
        intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8,
        max_position_embeddings=131072, rms_norm_eps=1e-5, rope_theta=500000.0, tie_word_embeddings=True,
        torch_dtype="bfloat16",
    )  # fmt: skip
    (folder / "config.json").write_text(json.dumps(hf))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(SAMPLE / name, folder)
    return folder


def timed(python: str, code: str, folder: Path) -> tuple[float, str]:
    since = time.perf_counter()
    token = subprocess.check_output([python, "-c", code, str(folder)], text=True, stderr=subprocess.DEVNULL)
    return time.perf_counter() - since, token


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--peer", default=sys.executable, help="A Python that has transformers.")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        for name, folder in (("SmolLM2-135M", SAMPLE), ("1B-shaped", make(Path(temporary)))):
            times: dict[str, list[float]] = {"ours": [], "transformers": []}
            tokens = set()
            for _ in range(args.repeats + 1):  # the first fills the page cache
                for who, python, code in (("ours", sys.executable, OURS), ("transformers", args.peer, THEIRS)):
                    seconds, token = timed(python, code, folder)
                    times[who].append(seconds)
                    tokens.add(token)
                assert len(tokens) == 1, "not the same token"
            ours, theirs = (statistics.median(times[who][1:]) for who in times)
            print(f"{name}: ours {ours:.2f} s, transformers {theirs:.2f} s ({theirs / ours:.2f} times as long).")


if __name__ == "__main__":
    main()
