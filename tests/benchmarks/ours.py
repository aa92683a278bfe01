"""lit_gpt: records laid end to end, micro_batch of them in one forward pass; `shared` computes common prefixes once."""

import argparse
from collections.abc import Callable

import torch
from safetensors.torch import load_file
from worker import ALPHA, RANK, Record, decoder, serve, trainer

from lit_gpt.checkpoint.load import load_model
from lit_gpt.generate.decode import generate
from lit_gpt.lora import LoRA, apply_lora, mark_only_lora_as_trainable
from lit_gpt.model.packing import Layout


def lora(args: argparse.Namespace) -> Callable[[dict], dict]:
    model = load_model(args.checkpoint_dir, torch.float32)
    apply_lora(model, LoRA(r=RANK, alpha=ALPHA, dropout=0.0, key=False, projection=False, mlp=False))
    mark_only_lora_as_trainable(model)
    start = load_file(args.work_dir / "lora.safetensors")
    with torch.no_grad():
        for layer, block in enumerate(model.transformer.h):
            block.attn.q.lora_A.copy_(start[f"{layer}.query"])
            block.attn.v.lora_A.copy_(start[f"{layer}.value"])

    def micro_batch_loss(records: list[Record], setting: str, trained: int) -> torch.Tensor:
        pairs = [(torch.tensor(record.ids), torch.tensor(record.trained)) for record in records]
        idx, layout = Layout.end_to_end(pairs, share_prefixes=setting == "shared")
        return model(idx, layout=layout) / trained

    model.train()
    return trainer(args, [param for param in model.parameters() if param.requires_grad], micro_batch_loss)


def decode(args: argparse.Namespace) -> Callable[[dict], dict]:
    model = load_model(args.checkpoint_dir, torch.float32)

    def continued(prompt: torch.Tensor, new_tokens: int, setting: str) -> torch.Tensor:
        return generate(model, prompt, len(prompt) + new_tokens, temperature=0.0)[len(prompt) :]

    return decoder(continued)


if __name__ == "__main__":
    serve({"lora": lora, "decode": decode}, [])
