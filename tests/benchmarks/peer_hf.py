"""transformers, with peft for LoRA. Three ways to train, of which the benchmark takes the fastest:

trainer: what `Trainer` does with padding and `train_sampling_strategy="group_by_length"`: attention mask, all logits.
lean:    as trainer, but no mask (padding is on the right, where causal attention never looks), logits at targets only.
flat:    records laid end to end as by `DataCollatorWithFlattening`, logits only at the targets.
"""

import argparse
from collections.abc import Callable

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import AutoModelForCausalLM
from worker import ALPHA, RANK, Record, decoder, padded, serve, trainer


def load(args: argparse.Namespace) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(args.checkpoint_dir, dtype=torch.float32, attn_implementation="sdpa")


def lora(args: argparse.Namespace) -> Callable[[dict], dict]:
    settings = LoraConfig(
        r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"
    )
    model = get_peft_model(load(args), settings).train()
    start = load_file(args.work_dir / "lora.safetensors")
    with torch.no_grad():
        for layer, block in enumerate(model.get_base_model().model.layers):
            block.self_attn.q_proj.lora_A["default"].weight.copy_(start[f"{layer}.query"])
            block.self_attn.v_proj.lora_A["default"].weight.copy_(start[f"{layer}.value"])

    def micro_batch_loss(records: list[Record], setting: str, trained: int) -> torch.Tensor:
        if setting == "flat":
            ids = torch.tensor([[token for record in records for token in record.ids]])
            targets = torch.tensor([[flag for record in records for flag in record.targets()]])
            inputs = {"position_ids": torch.cat([torch.arange(len(record.ids)) for record in records])[None]}
        else:
            ids, targets, present = padded(records)
            inputs = {"attention_mask": present} if setting == "trainer" else {}
        if setting == "trainer":
            labels = F.pad(ids[:, 1:].masked_fill(~targets[:, :-1], -100), (1, 0), value=-100)
            return model(ids, labels=labels, num_items_in_batch=trained, use_cache=False, **inputs).loss
        logits = model(ids, logits_to_keep=targets, use_cache=False, **inputs).logits  # (N, vocabulary)
        return F.cross_entropy(logits.flatten(0, -2), ids.roll(-1, 1)[targets], reduction="sum") / trained

    params = [param for param in model.parameters() if param.requires_grad]
    return trainer(args, params, micro_batch_loss, sorting=("trainer", "lean"))


def decode(args: argparse.Namespace) -> Callable[[dict], dict]:
    model = load(args).eval()
    model.generation_config.eos_token_id = None  # no early stop
    caches = {"dynamic": {}, "static": {"cache_implementation": "static"}}

    def generate(prompt: torch.Tensor, new_tokens: int, setting: str) -> torch.Tensor:
        kwargs = {"max_new_tokens": new_tokens, "do_sample": False, **caches[setting]}
        return model.generate(prompt[None], attention_mask=torch.ones_like(prompt)[None], **kwargs)[0, len(prompt) :]

    return decoder(generate)


if __name__ == "__main__":
    serve({"lora": lora, "decode": decode}, ["transformers", "peft"])
