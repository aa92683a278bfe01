"""litgpt, with its own checkpoint conversion, LoRA and generate. Two ways to train, the benchmark takes the faster:

chunked: head and cross entropy in chunks of 128 positions, as in its finetune/lora.py.
whole:   one tensor of logits.

Its scripts go through Fabric, which on one CPU in float32 adds nothing to the arithmetic and is left out.
"""

import argparse
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import litgpt.lora
import torch
from litgpt.generate.base import generate as litgpt_generate
from litgpt.utils import chunked_cross_entropy, lazy_load
from safetensors.torch import load_file
from torch.nn import functional as F
from worker import ALPHA, RANK, Record, decoder, padded, read_records, serve, trainer


def converted(args: argparse.Namespace) -> Path:
    """A folder with what litgpt's own conversion makes of the checkpoint."""
    folder = args.work_dir / "SmolLM2-135M-Instruct"  # litgpt knows the architecture by this name
    if not (folder / "model_config.yaml").exists():
        folder.mkdir(exist_ok=True)
        for path in args.checkpoint_dir.iterdir():
            (folder / path.name).symlink_to(path)
        command = [Path(sys.executable).parent / "litgpt", "convert_to_litgpt", folder, "--dtype", "float32"]
        subprocess.run(command, check=True, stdout=sys.stderr)
    return folder


def lora(args: argparse.Namespace) -> Callable[[dict], dict]:
    folder = converted(args)
    places = {"lora_r": RANK, "lora_alpha": ALPHA, "lora_dropout": 0.0, "lora_query": True, "lora_value": True}
    model = litgpt.lora.GPT(litgpt.lora.Config.from_file(folder / "model_config.yaml", **places))
    litgpt.lora.mark_only_lora_as_trainable(model)
    model.load_state_dict(lazy_load(folder / "lit_model.pth"), strict=False)
    model.max_seq_length = max(len(record.ids) for record in read_records(args.work_dir / "records.jsonl"))
    start = load_file(args.work_dir / "lora.safetensors")
    with torch.no_grad():
        for layer, block in enumerate(model.transformer.h):
            block.attn.qkv.lora_A.copy_(torch.cat([start[f"{layer}.query"], start[f"{layer}.value"]]))

    def micro_batch_loss(records: list[Record], setting: str, trained: int) -> torch.Tensor:
        ids, targets, _ = padded(records)
        labels = ids.roll(-1, 1).masked_fill(~targets, -100)
        if setting == "whole":
            return F.cross_entropy(model(ids).flatten(0, 1), labels.flatten(), reduction="sum") / trained
        mean = chunked_cross_entropy(model(ids, lm_head_chunk_size=128), labels)
        return mean * (targets.sum() / trained)

    model.train()
    return trainer(args, [param for param in model.parameters() if param.requires_grad], micro_batch_loss)


def decode(args: argparse.Namespace) -> Callable[[dict], dict]:
    folder = converted(args)
    model = litgpt.GPT(litgpt.Config.from_file(folder / "model_config.yaml")).eval()
    model.load_state_dict(lazy_load(folder / "lit_model.pth"))

    def generate(prompt: torch.Tensor, new_tokens: int, setting: str) -> torch.Tensor:
        length = len(prompt) + new_tokens
        if model.max_seq_length != length:
            model.max_seq_length = length
            model.set_kv_cache(batch_size=1)
        return litgpt_generate(model, prompt, length, temperature=0.0, include_prompt=False)

    return decoder(generate)


if __name__ == "__main__":
    serve({"lora": lora, "decode": decode}, ["litgpt", "lightning"])
