"""How much memory a training step takes, found by running it on tensors without contents.

The real code builds the model, changes it and trains it for a step, on PyTorch's fake tensors: shapes and dtypes
without storage. A dispatch mode keeps the books: which storage is born in which part of the step, and when it dies.
Nothing is estimated, except what no dispatcher sees: memory inside a kernel, the CUDA context (0.3 to 0.5 GB), what
the allocator wastes, and where CUDA's kernels keep other things than the CPU's:

    attention with a mask or in float32      keys and values of grouped heads are repeated for every query head
    8-bit optimizers                         cannot step without values: `Adam8bitMemory` steps for them
    4 bits, a few tokens                     multiplies by the codes, and makes no weight
"""

import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils._pytree import tree_leaves

from lit_gpt.checkpoint.load import build_model
from lit_gpt.config import Config
from lit_gpt.data.dataset import Dataset, heaviest_first, micro_batches, step_records
from lit_gpt.device import autocast_dtype, peak_memory_gb, trained_dtype, weight_dtype
from lit_gpt.display.tables import markdown_table
from lit_gpt.errors import InputError
from lit_gpt.interruption import signals_wait
from lit_gpt.make_optimizer import TRIAL_SETTINGS, check_optimizer, make_optimizer
from lit_gpt.memory.ledger import PARTS, Ledger, Plan, enter_model, part_of_head, quantized_params
from lit_gpt.model.activation_checkpointing import ActivationCheckpointing, check_recomputed, recompute_blocks
from lit_gpt.model.gpt import GPT
from lit_gpt.model.packing import Layout
from lit_gpt.optimizer_in_backward import OptimizerInBackward, check_in_backward
from lit_gpt.quantize import Quantize, frozen_parameter, quantize_linears
from lit_gpt.runs.methods import METHODS, Method
from lit_gpt.sharding import is_sharded
from lit_gpt.stream_blocks import stream_blocks, stream_of
from lit_gpt.train import TrainArgs

if TYPE_CHECKING:
    from lightning_fabric import Fabric

OUTSIDE_GB = 1.0  # of a card: the CUDA context, and what the allocator cannot use
EIGHT_BITS = ("bitsandbytes.optim.AdamW8bit", "bitsandbytes.optim.PagedAdamW8bit")


@dataclass(frozen=True)
class Setup:
    """The settings of a run that decide about its memory."""

    config: Config
    method: str = "lora"
    """A name in METHODS of runs/methods.py."""
    settings: Any = None
    """The settings of that method, such as LoRA(r=8). None is the method's defaults."""
    dtype: torch.dtype = torch.bfloat16
    """The dtype of the frozen weights; if the method trains the base, of all weights."""
    autocast: torch.dtype | None = None
    """The dtype that mixed precision computes in. None is no mixed precision."""
    quantize: Quantize | None = None
    activation_checkpointing: ActivationCheckpointing = "none"
    stream_blocks: bool = False
    """Whether frozen blocks wait in the host's memory; each is computed again in backward then."""
    optimizer: str = "torch.optim.AdamW"
    optimizer_in_backward: bool = False
    lengths: tuple[int, ...] = (512,)
    """Tokens of each record of a micro-batch; all are trained on."""
    accumulates: bool = False
    """Whether a step has several micro-batches, so that the gradients of one are there while the next is computed."""


def check_method(method: str) -> None:
    """Raises InputError if finetune/ has no script of that name that trains a language model."""
    if method not in METHODS:
        raise InputError(f"There is no plan for finetune/{method}.py. Choose lora, full, adapter or adapter_v2.")


