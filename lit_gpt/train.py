"""The training loop. Every method runs this one: read it from top to bottom, and edit it.

One turn of the loop is one optimizer step. The loss of a step is the mean over all the tokens it trains on, however
they are spread over micro-batches and devices, so that accumulation and more devices change nothing but memory.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import nn

from lit_gpt.data.dataset import (
    Dataset,
    end_to_end,
    heaviest_first,
    micro_batch_groups,
    micro_batches,
    step_records,
)
from lit_gpt.device import peak_memory_gb
from lit_gpt.display.words import counted, duration
from lit_gpt.errors import InputError, Interrupted
from lit_gpt.evaluation.record_losses import ids_of_records
from lit_gpt.failures import how_to_go_on
from lit_gpt.interruption import Interruption
from lit_gpt.make_optimizer import make_optimizer
from lit_gpt.model.loss import loss_of_each
from lit_gpt.model.packing import Layout
from lit_gpt.model.rope import rotates_by_length
from lit_gpt.optimizer_in_backward import OptimizerInBackward
from lit_gpt.out_of_memory import explain_memory
from lit_gpt.ranges import check_range, check_seed
from lit_gpt.runs.best import is_within
from lit_gpt.runs.log import Log
from lit_gpt.runs.resume import Progress, check_finite, save_progress, start_or_resume
from lit_gpt.runs.val_losses import ValLosses
from lit_gpt.scores.record_scores import RecordScores, losses
from lit_gpt.sharding import any_device, full_tensor, sum_over_devices
from lit_gpt.stream_blocks import stream_of
from lit_gpt.watch import note_place

if TYPE_CHECKING:
    from lightning_fabric import Fabric

    from lit_gpt.evaluation.forgetting_in_training import GeneralText
    from lit_gpt.evaluation.validation_metric import ValidationMetric
    from lit_gpt.runs.saves import Checkpoints


@dataclass(frozen=True)
class TrainArgs:
    """The optimizer, the schedule, the batch and the intervals."""

    learning_rate: float | None = 3e-4
    """Peak of the schedule: linear warmup, then half a cosine down to min_learning_rate at the last step. None is the
    method's own; LoRA and classifiers have one."""
    min_learning_rate: float = 0.0
    """Where the schedule ends."""
    warmup_steps: int = 10
    """Optimizer steps until the peak; at most half of all steps."""
    weight_decay: float = 0.01
    """Weight decay of AdamW, on matrices only."""
    beta1: float = 0.9
    """AdamW's decay rate of the mean gradient, or the momentum of an optimizer that has one."""
    beta2: float = 0.95
    """AdamW's decay rate of the mean squared gradient."""
    max_norm: float | None = 1.0
    """Clip the gradient to this norm. None leaves it alone."""
    optimizer_in_backward: bool = False
    """Step with each gradient as soon as it is there, and free it: gradients are never held together, which saves the
    most where all weights train. The result stays the same. On one device, with one micro-batch in a step. With a
    max_norm each step takes twice the time, since a first pass measures the norm; null takes one pass."""
    global_batch_size: int = 16
    """Records per optimizer step, over all devices."""
    micro_batch_size: int = 16
    """Records per forward pass on one device. Lower it when memory runs out; the result stays the same."""
    micro_batch_tokens: int | None = None
    """Tokens per forward pass, instead of a number of records: as many records of similar length as fit. A record that
    has more tokens than that gets a pass of its own."""
    share_prefixes: bool = True
    """Compute tokens that several records of a micro-batch begin with, such as a template, only once. The result is the
    same; the larger the micro-batch, the more it saves. Off with dropout, and with rotations that depend on a record's
    length."""
    epochs: int = 1
    """How often to go through all records."""
    max_steps: int | None = None
    """Stop after this many optimizer steps, even in the middle of an epoch."""
    max_hours: float | None = None
    """Stop after this much time, with everything saved to go on later."""
    eval_interval: int | None = None
    """Optimizer steps between validations. None makes about ten in a run, at least five steps apart. There is one
    before the first step and one after the last, too."""
    eval_records: int = 64
    """How many validation records to use: always the first ones."""
    metric: str | None = None
    """Answer validation records at each validation, and choose `best` by how good the answers are, in place of the
    validation loss, which decides between equals: exact_match, contains, number_match, rouge_l, or a function of your
    own, my_file.py:function, that takes a record and an answer and returns a number. Higher is better."""
    metric_records: int = 16
    """How many validation records to answer for the metric: always the first ones."""
    watch_forgetting: bool = False
    """Measure at each validation how far the model has moved from its base on a general text: the loss there, and the
    KL to the base in nats per token. What the base says is kept in the host's memory, 2 bytes for each token of the
    text and each of the vocabulary."""
    general_text: Path | None = None
    """A text file to watch forgetting by, paragraphs apart by empty lines; its first 2,048 tokens are read. null is
    lit_gpt/evaluation/general_text.txt."""
    max_forgetting: float | None = None
    """Hold forgetting within this budget, in nats per token of KL to the base, such as 0.02. Each step adds the KL on
    two paragraphs of the general text to the loss, with a weight that follows; every other one measures. A validation
    beyond the budget scales down what LoRA or an adapter has changed until it is within, and measures that; `best` has
    these weights, and training goes on with its own. Full fine-tuning is not scaled: there `best` is the best
    validation within."""
    patience: int | None = None
    """Stop after this many validations in a row that were no better than the best."""
    save_minutes: float | None = 10.0
    """Minutes between saves of `last`, from which a run goes on. None saves by steps alone. Ctrl-C and SIGTERM save,
    too. `best` is saved whenever a validation is the best so far."""
    save_interval: int | None = None
    """Optimizer steps between saves of `last`, besides those by time."""
    keep_steps: bool = False
    """Keep the weights of every save by save_interval in a folder of its own, step-000050 and so on."""
    seed: int = 1337
    """Seed of the order of the records, and of dropout."""

    enough_steps = 50  # no setting: a run of less than half as many gets a remark. The quick start learns a style in 50

    def __post_init__(self) -> None:
        for name in ("learning_rate", "max_norm", "max_hours", "save_minutes", "max_forgetting"):
            check_range(f"--train.{name}", getattr(self, name), above=0)
        for name in ("min_learning_rate", "warmup_steps", "weight_decay"):
            check_range(f"--train.{name}", getattr(self, name), at_least=0)
        for name in ("global_batch_size", "micro_batch_size", "micro_batch_tokens", "epochs", "max_steps"):
            check_range(f"--train.{name}", getattr(self, name), at_least=1)
        for name in ("eval_interval", "eval_records", "metric_records", "patience", "save_interval"):
            check_range(f"--train.{name}", getattr(self, name), at_least=1)
        for name in ("beta1", "beta2"):
            check_range(f"--train.{name}", getattr(self, name), at_least=0, below=1)
        check_seed("--train.seed", self.seed)
        by_number = self.micro_batch_tokens is None
        if self.optimizer_in_backward and by_number and self.micro_batch_size < self.global_batch_size:
            raise InputError(
                "train.optimizer_in_backward cannot add up the gradients of several micro-batches: a step has"
                f" {self.global_batch_size} records in micro-batches of {self.micro_batch_size}, expected one. Set"
                f" --train.global_batch_size {self.micro_batch_size}, or --train.micro_batch_size"
                f" {self.global_batch_size}."
            )
        if self.keep_steps and self.save_interval is None:
            raise InputError("train.keep_steps keeps what train.save_interval saves, and there is none. Set it, too.")
        if self.optimizer_in_backward and self.max_forgetting is not None:
            raise InputError(
                "train.optimizer_in_backward cannot add the gradient of a second term, which train.max_forgetting"
                " brings. Leave one of them out."
            )
        if self.general_text is not None and not self.watches_forgetting:
            raise InputError("train.general_text is for train.watch_forgetting, which is off. Set it, too.")

    @property
    def watches_forgetting(self) -> bool:
        """Whether validations measure how far the model has moved from its base."""
        return self.watch_forgetting or self.max_forgetting is not None

    def or_learning_rate(self, own: float | None) -> Self:
        """The same with the method's own learning rate, if it has none yet."""
        return self if self.learning_rate is not None else replace(self, learning_rate=own)

    def steps(self, n_records: int) -> int:
        """Optimizer steps of the whole run."""
        steps = self.epochs * self.steps_per_epoch(n_records)
        return steps if self.max_steps is None else min(steps, self.max_steps)

    def steps_per_epoch(self, n_records: int) -> int:
        """Optimizer steps of an epoch; the last one takes the records that are left."""
        return math.ceil(n_records / self.global_batch_size)

    def steps_between_evals(self, steps: int) -> int:
        """Optimizer steps between validations in a run of so many steps."""
        return self.eval_interval or max(5, math.ceil(steps / 10))


