"""transformers, with peft for LoRA and bitsandbytes for 4 bits. Three ways to train, of which hf takes the fastest:

trainer: what `Trainer` does with padding and `train_sampling_strategy="group_by_length"`: attention mask, all logits.
lean:    as trainer, but no mask (padding is on the right, where causal attention never looks), logits at targets only.
flat:    records laid end to end as by `DataCollatorWithFlattening`, logits only at the targets.
"""

import argparse
from collections.abc import Callable
from typing import Any

import torch
from operations import LLAMA_8B, counter
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig
from worker import ALPHA, RANK, Record, adamw, decoder, in_slices, optimizer_steps, padded, read_records, serve

LORA = LoraConfig(
    r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"
)
BY_LENGTH = ("trainer", "lean")  # where padding is saved by micro-batches of records of like length


def load(args: argparse.Namespace, **options: Any) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(
        args.checkpoint_dir, dtype=torch.float32, attn_implementation="sdpa", **options
    )


def lora(args: argparse.Namespace) -> Callable[[dict], dict]:
    return training(adapted(load(args), args), args)


def qlora(args: argparse.Namespace) -> Callable[[dict], dict]:
    codes = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.float32,
        bnb_4bit_use_double_quant=False,
    )
    base = load(args, quantization_config=codes, device_map={"": "cpu"})
    base = prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
    return training(adapted(base, args), args)


def full(args: argparse.Namespace) -> Callable[[dict], dict]:
    return training(load(args), args)


def adapted(base: torch.nn.Module, args: argparse.Namespace) -> torch.nn.Module:
    """LoRA on queries and values, with the A that all programs begin with."""
    model = get_peft_model(base, LORA)
    start = load_file(args.work_dir / "lora.safetensors")
    with torch.no_grad():
        for layer, block in enumerate(model.get_base_model().model.layers):
            block.self_attn.q_proj.lora_A["default"].weight.copy_(start[f"{layer}.query"])
            block.self_attn.v_proj.lora_A["default"].weight.copy_(start[f"{layer}.value"])
    return model


def training(model: torch.nn.Module, args: argparse.Namespace) -> Callable[[dict], dict]:
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

    model.train()
    micro_batches = in_slices(read_records(args.work_dir / "records.jsonl"), by_length=BY_LENGTH)
    return optimizer_steps(args, adamw(model, args.task), micro_batches, micro_batch_loss)


def operations(args: argparse.Namespace) -> Callable[[dict], dict]:
    """LoRA on Llama 3.1 8B without contents."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            LlamaConfig(**LLAMA_8B), dtype=torch.bfloat16, attn_implementation="sdpa"
        )
        model = get_peft_model(model, LORA).train()

    def micro_batch_loss(records: list[Record], setting: str, trained: int) -> torch.Tensor:
        if setting == "flat":
            ids = torch.tensor([[token for record in records for token in record.ids]])
            targets = torch.tensor([[flag for record in records for flag in record.targets()]])
        else:
            ids, targets, _ = padded(records)
        # the mask that the model would make itself, for which it reads positions or padding
        T = ids.size(1)
        mask = torch.ones(len(ids), 1, T, T, dtype=torch.bool, device="meta")
        if setting == "trainer":
            labels = ids.to("meta")
            outputs = model(
                ids.to("meta"), labels=labels, attention_mask=mask, num_items_in_batch=trained, use_cache=False
            )
            return outputs.loss
        # logits_to_keep=targets: which they are, cannot be read from a tensor without contents
        llama = model.get_base_model()
        hidden = llama.model(ids.to("meta"), attention_mask=mask, use_cache=False).last_hidden_state
        rows, columns = targets.nonzero(as_tuple=True)
        logits = llama.lm_head(hidden[rows.to("meta"), columns.to("meta")])  # (N, vocabulary)
        return F.cross_entropy(logits, ids.roll(-1, 1)[targets].to("meta"), reduction="sum") / trained

    micro_batches = in_slices(read_records(args.work_dir / "records.jsonl"), by_length=BY_LENGTH)
    return counter(args, model, micro_batches, micro_batch_loss)


def decode(args: argparse.Namespace) -> Callable[[dict], dict]:
    model = load(args).eval()
    model.generation_config.eos_token_id = None  # no early stop
    caches = {"dynamic": {}, "static": {"cache_implementation": "static"}}

    def generate(prompt: torch.Tensor, new_tokens: int, setting: str) -> torch.Tensor:
        kwargs = {"max_new_tokens": new_tokens, "do_sample": False, **caches[setting]}
        return model.generate(prompt[None], attention_mask=torch.ones_like(prompt)[None], **kwargs)[0, len(prompt) :]

    return decoder(generate)


if __name__ == "__main__":
    serve(
        {"lora": lora, "qlora": qlora, "full": full, "operations": operations, "decode": decode},
        ["transformers", "peft"],
    )
