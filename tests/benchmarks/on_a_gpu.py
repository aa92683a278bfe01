"""Speed and memory on one GPU, beside transformers with peft, with and without liger: one run of nine minutes.

    PYTHON=.venv/bin/python bash scripts/pack_for_gpu.sh     # once, where there is a network
    PYTHONPATH=$PWD:$PWD/.gpu/site python3 tests/benchmarks/on_a_gpu.py --deadline 520
    PYTHONPATH=$PWD:$PWD/.gpu/site python3 tests/benchmarks/on_a_gpu.py --only 8,11      # some sections again
    PYTHONPATH=$PWD .venv/bin/python tests/benchmarks/on_a_gpu.py --device cpu --tiny    # a rehearsal without a GPU

Each figure is a line of $OUT/results.jsonl (OUT is out/on_a_gpu by default) as soon as it is known; a table comes last.

All programs have the same weights, which are random, the same records, and the same A of LoRA. A short record has 60 to
250 tokens: the first 30 are the same in all, and the second half is trained. All tokens of a long record are trained.
Every step has records of its own, hence new lengths. Tokens per second count tokens of records and no padding, and so
does MFU, the share of the speed of a large matrix product. transformers gets the records of a step sorted by length,
padded on the right, where causal attention needs no mask, and computes the loss from labels. Attention by cuDNN, which
plans anew for each shape, is off for all programs but in section 6.

    short x 16     kind of records, and how many a micro-batch has; apart: ours does not share their first tokens
    tok/s, ms      the median of five steps after two others, and how long one takes
    loss, norm     of the first step and its gradient; loss_off, norm_off: the relative difference to the program before
    GB, reserved   the peak, and what the allocator held; planned: the peak by lit_gpt/memory/plan.py
    GB_copied      by a step from the host, where blocks are streamed; GB/s: that by the time of the step
"""

import argparse
import gc
import json
import math
import os
import shutil
import statistics
import subprocess
import tempfile
import time
import traceback
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from lit_gpt import GPT, Config
from lit_gpt.checkpoint.load import build_model, parameter_shapes, replace_parameter
from lit_gpt.checkpoint.tensor_names import hf_name
from lit_gpt.data.dataset import NEEDED, OTHER, TRAIN, Dataset, micro_batches, step_records
from lit_gpt.device import CopyStream, host_buffer
from lit_gpt.fast_linears import prepare_for_answers
from lit_gpt.generate.decode import generate
from lit_gpt.generate.engine import Engine, Request
from lit_gpt.lora import LoRA, LoRALinear, apply_lora, mark_only_lora_as_trainable
from lit_gpt.make_optimizer import make_optimizer
from lit_gpt.memory.plan import OUTSIDE_GB, Setup, plan
from lit_gpt.model.activation_checkpointing import ActivationCheckpointing
from lit_gpt.quantize import Quantize, QuantizedLinear, frozen_parameter, quantize_linears
from lit_gpt.recipe import LaunchArgs, recompute_or_compile_blocks
from lit_gpt.stream_blocks import stream_of
from lit_gpt.train import TrainArgs

PLANS = Path(".gpu/plans.json")
MODELS = {
    "0.6B": "Qwen/Qwen3-0.6B",
    "1B": "meta-llama/Llama-3.2-1B",
    "8B": "meta-llama/Llama-3.1-8B",
    "32B": "Qwen/Qwen3-32B",
    "70B": "meta-llama/Llama-3.3-70B-Instruct",
}
TINY = dict(n_layer=4, n_embd=64, n_head=4, n_query_groups=2, head_size=16, intermediate_size=128, vocab_size=512)
WARM_UP = 2
TIMED = 5

QUERY_VALUE = LoRA(r=8, alpha=16, key=False, projection=False, mlp=False)
ALL_LINEARS = LoRA(r=16, alpha=32)  # as in NeMo's benchmark
PEFT_NAMES = {
    "query": ["q_proj"],
    "key": ["k_proj"],
    "value": ["v_proj"],
    "projection": ["o_proj"],
    "mlp": ["gate_proj", "up_proj", "down_proj"],
}


