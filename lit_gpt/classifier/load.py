"""A classifier in files: `last` and `best` of its run, and the model that is built from them again.

`CLASSIFIER` is to classifiers what a line of `runs/methods.py` is to a method that writes text. It is handed to
`Checkpoints` and `load_finetuned` from here, since runs know no classifier.
"""

from dataclasses import asdict, replace
from pathlib import Path
from typing import cast

import torch

from lit_gpt.classifier.head import Classifier, ClassifierArgs, TrainedClassifier, mark_trainable
from lit_gpt.data.tokenizer import Tokenizer
from lit_gpt.errors import InputError
from lit_gpt.lora import LoRA, apply_lora
from lit_gpt.model.gpt import GPT
from lit_gpt.quantize import quantization
from lit_gpt.runs.header import Header, is_peft, read_header
from lit_gpt.runs.load_finetuned import load_finetuned
from lit_gpt.runs.methods import Method
from lit_gpt.runs.saves import Checkpoints


def as_classifier(model: GPT, trained: TrainedClassifier) -> Classifier:
    """A classifier around a base model, changed in place, as it was before its trained weights are loaded."""
    args = ClassifierArgs(**trained.args)
    if args.uses_lora:
        apply_lora(model, LoRA(**(trained.lora or {})))
    classifier = Classifier(model, len(trained.names), args)
    mark_trainable(classifier, args)
    return classifier


def is_saved(key: str, value: torch.Tensor) -> bool:
    """Whether a parameter is saved: a classifier keeps those that its own method trains, and how it standardizes."""
    # not by its name alone, as in runs/methods.py: which names train depends on --method and --k
    return value.requires_grad or key.startswith("standardize.")


CLASSIFIER = Method(
    name="classifier",
    title="Classifier",
    settings=TrainedClassifier,
    flag="classifier",
    apply=as_classifier,
    filter=is_saved,
)


def new_classifier_checkpoints(
    folder: Path,
    model: Classifier,
    trained: TrainedClassifier,
    checkpoint_dir: Path,
    base: str,
    tokenizer: Tokenizer,
) -> Checkpoints:
    """The folders `last` and `best` of a classifier's run. `base` is the fingerprint of the model's weights."""
    settings = asdict(trained)
    del settings["temperature"]  # found at the end, and no part of what a run goes on by
    header = Header(
        method=CLASSIFIER.name,
        settings=settings,
        checkpoint_dir=str(checkpoint_dir),
        base=base,
        tokenizer=tokenizer.fingerprint,
        prompt_style="none",  # texts are classified as they are
        quantize=quantization(model.gpt),
    )
    return Checkpoints(folder, model, header, CLASSIFIER)


def save_with_temperature(checkpoints: Checkpoints, trained: TrainedClassifier, temperature: float) -> None:
    """Saves the weights that the model has as `best`, with the temperature that suits them."""
    settings = asdict(replace(trained, temperature=temperature))
    checkpoints.header = replace(checkpoints.header, settings=settings)
    checkpoints.save("best")


def load_classifier(
    checkpoint_dir: Path | None,
    finetuned_dir: Path,
    dtype: torch.dtype | None,
    device: torch.device | None,
) -> tuple[Classifier, Tokenizer, TrainedClassifier]:
    """A trained classifier, its tokenizer, and what it was trained to do.

    `checkpoint_dir` None is the base that it was trained on.

    Raises:
        InputError: see `load_finetuned`; or no classifier was trained there.
    """
    if is_peft(finetuned_dir) or read_header(finetuned_dir).method != CLASSIFIER.name:
        raise InputError(f"{finetuned_dir} holds no classifier: use generate/base.py.")
    methods = {CLASSIFIER.name: CLASSIFIER}
    model, header = load_finetuned(checkpoint_dir, finetuned_dir, dtype, device, methods=methods)
    tokenizer = Tokenizer(checkpoint_dir or header.checkpoint_dir)
    # the base model as `CLASSIFIER.apply` returned it
    classifier = cast(Classifier, model)
    return classifier, tokenizer, TrainedClassifier(**header.settings)
