"""One optimizer step of QLoRA on a model of the shape of Llama 2 7B, with random weights: what it takes.

    MALLOC_MMAP_THRESHOLD_=65536 python tests/benchmarks/qlora_7b_step.py
    MALLOC_MMAP_THRESHOLD_=65536 python tests/benchmarks/qlora_7b_step.py --n_layer 2    # a try
    python tests/benchmarks/qlora_7b_step.py --tokens 1304                               # on a GPU: bf16-true

LoRA of rank 8 on query and value, micro-batch 1, all tokens trained, the activations of every block computed again in
backward. The linears are quantized one after the other, as in loading a checkpoint; embedding, head and norms stay in
float32 on a CPU, in bfloat16 on a GPU that has it. The variable lets malloc return what is freed, so that the peak is
what was in use.
"""

import argparse
import threading
import time
from pathlib import Path

import torch

from lit_gpt import GPT, Config
from lit_gpt.checkpoint.load import build_model
from lit_gpt.device import default_device, peak_memory_gb, weight_dtype
from lit_gpt.lora import LoRA, apply_lora, mark_only_lora_as_trainable
from lit_gpt.make_optimizer import make_optimizer
from lit_gpt.model.activation_checkpointing import recompute_blocks
from lit_gpt.model.packing import Layout
from lit_gpt.quantize import Quantize, QuantizedLinear, quantize_linears
from lit_gpt.train import TrainArgs


def random_model(config: Config, kind: Quantize, device: torch.device, dtype: torch.dtype) -> GPT:
    """A quantized model of this shape; its weights are normally distributed, those of norms are one."""
    model = build_model(config)
    quantize_linears(model, kind)
    for module in model.modules():
        # one weight at a time is whole
        if isinstance(module, QuantizedLinear):
            weight = torch.randn(module.out_features, module.in_features, device=device)
            module.load_weight(weight.mul_(0.02))
            continue
        for name, param in module.named_parameters(recurse=False):
            if param.ndim == 1:
                value = torch.ones(param.shape)
            else:
                value = torch.randn(param.shape).mul_(0.02)
            setattr(module, name, torch.nn.Parameter(value.to(device, dtype), requires_grad=False))
    return model.to(device)


class UniqueMemory(threading.Thread):
    """Watches this process's unique set size: its pages that no other process shares, in bytes."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak = 0
        self.done = threading.Event()

    @staticmethod
    def now() -> int:
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
        private = [line for line in lines if line.startswith("Private_")]
        return sum(1024 * int(line.split()[1]) for line in private)

    def run(self) -> None:
        while not self.done.wait(0.1):
            self.peak = max(self.peak, self.now())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--n_layer", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--quantize", default="bnb.nf4")
    parser.add_argument("--name", default="meta-llama/Llama-2-7b-hf")
    args = parser.parse_args()

    # the model
    torch.manual_seed(0)
    device = default_device()
    dtype = weight_dtype("auto")
    imported = peak_memory_gb(device)
    unique = UniqueMemory()
    unique.start()
    since = time.perf_counter()
    config = Config.from_name(args.name, n_layer=args.n_layer)
    model = random_model(config, args.quantize, device, dtype)
    apply_lora(model, LoRA(r=8, alpha=16, key=False, projection=False, mlp=False))
    mark_only_lora_as_trainable(model)
    recompute_blocks(model, "block")
    optimizer = make_optimizer(model, TrainArgs())
    seconds = time.perf_counter() - since
    params = [param for param in model.parameters() if param.requires_grad]
    n_trained = sum(param.numel() for param in params)
    gb = sum(param.nbytes for param in model.parameters()) / 1e9
    print(
        f"{args.name}, {args.n_layer} layers in {args.quantize}, {str(dtype)[6:]} on {device}: {gb:.2f} GB,"
        f" {n_trained:,} parameters to train. Quantized in {seconds:.0f} s.",
        flush=True,
    )
    print(f"loaded  {peak_memory_gb(device):6.2f} GB at most, of which {imported:.2f} GB before the model", flush=True)

    # a step
    idx = torch.randint(model.config.vocab_size, (args.tokens,))
    idx, layout = Layout.end_to_end([(idx, torch.ones_like(idx))])
    idx = idx.to(device)
    layout = layout.to(device)
    began = time.perf_counter()
    loss = model(idx, layout=layout) / layout.n_targets
    print(f"loss    {loss.item():.4f}", flush=True)  # waits for the device
    forward_ended = time.perf_counter()
    loss.backward()
    backward_ended = time.perf_counter()
    optimizer.step()
    ended = time.perf_counter()
    norm = torch.nn.utils.get_total_norm([param.grad for param in params]).item()
    unique.done.set()
    unique.join()

    # what it took
    print(
        f"step    {ended - began:.1f} s: forward {forward_ended - began:.1f},"
        f" backward {backward_ended - forward_ended:.1f}, update {ended - backward_ended:.1f};"
        f" {args.tokens} tokens, norm of the gradient {norm:.3f}"
    )
    print(f"peak    {peak_memory_gb(device):6.2f} GB; unique to this process {unique.peak / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
