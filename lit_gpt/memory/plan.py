"""How much memory a training step takes, found by running it on tensors without contents.

The real code builds the model, changes it and trains it for two steps, on PyTorch's fake tensors: shapes and dtypes
without storage. A dispatch mode keeps the books: which storage is born in which part of the step, and when it dies.
Nothing is estimated, except what no dispatcher sees: memory inside a kernel, the CUDA context (0.3 to 0.5 GB), what
the allocator wastes, and where CUDA's kernels keep other things than the CPU's:

    attention with a mask or in float32      keys and values of grouped heads are repeated for every query head
    AdamW                                    works on all parameters at once: up to one more copy of the trained ones
    8-bit optimizers                         cannot step without values: what bitsandbytes keeps is entered
    4 bits, a few tokens                     multiplies by the codes, and makes no weight"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils._pytree import tree_leaves

from lit_gpt.checkpoint.load import build_model
from lit_gpt.config import Config
from lit_gpt.data.dataset import Dataset, heaviest_first, micro_batches, step_records
from lit_gpt.device import autocast_dtype, trained_dtype, weight_dtype
from lit_gpt.distributed import is_sharded
from lit_gpt.errors import InputError
from lit_gpt.memory.ledger import PARTS, Ledger, Plan, enter_model, part_of_head, quantized_params
from lit_gpt.model.activation_checkpointing import ActivationCheckpointing, recompute_blocks
from lit_gpt.model.gpt import GPT
from lit_gpt.model.packing import Layout
from lit_gpt.optimizer import OptimizerArgs, check_optimizer, make_optimizer
from lit_gpt.quantize import Quantize, frozen, quantize_linears
from lit_gpt.runs.methods import METHODS, Method
from lit_gpt.train import TrainArgs

if TYPE_CHECKING:
    from lightning_fabric import Fabric

OPERATIONS_PER_SECOND = {"cpu": 2e11, "gpu": 1e14}  # roughly
OUTSIDE_GB = 1.0  # of a card: the CUDA context, and what the allocator cannot use
EIGHT_BITS = ("bitsandbytes.optim.AdamW8bit", "bitsandbytes.optim.PagedAdamW8bit")


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
    if method not in METHODS:
        raise InputError(f"There is no plan for finetune/{method}.py. Choose lora, full, adapter or adapter_v2.")


def setup_of_script(method: str, settings: dict[str, Any], config: Config, tokens: int | None = None) -> Setup:
    """What a script's parsed flags say. The records are those of the heaviest step; or all of `tokens` tokens.

    Raises:
        InputError: the model reads no such record, or there are no prepared data where `tokens` is not given; or see
            `check_optimizer` and `trained_dtype`.
    """
    check_method(method)
    if tokens is not None and not 1 <= tokens <= config.block_size:
        raise InputError(f"--tokens is {tokens}, but {config.name} reads 1 to {config.block_size}.")
    flags = vars(settings["args"]) | settings
    if flags["optimizer"] not in EIGHT_BITS:  # they need not be installed here
        check_optimizer(flags["optimizer"])
    train = flags["train"]
    if tokens is None:
        lengths = heaviest_lengths(Dataset(flags["data_dir"], "train"), train)
    elif train.micro_batch_tokens is None:
        lengths = (tokens,) * min(train.micro_batch_size, train.global_batch_size)
    else:
        lengths = (tokens,) * max(1, train.micro_batch_tokens // tokens)
    return setup_of(METHODS[method], flags, config, lengths)


def setup_of(method: Method, flags: dict[str, Any], config: Config, lengths: tuple[int, ...]) -> Setup:
    """What the flags of a recipe say, its method's settings among them."""
    dtype_of = trained_dtype if method.trains_base else weight_dtype
    return Setup(
        config=config,
        method=method.name,
        settings=flags[method.flag],
        dtype=dtype_of(flags["precision"]),
        autocast=autocast_dtype(flags["precision"]),
        quantize=flags.get("quantize"),
        activation_checkpointing=flags["activation_checkpointing"],
        optimizer=flags["optimizer"],
        lengths=lengths,
    )


def print_plan(fabric: "Fabric", method: Method, flags: dict[str, Any], config: Config, train_data: Dataset) -> None:
    """Prints the memory that the heaviest step of a run will take, on stderr; the first process does.

    A plan takes about a quarter of a second a block. It is left out where that is more than a twentieth of an epoch,
    and where there is none (see `plan`).
    """
    if not fabric.is_global_zero or config.n_expert:
        return
    n_params = sum(param.numel() for param in build_model(config).parameters())
    n_tokens = int(train_data.lengths().sum())
    epoch_seconds = 6 * n_params * n_tokens / OPERATIONS_PER_SECOND["cpu" if fabric.device.type == "cpu" else "gpu"]
    if 0.25 * config.n_layer > 0.05 * epoch_seconds:
        return
    setup = setup_of(method, flags, config, heaviest_lengths(train_data, flags["train"]))
    split = " before it is split among the devices" if is_sharded(fabric) else ""
    try:
        print(f"Planned peak of a step{split}: {plan(setup)}.", file=sys.stderr)
    except InputError as error:  # a plan is a courtesy
        print(f"No plan of the memory: {error}", file=sys.stderr)


def heaviest_lengths(data: Dataset, train: TrainArgs) -> tuple[int, ...]:
    """Of the records of the largest micro-batch in the step that the loop takes first. Shared prefixes need less."""
    size = train.global_batch_size
    records = step_records(len(data), heaviest_first(data, size, train.seed)[0], size, train.seed)
    batches = micro_batches(data, records, train.micro_batch_size, budget=train.micro_batch_tokens)
    return max((tuple(segment.length for segment in layout.segments) for _, layout in batches), key=sum)


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
    if not METHODS[setup.method].trains_base:  # which has said what trains
        for name, param in model.named_parameters():
            param.requires_grad = method.filter(name, param)
    recompute_blocks(model, setup.activation_checkpointing)
    return model


def watch_steps(model: GPT, batch: tuple[torch.Tensor, Layout], setup: Setup) -> Plan:
    """Two steps of a model, fake or real: the second one has the optimizer's memory from its beginning."""
    codes_only = setup.optimizer in EIGHT_BITS
    optimizer = make_optimizer(model, OptimizerArgs(), "torch.optim.SGD" if codes_only else setup.optimizer)
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
    if setup.quantize is None and not METHODS[setup.method].trains_base:
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