def fit(
    fabric: "Fabric",
    model: nn.Module,
    train_data: Dataset,
    val_data: Dataset,
    args: TrainArgs,
    checkpoints: "Checkpoints",
    resume: bool = False,
    show_sample: Callable[[], list] | None = None,
    optimizer_path: str = "torch.optim.AdamW",
    metric: "ValidationMetric | None" = None,
    general_text: "GeneralText | None" = None,
) -> Log:
    """Trains the parameters of `model` that require a gradient, and saves `best` and `last`.

    Args:
        fabric: Lightning's, as `recipe.start_processes` gives it: device, precision, and the other processes.
        model: The adapted model. Called with tokens and a layout, which says where records begin and what is trained,
            it returns the summed loss.
        train_data: Records to train on.
        val_data: Records to judge by; there may be none.
        args: The settings above.
        checkpoints: Writes and loads the folders `best`, with what has been trained, and `last`, which also has the
            optimizer and the step.
        resume: Whether to go on from `last`, if there is one.
        show_sample: Gives answers (see `generate.answers`) to print after every validation.
        optimizer_path: The path of the optimizer's class.
        metric: Judges answers, as --train.metric says.
        general_text: A text to measure forgetting by, as --train.watch_forgetting says. The model is the base, but for
            what `last` holds.

    Raises:
        InputError: no data, a loss that is not finite, not enough GPU memory, or a setting that nobody reads here.
        Interrupted: Ctrl-C or SIGTERM came, and the run is saved.
    """
    check_run(train_data, val_data, args)
    check_measures(args, metric, general_text)
    steps = args.steps(len(train_data))
    steps_per_epoch = args.steps_per_epoch(len(train_data))

    # the model on its device. This comes before the optimizer, since fsdp replaces each parameter by a slice of it.
    # From here on `model` is Fabric's wrapper; inside it is the model that `checkpoints` saves
    unwrapped = model
    is_streamed = stream_of(model) is not None  # then all that belongs on the device is there, and the rest must not be
    model = fabric.setup_module(model, move_to_device=not is_streamed)
    obstacle = obstacle_to_sharing(model)
    share_prefixes = args.share_prefixes and obstacle is None

    # the optimizer, AdamW or another class: for all that trains, with weight decay for matrices, none for vectors
    scales_loss = bool(fabric.strategy.precision.state_dict())  # the factor is all that a precision has to keep
    own_optimizer = make_optimizer(model, args, optimizer_path, scales_loss)
    optimizer: Any = fabric.setup_optimizers(own_optimizer)  # Fabric's wrapper
    in_backward = OptimizerInBackward(own_optimizer, args.max_norm) if args.optimizer_in_backward else None

    # what the base says to the general text: it is still the base, also where the run goes on
    if general_text is not None:
        general_text.remember_base(fabric, model)

    # step 0, or the step, the weights and the optimizer that `last` holds; the log writes metrics.csv and shows the
    # progress
    progress = start_or_resume(fabric, checkpoints, optimizer, train_data, args, resume)
    log = Log(
        checkpoints.out_dir,
        steps,
        first_step=progress.step,
        main_process=fabric.is_global_zero,
        loggers=fabric.loggers,
        metric="" if metric is None else metric.name,
        max_forgetting=args.max_forgetting,
    )
    val_losses = ValLosses(checkpoints.out_dir, goes_on=progress.step > 0) if fabric.is_global_zero else None
    log.note(describe_run(fabric, model, train_data, args, progress))
    if resume and progress.step == 0:
        log.note("Nothing has been saved yet that the run could go on from: it begins at step 0.")
    for_more_steps = flags_for_more_steps(len(train_data), args)
    if for_more_steps:
        log.note(f"So few steps teach little. {args.enough_steps} or more: {for_more_steps} --overwrite")
    if args.share_prefixes and obstacle is not None:
        log.note(f"Prefixes are not shared: {obstacle}.")
    if args.optimizer_in_backward and args.max_norm is not None:
        log.note(
            "Each step goes forward and backward twice: first for the norm, to clip by. Not so with a max_norm null."
        )

    def validate_weights(extra: bool, figures: dict[str, float]) -> None:
        """Adds to `figures` what else is to be measured, and saves `best` if it is the best so far."""
        of_records = evaluate(fabric, model, val_data, args)
        loss = of_records.mean
        if metric is not None:
            figures["metric"] = metric.measure(fabric, unwrapped)
        log.val(progress.step, loss, **figures)
        check_finite(loss, f"The validation loss after step {progress.step}")
        is_best = progress.note_validation(
            loss,
            figures.get("metric"),
            within_budget=is_within(figures.get("general_kl"), args.max_forgetting),
            extra=extra,
        )
        if is_best:
            checkpoints.save("best")
        if val_losses is not None:
            val_losses.write(of_records, is_best)

    def validate(extra: bool = False) -> None:
        """Validates the weights, those that a budget of forgetting allows, and shows a sample.

        An `extra` one is not due yet, see `Progress.note_validation`.
        """
        if len(val_data) and general_text is not None:
            with general_text.within_budget(fabric, model, unwrapped) as figures:
                validate_weights(extra, figures)
        elif len(val_data):
            validate_weights(extra, {})
        if show_sample is not None:
            for sample in show_sample():
                log.note(f"{sample.question}\n    -> {sample.answer}")
        fabric.barrier()  # the others wait for the sample

    # the order of the first epoch's batches: the one with the most tokens and the one with the longest record come
    # first, so that too little memory shows at once
    batch_order = heaviest_first(train_data, args.global_batch_size, args.seed)
    eval_interval = args.steps_between_evals(steps)

    def batches_of_step(step: int) -> tuple[list[int], list[tuple[torch.Tensor, Layout]]]:
        """The records of a step, and this device's share of them in micro-batches."""
        batch_number = batch_order[step] if step < len(batch_order) else step
        records = step_records(len(train_data), batch_number, args.global_batch_size, args.seed)
        batches = micro_batches(
            train_data,
            records,
            args.micro_batch_size,
            rank=fabric.global_rank,
            world_size=fabric.world_size,
            share_prefixes=share_prefixes,
            micro_batch_tokens=args.micro_batch_tokens,
        )
        return records, batches

    if progress.step < steps:
        upcoming = batches_of_step(progress.step)
    run_began = time.perf_counter()
    saved_at = run_began

    # from here on Ctrl-C and SIGTERM finish the step at hand and save
    with Interruption() as interruption:
        if progress.step == 0:
            validate()  # so that the curve begins before training, and `best` is the base until a step improves on it

        # a run that stopped for want of patience is not trained further if it is resumed
        while progress.step < steps and not progress.out_of_patience(args.patience):
            step_began = time.perf_counter()
            note_place(f"step {progress.step + 1}")  # for what is said if a process hangs

            # dropout: its random numbers depend on step and rank alone, so that a resumed run has no state to restore.
            # The factors are primes, far enough apart that no two steps and ranks get the same seed
            dropout_seed = (args.seed * 1_000_003 + progress.step) * 1_009 + fabric.global_rank
            torch.manual_seed(dropout_seed)

            # learning rate
            lr = learning_rate(progress.step, steps, args)
            for group in optimizer.param_groups:
                group["lr"] = lr

            # forward and backward: the records of a micro-batch lie end to end in one row of tokens, and its layout
            # says where each begins and which tokens are targets. The sum of their losses is divided by the number of
            # targets that all devices together have in this step; devices exchange gradients once, with the last
            # micro-batch. With a budget of forgetting the KL to the base on two paragraphs comes first
            records, batches = upcoming
            n_targets = sum(train_data.n_targets(i) for i in records)
            total = torch.zeros((), device=fabric.device)
            forgotten = torch.zeros((), device=fabric.device)
            try:
                if general_text is not None and args.max_forgetting is not None:
                    with fabric.no_backward_sync(model):
                        term = general_text.term(fabric, model, progress.step)
                        fabric.backward(progress.kl_weight * term * fabric.world_size)
                    forgotten += term.detach()
                for i, (idx, layout) in enumerate(batches):
                    is_last = i == len(batches) - 1
                    with fabric.no_backward_sync(model, enabled=not is_last):
                        idx = idx.to(fabric.device, non_blocking=True)
                        part = model(idx, layout=layout.to(fabric.device)) / n_targets
                        fabric.backward(part * fabric.world_size)  # devices average their gradients; ours is a sum
                    total += part.detach()
            except torch.OutOfMemoryError as error:
                to_lower = "--train.micro_batch_size (or --train.micro_batch_tokens)"
                raise InputError(explain_memory(error, f"Step {progress.step + 1}", to_lower)) from None

            # a GPU is still at work on all that: time to prepare the next step
            if progress.step + 1 < steps:
                upcoming = batches_of_step(progress.step + 1)

            # clip; here we wait for the GPU, once in a step
            if in_backward is None:
                norm = clip_gradient(fabric, model, optimizer, args.max_norm)
            else:
                norm = in_backward.norm()
            sums = sum_over_devices(fabric, torch.stack((total, forgotten)))
            loss, kl, grad_norm = torch.cat((sums, norm.to(sums.dtype)[None])).tolist()
            check_finite(loss, f"The loss of step {progress.step + 1}")

            # step; backward has taken it if the optimizer is there, or takes it now, with the gradient clipped
            if leaves_out_step(fabric, grad_norm, progress.step + 1):
                log.note(f"Step {progress.step + 1} changes no weight: its gradient has overflowed in float16.")
            if in_backward is None:
                optimizer.step()
                optimizer.zero_grad()
            else:
                torch.manual_seed(dropout_seed)
                in_backward.step(fabric, model, batches[0], n_targets)
            progress.step += 1
            if general_text is not None:
                progress.kl_weight = general_text.next_weight(progress.kl_weight, kl)

            # log
            log.step(
                progress.step,
                epoch=progress.step / steps_per_epoch,
                loss=loss,
                learning_rate=lr,
                grad_norm=grad_norm,
                tokens=sum(train_data.length(i) for i in records),
                trained_tokens=n_targets,
                seconds=time.perf_counter() - step_began,
                memory_gb=peak_memory_gb(fabric.device),
            )

            # what the clock and the signals say; all devices have to agree, and any of them may get a signal
            now = time.perf_counter()
            hours = (now - run_began) / 3600
            minutes = (now - saved_at) / 60
            out_of_time, save_is_due, interrupted = any_device(
                fabric,
                args.max_hours is not None and hours > args.max_hours,
                args.save_minutes is not None and minutes > args.save_minutes,
                interruption.asked,
            )
            if interrupted:
                interruption.settle()

            # validate
            is_last_step = progress.step == steps or out_of_time
            is_due = progress.step % eval_interval == 0 or progress.step == steps
            if is_due or is_last_step:
                validate(extra=not is_due)

            # save, after validating: `last` also holds the best loss so far and the patience
            out_of_patience = progress.out_of_patience(args.patience)
            is_interval = args.save_interval is not None and progress.step % args.save_interval == 0
            if is_interval or is_last_step or save_is_due or out_of_patience or interrupted:
                keep = args.keep_steps and (is_interval or is_last_step)
                save_progress(fabric, checkpoints, optimizer, progress, keep_steps=keep)
                saved_at = time.perf_counter()

            # stop?
            if interrupted or out_of_time or out_of_patience:
                break

    note_place("after the last step")
    if in_backward is not None:
        in_backward.remove()
    if not len(val_data):
        checkpoints.save("best")  # nothing to judge by: the last is the best
    log.close()

    # the end
    (interrupted,) = any_device(fabric, interruption.asked)
    if interrupted:
        ended = f"Stopped after step {progress.step:,} of {steps:,}, which is saved{describe_best(log, progress)}."
        raise Interrupted(f"{ended}{how_to_go_on()}", interruption.status)
    if progress.step < steps:
        if progress.out_of_patience(args.patience):
            why = f"no gain in {counted(args.patience, 'validation')}."
        else:
            why = f"{args.max_hours:g} hours are over{describe_best(log, progress)}.{how_to_go_on()}"
        log.note(f"Stopped after step {progress.step:,} of {steps:,}: {why}")
    seconds = [row["seconds"] for row in log.rows if row["seconds"] is not None]
    if seconds:
        epoch = duration(sum(seconds) / len(seconds) * steps_per_epoch)
        log.note(f"A whole epoch of {counted(len(train_data), 'record')} takes {epoch} on this machine.")
    return log


