"""How much memory a training step takes, found by running it on tensors without contents.

The real code builds the model, changes it and trains it for two steps, on PyTorch's fake tensors: shapes and dtypes
without storage. A dispatch mode keeps the books: which storage is born in which part of the step, and when it dies.
Nothing is estimated, except what no dispatcher sees: memory inside a kernel, the CUDA context (0.3 to 0.5 GB), what
the allocator wastes, and where CUDA's kernels keep other things than the CPU's:

    attention with a mask or in float32      keys and values of grouped heads are repeated for every query head
    AdamW                                    works on all parameters at once: up to one more copy of the trained ones
    8-bit optimizers                         cannot step without values: what bitsandbytes keeps is entered
    4 bits, a few tokens                     multiplies by the codes, and makes no weight
"""

import weakref
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lit_gpt.blocks import ActivationCheckpointing, recompute_blocks
from lit_gpt.checkpoint import build_model
from lit_gpt.config import Config
from lit_gpt.dataset import Dataset, heaviest_first, micro_batches, step_records
from lit_gpt.device import autocast_dtype, trained_dtype, weight_dtype
from lit_gpt.errors import InputError
from lit_gpt.finetuned import METHODS
from lit_gpt.full import Full
from lit_gpt.layout import Layout
from lit_gpt.model import GPT
from lit_gpt.quantize import Quantize, QuantizedLinear, frozen, quantize_linears
from lit_gpt.train import TrainArgs, check_optimizer, make_optimizer

OUTSIDE_GB = 1.0  # of a card: the CUDA context, and what the allocator cannot use
EIGHT_BITS = ("bitsandbytes.optim.AdamW8bit", "bitsandbytes.optim.PagedAdamW8bit")
PARTS = ("weights", "quantized", "trained", "gradients", "optimizer", "activations", "logits", "workspace")


@dataclass(frozen=True)
class Setup:
    """What decides about memory, of a script's settings."""

    config: Config
    method: str = "lora"
    """A name in `finetuned.METHODS`."""
    settings: Any = None
    """Of that method."""
    dtype: torch.dtype = torch.bfloat16
    """Of the frozen weights."""
    autocast: torch.dtype | None = None
    """What mixed precision computes in."""
    quantize: Quantize | None = None
    activation_checkpointing: ActivationCheckpointing = "none"
    optimizer: str = "torch.optim.AdamW"
    lengths: tuple[int, ...] = (512,)
    """Tokens of each record of a micro-batch; all are trained on."""


def check_method(method: str) -> None:
    """Raises InputError where this is no script of a language model."""
    if method not in METHODS or method == "classifier":
        raise InputError(f"There is no plan for finetune/{method}.py. Choose lora, full, adapter or adapter_v2.")