def setup_of_script(method: str, settings: dict[str, Any], config: Config, tokens: int | None = None) -> Setup:
    """The setup that a script's parsed flags ask for.

    Args:
        method: The stem of the script in finetune/.
        settings: The arguments of its `main`.
        config: The model, which need not be the one that the flags name.
        tokens: The length of every record. None takes the records of the heaviest step from --data_dir.

    Raises:
        InputError: the model reads no such record, or there are no prepared data and `tokens` is not given; or see
            `check_optimizer`, `check_in_backward`, `check_recomputed` and `trained_dtype`.
    """
    check_method(method)
    if tokens is not None and not 1 <= tokens <= config.block_size:
        raise InputError(f"--tokens is {tokens}, but {config.name} reads 1 to {config.block_size}.")
    flags = vars(settings["args"]) | settings
    check_recomputed(flags["activation_checkpointing"], config.n_layer)
    if flags["optimizer"] not in EIGHT_BITS:  # they need not be installed here
        check_optimizer(flags["optimizer"])
        if flags["train"].optimizer_in_backward:
            check_in_backward(flags["optimizer"])

    # the records of a micro-batch
    train = flags["train"]
    if tokens is None:
        data = Dataset(flags["data_dir"], "train")
        data.check_trained()
        lengths = heaviest_lengths(data, train)
    else:
        if train.micro_batch_tokens is None:
            n_records = min(train.micro_batch_size, train.global_batch_size)
        else:
            n_records = max(1, train.micro_batch_tokens // tokens)
        lengths = (tokens,) * n_records
    return setup_of(METHODS[method], flags, config, lengths)


def setup_of(method: Method, flags: dict[str, Any], config: Config, lengths: tuple[int, ...]) -> Setup:
    """The setup that the flags of a recipe ask for; the settings of its method are among them."""
    precision = flags["precision"]
    train = flags["train"]
    n_devices = flags["devices"] * flags["num_nodes"]
    return Setup(
        config=config,
        method=method.name,
        settings=flags[method.flag],
        dtype=trained_dtype(precision) if method.trains_base else weight_dtype(precision),
        autocast=autocast_dtype(precision),
        quantize=flags.get("quantize"),
        activation_checkpointing=flags["activation_checkpointing"],
        stream_blocks=flags.get("stream_blocks", False),
        optimizer=flags["optimizer"],
        optimizer_in_backward=flags["train"].optimizer_in_backward,
        lengths=lengths,
        accumulates=len(lengths) * n_devices < train.global_batch_size,
    )


def print_plan(fabric: "Fabric", method: Method, flags: dict[str, Any], config: Config, train_data: Dataset) -> None:
    """Prints the memory that the heaviest step of a run will take, on stderr; the first process does.

    Without a GPU the log shows the memory of the whole process, which is told, too: what it holds besides the model is
    known by now. A mixture of experts has no plan (see `plan`), and nothing is printed.
    """
    if not fabric.is_global_zero or config.n_expert:
        return
    lengths = heaviest_lengths(train_data, flags["train"])
    setup = setup_of(method, flags, config, lengths)
    try:
        step = plan(setup)
    except InputError as error:  # a plan is a courtesy
        print(f"No plan of the memory: {error}", file=sys.stderr)
        return

    if is_sharded(fabric):
        line = f"Planned peak of a step before it is split among the devices: {step}."
    elif fabric.device.type != "cpu":
        line = f"Planned peak of a step: {step}."
    else:
        others = max(0.0, peak_memory_gb(fabric.device) - step.model_gb)
        total = step.gb + others
        line = f"Planned peak of a step: {step}; with the rest of the process, as in the log, {total:.2f} GB."
    print(line, file=sys.stderr)


def heaviest_lengths(data: Dataset, train: TrainArgs) -> tuple[int, ...]:
    """The lengths of the records in the largest micro-batch of the step that the loop takes first.

    Shared prefixes, which are left out here, need less.
    """
    size = train.global_batch_size
    first = heaviest_first(data, size, train.seed)[0]
    records = step_records(len(data), first, size, train.seed)
    batches = micro_batches(data, records, train.micro_batch_size, micro_batch_tokens=train.micro_batch_tokens)
    lengths_of_batches = []
    for _, layout in batches:
        lengths = tuple(segment.length for segment in layout.segments)
        lengths_of_batches.append(lengths)
    return max(lengths_of_batches, key=sum)


def plan(setup: Setup, ledger: Ledger | None = None, prepare: Callable[[GPT], None] = lambda model: None) -> Plan:
    """The peak of a training step with these settings.

    Args:
        setup: The settings.
        ledger: Keeps the books; one of its own kind, if more is to be known than the peak.
        prepare: Is called with the model before the step.

    Raises:
        InputError: a mixture of experts, whose shapes are known only as it runs, or an optimizer that reads values.
    """
    if setup.config.n_expert:
        raise InputError("A mixture of experts decides as it runs what is computed: there is no plan for it.")
    model = build_model(setup.config)
    quantize_linears(model, setup.quantize)
    batch = batch_of(setup.lengths)
    # a KeyboardInterrupt would reach torch in C++, which calls Python for each fake tensor, and abort the process
    try:
        with signals_wait(), FakeTensorMode(allow_non_fake_inputs=True):
            fill_with_zeros(model, setup)
            adapted = adapt(model, setup)
            prepare(adapted)
            return watch_step(adapted, batch, setup, ledger)
    except (DataDependentOutputException, DynamicOutputShapeException):
        raise InputError(f"--optimizer {setup.optimizer} reads values as it steps: there is no plan for it.") from None


def batch_of(lengths: Sequence[int]) -> tuple[torch.Tensor, Layout]:
    """A micro-batch of records of these lengths, laid end to end."""
    records = []
    for length in lengths:
        ids = torch.zeros(length, dtype=torch.int64)
        trained = torch.ones(length)
        records.append((ids, trained))
    return Layout.end_to_end(records)


def fill_with_zeros(model: GPT, setup: Setup) -> None:
    """Gives an empty model parameters of the shapes and dtypes that loading gives it; under FakeTensorMode, fake ones.

    Codes keep the dtype that they have already.
    """
    codes = {id(param) for param in quantized_params(model)}
    for module in model.modules():
        for name, param in module.named_parameters(recurse=False):
            dtype = param.dtype if id(param) in codes else setup.dtype
            zeros = torch.zeros(param.shape, dtype=dtype)
            setattr(module, name, frozen_parameter(zeros))
    if setup.config.tie_embeddings:
        model.lm_head.weight = model.transformer.wte.weight


def adapt(model: GPT, setup: Setup) -> GPT:
    """Applies the method, and activation checkpointing or streaming, as a script does; says which parameters train."""
    method = METHODS[setup.method]
    settings = method.settings() if setup.settings is None else setup.settings
    adapted = method.apply(model, settings)
    assert isinstance(adapted, GPT), "the methods of language models change a GPT in place"
    if not method.trains_base:  # a method that does has said what trains
        for name, param in adapted.named_parameters():
            param.requires_grad = method.filter(name, param)
    if setup.stream_blocks:
        stream_blocks(adapted, adapted.transformer.wte.weight.device)
    else:
        recompute_blocks(adapted, setup.activation_checkpointing)
    return adapted


def watch_step(model: GPT, batch: tuple[torch.Tensor, Layout], setup: Setup, ledger: Ledger | None = None) -> Plan:
    """Trains a model, fake or real, for one step, at the beginning of which the optimizer has its memory already."""
    params = [param for param in model.parameters() if param.requires_grad]
    if setup.optimizer in EIGHT_BITS:
        optimizer = Adam8bitMemory(params)
    else:
        optimizer = make_optimizer(model, TRIAL_SETTINGS, setup.optimizer)
    if ledger is None:
        ledger = Ledger()
    enter_model(model, ledger)

    def enter_gradient(param: torch.Tensor) -> None:
        assert param.grad is not None, "all that train have one"
        ledger.enter(param.grad, "gradients")

    def step(stepped: Sequence[torch.Tensor]) -> None:
        for param in stepped:
            enter_gradient(param)
        optimizer.step()
        for tensor in tree_leaves([optimizer.state[param] for param in stepped]):
            if isinstance(tensor, torch.Tensor):
                ledger.enter(tensor, "optimizer")
        optimizer.zero_grad()

    with ledger, part_of_head(model, ledger):
        # an optimizer takes its memory in its first step: one with gradients out of nowhere, since a forward and a
        # backward pass would double the time of a plan
        together = [[param] for param in params] if setup.optimizer_in_backward else [params]
        for stepped in together:
            for param in stepped:
                param.grad = torch.zeros_like(param)
            step(stepped)
        if setup.optimizer_in_backward:
            for param in params:
                param.register_post_accumulate_grad_hook(enter_gradient)
            OptimizerInBackward(optimizer, max_norm=None)

        # gradients of an earlier micro-batch
        if setup.accumulates:
            for param in params:
                param.grad = torch.zeros_like(param)
                ledger.enter(param.grad, "gradients")

        # forward; from the final norm on, `part_of_head` says logits
        idx, layout = batch
        ledger.part = "activations"
        with torch.autocast(idx.device.type, setup.autocast, enabled=setup.autocast is not None):
            loss = model(idx, layout=layout)

        # backward and step
        ledger.part = "workspace"
        loss.backward()
        del loss
        if not setup.optimizer_in_backward:
            step(params)
    return peak_of(ledger, model)


def peak_of(ledger: Ledger, model: GPT) -> Plan:
    """The peak that a ledger has seen, with a figure for each of PARTS, and what the model has on the host."""
    sizes = ledger.at_peak()
    stream = stream_of(model)
    return Plan({part: sizes[part] for part in PARTS}, 0 if stream is None else stream.host_bytes)


class Adam8bitMemory(torch.optim.Optimizer):
    """Keeps as many bytes as the 8-bit Adams of bitsandbytes, whose kernels cannot step without values."""

    def __init__(self, params: Iterable[nn.Parameter]) -> None:
        super().__init__(params, defaults={})

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Makes the state of the parameters that have a gradient, once; they stay as they are."""
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is None or param in self.state:
                    continue
                size = self.state_bytes(param.numel())
                self.state[param]["codes"] = torch.empty(size, dtype=torch.uint8, device=param.device)

    @staticmethod
    def state_bytes(n: int) -> int:
        """The state of a parameter of `n` values: two codes for each, and two float32 scales for every 256 of them.

        A small parameter has two float32 values for each of its own instead.
        """
        if n < 4096:
            return 8 * n
        n_blocks = -(n // -256)
        return 2 * n + 8 * n_blocks


def plan_generation(setup: Setup, n_prompt: int = 64, n_total: int = 256) -> Plan:
    """The peak of generating up to `n_total` tokens, the prompt's `n_prompt` included."""
    model = build_model(setup.config)
    quantize_linears(model, setup.quantize)
    ledger = Ledger()
    input_pos = torch.arange(n_prompt)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        fill_with_zeros(model, setup)
        if setup.stream_blocks:
            stream_blocks(model, model.transformer.wte.weight.device)
        enter_model(model, ledger)
        with ledger, part_of_head(model, ledger):
            # the ledger enters the cache as it is made: under this name, since there is no backward
            ledger.part = "activations"
            cache = model.new_kv_cache(batch_size=1, max_seq_length=n_total)
            # reading the prompt takes the most
            ledger.part = "workspace"
            model(torch.zeros(1, n_prompt, dtype=torch.int64), input_pos, cache=cache)
    return peak_of(ledger, model)


def switches(setup: Setup) -> dict[str, Setup]:
    """Setups that need less: for every flag that saves memory and is not set yet, the setup with this flag alone."""
    setups = {}
    # weights
    if setup.quantize is None and not METHODS[setup.method].trains_base:
        for kind in ("bnb.nf4", "bnb.nf4-dq"):
            setups[f"--quantize {kind}"] = replace(setup, quantize=kind)
    if not setup.stream_blocks and not METHODS[setup.method].trains_base:
        flag = "--stream_blocks true"
        if setup.activation_checkpointing not in ("none", "block"):  # streaming computes all blocks again
            flag += " --activation_checkpointing block"
        setups[flag] = replace(setup, stream_blocks=True, activation_checkpointing="block")
    # activations
    if setup.activation_checkpointing == "none" and not setup.stream_blocks:
        setups["--activation_checkpointing selective"] = replace(setup, activation_checkpointing="selective")
    recomputes_all = setup.stream_blocks or setup.activation_checkpointing in ("block", setup.config.n_layer)
    if not recomputes_all:
        setups["--activation_checkpointing block"] = replace(setup, activation_checkpointing="block")
    # dtype
    if setup.dtype == torch.float32:
        setups["--precision bf16-true"] = replace(setup, dtype=torch.bfloat16, autocast=None)
    # optimizer
    if setup.optimizer == "torch.optim.AdamW":
        adamw = EIGHT_BITS[0]
        setups[f"--optimizer {adamw}"] = replace(setup, optimizer=adamw)
    if METHODS[setup.method].trains_base and not setup.optimizer_in_backward:
        setups["--train.optimizer_in_backward"] = replace(setup, optimizer_in_backward=True)
    # micro-batch
    if len(setup.lengths) > 1:
        longest = max(setup.lengths)
        setups["--train.micro_batch_size 1"] = replace(setup, lengths=(longest,))
    return setups


def plans_table(rows: Sequence[tuple[str, Plan]]) -> str:
    """A Markdown table of named plans, in GB: the peak, and each part of it."""
    cells = []
    for name, peak in rows:
        parts = [f"{peak.parts[part] / 1e9:.2f}" for part in PARTS]
        cells.append((name, f"{peak.gb:.2f}", *parts))
    heads = ("", "peak", *PARTS)
    return markdown_table(heads, cells, right=range(1, len(heads)))
