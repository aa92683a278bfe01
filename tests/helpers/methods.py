"""A run of every method, by its script, on a tiny model; and the models that such a run begins with."""

from pathlib import Path
from typing import Any

import torch

from helpers.scripts import script
from lit_gpt import GPT
from lit_gpt.adapter import (
    Adapter,
    apply_adapter,
    apply_adapter_v2,
    mark_only_adapter_as_trainable,
    mark_only_adapter_v2_as_trainable,
)
from lit_gpt.checkpoint.load import build_model, load_weights
from lit_gpt.config import Config
from lit_gpt.full import Full, mark_chosen_as_trainable
from lit_gpt.lora import LoRA, apply_lora, mark_only_lora_as_trainable
from lit_gpt.quantize import quantize_linears
from lit_gpt.train import TrainArgs

TRAIN = TrainArgs(
    learning_rate=0.02,
    global_batch_size=4,
    micro_batch_size=4,
    max_steps=4,
    warmup_steps=1,
    eval_interval=2,
    save_interval=2,
)
PROMPTS = Adapter(prompt_length=3, start_layer=1)

# the name of a run -> its flags. The first word of the name is that of the script in finetune/
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"lora": LoRA(mlp=True)},
    "lora nf4": {"lora": LoRA(mlp=True), "quantize": "bnb.nf4"},
    "lora int8": {"lora": LoRA(mlp=True), "quantize": "bnb.int8"},
    "adapter": {"adapter": PROMPTS},
    "adapter nf4": {"adapter": PROMPTS, "quantize": "bnb.nf4"},
    "adapter_v2": {"adapter": PROMPTS},
    "adapter_v2 nf4-dq": {"adapter": PROMPTS, "quantize": "bnb.nf4-dq"},
    "full": {},
    "full last": {"train_only": 1},
    "full pattern": {"train_only": ["transformer.h.0.mlp", "transformer.h.1.norm_1.weight"]},
}


def finetune(name: str, tiny_dir: Path, data_dir: Path, out_dir: Path, train: TrainArgs = TRAIN, **flags: Any) -> None:
    """The run of METHODS with this name, by its script's `main`; `flags` come on top."""
    main = script(f"finetune/{name.split()[0]}.py").main
    settings = METHODS[name] | dict(n_answers=0, precision="32-true") | flags
    main(checkpoint_dir=tiny_dir, data_dir=data_dir, out_dir=out_dir, train=train, **settings)


def unmoved(name: str, tiny_dir: Path) -> GPT:
    """The model of a method before its first step, with the random numbers that its script began with."""
    torch.manual_seed(1337)
    model = build_model(Config.from_checkpoint(tiny_dir))
    settings = METHODS[name]
    quantize_linears(model, settings.get("quantize"))
    load_weights(model, tiny_dir)
    surgeons = {"lora": apply_lora, "adapter": apply_adapter, "adapter_v2": apply_adapter_v2}
    if surgeon := surgeons.get(name.split()[0]):
        surgeon(model, settings.get("lora") or settings["adapter"])
    return model


def exact(name: str, tiny_dir: Path) -> GPT:
    """The model of a method in float64, ready to train, with nothing at zero that would hide a gradient."""
    model = unmoved(name, tiny_dir)
    marks = {
        "lora": mark_only_lora_as_trainable,
        "adapter": mark_only_adapter_as_trainable,
        "adapter_v2": mark_only_adapter_v2_as_trainable,
    }
    if name.startswith("full"):
        mark_chosen_as_trainable(model, Full(**METHODS[name]))
    else:
        marks[name.split()[0]](model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, param in model.double().named_parameters():
            if key.endswith(("lora_B", "adapter_gate", "adapter_bias")):
                param.add_(0.1 * torch.randn(param.shape, generator=generator, dtype=param.dtype))
    return model
