"""Training one classifier, from the base model to its scores: the acts of finetune/lora.py, for a head of classes."""

import time
from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lit_gpt.checkpoint.load import build_model, load_weights
from lit_gpt.classifier.cached_states import cached_rows
from lit_gpt.classifier.calibration import Calibration, calibrate, log_softmax
from lit_gpt.classifier.features import compute_logits, fit_logistic_regression, fit_standardize
from lit_gpt.classifier.head import (
    Classifier,
    ClassifierArgs,
    TrainedClassifier,
    class_weights,
    default_learning_rate,
    mark_trainable,
)
from lit_gpt.classifier.load import new_classifier_checkpoints, save_with_temperature
from lit_gpt.classifier.scores import Scores, score_log_probabilities
from lit_gpt.classifier.texts import ClassifierData, Texts
from lit_gpt.config import Config
from lit_gpt.data.tokenizer import Tokenizer
from lit_gpt.device import weight_dtype
from lit_gpt.lora import LoRA, apply_lora
from lit_gpt.quantize import Quantize, quantize_linears
from lit_gpt.recipe import LaunchArgs, recompute_or_compile_blocks
from lit_gpt.runs.overwrite import drop_earlier_run
from lit_gpt.train import TrainArgs, fit

if TYPE_CHECKING:
    from lightning_fabric import Fabric


@dataclass(frozen=True)
class ClassifierTrainArgs(TrainArgs):
    """The optimizer, the schedule, the batch and the intervals; without a learning rate, that of the method."""

    learning_rate: float | None = None
    """Peak of the schedule: linear warmup, then half a cosine down to min_learning_rate at the last step. None is the
    method's own: 1.7 / width for head (3e-3 for the sample model), 3e-3 / sqrt(k) for last_k, LoRA's for lora and
    qlora, 3e-4 for full."""

    enough_steps = 0  # no setting: a head learns in a few steps, and no run gets a remark

    def for_method(self, classifier: ClassifierArgs, config: Config) -> "ClassifierTrainArgs":
        """The same with a learning rate: the method's own, unless there is one."""
        return self.or_learning_rate(default_learning_rate(classifier, config.n_embd))


def train_classifier(
    classifier: ClassifierArgs,
    seed: int,
    folder: Path,
    *,
    fabric: "Fabric",
    config: Config,
    tokenizer: Tokenizer,
    data: ClassifierData,
    depths: Collection[int],
    args: LaunchArgs,
    lora: LoRA,
    quantize: Quantize | None,
    train: ClassifierTrainArgs,
    n_labels: int | None = None,
) -> Scores:
    """Trains a classifier, saves it in `folder`, and returns its scores on the test texts, or on those that this seed
    sets aside if there are none.

    `depths` are the blocks whose inputs are computed once for all classifiers of the run; see `cached_rows`. With
    `n_labels` so many labels are all that it learns from: no others choose `best` or fit a temperature.
    """
    began = time.perf_counter()
    train = train.for_method(classifier, config)
    train_data, val_data, scored_data = data.split(seed)
    if n_labels is not None:
        train_data = data.first_labels(train_data, n_labels, seed)
        val_data = val_data.choose(val_data.records[:0])

    # build, quantize, load, adapt
    gpt = build_model(config)
    quantize_linears(gpt, quantize)
    dtype = weight_dtype(args.precision)
    base = load_weights(gpt, args.checkpoint_dir, dtype, fabric.device)
    if classifier.uses_lora:
        apply_lora(gpt, lora)
    weights = class_weights(train_data.labels, classifier.balanced)
    model = Classifier(gpt, len(data.labelled.names), classifier, weights)
    mark_trainable(model, classifier)

    # below the first trained block nothing changes: its input is computed once, and kept
    seconds = 0.0
    first_block = classifier.first_trained_block(config.n_layer)
    if first_block > 0:
        rows, seconds = cached_rows(
            file=args.out_dir / "hidden.safetensors",
            base=base,
            model=model,
            texts=data.texts,
            depths=depths,
            depth=first_block,
            batch_size=train.micro_batch_size,
        )
        began = time.perf_counter()  # the pass counts as `seconds`, whether it was made now or by another classifier

    # how the blocks run, while all of them are there; then only the trained ones stay, and read rows in place of tokens
    recompute_or_compile_blocks(gpt, args)
    if first_block > 0:
        model.start_from(first_block, rows)
        pooled = first_block == config.n_layer
        train_data = train_data.as_row_numbers(pooled)
        val_data = val_data.as_row_numbers(pooled)
        scored_data = scored_data.as_row_numbers(pooled)
    if not classifier.trains_blocks:
        fit_standardize(model, train_data, train.micro_batch_size)

    # what it writes: `last` and `best`, with all that is needed to build the classifier again
    trained = TrainedClassifier(
        args=asdict(classifier),
        lora=asdict(lora),
        names=data.labelled.names,
        max_seq_length=data.max_seq_length,
    )
    checkpoints = new_classifier_checkpoints(folder, model, trained, args.checkpoint_dir, base, tokenizer)

    # train
    if classifier.method == "features":
        fit_logistic_regression(model, train_data, train.micro_batch_size)
    else:
        fit(
            fabric,
            model,
            train_data,
            val_data,
            train,
            checkpoints,
            resume=args.resume,
            optimizer_path=args.optimizer,
        )
        checkpoints.load("best")
    model.eval()

    # how sure it is: a temperature by the validation texts, kept with the weights
    calibration = None
    if n_labels is None:
        calibration = calibrate_classifier(model, data, val_data, scored_data, train.micro_batch_size, seed)
    save_with_temperature(checkpoints, trained, calibration.temperature if calibration else 1.0)
    drop_earlier_run()

    # score
    if calibration is None:
        log_probabilities = log_softmax(compute_logits(model, scored_data, train.micro_batch_size))
    else:
        log_probabilities = calibration.after
    return score_log_probabilities(
        scored_data.labels,
        log_probabilities,
        ids=[data.ids[i] for i in scored_data.records],
        trained=sum(param.numel() for param in model.parameters() if param.requires_grad),
        seconds=seconds + time.perf_counter() - began,
        calibration=calibration,
    )


def calibrate_classifier(
    model: Classifier, data: ClassifierData, val_data: Texts, scored_data: Texts, batch_size: int, seed: int
) -> Calibration:
    """The temperature of a trained classifier by its validation texts, and what it does to the scored ones."""
    is_scored = np.array_equal(val_data.records, scored_data.records)
    return calibrate(
        val_logits=compute_logits(model, val_data, batch_size),
        val_labels=val_data.labels,
        scored_logits=None if is_scored else compute_logits(model, scored_data, batch_size),
        val_texts=[data.labelled.texts[i] for i in val_data.records],
        seed=seed,
    )
