"""Using a trained classifier again."""

from pathlib import Path

import torch

from lit_gpt.classifier.head import Classifier, ClassifierArgs, TrainedClassifier, mark_trainable
from lit_gpt.data.tokenizer import Tokenizer
from lit_gpt.errors import InputError
from lit_gpt.lora import LoRA, apply_lora, lora_filter
from lit_gpt.model.gpt import GPT
from lit_gpt.runs.finetuned import is_peft, load_finetuned, read_description
from lit_gpt.runs.methods import Method


def as_classifier(model: GPT, trained: TrainedClassifier) -> Classifier:
    args = ClassifierArgs(**trained.args)
    if args.uses_lora:
        apply_lora(model, LoRA(**trained.lora))
    classifier = Classifier(model, len(trained.names), args)
    mark_trainable(classifier, args, lora_filter)
    return classifier


def requires_grad(key: str, value: torch.Tensor) -> bool:
    return value.requires_grad


CLASSIFIER = Method("classifier", "Classifier", TrainedClassifier, "classifier", as_classifier, requires_grad)


def load_classifier(
    checkpoint_dir: Path | None, finetuned_dir: Path, dtype: torch.dtype | None, device: torch.device | None
) -> tuple[Classifier, Tokenizer, TrainedClassifier]:
    """A classifier, its tokenizer, and what it was trained to do.

    Raises:
        InputError: see `load_finetuned`; or no classifier was trained there.
    """
    methods = {CLASSIFIER.name: CLASSIFIER}
    if is_peft(finetuned_dir) or read_description(finetuned_dir).method != CLASSIFIER.name:
        raise InputError(f"{finetuned_dir} holds no classifier: use generate/base.py.")
    model, description = load_finetuned(checkpoint_dir, finetuned_dir, dtype, device, methods=methods)
    return model, Tokenizer(checkpoint_dir or description.checkpoint_dir), TrainedClassifier(**description.settings)