@dataclass(frozen=True)
class Work:
    """The records of an optimizer step."""

    kind: str
    shortest: int
    longest: int
    records: int
    """Records of a step."""
    micro_batch: int
    """Records of a forward pass."""
    prefix: int = 0
    """Tokens that all records begin with."""
    trained_share: float = 1.0

    @property
    def name(self) -> str:
        return f"{self.kind} x {self.micro_batch}"

    def tiny(self) -> "Work":
        """For a rehearsal: the same kind of records, but few and short."""
        shrink = 8 if self.prefix else 64
        return replace(
            self,
            shortest=self.shortest // shrink,
            longest=self.longest // shrink,
            records=max(1, self.records // 8),
            micro_batch=max(1, self.micro_batch // 8),
            prefix=self.prefix // shrink,
        )


SHORT = Work("short", 60, 250, records=64, micro_batch=16, prefix=30, trained_share=0.5)
SHORT_64 = replace(SHORT, micro_batch=64)
SHORT_8 = replace(SHORT, records=32, micro_batch=8)
SHORT_FEW = replace(SHORT, records=16)
LONG_2K = Work("2,048", 2048, 2048, records=8, micro_batch=4)
LONG_4K = Work("4,096", 4096, 4096, records=2, micro_batch=1)
LONG_8K = replace(LONG_4K, micro_batch=2)
# one micro-batch a step, for which streamed blocks are copied twice
ONE_2K = Work("2,048", 2048, 2048, records=1, micro_batch=1)
ONE_4K = replace(ONE_2K, records=2, micro_batch=2)
ONE_8K = replace(ONE_2K, records=4, micro_batch=4)

# what is planned beforehand, since a plan of an 8B model takes some seconds: prefixes are apart in it
PLANNED: list[tuple[str, LoRA, Quantize | None, Work]] = [
    ("1B", QUERY_VALUE, None, SHORT),
    ("1B", QUERY_VALUE, None, LONG_2K),
    ("8B", QUERY_VALUE, None, SHORT),
    ("8B", QUERY_VALUE, None, SHORT_64),
    ("8B", QUERY_VALUE, None, LONG_4K),
    ("8B", ALL_LINEARS, None, LONG_4K),
    ("8B", QUERY_VALUE, "bnb.nf4", SHORT_8),
    ("8B", QUERY_VALUE, "bnb.nf4", LONG_8K),
    ("0.6B", ALL_LINEARS, None, SHORT),
    ("0.6B", ALL_LINEARS, None, LONG_2K),
    ("32B", LoRA(), "bnb.nf4-dq", SHORT_8),
]
PLANNED_STREAMED: list[tuple[str, LoRA, Quantize | None, Work]] = [
    ("8B", ALL_LINEARS, "bnb.nf4", ONE_2K),
    ("8B", ALL_LINEARS, "bnb.nf4", ONE_8K),
    ("70B", LoRA(), "bnb.nf4-dq", ONE_2K),
    ("70B", LoRA(), "bnb.nf4-dq", ONE_4K),
]


class OutOfTime(Exception):
    """The deadline has passed."""


class Bench:
    """What all sections share: the device, the records, the clock and the results."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self.began = time.perf_counter() - time.process_time()  # the imports count, too
        self.deadline = args.deadline
        self.tiny = args.tiny
        self.device = torch.device(args.device)
        self.is_cuda = self.device.type == "cuda"
        self.dtype = torch.bfloat16 if self.is_cuda else torch.float32
        self.card = torch.cuda.get_device_name() if self.is_cuda else "CPU"
        self.folder = folder
        self.section = 0
        self.product_rate = 790e12  # until section 0 has measured it
        self.first_steps: dict[str, tuple[float, float]] = {}  # loss and norm of the first program
        self.plans = json.loads(PLANS.read_text()) if PLANS.is_file() and not args.tiny else {}
        self.out_dir = Path(os.environ.get("OUT", "out/on_a_gpu"))
        self.out_dir.mkdir(parents=True, exist_ok=True)
        self.results = open(self.out_dir / "results.jsonl", "a")
        self.table: list[str] = []

    # ---- results

    def add(self, what: str, **figures: Any) -> None:
        """A result: a line on the screen and in the table, and one of JSON."""
        rounded = {key: float(f"{value:.6g}") if isinstance(value, float) else value for key, value in figures.items()}
        line = json.dumps({"section": self.section, "card": self.card, "what": what} | rounded)
        self.results.write(line + "\n")
        self.results.flush()
        texts = [f"{key} {as_text(value)}" for key, value in figures.items() if value is not None and key != "all"]
        row = f"{self.section:>2}  {what:<38} {', '.join(texts)}"
        self.table.append(row)
        print(row, flush=True)

    def seconds(self) -> float:
        """Since the start."""
        return time.perf_counter() - self.began

    def attempt(self, what: str, measure: Callable[..., None], *args: Any, **options: Any) -> None:
        """Calls `measure`; that it fails is a result, too. The memory of the one before is freed first."""
        self.free()
        try:
            if self.seconds() > self.deadline:
                raise OutOfTime
            if self.memory().get("GB", 0) > 0.5:
                self.add(what, left_over_GB=self.memory()["GB"])
            measure(self, what, *args, **options)
        except OutOfTime:
            self.add(what, failed="no time left")
        except torch.OutOfMemoryError:
            self.add(what, failed="out of memory")
        except Exception as error:
            traceback.print_exc()
            self.add(what, failed=f"{type(error).__name__}: {str(error)[:150]}")

    # ---- the device

    def wait(self) -> None:
        """Until the device has done all that it was asked for."""
        if self.is_cuda:
            torch.cuda.synchronize()

    def free(self) -> None:
        """Gives back what nobody uses, and counts the peak anew."""
        gc.collect()  # wrapped methods of models are cycles
        if self.is_cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def memory(self) -> dict[str, float]:
        """The peak since `free`, in GB."""
        if not self.is_cuda:
            return {}
        return {"GB": torch.cuda.max_memory_allocated() / 1e9, "reserved": torch.cuda.max_memory_reserved() / 1e9}

    def time(self, function: Callable[[], Any]) -> float:
        """Seconds of a call, to the end of what it asks of the device."""
        self.wait()
        since = time.perf_counter()
        function()
        self.wait()
        return time.perf_counter() - since

    def rate(self, function: Callable[[], Any], n_calls: int = 10) -> float:
        """Calls a second: the median of five times `n_calls` in a row."""

        def several() -> None:
            for _ in range(n_calls):
                function()

        several()
        return n_calls / statistics.median(self.time(several) for _ in range(5))

    # ---- models and records

    def sized(self, work: Work) -> Work:
        return work.tiny() if self.tiny else work

    def config(self, model: str) -> Config:
        return Config.from_name(MODELS[model], **(TINY if self.tiny else {}))

    def weight(self, name: str, shape: Sequence[int]) -> torch.Tensor:
        """The weight of that name in Hugging Face's checkpoint: the same in every program. A norm's is one."""
        weight = torch.empty(shape, dtype=self.dtype, device=self.device)
        if weight.ndim == 1:
            return weight.fill_(1)
        seed = zlib.crc32(name.encode())
        return weight.normal_(0, 0.02, generator=torch.Generator(self.device).manual_seed(seed))

    def lora_A(self, linear: str, shape: Sequence[int]) -> torch.Tensor:
        """Where A of the linear of that name in Hugging Face's checkpoint begins, in float32."""
        seed = zlib.crc32(f"{linear}.lora_A".encode())
        bound = shape[1] ** -0.5
        A = torch.empty(shape, device=self.device)
        return A.uniform_(-bound, bound, generator=torch.Generator(self.device).manual_seed(seed))

    def records(self, work: Work, config: Config) -> Dataset:
        """Random records, enough for steps that are all different."""
        folder = self.folder / f"{work.shortest}-{work.records}-{config.vocab_size}"
        if not folder.is_dir():
            write_records(folder, work, config.vocab_size)
        return Dataset(folder, "train")


def as_text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return str(value)


def write_records(folder: Path, work: Work, vocab_size: int) -> None:
    """A prepared folder of random tokens, as lit_gpt/data/dataset.py draws it."""
    folder.mkdir(parents=True)
    chance = np.random.default_rng(1)
    lengths = chance.integers(work.shortest, work.longest + 1, work.records * (WARM_UP + TIMED))
    ends = np.cumsum(lengths)
    tokens = chance.integers(0, vocab_size, ends[-1], dtype=np.uint32)
    trained = np.zeros(ends[-1], np.uint8)
    for end, length in zip(ends, lengths):
        start = end - length
        tokens[start : start + work.prefix] = np.arange(work.prefix)
        trained[end - int(work.trained_share * length) : end] = OTHER

    tokens.tofile(folder / "tokens.bin")
    trained.tofile(folder / "trained.bin")
    ends.astype(np.int64).tofile(folder / "ends.bin")
    np.full(len(ends), TRAIN, np.uint8).tofile(folder / "split.bin")
    meta = dict.fromkeys(NEEDED, "") | {"tokens_dtype": "uint32", "n_tokens": len(tokens), "n_records": len(ends)}
    (folder / "meta.json").write_text(json.dumps(meta))


def their_update(params: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> float:
    """Clips the gradient, takes the step, and returns the norm that the gradient had."""
    norm = nn.utils.clip_grad_norm_(params, 1.0).item()
    optimizer.step()
    optimizer.zero_grad()
    return norm


# ---- our program


def our_model(bench: Bench, config: Config, quantize: Quantize | None = None) -> GPT:
    """A model with random weights, made on the device, one at a time: as `load_weights` fills one."""
    model = build_model(config)
    quantize_linears(model, quantize)
    for name, shape in parameter_shapes(config).items():
        their_name, _ = hf_name(name, config)
        replace_parameter(model, name, bench.weight(their_name, shape), bench.dtype)
    if config.tie_embeddings:
        model.lm_head.weight = model.transformer.wte.weight
    return model.to(bench.device)  # the rotary frequencies


def model_of_random_codes(bench: Bench, config: Config, quantize: Quantize | None) -> GPT:
    """As `our_model`, but codes are random bytes and no weight is quantized: the blocks of a 70B take half a minute.

    They lie in the host's memory, as `load_weights` leaves them for streaming.
    """
    model = build_model(config)
    quantize_linears(model, quantize)
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            for name, (shape, dtype) in module.layout().items():
                setattr(module, name, frozen_parameter(random_part(bench, name, shape, dtype).cpu()))
    for name, param in list(model.named_parameters()):
        if param.is_meta:
            their_name, _ = hf_name(name, config)
            replace_parameter(model, name, bench.weight(their_name, param.shape), bench.dtype)
    model.ropes.to(bench.device)
    return model


def random_part(bench: Bench, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Codes or scales as `QuantizedLinear.layout` names them: those of 4 bits stand for weights of 0.02 or so."""
    if not dtype.is_floating_point:
        return torch.randint(0, 127, shape, dtype=dtype, device=bench.device)
    # a weight is the value of its code, up to 1, times mean + value of the scale's code * scale_scales
    values = {"scale_mean": 0.04, "scale_scales": 0.01, "scale_values": 1.0, "scales": 0.04}
    return torch.full(shape, values[name], device=bench.device)


class Ours:
    """Our model with LoRA, and the optimizer step of `fit` in lit_gpt/train.py, with all that the host does for it."""

    def __init__(
        self,
        bench: Bench,
        config: Config,
        lora: LoRA = QUERY_VALUE,
        quantize: Quantize | None = None,
        compiled: bool = False,
        recompute: ActivationCheckpointing = "none",
        stream: bool = False,
        build: Callable[[Bench, Config, Quantize | None], GPT] = our_model,
    ) -> None:
        self.bench = bench
        self.config = config
        self.share_prefixes = True
        self.prepared: dict[Any, Any] = {}
        self.model = build(bench, config, quantize)
        apply_lora(self.model, lora)
        mark_only_lora_as_trainable(self.model)
        args = LaunchArgs(compile=compiled, activation_checkpointing=recompute)
        recompute_or_compile_blocks(self.model, args, stream_to=bench.device if stream else None)
        self.model.train()
        self.params = [param for param in self.model.parameters() if param.requires_grad]
        self.start()

    @torch.no_grad()
    def start(self) -> None:
        """Begins training anew."""
        for name, module in self.model.named_modules():
            if isinstance(module, LoRALinear):
                their_name, _ = hf_name(f"{name}.weight", self.config)
                module.lora_A.copy_(self.bench.lora_A(their_name, module.lora_A.shape))
                module.lora_B.zero_()
        self.optimizer = make_optimizer(self.model, TrainArgs())

    def step(
        self, data: Dataset, records: Sequence[int], micro_batch: int, next_records: Sequence[int]
    ) -> tuple[float, float]:
        """The loss, and the norm of the gradient."""
        device = self.bench.device
        batches = self.prepare(data, records, micro_batch)
        n_targets = sum(data.n_targets(i) for i in records)
        total = torch.zeros((), device=device)
        for idx, layout in batches:
            part = self.model(idx.to(device, non_blocking=True), layout=layout.to(device)) / n_targets
            part.backward()
            total += part.detach()

        # while the device is at work
        self.prepared.clear()
        self.prepare(data, next_records, micro_batch)

        norm = nn.utils.clip_grad_norm_(self.params, 1.0)
        loss, norm = torch.stack((total, norm)).tolist()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss, norm

    def prepare(self, data: Dataset, records: Sequence[int], micro_batch: int) -> Any:
        """The micro-batches of a step, made once."""
        key = (tuple(records), micro_batch, self.share_prefixes)
        if key not in self.prepared:
            self.prepared[key] = micro_batches(data, records, micro_batch, share_prefixes=self.share_prefixes)
        return self.prepared[key]


# ---- transformers with peft


def their_config(config: Config) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.n_embd,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.n_layer,
        num_attention_heads=config.n_head,
        num_key_value_heads=config.n_query_groups,
        head_dim=config.head_size,
        max_position_embeddings=config.block_size,
        rms_norm_eps=config.norm_eps,
        rope_parameters={"rope_theta": float(config.rope_base), **config.rope_scaling},
        tie_word_embeddings=config.tie_embeddings,
    )


def their_model(bench: Bench, config: Config, quantize: Quantize | None = None) -> nn.Module:
    """The Llama of transformers with our weights, made on the device, one at a time. `quantize` is nf4 or None."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            their_config(config), dtype=bench.dtype, attn_implementation="sdpa"
        ).requires_grad_(False)

    # as when a checkpoint is loaded: bitsandbytes quantizes all linears but the head
    for path, module in list(model.named_modules()):
        is_linear = isinstance(module, nn.Linear) and path != "lm_head"
        if quantize and is_linear:
            weight = bench.weight(f"{path}.weight", module.weight.shape)
            model.set_submodule(path, linear_4bit(weight))
            continue
        for leaf, param in module.named_parameters(recurse=False):
            weight = bench.weight(f"{path}.{leaf}", param.shape)
            setattr(module, leaf, nn.Parameter(weight, requires_grad=False))
    if config.tie_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight

    model.is_loaded_in_4bit = quantize is not None  # by which peft knows
    # the rotary frequencies are in no checkpoint
    rotary_class = type(model.model.rotary_emb)
    model.model.rotary_emb = rotary_class(model.config).to(bench.device)
    return model


def linear_4bit(weight: torch.Tensor) -> nn.Module:
    """A linear of bitsandbytes with the nf4 codes of a weight (out, in)."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    settings: dict[str, Any] = {"compress_statistics": False, "quant_type": "nf4"}
    n_out, n_in = weight.shape
    linear = Linear4bit(n_in, n_out, bias=False, compute_dtype=weight.dtype, device="meta", **settings)
    codes = Params4bit(weight, requires_grad=False, module=linear, **settings)
    linear.weight = codes.to(weight.device)  # makes the codes
    return linear


class Theirs:
    """transformers' Llama with peft's LoRA, and the optimizer step of its Trainer."""

    def __init__(
        self,
        bench: Bench,
        config: Config,
        lora: LoRA = QUERY_VALUE,
        quantize: Quantize | None = None,
        float32_adapter: bool = False,
    ) -> None:
        from peft import LoraConfig, get_peft_model

        self.bench = bench
        self.with_mask = False
        names = [name for switch, names in PEFT_NAMES.items() if getattr(lora, switch) for name in names]
        settings = LoraConfig(
            r=lora.r, lora_alpha=lora.alpha, lora_dropout=0.0, target_modules=names, task_type="CAUSAL_LM"
        )
        base = their_model(bench, config, quantize)
        self.model = get_peft_model(base, settings, autocast_adapter_dtype=float32_adapter).train()
        self.params = [param for param in self.model.parameters() if param.requires_grad]
        if not float32_adapter:
            for param in self.params:  # peft leaves them in float32 beside codes
                param.data = param.data.to(bench.dtype)
        self.start()

    @torch.no_grad()
    def start(self) -> None:
        """Begins training anew."""
        for name, module in self.model.get_base_model().named_modules():
            if hasattr(module, "lora_A"):
                A = module.lora_A["default"].weight
                A.copy_(self.bench.lora_A(f"{name}.weight", A.shape))
                module.lora_B["default"].weight.zero_()
        settings = TrainArgs()
        self.optimizer = torch.optim.AdamW(
            self.params,
            lr=settings.learning_rate,
            betas=(settings.beta1, settings.beta2),
            weight_decay=settings.weight_decay,
            fused=self.bench.is_cuda,  # the Trainer's default
        )

    def step(
        self, data: Dataset, records: Sequence[int], micro_batch: int, next_records: Sequence[int]
    ) -> tuple[float, float]:
        """The loss, and the norm of the gradient."""
        device = self.bench.device
        by_length = sorted(records, key=data.length)
        n_targets = sum(data.n_targets(i) for i in records)
        total = torch.zeros((), device=device)
        for start in range(0, len(records), micro_batch):
            members = [data[i] for i in by_length[start : start + micro_batch]]
            ids = pad_sequence([ids for ids, _ in members], batch_first=True)
            labels = [ids.masked_fill(~trained, -100) for ids, trained in members]
            inputs = {"labels": pad_sequence(labels, batch_first=True, padding_value=-100)}
            if self.with_mask:
                present = [torch.ones_like(ids) for ids, _ in members]
                inputs["attention_mask"] = pad_sequence(present, batch_first=True)
            inputs = {key: value.to(device) for key, value in inputs.items()}
            part = self.model(ids.to(device), num_items_in_batch=n_targets, use_cache=False, **inputs).loss
            part.backward()
            total += part.detach()
        return total.item(), their_update(self.params, self.optimizer)


@contextmanager
def liger() -> Iterator[None]:
    """Models of transformers that are built and run in here have liger's kernels."""
    from liger_kernel.transformers import apply_liger_kernel_to_llama
    from transformers.models.llama import modeling_llama

    kept = dict(vars(modeling_llama))
    forward = modeling_llama.LlamaForCausalLM.forward
    apply_liger_kernel_to_llama()
    try:
        yield
    finally:
        vars(modeling_llama).update(kept)
        modeling_llama.LlamaForCausalLM.forward = forward


# ---- training


@dataclass(frozen=True)
class Case:
    """Records, and what is not as usual."""

    work: Work
    apart: bool = False
    """Ours: prefixes are not shared."""
    mask: bool = False
    """transformers: gets a mask of the padding."""


def operations_per_token(config: Config, work: Work, data: Dataset) -> float:
    """Of a training step of LoRA: forward and the gradient of the input, two each for every weight; and attention."""
    attention = config.head_size * config.n_embd * 2 * (config.n_head + config.n_query_groups)
    mlp = 3 * config.n_embd * config.intermediate_size
    head = config.n_embd * config.vocab_size
    lengths = data.lengths().astype(float)
    mean_length = (lengths**2).sum() / lengths.sum()  # of the record that a token is in
    scores = 4 * config.n_head * config.head_size * config.n_layer * mean_length / 2
    return 4 * config.n_layer * (attention + mlp) + 4 * head * work.trained_share + 3.5 * scores


def train(
    bench: Bench,
    what: str,
    program: Callable[..., Any],
    model: str,
    cases: list[Case],
    lora: LoRA = QUERY_VALUE,
    limit: float = math.inf,
    **options: Any,
) -> None:
    """Builds a program, `Ours` or `Theirs`, and measures it in each case for `limit` seconds at most."""
    config = bench.config(model)
    trainer = program(bench, config, lora, **options)
    for case in cases:
        trainer.share_prefixes = not case.apart
        trainer.with_mask = case.mask
        trainer.start()
        bench.free()
        label = f"{what}, {case.work.name}"
        if case.apart:
            label += " apart"
        if case.mask:
            label += " mask"
        quantize = options.get("quantize")
        stream = stream_of(trainer.model)
        copied_before = 0 if stream is None else stream.n_copied
        planned = bench.plans.get(plan_key(model, lora, quantize, case.work, stream is not None))
        try:
            figures = time_steps(bench, trainer, config, case.work, limit)
        except torch.OutOfMemoryError:
            trainer.optimizer.zero_grad()
            bench.add(label, failed="out of memory", **bench.memory(), planned=planned)
            continue

        # what a step copies: the first ones of a case, which warm up, copy as much as the others
        if stream is not None:
            copied = (stream.n_copied - copied_before) / len(figures["all"])
            figures["GB_copied"] = copied / 1e9
            figures["GB/s"] = copied / 1e6 / figures["ms"]

        # the first program's loss and gradient are what those of the others are compared with
        same = f"{model} {quantize} {lora.r} {case.work.kind} {case.work.records}"
        loss, norm = bench.first_steps.setdefault(same, (figures["loss"], figures["norm"]))
        if loss != figures["loss"]:
            figures["loss_off"] = figures["loss"] / loss - 1
            figures["norm_off"] = figures["norm"] / norm - 1
        if program is Ours and (case.apart or not case.work.prefix):
            figures["planned"] = planned  # a plan shares nothing
        bench.add(label, **figures)


def time_steps(bench: Bench, trainer: Any, config: Config, work: Work, limit: float) -> dict[str, Any]:
    """Figures of `TIMED` steps after `WARM_UP` others, fewer if time runs out."""
    work = bench.sized(work)
    data = bench.records(work, config)
    first = (math.nan, math.nan)
    seconds: list[float] = []
    speeds: list[float] = []
    began = bench.seconds()
    for step in range(WARM_UP + TIMED):
        if bench.seconds() > min(bench.deadline, began + limit):
            break
        records, following = (step_records(len(data), n, work.records, seed=0) for n in (step, step + 1))
        results: list[tuple[float, float]] = []

        def take(records: Sequence[int] = records, following: Sequence[int] = following, to: list = results) -> None:
            to.append(trainer.step(data, records, work.micro_batch, following))

        seconds.append(bench.time(take))
        speeds.append(sum(data.length(i) for i in records) / seconds[-1])
        if step == 0:
            first = results[0]
    if not seconds:
        raise OutOfTime

    # a case that was cut short has its last step as its speed
    timed = slice(min(WARM_UP, len(seconds) - 1), None)
    speed = statistics.median(speeds[timed])
    figures: dict[str, Any] = {"tok/s": speed, "ms": 1000 * statistics.median(seconds[timed])}
    figures["MFU"] = speed * operations_per_token(config, work, data) / bench.product_rate
    if len(seconds) < WARM_UP + TIMED:
        figures["steps"] = len(seconds)
    return figures | bench.memory() | {"loss": first[0], "norm": first[1], "all": [round(s, 4) for s in seconds]}


# ---- sections


def ceilings(bench: Bench) -> None:
    """0: what the card and its software can do."""
    n = 256 if bench.tiny else 8192
    versions = {"torch": torch.__version__, "cuDNN": torch.backends.cudnn.version()}
    for package in ("transformers", "peft", "triton", "bitsandbytes", "liger_kernel"):
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    bench.add("versions", **versions)
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total,clocks.sm,power.limit", "--format=csv"]
        print(subprocess.run(query, capture_output=True, text=True).stdout, flush=True)
    print(torch.ops.aten._flash_attention_forward.default._schema, flush=True)

    a = torch.randn(n, n, device=bench.device).to(bench.dtype)
    b = torch.randn(n, n, device=bench.device).to(bench.dtype)
    bench.product_rate = 2 * n**3 * bench.rate(lambda: a @ b)
    bench.add(f"product of {n} x {n}", TFLOPs=bench.product_rate / 1e12)
    wide = torch.randn(4096, n, device=bench.device).to(bench.dtype)
    bench.add(f"product of 4096 x {n}", TFLOPs=2 * 4096 * n * n * bench.rate(lambda: wide @ b) / 1e12)
    a32 = a.float()
    bench.add("product in float32", TFLOPs=2 * n**3 * bench.rate(lambda: a32 @ a32, 2) / 1e12)
    source = torch.empty(2**12 if bench.tiny else 2**32, dtype=torch.uint8, device=bench.device)
    target = torch.empty_like(source)
    bench.add("copy", TBs=2 * source.numel() * bench.rate(lambda: target.copy_(source)) / 1e12)
    small = torch.zeros(8, device=bench.device)
    bench.add("launch", us=1e6 / bench.rate(lambda: small.add_(1), 1000))


def one_b(bench: Bench) -> None:
    """7: 1B, where the host limits."""
    short = Case(SHORT)
    long = Case(LONG_2K)
    bench.attempt("1B ours", train_compiled, "1B", [Case(SHORT, apart=True), long, short, Case(SHORT_64)])
    bench.attempt("1B hf liger", train_with_liger, "1B", [short, long])
    bench.attempt("1B hf", train, Theirs, "1B", [short, long])


def eight_b(bench: Bench) -> None:
    """8: 8B, the headline."""
    short = Case(SHORT)
    apart = Case(SHORT, apart=True)
    long = Case(LONG_4K)
    bench.attempt("8B ours", train_compiled, "8B", [apart, long, short, Case(SHORT_64)])
    bench.attempt("8B hf liger", train_with_liger, "8B", [short, long])
    bench.attempt("8B ours all linears", train_compiled, "8B", [apart, long, short], ALL_LINEARS)
    bench.attempt("8B hf liger all linears", train_with_liger, "8B", [short, long], ALL_LINEARS)
    bench.attempt("8B hf", train, Theirs, "8B", [short, long])


def train_compiled(bench: Bench, what: str, model: str, cases: list[Case], *args: Any, **options: Any) -> None:
    """Ours as it is by default on a GPU, compiled: how many graphs, and how long the first step of each case takes."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    train(bench, what, Ours, model, cases, *args, compiled=True, **options)
    breaks = sum(counters["graph_break"].values())
    bench.add(f"{what}, graphs", made=counters["stats"]["unique_graphs"], breaks=breaks)


def train_with_liger(bench: Bench, what: str, model: str, cases: list[Case], *args: Any, **options: Any) -> None:
    if not bench.is_cuda:
        bench.add(what, skipped="liger needs Triton")
        return
    with liger():
        train(bench, what, Theirs, model, cases, *args, **options)


def quantized(bench: Bench) -> None:
    """9: QLoRA of 8B, with few tokens and many in a micro-batch, beside LoRA with as many."""
    long = Case(LONG_8K)
    apart = Case(SHORT_8, apart=True)
    bench.attempt("8B nf4 ours", train_compiled, "8B", [long, apart, Case(SHORT_8)], quantize="bnb.nf4")
    bench.attempt("8B ours", train_compiled, "8B", [long, apart])
    bench.attempt("8B nf4 hf liger", train_with_liger, "8B", [long, Case(SHORT_8)], quantize="bnb.nf4")
    bench.attempt("8B nf4 loading", time_loading)


def time_loading(bench: Bench, what: str) -> None:
    """Seconds to make all weights and their codes."""
    config = bench.config("8B")
    bench.add(what, s=bench.time(lambda: our_model(bench, config, "bnb.nf4")))


def other_models(bench: Bench) -> None:
    """12: a small model, and one of 32B in the memory of a card with 24 GB."""
    bench.attempt("32B nf4-dq ours in 24 GB", train_in_24_gb)
    cases = [Case(SHORT_64, apart=True), Case(LONG_2K)]
    bench.attempt("0.6B ours all linears", train_compiled, "0.6B", cases, ALL_LINEARS)


def train_in_24_gb(bench: Bench, what: str) -> None:
    """QLoRA of all linears, each block recomputed."""
    settings: dict[str, Any] = {"quantize": "bnb.nf4-dq", "recompute": "block"}
    with card_of_24_gb(bench):
        train(bench, what, Ours, "32B", [Case(SHORT_8, apart=True)], LoRA(), **settings)


@contextmanager
def card_of_24_gb(bench: Bench) -> Iterator[None]:
    """In here a card has as much memory as one of 24 GB."""
    if bench.is_cuda:
        everything = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction((24e9 - OUTSIDE_GB * 1e9) / everything)
    try:
        yield
    finally:
        if bench.is_cuda:
            torch.cuda.set_per_process_memory_fraction(1.0)


def streamed(bench: Bench) -> None:
    """15: blocks that come from the host's memory, beside blocks on the card; and 70B on a card of 24 GB."""
    bench.attempt("copy from the host", time_host_copies)
    cases = [Case(ONE_2K), Case(ONE_4K), Case(ONE_8K)]
    settings: dict[str, Any] = {"quantize": "bnb.nf4", "recompute": "block"}
    bench.attempt("8B nf4 resident", train_compiled, "8B", cases, ALL_LINEARS, **settings)
    bench.attempt("8B nf4 streamed", train_compiled, "8B", cases, ALL_LINEARS, **settings, stream=True)
    bench.attempt("70B nf4-dq streamed in 24 GB", train_70b_in_24_gb)


def time_host_copies(bench: Bench, what: str) -> None:
    """The speed of the copy of a block alone: what GB/s of a step can come to."""
    n_bytes = 2**20 if bench.tiny else 2**28
    source = host_buffer(n_bytes, bench.device)
    target = torch.empty(n_bytes, dtype=torch.uint8, device=bench.device)
    copies = CopyStream(bench.device)

    def copy() -> None:
        copies.wait(copies.copy(target, source))

    bench.add(what, **{"GB/s": n_bytes * bench.rate(copy) / 1e9})


def train_70b_in_24_gb(bench: Bench, what: str) -> None:
    """QLoRA of all linears; about 43 GB of the host's memory."""
    settings: dict[str, Any] = {"quantize": "bnb.nf4-dq", "stream": True, "build": model_of_random_codes}
    began = bench.seconds()
    with card_of_24_gb(bench):
        train_compiled(bench, what, "70B", [Case(ONE_2K), Case(ONE_4K)], LoRA(), limit=60, **settings)
    bench.add(f"{what}, in all", s=bench.seconds() - began)


def profiles(bench: Bench) -> None:
    """10: where the time of a micro-batch goes."""
    for model in ("8B", "1B"):
        bench.attempt(f"{model} ours, profile", profile, model, True)
        bench.attempt(f"{model} ours eager, profile", profile, model)


def profile(bench: Bench, what: str, model: str, compiled: bool = False) -> None:
    """The kernels of one step of 16 records; how long the card computes, and how often it is asked to."""
    from torch.profiler import ProfilerActivity

    config = bench.config(model)
    work = bench.sized(SHORT_FEW)
    data = bench.records(work, config)
    ours = Ours(bench, config, compiled=compiled)
    ours.share_prefixes = False

    def step(number: int) -> float:
        records, following = (step_records(len(data), n, work.records, seed=0) for n in (number, number + 1))
        return bench.time(lambda: ours.step(data, records, work.micro_batch, following))

    seconds = statistics.median([step(number) for number in range(7)][WARM_UP:])
    # of the host, only on a CPU: it would be slowed by being watched
    activity = ProfilerActivity.CUDA if bench.is_cuda else ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity]) as profiler:
        watched = step(7)

    # on the card there are kernels, copies, and the optimizer's mark, which spans several of them
    kind = torch.autograd.DeviceType.CUDA if bench.is_cuda else torch.autograd.DeviceType.CPU
    key = "self_device_time_total" if bench.is_cuda else "self_cpu_time_total"
    averages = [row for row in profiler.key_averages() if row.device_type == kind and "#AdamW" not in row.key]
    averages.sort(key=lambda row: -getattr(row, key))
    busy = sum(getattr(row, key) for row in averages) / 1e6
    calls = sum(row.count for row in averages)
    bench.add(what, ms=1000 * seconds, ms_watched=1000 * watched, busy=busy / seconds, kernels=calls)

    lines = [f"{what}: {1000 * seconds:.1f} ms, busy {busy / seconds:.0%}, {calls} kernels"]
    for row in averages[:20]:
        microseconds = getattr(row, key)
        name = row.key.replace("at::native::", "").removeprefix("void ")
        lines.append(f"{microseconds / 1000:9.2f} ms {microseconds / busy / 1e6:6.1%} {row.count:6} x  {name[:140]}")
    text = "\n".join(lines)
    name = what.replace(",", "").replace(" ", "-")
    (bench.out_dir / f"{name}.txt").write_text(text + "\n")
    print(text, flush=True)
    bench.table += [line[:110] for line in lines[1:8]]


def cudnn(bench: Bench) -> None:
    """6: attention by cuDNN, the default of PyTorch 2.11 on this card, at lengths that are new."""
    try:
        for enabled in (False, True):
            torch.backends.cuda.enable_cudnn_sdp(enabled)
            name = "on" if enabled else "off"
            bench.attempt(f"attention, cuDNN {name}", first_calls)
            bench.attempt(f"1B ours, cuDNN {name}", train, Ours, "1B", [Case(SHORT_FEW)], limit=15)
    finally:
        torch.backends.cuda.enable_cudnn_sdp(False)


def first_calls(bench: Bench, what: str) -> None:
    """Milliseconds, forward and backward, of a record in a row of records: at the first call, and at the second."""
    from torch.nn.attention import SDPBackend

    heads, groups, size = (4, 2, 16) if bench.tiny else (32, 8, 128)

    def inputs(total: int, start: int, length: int) -> list[torch.Tensor]:
        """Of a record of `length` in a row of `total` tokens: the heads lie that far apart."""
        shapes = [(1, n, total, size) for n in (heads, groups, groups)]
        rows = [torch.randn(shape, device=bench.device, dtype=bench.dtype, requires_grad=True) for shape in shapes]
        return [row[:, :, start : start + length] for row in rows]

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        torch.autograd.grad(y, (q, k, v), y.detach())

    first = []
    second = []
    for i, length in enumerate(range(61, 241, 15)):
        q, k, v = inputs(1000 + i, 100, length)
        for times in (first, second):
            times.append(1000 * bench.time(lambda q=q, k=k, v=v: attend(q, k, v)))
    backend = SDPBackend(torch._fused_sdp_choice(q, k, v, is_causal=True, enable_gqa=True)).name
    bench.add(what, backend=backend, ms_first=statistics.median(first), ms_second=statistics.median(second))

    # one long record, where plans are made once
    n = 64 if bench.tiny else 4096
    q, k, v = inputs(n, 0, n)
    bench.add(f"{what}, {n} tokens", ms=1000 / bench.rate(lambda: attend(q, k, v), 3))


def decoding(bench: Bench) -> None:
    """11: 128 new tokens after 100, one text."""
    for model in ("8B", "1B"):
        bench.attempt(f"{model} ours, decoding", decode_ours, model)
        bench.attempt(f"{model} hf dynamic, decoding", decode_theirs, model)
    bench.attempt("8B nf4 ours, decoding", decode_ours, "8B", "bnb.nf4")
    # transformers compiles the model for this cache: some dozen seconds
    bench.attempt("1B hf static, decoding", decode_theirs, "1B", cache_implementation="static")
    torch._dynamo.reset()


def decode_ours(bench: Bench, what: str, model: str, quantize: Quantize | None = None) -> None:
    ours = our_model(bench, bench.config(model), quantize).eval()
    time_decoding(bench, what, lambda prompt, n_new: generate(ours, prompt, len(prompt) + n_new, temperature=0.0))


def answers(bench: Bench) -> None:
    """16: 128 new tokens in each of 1, 8 and 32 answers at once, after prompts of 100 that share nothing."""
    for quantize in (None, "bnb.nf4"):
        for n_answers in (1, 8, 32):
            bench.attempt(f"8B {quantize or 'bf16'}, {n_answers} answers", answer_many, quantize, n_answers)
    bench.attempt("8B bf16, 1 answer, not recorded", answer_many, None, 1, False)


def answer_many(bench: Bench, what: str, quantize: Quantize | None, n_answers: int, is_recorded: bool = True) -> None:
    config = bench.config("8B")
    model = prepare_for_answers(our_model(bench, config, quantize).eval())
    n_new = 16 if bench.tiny else 128
    vocab = config.padded_vocab_size
    requests = [Request([(7919 * i + 31 * j) % vocab for j in range(100)], n_new) for i in range(n_answers)]
    engine = Engine(model, max_batch=n_answers)
    (batch,) = engine.batches.values()
    batch.is_recorded &= is_recorded
    first, *seconds = [bench.time(lambda: list(engine.run(requests))) for _ in range(3)]
    n_bytes = sum(param.nbytes for name, param in model.named_parameters() if "wte" not in name)
    speed = n_answers * n_new / min(seconds)
    # after the first time prompts are known but for their last token: a step reads all weights once
    figures = {"tok/s": speed, "read GB/s": n_bytes * speed / n_answers / 1e9, "s_first": first}
    bench.add(what, **figures, **bench.memory())


def decode_theirs(bench: Bench, what: str, model: str, **options: Any) -> None:
    theirs = their_model(bench, bench.config(model)).eval()
    theirs.generation_config.eos_token_id = None  # no early stop

    def continued(prompt: torch.Tensor, n_new: int) -> torch.Tensor:
        settings = {"max_new_tokens": n_new, "do_sample": False, "pad_token_id": 0, **options}
        return theirs.generate(prompt[None], attention_mask=torch.ones_like(prompt)[None], **settings)[0]

    time_decoding(bench, what, continued)


def time_decoding(bench: Bench, what: str, continued: Callable[[torch.Tensor, int], torch.Tensor]) -> None:
    """Tokens per second, the prompt's time included; the first of three calls, which warms up, apart."""
    n_new = 16 if bench.tiny else 128
    prompt = torch.arange(100, device=bench.device)
    texts: list[torch.Tensor] = []
    first, *seconds = [bench.time(lambda: texts.append(continued(prompt, n_new))) for _ in range(3)]
    n_made = len(texts[0]) - len(prompt)
    bench.add(what, **{"tok/s": n_made / min(seconds), "tokens": n_made, "s_first": first}, **bench.memory())


# ---- the model as it would be without its faster pieces


@contextmanager
def variant(*names: str) -> Iterator[None]:
    """Models that run in here have these pieces.

    plain    norms, rotations, the gate of the MLP and LoRA as PyTorch's operations one by one, with their own gradients
    loop     attention by a loop over records
    chunk    the loss of 128 rows at a time
    """
    from lit_gpt.model import attention, fused, loss

    small_chunks = dict.fromkeys(loss.LOGITS, 128 * 128_256)
    pieces: dict[str, tuple[Any, str, Any]] = {
        "plain": (fused, "needs_gradient", lambda *tensors: False),
        "loop": (attention, "has_flash_attention", lambda q: False),
        "chunk": (loss, "LOGITS", small_chunks),
    }
    kept = []
    for name in names:
        owner, attribute, piece = pieces[name]
        kept.append((owner, attribute, getattr(owner, attribute)))
        setattr(owner, attribute, piece)
    try:
        yield
    finally:
        for owner, attribute, piece in kept:
            setattr(owner, attribute, piece)


def variants(bench: Bench) -> None:
    """14: not compiled, and what a piece of the model then gains or costs."""
    for model, long in (("8B", LONG_4K), ("1B", LONG_2K)):
        cases = [Case(SHORT, apart=True), Case(long)]
        for names in ([], ["plain"], ["loop"], ["chunk"]):
            what = f"{model} ours eager {' '.join(names)}".strip()
            bench.attempt(what, train_variant, model, cases, names)


def train_variant(bench: Bench, what: str, model: str, cases: list[Case], names: list[str]) -> None:
    with variant(*names):
        train(bench, what, Ours, model, cases)


# in order of worth, with the seconds that each takes on an H100
SECTIONS: dict[int, tuple[Callable[[Bench], None], float]] = {
    0: (ceilings, 5),
    8: (eight_b, 150),
    7: (one_b, 60),
    9: (quantized, 80),
    12: (other_models, 140),
    15: (streamed, 230),
    14: (variants, 60),
    10: (profiles, 60),
    6: (cudnn, 15),
    11: (decoding, 90),
    16: (answers, 80),
}


# ---- plans


def plan_key(model: str, lora: LoRA, quantize: Quantize | None, work: Work, streamed: bool = False) -> str:
    linears = "q, v" if lora == QUERY_VALUE else f"all linears {lora.r}"
    key = f"{model}, {quantize or 'bf16'}, {linears}, {work.name}"
    return f"{key}, streamed" if streamed else key


def write_plans(bench: Bench, path: Path) -> None:
    """The planned peak of every case in `PLANNED` and `PLANNED_STREAMED`, in GB."""
    plans = {}
    for model, lora, quantize, work in PLANNED + PLANNED_STREAMED:
        is_streamed = (model, lora, quantize, work) in PLANNED_STREAMED
        config = bench.config(model)
        data = bench.records(work, config)
        heaviest: tuple[int, ...] = ()
        for step in range(WARM_UP + TIMED):
            records = step_records(len(data), step, work.records, seed=0)
            for _, layout in micro_batches(data, records, work.micro_batch):
                lengths = tuple(segment.length for segment in layout.segments)
                heaviest = max(heaviest, lengths, key=sum)
        recompute: ActivationCheckpointing = "block" if model == "32B" else "none"
        planned = plan(
            Setup(
                config,
                settings=lora,
                quantize=quantize,
                lengths=heaviest,
                activation_checkpointing=recompute,
                stream_blocks=is_streamed,
                accumulates=work.records > work.micro_batch,
            )
        )
        key = plan_key(model, lora, quantize, work, is_streamed)
        plans[key] = round(planned.gb, 3)
        print(f"{key}: {sum(heaviest)} tokens, {planned}", flush=True)
    path.write_text(json.dumps(plans, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--tiny", action="store_true", help="four small layers and short records")
    parser.add_argument("--deadline", type=float, default=520, help="seconds after which nothing new is begun")
    parser.add_argument("--only", default="", help="numbers of sections, such as 8,11; 0 runs always")
    parser.add_argument("--plan", type=Path, metavar="JSON", help="write the planned memory, and measure nothing")
    args = parser.parse_args()
    if args.plan:
        args.device = "cpu"
    wanted = [int(number) for number in args.only.split(",") if number] or list(SECTIONS)

    torch.backends.cuda.enable_cudnn_sdp(False)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(args, Path(folder))
        if args.plan:
            write_plans(bench, args.plan)
            return
        for number, (section, estimate) in SECTIONS.items():
            if number != 0 and number not in wanted:
                continue
            bench.section = number
            left = bench.deadline - bench.seconds()
            if estimate > left:
                bench.add(section.__name__, skipped=f"needs {estimate} s, {left:.0f} are left")
                continue
            try:
                section(bench)
            except Exception as error:  # the next one may be better off
                traceback.print_exc()
                bench.add(section.__name__, failed=f"{type(error).__name__}: {str(error)[:150]}")
            print(f"    section {number} took {left - bench.deadline + bench.seconds():.0f} s\n", flush=True)

    print(f"\n==== {bench.card}, {bench.seconds():.0f} s\n" + "\n".join(bench.table), flush=True)


if __name__ == "__main__":
    main()
