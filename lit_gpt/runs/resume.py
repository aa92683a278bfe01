"""Where a run stands: what is saved to go on with it, and what is checked before it goes on.

`runs/out_dir.py` compares the settings of the two runs, `runs/saves.py` reads and writes the weights and the
optimizer, and this file knows the position in the data and the schedule.
"""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from lit_gpt.data.dataset import Dataset
from lit_gpt.distributed import check_alike
from lit_gpt.errors import InputError
from lit_gpt.runs.best import is_better
from lit_gpt.sharding import local_tensor, sum_over_devices

if TYPE_CHECKING:
    from lightning_fabric import Fabric

    from lit_gpt.runs.saves import Checkpoints
    from lit_gpt.train import TrainArgs


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
    """The loss of the best of all validations, which is that of `best`."""
    best_metric: float = -math.inf
    """Its metric, with --train.metric."""
    best_for_patience: float = math.inf
    """The loss of the best of those that a run has which is never stopped."""
    best_metric_for_patience: float = -math.inf
    """Its metric."""
    evals_without_gain: int = 0
    """How many of those came after it."""
    kl_weight: float = 3.0
    """The weight of the KL to the base in the loss, with --train.max_forgetting."""
    scaler: dict[str, Any] = field(default_factory=dict)
    """The scale of the loss under 16-true and 16-mixed; empty under the others."""

    def note_validation(
        self, loss: float, metric: float | None = None, within_budget: bool = True, extra: bool = False
    ) -> bool:
        """Remembers a validation. Returns whether it is the best so far, which one beyond the budget never is.

        An `extra` one, which there is because the run stops here for a while, is nothing to be patient by: the run
        ends where it would have ended without the stop.
        """
        is_gain = within_budget and is_better(loss, metric, self.best_for_patience, self.best_metric_for_patience)
        if not extra and is_gain:
            self.best_for_patience = loss
            self.best_metric_for_patience = -math.inf if metric is None else metric
            self.evals_without_gain = 0
        elif not extra:
            self.evals_without_gain += 1
        is_best = within_budget and is_better(loss, metric, self.best_val_loss, self.best_metric)
        if is_best:
            self.best_val_loss = loss
            self.best_metric = -math.inf if metric is None else metric
        return is_best

    def out_of_patience(self, patience: int | None) -> bool:
        return patience is not None and self.evals_without_gain >= patience


def start_or_resume(
    fabric: "Fabric",
    checkpoints: "Checkpoints",
    optimizer: torch.optim.Optimizer,
    train_data: Dataset,
    args: "TrainArgs",
    resume: bool,
) -> Progress:
    """Step 0 of a new run; or, to resume, the progress that `last` holds, with the weights and the optimizer put back.

    Raises:
        InputError: the saved run had other data, another batch size or another seed; machines have not the same files;
            or see `Checkpoints.resume`.
    """
    new_run = Progress(data_fingerprint(train_data), args.global_batch_size, args.seed)

    # what a killed process left half-written is cleared away before anybody reads
    if fabric.is_global_zero:
        checkpoints.recover()
    fabric.barrier()

    # each machine may have disks of its own
    facts = {
        "The fingerprint of the base in --checkpoint_dir": checkpoints.header.base[:12],
        "The fingerprint of the training records in --data_dir": new_run.data[:12],
    }
    if resume:
        is_there = (checkpoints.out_dir / "last").is_dir()
        facts["`last`, from which the run in --out_dir is to go on,"] = "there" if is_there else "not there"
    check_alike(fabric, facts)

    # the weights and the optimizer, put back; nothing if the run was killed before its first save
    saved = checkpoints.resume(optimizer) if resume else None
    if saved is None:
        return new_run

    # the position in the data and the schedule
    progress = Progress(**saved)
    check_alike(fabric, {"The step of `last` in --out_dir": progress.step})
    check_same_batches(progress, new_run)
    if progress.scaler:
        fabric.strategy.precision.load_state_dict(progress.scaler)
    return progress


def check_same_batches(saved: Progress, new_run: Progress) -> None:
    """Raises InputError where the saved run drew its batches from other records: some would be skipped or repeated."""
    names = ("data", "global_batch_size", "seed")
    changed = [name for name in names if getattr(saved, name) != getattr(new_run, name)]
    if changed:
        raise InputError(
            f"The saved run had another {' and another '.join(changed)}. Resume with the settings of"
            " hyperparameters.yaml, or start anew with --overwrite."
        )


def save_progress(
    fabric: "Fabric",
    checkpoints: "Checkpoints",
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    keep_steps: bool = False,
) -> None:
    """Saves `last`, from which the run can go on; with `keep_steps` also the weights of this step.

    Raises:
        InputError: a trained weight is not finite. That shows here, and not in the next step's loss.
    """
    # a weight that is not finite on any device must not replace the last good save
    is_finite = all(torch.isfinite(local_tensor(param)).all() for param in trained_params(optimizer))
    n_not_finite = torch.tensor(float(not is_finite), device=fabric.device)
    if sum_over_devices(fabric, n_not_finite):
        raise not_finite(f"A trained weight after step {progress.step}", math.nan)

    progress.scaler = fabric.strategy.precision.state_dict()
    if keep_steps:  # before `last`: a run killed in between comes by here again
        checkpoints.save(f"step-{progress.step:06d}")
    checkpoints.save_state("last", optimizer, asdict(progress))
    fabric.barrier()


def trained_params(optimizer: torch.optim.Optimizer) -> Iterator[torch.nn.Parameter]:
    """The parameters that an optimizer changes."""
    for group in optimizer.param_groups:
        yield from group["params"]


def check_finite(value: float, what: str) -> None:
    """Raises InputError if a loss is NaN or infinite."""
    if not math.isfinite(value):
        raise not_finite(what, value)


def not_finite(what: str, value: float) -> InputError:
    """The error that ends a run in which numbers have become NaN or infinite."""
    return InputError(
        f"{what} is {value}. Lower --train.learning_rate, or choose another --precision; `last` and `best` are as"
        " they were saved before."
    )


def data_fingerprint(dataset: Dataset) -> str:
    """sha256 over which records these are, where they lie, and the hash of what `prepare` made them from.

    Records that `prepare` did not write have no such hash: for them it is over their tokens and marks.
    """
    digest = hashlib.sha256(dataset.meta.get("hash", "").encode())
    arrays = [dataset.records, dataset.ends]
    if "hash" not in dataset.meta:
        arrays += [dataset.tokens, dataset.trained]
    for array in arrays:
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