def setup_of_script(method: str, settings: dict[str, Any], config: Config, tokens: int | None = None) -> Setup:
    """What a script's settings say. The records are those of the heaviest step; or all of `tokens` tokens.

    Raises:
        InputError: the model reads no such record, or there are no prepared data where `tokens` is not given; or see
            `check_optimizer` and `trained_dtype`.
    """
    check_method(method)
    if tokens is not None and not 1 <= tokens <= config.block_size:
        raise InputError(f"--tokens is {tokens}, but {config.name} reads 1 to {config.block_size}.")
    if settings["optimizer"] not in EIGHT_BITS:  # they need not be installed here
        check_optimizer(settings["optimizer"])
    of_method = Full(settings["train_only"]) if method == "full" else settings[method.removesuffix("_v2")]
    train = settings["train"]
    if tokens is None:
        longest = heaviest_lengths(Dataset(settings["data_dir"], "train"), train)
    else:
        n = min(train.micro_batch_size, train.global_batch_size)
        longest = (tokens,) * (n if train.micro_batch_tokens is None else max(1, train.micro_batch_tokens // tokens))
    return setup_of(method, of_method, settings, config, longest)


def setup_of(method: str, of_method: Any, settings: dict[str, Any], config: Config, lengths: tuple[int, ...]) -> Setup:
    """What the flags of every recipe say, and the settings of a method."""
    return Setup(
        config=config,
        method=method,
        settings=of_method,
        dtype=(trained_dtype if method == "full" else weight_dtype)(settings["precision"]),
        autocast=autocast_dtype(settings["precision"]),
        quantize=settings.get("quantize"),
        activation_checkpointing=settings["activation_checkpointing"],
        optimizer=settings["optimizer"],
        lengths=lengths,
    )


def heaviest_lengths(data: Dataset, train: TrainArgs) -> tuple[int, ...]:
    """Of the records of the largest micro-batch in the step that the loop takes first. Shared prefixes need less."""
    size = train.global_batch_size
    records = step_records(len(data), heaviest_first(data, size, train.seed)[0], size, train.seed)
    batches = micro_batches(data, records, train.micro_batch_size, budget=train.micro_batch_tokens)
    return max((tuple(segment.length for segment in layout.segments) for _, layout in batches), key=sum)


class Ledger(TorchDispatchMode):
    """Every storage that is made while it is on, with its bytes, the part of the step, and when it died."""

    def __init__(self) -> None:
        super().__init__()
        self.part = "workspace"
        self.events: list[tuple[int, int]] = []  # (which storage, its bytes or minus them)
        self.parts: dict[int, str] = {}
        self.known: dict[int, int] = {}  # id of a living storage -> its number
        self.alive, self.peak = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.note(tensor)
        return out

    def note(self, tensor: torch.Tensor, part: str | None = None) -> int:
        """Enters a tensor's storage, once, and returns its number; `part` says better what an entered one is."""
        storage = tensor.untyped_storage()
        key = id(storage)  # PyTorch keeps one object per storage for as long as the storage lives
        if key not in self.known:
            number = self.known[key] = len(self.parts)
            self.parts[number] = part or self.part
            self.book(number, storage.nbytes())
            weakref.finalize(storage, self.died, key, number, storage.nbytes()).atexit = False
        elif part is not None:
            self.parts[self.known[key]] = part
        return self.known[key]

    def died(self, key: int, number: int, size: int) -> None:
        del self.known[key]
        self.book(number, -size)

    def book(self, number: int, size: int) -> None:
        self.events.append((number, size))
        self.alive += size
        self.peak = max(self.peak, self.alive)

    def at_peak(self) -> Counter[str]:
        """Bytes of each part at the moment when the most was alive."""
        total, alive, most = 0, Counter(), 0
        found: Counter[str] = Counter()
        for number, size in self.events:
            total += size
            alive[self.parts[number]] += size
            if total > most and total == self.peak:
                most, found = total, Counter(alive)
        return found


@dataclass(frozen=True)
class Plan:
    parts: dict[str, int]
    """Bytes at the peak, by PARTS."""

    @property
    def gb(self) -> float:
        return sum(self.parts.values()) / 1e9

    def __str__(self) -> str:
        large = sorted((part for part in PARTS if self.parts[part] > 0.02 * 1e9 * self.gb), key=self.parts.get)[::-1]
        return f"{self.gb:.2f} GB ({', '.join(f'{part} {self.parts[part] / 1e9:.2f}' for part in large)})"


def plan(setup: Setup) -> Plan:
    """The peak of a training step with these settings.

    Raises:
        InputError: a mixture of experts, whose shapes are known only as it runs, or an optimizer that reads values.
    """
    if setup.config.n_expert:
        raise InputError("A mixture of experts decides as it runs what is computed: there is no plan for it.")
    model = build_model(setup.config)
    quantize_linears(model, setup.quantize)
    batch = batch_of(setup.lengths)
    with FakeTensorMode(allow_non_fake_inputs=True):
        try:
            return watch_steps(adapt(fill(model, setup), setup), batch, setup)
        except (DataDependentOutputException, DynamicOutputShapeException):
            raise InputError(
                f"--optimizer {setup.optimizer} reads values as it steps: there is no plan for it."
            ) from None


def batch_of(lengths: Sequence[int]) -> tuple[torch.Tensor, Layout]:
    return Layout.end_to_end([(torch.zeros(n, dtype=torch.int64), torch.ones(n)) for n in lengths])


def fill(model: GPT, setup: Setup) -> GPT:
    """Gives an empty model parameters, as loading does. Fake tensors take no memory."""
    codes = {id(param) for param in quantized_params(model)}
    for module in model.modules():
        for name, param in module.named_parameters(recurse=False):
            dtype = param.dtype if id(param) in codes else setup.dtype
            setattr(module, name, frozen(torch.zeros(param.shape, dtype=dtype)))
    if setup.config.tie_embeddings:
        model.lm_head.weight = model.transformer.wte.weight
    return model


def adapt(model: GPT, setup: Setup) -> GPT:
    """Applies the method, as a script does."""
    method = METHODS[setup.method]
    model = method.apply(model, setup.settings if setup.settings is not None else method.settings())
    if setup.method != "full":  # which has said what trains
        for name, param in model.named_parameters():
            param.requires_grad = method.filter(name, param)
    recompute_blocks(model, setup.activation_checkpointing)
    return model


def quantized_params(model: nn.Module) -> Iterator[nn.Parameter]:
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            yield from (getattr(module, name) for name in module.layout())


def watch_steps(model: GPT, batch: tuple[torch.Tensor, Layout], setup: Setup) -> Plan:
    """Two steps of a model, fake or real: the second one has the optimizer's memory from its beginning."""
    codes_only = setup.optimizer in EIGHT_BITS
    optimizer = make_optimizer(model, TrainArgs(), "torch.optim.SGD" if codes_only else setup.optimizer)
    if codes_only:
        optimizer.step = lambda: optimizer.state.setdefault("codes", [codes_of(param) for param in params])
    params = [param for param in model.parameters() if param.requires_grad]
    (idx, layout), ledger = batch, Ledger()
    enter_model(model, ledger)
    with ledger, part_of_head(model, ledger):
        for _ in range(2):
            ledger.part = "activations"
            with torch.autocast(idx.device.type, setup.autocast, enabled=setup.autocast is not None):
                loss = model(idx, layout=layout)
            ledger.part = "workspace"
            loss.backward()
            del loss
            for param in params:
                ledger.note(param.grad, "gradients")
            optimizer.step()
            for tensor in tree_leaves(list(optimizer.state.values())):
                if isinstance(tensor, torch.Tensor):
                    ledger.note(tensor, "optimizer")
            optimizer.zero_grad()
    return Plan({part: ledger.at_peak()[part] for part in PARTS})


def codes_of(param: torch.Tensor) -> torch.Tensor:
    """As large as what 8-bit Adam keeps: two codes a value and two scales for 256; floats of small parameters."""
    n = param.numel()
    return torch.empty(2 * n + 8 * -(n // -256) if n >= 4096 else 8 * n, dtype=torch.uint8, device=param.device)


def plan_generation(setup: Setup, n_prompt: int = 64, n_total: int = 256) -> Plan:
    """The peak of generating up to `n_total` tokens, the prompt's `n_prompt` included."""
    model = build_model(setup.config)
    quantize_linears(model, setup.quantize)
    ledger, pos = Ledger(), torch.arange(n_prompt)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        fill(model, setup)
        enter_model(model, ledger)
        with ledger, part_of_head(model, ledger):
            ledger.part = "activations"  # the cache
            model.max_seq_length = n_total
            model.set_kv_cache(batch_size=1)
            ledger.part = "workspace"
            model(torch.zeros(1, n_prompt, dtype=torch.int64), pos)
    return Plan({part: ledger.at_peak()[part] for part in PARTS})


def enter_model(model: GPT, ledger: Ledger) -> None:
    codes = {id(param) for param in quantized_params(model)}
    for param in model.parameters():
        part = "quantized" if id(param) in codes else "weights"
        ledger.note(param, "trained" if param.requires_grad else part)
    for buffer in model.buffers():
        ledger.note(buffer, "weights")


@contextmanager
def part_of_head(model: GPT, ledger: Ledger) -> Iterator[None]:
    """From the final norm on, all that a forward pass makes is there for the sake of the logits."""

    def enter(*_: Any) -> None:
        ledger.part = "logits"

    hook = model.transformer.ln_f.register_forward_hook(enter)
    try:
        yield
    finally:
        hook.remove()


def largest_batch(setup: Setup, gb: float, limit: int = 512) -> int:
    """How many records of the first one's length fit, 0 if none does, up to `limit`.

    Peaks grow by about as much with each record: a line through two of them says which to try next.
    """
    peaks: dict[int, float] = {}
    low, high, n = 0, limit + 1, 1  # low fits, high does not
    while high - low > 1:
        peaks[n] = plan(replace(setup, lengths=(setup.lengths[0],) * n)).gb
        low, high = (n, high) if peaks[n] <= gb else (low, n)
        n = 8
        if len(peaks) > 1:
            a, b = sorted(peaks)[-2:]
            slope = (peaks[b] - peaks[a]) / (b - a)
            n = int(b + (gb - peaks[b]) / slope) if slope > 0 else 2 * b
        n = min(max(n, low + 1), high - 1)
    return low


def switches(setup: Setup) -> dict[str, Setup]:
    """Each way to need less, alone, that is not taken yet."""
    found = {}
    if setup.quantize is None and setup.method != "full":
        found |= {f"--quantize {kind}": replace(setup, quantize=kind) for kind in ("bnb.nf4", "bnb.nf4-dq")}
    for how in ("selective", "block"):
        if setup.activation_checkpointing == "none" or (how, setup.activation_checkpointing) == ("block", "selective"):
            found[f"--activation_checkpointing {how}"] = replace(setup, activation_checkpointing=how)
    if setup.dtype == torch.float32:
        found["--precision bf16-true"] = replace(setup, dtype=torch.bfloat16, autocast=None)
    if setup.optimizer == "torch.optim.AdamW":
        found[f"--optimizer {EIGHT_BITS[0]}"] = replace(setup, optimizer=EIGHT_BITS[0])
    if len(setup.lengths) > 1:
        found["--train.micro_batch_size 1"] = replace(setup, lengths=(max(setup.lengths),))
    return found


def table(rows: Sequence[tuple[str, Plan]]) -> str:
    """Markdown, in GB."""
    lines = [f"| | peak | {' | '.join(PARTS)} |", "|---|" + "---:|" * (len(PARTS) + 1)]
    for name, found in rows:
        parts = " | ".join(f"{found.parts[part] / 1e9:.2f}" for part in PARTS)
        lines.append(f"| {name} | {found.gb:.2f} | {parts} |")
    return "\n".join(lines)
