"""lit_gpt, with the parts of its scripts: a prepared folder, `micro_batches`, `make_optimizer`.

shared: records laid end to end, micro_batch of them in one forward pass, common prefixes computed once; the default.
packed: the same with --train.share_prefixes false.
"""

import argparse
from collections.abc import Callable

import numpy as np
import torch
from operations import counter
from safetensors.torch import load_file
from worker import ALPHA, BETAS, LEARNING_RATES, RANK, WEIGHT_DECAY, decoder, optimizer_steps, read_records, serve

from lit_gpt import GPT, Config
from lit_gpt.checkpoint.load import build_model, load_model
from lit_gpt.data.dataset import Dataset, micro_batches
from lit_gpt.data.writer import RecordWriter
from lit_gpt.full import Full, mark_chosen_as_trainable
from lit_gpt.generate.decode import generate
from lit_gpt.lora import LoRA, apply_lora, mark_only_lora_as_trainable
from lit_gpt.make_optimizer import make_optimizer
from lit_gpt.model.packing import Layout
from lit_gpt.runs.load_finetuned import QuantizeForUse, UseArgs, load_model_for_use
from lit_gpt.train import TrainArgs

LORA = LoRA(r=RANK, alpha=ALPHA, dropout=0.0, key=False, projection=False, mlp=False)


def lora(args: argparse.Namespace) -> Callable[[dict], dict]:
    model = load_model(args.checkpoint_dir, torch.float32)
    adapt(model, args)
    return training(model, args)


def qlora(args: argparse.Namespace) -> Callable[[dict], dict]:
    model = load_model(args.checkpoint_dir, torch.float32, quantize="bnb.nf4")
    adapt(model, args)
    return training(model, args)


def full(args: argparse.Namespace) -> Callable[[dict], dict]:
    model = load_model(args.checkpoint_dir, torch.float32)
    mark_chosen_as_trainable(model, Full())
    return training(model, args)


def adapt(model: GPT, args: argparse.Namespace) -> None:
    """LoRA on queries and values, with the A that all programs begin with."""
    apply_lora(model, LORA)
    mark_only_lora_as_trainable(model)
    start = load_file(args.work_dir / "lora.safetensors")
    with torch.no_grad():
        for layer, block in enumerate(model.transformer.h):
            block.attn.q.lora_A.copy_(start[f"{layer}.query"])
            block.attn.v.lora_A.copy_(start[f"{layer}.value"])


def training(model: GPT, args: argparse.Namespace) -> Callable[[dict], dict]:
    """The steps of `fit` in lit_gpt/train.py, but for the clipping."""
    data = prepared(args)
    beta1, beta2 = BETAS
    settings = TrainArgs(
        learning_rate=LEARNING_RATES[args.task], weight_decay=WEIGHT_DECAY, beta1=beta1, beta2=beta2, max_norm=None
    )

    def rows(numbers: list[int], setting: str, size: int) -> list[tuple[torch.Tensor, Layout]]:
        return micro_batches(data, numbers, size, share_prefixes=setting == "shared")

    def row_loss(row: tuple[torch.Tensor, Layout], setting: str, trained: int) -> torch.Tensor:
        idx, layout = row
        return model(idx, layout=layout) / trained

    model.train()
    return optimizer_steps(args, make_optimizer(model, settings), rows, row_loss)


def prepared(args: argparse.Namespace) -> Dataset:
    """The records in the files that scripts/prepare_*.py write; number i is the record of line i."""
    records = read_records(args.work_dir / "records.jsonl")
    folder = args.work_dir / "prepared"
    folder.mkdir(exist_ok=True)
    with RecordWriter(folder, np.dtype(np.uint32), seed=0) as writer:
        for record in records:
            writer.add([(record.ids, bytes(record.trained))], prompt=None, split="train")
    split = writer.choose_split(val_fraction=0.0)
    writer.write_ends_and_split(split)
    writer.write_meta(split, tokenizer="", prompt_style="")
    data = Dataset(folder, "train")
    assert len(data) == len(records), "a record was left out"
    return data


def operations(args: argparse.Namespace) -> Callable[[dict], dict]:
    """LoRA on Llama 3.1 8B without contents."""
    model = build_model(Config.from_name("meta-llama/Llama-3.1-8B")).bfloat16()
    model.to("meta")  # the rotary frequencies, too
    apply_lora(model, LORA)
    mark_only_lora_as_trainable(model)
    data = prepared(args)

    def rows(numbers: list[int], setting: str, size: int) -> list[tuple[torch.Tensor, Layout]]:
        return micro_batches(data, numbers, size, share_prefixes=setting == "shared")

    def row_loss(row: tuple[torch.Tensor, Layout], setting: str, trained: int) -> torch.Tensor:
        idx, layout = row
        return model(idx.to("meta"), layout=layout.to("meta")) / trained

    return counter(args, model.train(), rows, row_loss)


def decode(args: argparse.Namespace) -> Callable[[dict], dict]:
    """The model as generate/base.py loads it: in float32, or in the codes that a setting is called after."""
    kinds: dict[str, QuantizeForUse] = {"float32": "none", "int8": "cpu.int8", "int4": "cpu.int4"}
    models = {}
    for setting, kind in kinds.items():
        use = UseArgs(checkpoint_dir=args.checkpoint_dir, precision="32-true", quantize=kind)
        models[setting] = load_model_for_use(use, torch.device("cpu"))

    def continued(prompt: torch.Tensor, new_tokens: int, setting: str) -> torch.Tensor:
        return generate(models[setting], prompt, len(prompt) + new_tokens, temperature=0.0)[len(prompt) :]

    return decoder(continued)


if __name__ == "__main__":
    serve({"lora": lora, "qlora": qlora, "full": full, "operations": operations, "decode": decode}, [])