def learning_rate(step: int, steps: int, args: TrainArgs) -> float:
    """The schedule: linear warmup to the peak, then half a cosine down. Steps count from 0.

    The first step has more than 0, the last has `min_learning_rate`.
    """
    low = args.min_learning_rate
    high = args.learning_rate
    assert high is not None, "`fit` has asked for one"
    warmup = min(args.warmup_steps, steps // 2)
    warmup = max(1, warmup)  # without warmup the first step, which may be the only one, has the peak
    if step < warmup:
        return high * (step + 1) / warmup
    done = (step + 1 - warmup) / (steps - warmup)  # 1 at the last step
    return low + (high - low) * (1 + math.cos(math.pi * done)) / 2


def clip_gradient(
    fabric: "Fabric", model: nn.Module, optimizer: torch.optim.Optimizer, max_norm: float | None
) -> torch.Tensor:
    """Scales the gradient down to `max_norm`, and returns the norm it had, a scalar. None only measures it."""
    limit = math.inf if max_norm is None else max_norm
    # a gradient that is not finite shows in the next loss, or in the weights when they are saved
    norm = fabric.clip_gradients(model, optimizer, max_norm=limit, error_if_nonfinite=False)
    return full_tensor(norm)


def leaves_out_step(fabric: "Fabric", grad_norm: float, step: int) -> bool:
    """Whether the optimizer is about to leave out this step, since its gradient is not finite: in 16-mixed alone.

    There the loss is multiplied by a factor that begins at 2^16, and is halved by each step that is left out.

    Raises:
        InputError: the factor is below 1. What overflows now is the gradient itself, and no step would ever be taken.
    """
    if math.isfinite(grad_norm):
        return False
    scaler = fabric.strategy.precision.state_dict()
    if not scaler:  # another precision: see `clip_gradient`
        return False
    if scaler["scale"] < 1:
        check_finite(grad_norm, f"The norm of the gradient in step {step}, as in many before it,")
    return True


@torch.no_grad()
def evaluate(fabric: "Fabric", model: nn.Module, dataset: Dataset, args: TrainArgs) -> RecordScores:
    """The loss of each of the first `eval_records` records in nats per trained token; their mean is over all tokens.

    All processes must call it, and all get all losses.
    """
    # dropout is off here, so that prefixes can be shared even if training cannot share them
    share_prefixes = args.share_prefixes and not rotates_by_length(model)
    numbers = range(min(len(dataset), args.eval_records))
    groups = micro_batch_groups(
        dataset,
        numbers,
        args.micro_batch_size,
        rank=fabric.global_rank,
        world_size=fabric.world_size,
        share_prefixes=share_prefixes,
        micro_batch_tokens=args.micro_batch_tokens,
    )

    # the loss of each target, on the device: nothing waits for it between two passes
    model.eval()
    of_groups = []
    for group in groups:
        idx, layout = end_to_end(dataset, group, share_prefixes)
        idx = idx.to(fabric.device, non_blocking=True)
        of_targets = model(idx, layout=layout.to(fabric.device), judge=loss_of_each)
        of_groups.append((group, layout, of_targets))
    model.train()  # back to the mode in which a model is built, and trained

    # their sum for each record, in float64; zero where another device has it
    totals = torch.zeros(len(numbers), dtype=torch.float64)
    for group, layout, of_targets in of_groups:
        of_members = layout.split_by_record(of_targets.cpu().double())
        for member, number in enumerate(group):
            totals[number] = of_members[member].sum()
    if fabric.world_size > 1:
        totals = sum_over_devices(fabric, totals.to(fabric.device)).cpu()
    n_targets = [dataset.n_targets(number) for number in numbers]
    return losses(totals.tolist(), n_targets, ids_of_records([dataset[number] for number in numbers]))


def check_run(train_data: Dataset, val_data: Dataset, args: TrainArgs) -> None:
    """Checks what the settings need of the data; scripts do it before they read a weight, and `fit` once more.

    Raises:
        InputError: there is no learning rate, nothing to train on, nothing to be patient by, or see
            `check_one_micro_batch`.
    """
    if args.learning_rate is None:
        raise InputError("train.learning_rate is null, expected a number: this method has none of its own.")
    for name in ("patience", "metric", "watch_forgetting", "max_forgetting"):
        if getattr(args, name) and not len(val_data):
            raise InputError(f"train.{name} needs validation records, and there are none. Prepare the data with some.")
    if not len(train_data):
        raise InputError(
            "There are no training records: all went to validation. Prepare the data with a smaller fraction."
        )
    check_one_micro_batch(train_data, args)


def check_measures(args: TrainArgs, metric: "ValidationMetric | None", general_text: "GeneralText | None") -> None:
    """Raises InputError for a measure that is asked for and that the script does not hand over, such as a classifier's
    script: what it trains gives no answers and reads no text."""
    asked = {
        "metric": args.metric is not None and metric is None,
        "watch_forgetting": args.watch_forgetting and general_text is None,
        "max_forgetting": args.max_forgetting is not None and general_text is None,
    }
    for name, is_missing in asked.items():
        if is_missing:
            raise InputError(f"train.{name} is for models that write text, and this one does not. Leave it out.")


def check_one_micro_batch(train_data: Dataset, args: TrainArgs) -> None:
    """Raises InputError if a step has more than --train.micro_batch_tokens: an optimizer in backward adds nothing up.

    Where micro-batches have a number of records, the flags alone say it.
    """
    limit = args.micro_batch_tokens
    if not args.optimizer_in_backward or limit is None:
        return
    n = len(train_data)
    lengths = train_data.lengths()
    # a run that ends within its first epoch begins with the heaviest steps of it: see `heaviest_first`
    steps = max(args.steps(n), args.steps_per_epoch(n))
    sizes = []  # of the steps that could be split
    for step in range(steps):
        records = step_records(n, step, args.global_batch_size, args.seed)
        if len(records) > 1:
            sizes.append(int(lengths[records].sum()))
    most = max(sizes, default=0)
    if most > limit:
        raise InputError(
            "train.optimizer_in_backward cannot add up the gradients of several micro-batches: a step has"
            f" {most} tokens and a micro-batch up to {limit}, expected one for the whole step. Set"
            f" --train.micro_batch_tokens {most}, or a smaller --train.global_batch_size."
        )


def describe_run(fabric: "Fabric", model: nn.Module, train_data: Dataset, args: TrainArgs, progress: Progress) -> str:
    """What the run is about to do, in a line."""
    dtypes = sorted({str(param.dtype).removeprefix("torch.") for param in model.parameters()})
    n_trained = sum(param.numel() for param in model.parameters() if param.requires_grad)
    steps = args.steps(len(train_data)) - progress.step
    if steps <= 0:
        return f"The run is finished: it has done {counted(progress.step, 'step')}."
    line = (
        f"On {fabric.device}, weights in {' and '.join(dtypes)}. {n_trained:,} trained parameters."
        f" {counted(steps, 'step')} of up to {counted(args.global_batch_size, 'record')}; an epoch of"
        f" {counted(len(train_data), 'record')} is {counted(args.steps_per_epoch(len(train_data)), 'step')}."
    )
    if progress.step:
        line += f" Continuing after step {progress.step}."
    return line


def describe_best(log: Log, progress: Progress) -> str:
    """Which step `best` is of, if it is not the last one, for the end of a sentence."""
    step = log.best_step()
    if step is None or step == progress.step:
        return ""
    return f"; `best` is of step {step:,}" + (", before any training" if step == 0 else "")


def flags_for_more_steps(n_records: int, args: TrainArgs) -> str:
    """The flags to type where all the records make few steps; empty if there are enough, or the user has said when to
    stop."""
    if args.max_steps is not None or args.steps(n_records) >= args.enough_steps / 2:
        return ""
    # a few epochs will do, or smaller steps, too
    epochs = math.ceil(args.enough_steps / args.steps_per_epoch(n_records))
    if epochs <= 5 or args.global_batch_size <= 4:
        return f"--train.epochs {epochs}"
    epochs = math.ceil(args.enough_steps / math.ceil(n_records / 4))
    return f"--train.global_batch_size 4 --train.epochs {epochs}"


def obstacle_to_sharing(model: nn.Module) -> str | None:
    """The reason why records that begin with the same tokens cannot share them in training; None if they can."""
    if has_dropout(model):
        return "dropout does not treat a token alike in all its records"
    if rotates_by_length(model):
        return "this scaling of positions does not turn a token alike in all its records"
    return None


def has_dropout(model: nn.Module) -> bool:
    """Whether a layer sets random elements to zero in training."""
    return any(module.p > 0 for module in model.modules() if isinstance(module, nn.Dropout))
