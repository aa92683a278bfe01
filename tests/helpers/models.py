"""Shared by several test files."""

import json
from pathlib import Path

import torch

from lit_gpt import GPT, Config

SIZES = dict(
    vocab_size=97, hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=6,
    num_key_value_heads=2, max_position_embeddings=128, bos_token_id=None, eos_token_id=None,
)  # fmt: skip


def make_checkpoint(folder: Path, **changes) -> Path:
    """A Llama whose every parameter is random: transformers starts biases at zero and norms at one."""
    from transformers import LlamaConfig, LlamaForCausalLM

    old = {key: changes.pop(key) for key in ("rope_theta", "rope_scaling") if key in changes}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES | changes))
    for param in model.parameters():
        torch.nn.init.normal_(param, mean=float(param.dim() == 1), std=0.2)
    model.save_pretrained(folder)
    if old:
        edit_config(folder, {"rope_parameters": None} | old)
    return folder


def edit_config(folder: Path, changes: dict) -> None:
    """None removes a key, but for rope_scaling, where real files say null."""
    hf = json.loads((folder / "config.json").read_text()) | changes
    hf = {key: value for key, value in hf.items() if value is not None or key == "rope_scaling"}
    (folder / "config.json").write_text(json.dumps(hf))


def reference(folder: Path, dtype: torch.dtype = torch.float32):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, as a share of the largest entry."""
    return ((got - expected).abs().max() / expected.abs().max()).item()


def cached(model: GPT, idx: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    """The logits of all of idx, computed in pieces of these sizes."""
    model.max_seq_length = idx.size(1)
    model.set_kv_cache(batch_size=idx.size(0))
    steps = torch.arange(idx.size(1), device=idx.device).split(sizes)
    logits = torch.cat([model(idx[:, pos], pos) for pos in steps], dim=1)
    model.clear_kv_cache()
    return logits


def small_gpt(**changes) -> GPT:
    """A float64 model, so that a difference of 1e-10 is a mistake and no rounding."""
    torch.manual_seed(0)
    settings = dict(vocab_size=50, block_size=300, n_layer=2, n_head=4, n_query_groups=2, n_embd=32)
    model = GPT(Config(**settings | dict(intermediate_size=48) | changes)).double()
    for param in model.parameters():
        torch.nn.init.normal_(param, mean=float(param.dim() == 1), std=0.3)
    return model


def make_record(length: int, n_trained: int, start: tuple[int, ...] = ()) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.cat((torch.tensor(start).long(), torch.randint(0, 50, (length - len(start),))))
    return ids, torch.arange(length) >= length - n_trained
