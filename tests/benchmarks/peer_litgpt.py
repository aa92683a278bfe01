"""litgpt, with its own checkpoint conversion, LoRA and generate. Two ways to train, the benchmark takes the faster:

chunked: head and cross entropy in chunks of 128 positions, as in its finetune/lora.py and full.py.
whole:   one tensor of logits.

There is no QLoRA here: lightning's plugin, by which litgpt quantizes, raises an error on any device but CUDA.
Its scripts go through Fabric, which on one CPU in float32 adds nothing to the arithmetic and is left out.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import litgpt.lora
import torch
from litgpt.generate.base import generate as litgpt_generate
from litgpt.utils import chunked_cross_entropy, lazy_load
from operations import counter
from safetensors.torch import load_file
from torch.nn import functional as F
from worker import ALPHA, RANK, Record, adamw, decoder, in_slices, optimizer_steps, padded, read_records, serve

PLACES = {"lora_r": RANK, "lora_alpha": ALPHA, "lora_dropout": 0.0, "lora_query": True, "lora_value": True}


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
    model = litgpt.lora.GPT(litgpt.lora.Config.from_file(folder / "model_config.yaml", **PLACES))
    litgpt.lora.mark_only_lora_as_trainable(model)
    model.load_state_dict(lazy_load(folder / "lit_model.pth"), strict=False)
    start = load_file(args.work_dir / "lora.safetensors")
    with torch.no_grad():
        for layer, block in enumerate(model.transformer.h):
            block.attn.qkv.lora_A.copy_(torch.cat([start[f"{layer}.query"], start[f"{layer}.value"]]))
    return training(model, args)


def full(args: argparse.Namespace) -> Callable[[dict], dict]:
    folder = converted(args)
    model = litgpt.GPT(litgpt.Config.from_file(folder / "model_config.yaml"))
    model.load_state_dict(lazy_load(folder / "lit_model.pth"))
    if json.loads((folder / "config.json").read_text()).get("tie_word_embeddings"):
        model.lm_head.weight = model.transformer.wte.weight  # which litgpt does in pretraining alone
    return training(model, args)


def training(model: torch.nn.Module, args: argparse.Namespace) -> Callable[[dict], dict]:
    records = read_records(args.work_dir / "records.jsonl")
    model.max_seq_length = max(len(record.ids) for record in records)

    def micro_batch_loss(records: list[Record], setting: str, trained: int) -> torch.Tensor:
        ids, targets, _ = padded(records)
        labels = ids.roll(-1, 1).masked_fill(~targets, -100)
        if setting == "whole":
            return F.cross_entropy(model(ids).flatten(0, 1), labels.flatten(), reduction="sum") / trained
        mean = chunked_cross_entropy(model(ids, lm_head_chunk_size=128), labels)
        return mean * (targets.sum() / trained)

    model.train()
    return optimizer_steps(args, adamw(model, args.task), in_slices(records), micro_batch_loss)


def operations(args: argparse.Namespace) -> Callable[[dict], dict]:
    """LoRA on Llama 3.1 8B without contents."""
    records = read_records(args.work_dir / "records.jsonl")
    with torch.device("meta"):
        model = litgpt.lora.GPT(litgpt.lora.Config.from_name("Llama-3.1-8B", **PLACES)).bfloat16()
        model.max_seq_length = max(len(record.ids) for record in records)
    litgpt.lora.mark_only_lora_as_trainable(model)

    def micro_batch_loss(records: list[Record], setting: str, trained: int) -> torch.Tensor:
        ids, _, _ = padded(records)
        ids = ids.to("meta")
        return chunked_cross_entropy(model(ids, lm_head_chunk_size=128), ids)

    return counter(args, model.train(), in_slices(records), micro_batch_loss)


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
    serve({"lora": lora, "full": full, "operations": operations, "decode": decode}, ["litgpt", "lightning"])
