"""The training loop. Every method runs this one: read it from top to bottom, and edit it.

One turn of the loop is one optimizer step. The loss of a step is the mean over all the tokens it trains on, however
they are spread over micro-batches and devices, so that accumulation and more devices change nothing but memory.
"""

import hashlib
import inspect
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from lit_gpt.dataset import Dataset, heaviest_first, micro_batches, step_records
from lit_gpt.device import as_weight, is_sharded, own_part, peak_memory_gb, whole
from lit_gpt.errors import InputError
from lit_gpt.log import Log, duration

if TYPE_CHECKING:
    from lightning_fabric import Fabric

    from lit_gpt.finetuned import Checkpoints


@dataclass(frozen=True)
class TrainArgs:
    """The optimizer, the batch and the intervals."""

    learning_rate: float = 3e-4
    """Peak of the schedule: linear warmup, then half a cosine down to min_learning_rate at the last step."""
    min_learning_rate: float = 0.0
    """Where the schedule ends."""
    warmup_steps: int = 10
    """Optimizer steps until the peak; at most half of all steps."""
    weight_decay: float = 0.01
    """AdamW's, on matrices only."""
    beta1: float = 0.9
    """AdamW's memory of the gradient, or the momentum of an optimizer that has one."""
    beta2: float = 0.95
    """AdamW's memory of its square."""
    max_norm: float | None = 1.0
    """Clip the gradient to this norm. None leaves it alone."""
    global_batch_size: int = 16
    """Records per optimizer step, over all devices."""
    micro_batch_size: int = 16
    """Records per forward pass on one device. Lower it when memory runs out; the result stays the same."""
    micro_batch_tokens: int | None = None
    """Tokens per forward pass instead of records: as many records as fit, like lengths together. A record that has more
    is alone."""
    share_prefixes: bool = True
    """Compute tokens that several records of a micro-batch begin with, such as a template, only once. The result is the
    same; the larger the micro-batch, the more it saves. Off where adapters have dropout."""
    epochs: int = 1
    """How often to go through all records."""
    max_steps: int | None = None
    """Stop after this many optimizer steps, even in the middle of an epoch."""
    max_hours: float | None = None
    """Stop after this much time, with everything saved to go on later."""
    eval_interval: int = 50
    """Optimizer steps between validations. There is one before the first step and one after the last, too."""
    eval_records: int = 64
    """Records of the validation data to use: always the same ones."""
    patience: int | None = None
    """Stop after this many validations in a row that were no better than the best."""
    save_interval: int = 50
    """Optimizer steps between saves of `last`. `best` is saved whenever the validation loss is the lowest so far."""
    keep_steps: bool = False
    """Keep the weights of every save in a folder of its own, step-000050 and so on."""
    seed: int = 1337
    """Of the order of the records, and of dropout."""

    def __post_init__(self) -> None:
        positive = ("learning_rate", "max_norm", "max_hours")
        for name in (*positive, "min_learning_rate", "warmup_steps", "weight_decay", "seed"):
            if (value := getattr(self, name)) is not None and (value < 0 or value == 0 and name in positive):
                raise InputError(
                    f"train.{name} is {value}, expected more than 0{'' if name in positive else ', or 0'}."
                )
        if not (0 <= self.beta1 < 1 and 0 <= self.beta2 < 1):
            raise InputError(f"train.beta1 is {self.beta1} and train.beta2 {self.beta2}, expected 0 to below 1.")
        at_least_one = (
            "global_batch_size",
            "micro_batch_size",
            "epochs",
            "eval_interval",
            "eval_records",
            "save_interval",
        )
        for name in (*at_least_one, "max_steps", "patience", "micro_batch_tokens"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise InputError(f"train.{name} is {value}, expected 1 or more.")

    def steps(self, n_records: int) -> int:
        """Optimizer steps of the whole run. The last one of an epoch takes what is left."""
        steps = self.epochs * self.steps_per_epoch(n_records)
        return steps if self.max_steps is None else min(steps, self.max_steps)

    def steps_per_epoch(self, n_records: int) -> int:
        return -(-n_records // self.global_batch_size)


@dataclass
class Progress:
    """Where a run stands; with the weights and the optimizer, all that resuming needs."""

    data: str
    """Fingerprint of the training records."""
    global_batch_size: int
    seed: int
    step: int = 0
    """Optimizer steps done."""
    best_val_loss: float = math.inf
    evals_without_gain: int = 0
    scaler: dict[str, Any] = field(default_factory=dict)
    """The scale of the loss under 16-true and 16-mixed; empty under the others."""

    def out_of_patience(self, patience: int | None) -> bool:
        return patience is not None and self.evals_without_gain >= patience


def fit(
    fabric: "Fabric",
    model: nn.Module,
    train_data: Dataset,
    val_data: Dataset,
    args: TrainArgs,
    checkpoints: "Checkpoints",
    resume: bool = False,
    show_sample: Callable[[], list] | None = None,
    optimizer_class: str = "torch.optim.AdamW",
) -> Log:
    """Trains the parameters of `model` that require a gradient, and saves `best` and `last`.

    `show_sample()` gives answers (see `generate.answers`) to print after every validation.

    Raises:
        InputError: no data, a loss that is not finite, or not enough GPU memory.
    """
    if args.patience is not None and not len(val_data):
        raise InputError("train.patience needs validation records, and there are none. Prepare the data with some.")
    if not len(train_data):
        raise InputError(
            "There are no training records: all went to validation. Prepare the data with a smaller fraction."
        )
    steps = args.steps(len(train_data))
    model = fabric.setup_module(model)  # first: it may replace the parameters by slices of them
    optimizer = fabric.setup_optimizers(make_optimizer(model, args, optimizer_class))
    params = [param for group in optimizer.param_groups for param in group["params"]]

    progress = Progress(data_fingerprint(train_data), args.global_batch_size, args.seed)
    if fabric.is_global_zero:
        checkpoints.recover()
    fabric.barrier()
    saved = checkpoints.resume(optimizer) if resume else None
    if saved is not None:
        progress = continued(saved, progress)
        if progress.scaler:
            fabric.strategy.precision.load_state_dict(progress.scaler)
    log = Log(
        checkpoints.out_dir, steps, first_step=progress.step, main_process=fabric.is_global_zero, loggers=fabric.loggers
    )
    log.note(
        f"On {fabric.device}, weights in {' and '.join(sorted({str(p.dtype)[6:] for p in model.parameters()}))}."
        f" {sum(param.numel() for param in params):,} trained parameters. {steps - progress.step} steps of up to"
        f" {args.global_batch_size} records; an epoch of {len(train_data):,} records is"
        f" {args.steps_per_epoch(len(train_data))} steps."
        + (f" Continuing after step {progress.step}." if progress.step else "")
    )

    share_prefixes = args.share_prefixes and not has_dropout(model) and not rotates_by_length(model)
    if args.share_prefixes and not share_prefixes:
        why = "dropout does not treat" if has_dropout(model) else "this scaling of positions does not turn"
        log.note(f"Prefixes are not shared: {why} a token alike in all its records.")

    first_epoch = heaviest_first(train_data, args.global_batch_size, args.seed)
    started = time.perf_counter()
    if progress.step == 0:
        validate(fabric, model, val_data, args, progress, checkpoints, log, show_sample)
    while progress.step < steps and not progress.out_of_patience(args.patience):
        since = time.perf_counter()
        # dropout is a function of the step and the rank: a resumed run has no random state to restore
        torch.manual_seed((args.seed * 1_000_003 + progress.step) * 1_009 + fabric.global_rank)
        lr = learning_rate(progress.step, steps, args)
        for group in optimizer.param_groups:
            group["lr"] = lr

        turn = first_epoch[progress.step] if progress.step < len(first_epoch) else progress.step
        records = step_records(len(train_data), turn, args.global_batch_size, args.seed)
        ranks = fabric.global_rank, fabric.world_size
        micro = args.micro_batch_size, *ranks, share_prefixes, args.micro_batch_tokens
        batches = micro_batches(train_data, records, *micro)
        targets = sum(train_data.n_targets(i) for i in records)  # of all devices: each knows the whole step's records
        tokens = sum(train_data.length(i) for i in records)

        loss = torch.zeros((), device=fabric.device)
        try:
            for i, (idx, layout) in enumerate(batches):
                with fabric.no_backward_sync(model, enabled=i < len(batches) - 1):
                    part = model(idx.to(fabric.device), layout=layout.to(fabric.device)) / targets
                    fabric.backward(part * fabric.world_size)  # the processes average their gradients; ours is a sum
                loss += part.detach()
        except torch.OutOfMemoryError as error:
            raise InputError(
                f"Step {progress.step + 1} does not fit. Lower --train.micro_batch_size (or _tokens). ({error})"
            ) from None
        loss = fabric.all_reduce(loss, reduce_op="sum").item()
        check_finite(loss, f"The loss of step {progress.step + 1}")
        norm = clip(fabric, model, optimizer, args.max_norm)
        optimizer.step()
        optimizer.zero_grad()
        progress.step += 1

        log.step(
            progress.step,
            epoch=progress.step / args.steps_per_epoch(len(train_data)),
            loss=loss,
            learning_rate=lr,
            grad_norm=norm,
            tokens=tokens,
            trained_tokens=targets,
            seconds=time.perf_counter() - since,
            memory_gb=peak_memory_gb(fabric.device),
        )
        out_of_time = args.max_hours is not None and time.perf_counter() - started > args.max_hours * 3600
        out_of_time = fabric.broadcast(out_of_time) if args.max_hours is not None else False
        last = progress.step == steps or out_of_time
        if progress.step % args.eval_interval == 0 or last:
            validate(fabric, model, val_data, args, progress, checkpoints, log, show_sample)
        out_of_patience = progress.out_of_patience(args.patience)
        if progress.step % args.save_interval == 0 or last or out_of_patience:
            save(fabric, checkpoints, optimizer, progress, args)
        if out_of_time or out_of_patience:
            why = f"{args.max_hours} hours are over" if out_of_time else f"no gain in {args.patience} validations"
            log.note(f"Stopped after step {progress.step} of {steps}: {why}.")
            break
    if not len(val_data):
        checkpoints.save("best")  # nothing to judge by: the last is the best
    per_step = [row["seconds"] for row in log.rows if row["seconds"] is not None]
    if per_step:
        epoch = sum(per_step) / len(per_step) * args.steps_per_epoch(len(train_data))
        log.note(f"A whole epoch of {len(train_data):,} records takes {duration(epoch)} on this machine.")
    log.close()
    return log


def make_optimizer(model: nn.Module, args: TrainArgs, path: str = "torch.optim.AdamW") -> torch.optim.Optimizer:
    """An optimizer by its class path, with as many of the settings as it knows. Norms and biases, which are vectors, do
    not decay.

    Raises:
        InputError: there is no such class, or it wants something else.
    """
    module, _, name = path.rpartition(".")
    try:
        kind = getattr(import_module(module), name)
        if not issubclass(kind, torch.optim.Optimizer):
            raise TypeError(f"{name} is no optimizer")
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise InputError(
            f"--optimizer {path}: {error}. Name a class by its path, such as torch.optim.AdamW or"
            " bitsandbytes.optim.PagedAdamW8bit."
        ) from None
    known, betas = inspect.signature(kind).parameters, (args.beta1, args.beta2)
    options = {"lr": args.learning_rate, "betas": betas, "weight_decay": 0.0, "momentum": args.beta1}
    options = {key: value for key, value in options.items() if key in known}
    params = [param for param in model.parameters() if param.requires_grad]
    groups = [
        {"params": [param for param in params if param.ndim >= 2], "weight_decay": args.weight_decay},
        {"params": [param for param in params if param.ndim < 2], "weight_decay": 0.0},
    ]
    try:
        return kind([group for group in groups if group["params"]], **options)
    except (TypeError, ValueError) as error:
        raise InputError(f"--optimizer {path} cannot be made with {options}: {error}.") from None


def check_optimizer(path: str, fabric: "Fabric | None" = None) -> None:
    """Takes a step with a small weight, before there are others; as they will be on the devices of a run.

    Raises:
        InputError: there is no such class, it wants other gradients, or it cannot step where weights are split.
    """
    weight, split = torch.ones(64, 64), fabric is not None and is_sharded(fabric)
    weight = nn.Parameter(weight if fabric is None else as_weight(weight, fabric))
    weight.grad = torch.ones_like(weight)
    optimizer = make_optimizer(nn.ParameterList([weight]), TrainArgs(), path)
    try:
        optimizer.step()
    except Exception as error:  # each fails in its own way
        raise InputError(
            f"--optimizer {path} cannot step{' where weights are split among devices' if split else ''}:"
            f" {str(error).strip('.!')}. Choose torch.optim.AdamW{', or another --strategy' if split else ''}."
        ) from None


def has_dropout(model: nn.Module) -> bool:
    return any(module.p > 0 for module in model.modules() if isinstance(module, nn.Dropout))


def rotates_by_length(model: nn.Module) -> bool:
    """Whether a token is turned by an angle that depends on how long its record becomes."""
    return any(getattr(module, "by_length", False) for module in model.modules())


def learning_rate(step: int, steps: int, args: TrainArgs) -> float:
    """Linear warmup to the peak, then half a cosine down. Steps count from 0, and the first one already learns."""
    warmup = max(1, min(args.warmup_steps, steps // 2))  # 1: the first step is the peak; it may be the only one
    if step < warmup:
        return args.learning_rate * (step + 1) / warmup
    done = (step + 1 - warmup) / (steps - warmup)  # 1 at the last step
    low, high = args.min_learning_rate, args.learning_rate
    return low + (high - low) * (1 + math.cos(math.pi * done)) / 2


def clip(fabric: "Fabric", model: nn.Module, optimizer: torch.optim.Optimizer, max_norm: float | None) -> float:
    """The gradient's norm before it is clipped, or where it is not."""
    max_norm = math.inf if max_norm is None else max_norm
    return whole(fabric.clip_gradients(model, optimizer, max_norm=max_norm, error_if_nonfinite=False)).item()


def validate(
    fabric: "Fabric",
    model: nn.Module,
    val_data: Dataset,
    args: TrainArgs,
    progress: Progress,
    checkpoints: "Checkpoints",
    log: Log,
    show_sample: Callable[[], list] | None,
) -> None:
    """Measures the validation loss, keeps the weights if it is the best so far, and shows a sample."""
    if len(val_data):
        loss = evaluate(fabric, model, val_data, args)
        log.val(progress.step, loss)
        check_finite(loss, f"The validation loss after step {progress.step}")
        progress.evals_without_gain += 1
        if loss < progress.best_val_loss:
            progress.best_val_loss, progress.evals_without_gain = loss, 0
            checkpoints.save("best")
    if show_sample is not None and fabric.is_global_zero:
        for sample in show_sample():
            log.note(f"{sample.question}\n    -> {sample.answer}")
    fabric.barrier()


@torch.no_grad()
def evaluate(fabric: "Fabric", model: nn.Module, dataset: Dataset, args: TrainArgs) -> float:
    """Mean loss per trained token over the first `eval_records` records, in nats."""
    model.eval()
    total = torch.zeros(2, device=fabric.device)
    records = range(min(len(dataset), args.eval_records))
    share = args.share_prefixes and not rotates_by_length(model)
    ranks = fabric.global_rank, fabric.world_size
    for idx, layout in micro_batches(dataset, records, args.micro_batch_size, *ranks, share, args.micro_batch_tokens):
        total[0] += model(idx.to(fabric.device), layout=layout.to(fabric.device))
        total[1] += layout.n_targets
    model.train()
    loss, targets = fabric.all_reduce(total, reduce_op="sum").tolist()
    return loss / targets


def save(
    fabric: "Fabric", checkpoints: "Checkpoints", optimizer: torch.optim.Optimizer, progress: Progress, args: TrainArgs
) -> None:
    params = [own_part(param) for group in optimizer.param_groups for param in group["params"]]
    bad = torch.tensor(float(not all(torch.isfinite(param).all() for param in params)), device=fabric.device)
    if fabric.all_reduce(bad, reduce_op="sum"):  # seen here, and not by the next step's loss
        check_finite(math.nan, f"A trained weight after step {progress.step}")
    progress.scaler = fabric.strategy.precision.state_dict()
    if args.keep_steps:  # before `last`: a run killed in between comes by here again
        checkpoints.save(f"step-{progress.step:06d}")
    checkpoints.save_state("last", optimizer, asdict(progress))
    fabric.barrier()


def check_finite(value: float, what: str) -> None:
    if not math.isfinite(value):
        raise InputError(
            f"{what} is {value}. Lower --train.learning_rate, or choose another --precision; `last` and `best` are as"
            " they were saved before."
        )


def data_fingerprint(dataset: Dataset) -> str:
    """sha256 over which records these are, where they lie, and the hash of what `prepare` made them from; of records
    that it did not write, over their tokens and marks."""
    digest = hashlib.sha256(dataset.meta.get("hash", "").encode())
    content = () if "hash" in dataset.meta else (dataset.tokens, dataset.trained)
    for part in (dataset.records, dataset.ends, *content):
        digest.update(np.ascontiguousarray(part).tobytes())
    return digest.hexdigest()


def continued(saved: dict[str, Any], expected: Progress) -> Progress:
    """The saved progress, if it belongs to these data and batches: otherwise records would be skipped or repeated."""
    found = Progress(**saved)
    changed = [
        name for name in ("data", "global_batch_size", "seed") if getattr(found, name) != getattr(expected, name)
    ]
    if changed:
        raise InputError(
            f"The saved run had another {' and another '.join(changed)}. Resume with the settings of"
            " hyperparameters.yaml, or start anew with --overwrite true."
        )
    return found
