"""The outputs of a classifier for all records of a dataset, and the logistic regression that is fitted to them."""

from collections.abc import Callable, Iterator
from typing import cast

import numpy as np
import torch

from lit_gpt.classifier.head import Classifier, Standardize
from lit_gpt.classifier.texts import Texts
from lit_gpt.data.dataset import Dataset
from lit_gpt.model.packing import Layout
from lit_gpt.packages import require


def in_batches(dataset: Dataset, batch_size: int) -> Iterator[tuple[np.ndarray, torch.Tensor, Layout]]:
    """Each record once: (the numbers of up to `batch_size` records, their tokens (1, T), their layout).

    Records of like lengths come together.
    """
    order = np.argsort(dataset.lengths(), kind="stable")
    for start in range(0, len(order), batch_size):
        numbers = order[start : start + batch_size]
        records = [dataset[i] for i in numbers]
        idx, layout = Layout.end_to_end(records)
        yield numbers, idx, layout


def compute_features(model: Classifier, dataset: Texts, batch_size: int) -> np.ndarray:
    """The hidden state of each record, (len(dataset), C) float32."""
    return compute_each(model.features, model, dataset, batch_size)


def fit_standardize(model: Classifier, train_data: Texts, batch_size: int) -> None:
    """Standardizes features by those of these texts, before any head is trained on them."""
    features = compute_features(model, train_data, batch_size)
    cast(Standardize, model.standardize).fit(torch.from_numpy(features))


def compute_logits(model: Classifier, dataset: Texts, batch_size: int) -> np.ndarray:
    """The logits of each record, (len(dataset), n_classes) float32."""
    return compute_each(model.logits, model, dataset, batch_size)


def compute_probabilities(model: Classifier, dataset: Texts, batch_size: int, temperature: float) -> np.ndarray:
    """The probability of each class for each record, (len(dataset), n_classes) float32."""
    logits = torch.from_numpy(compute_logits(model, dataset, batch_size))
    return (logits / temperature).softmax(1).numpy()


@torch.inference_mode()
def compute_each(
    function: Callable[[torch.Tensor, Layout], torch.Tensor], model: Classifier, dataset: Texts, batch_size: int
) -> np.ndarray:
    """The rows (N, ...) that a function of `model` gives for batches, in the order of the dataset and as float32."""
    device = model.output_layer.weight.device
    order = []
    parts = []
    for numbers, idx, layout in in_batches(dataset, batch_size):
        rows = function(idx.to(device), layout.to(device))
        order.append(numbers)
        parts.append(rows.float().cpu().numpy())

    # batches came by length: back to the order of the dataset
    rows_by_length = np.concatenate(parts)
    in_order = np.empty_like(rows_by_length)
    in_order[np.concatenate(order)] = rows_by_length
    return in_order


def require_scikit_learn() -> None:
    """Raises InputError if it is not installed."""
    require("sklearn", "classify", "A logistic regression (--method features, --sweep or --labels_curve)")


@torch.no_grad()
def fit_logistic_regression(model: Classifier, train_data: Texts, batch_size: int) -> None:
    """Sets the head to a logistic regression on the standardized features of these texts."""
    from sklearn.linear_model import LogisticRegression

    # standardized features, (n, C)
    features = torch.from_numpy(compute_features(model, train_data, batch_size))
    features = model.standardize(features.to(model.output_layer.weight))
    class_weight = None if model.class_weights is None else "balanced"
    regression = LogisticRegression(max_iter=2000, class_weight=class_weight)
    regression.fit(features.double().cpu().numpy(), train_data.labels)

    weight = regression.coef_
    bias = regression.intercept_
    if len(weight) == 1:  # of two classes scikit-learn keeps one row, the logit of the second; the first is 0
        weight = np.concatenate([0 * weight, weight])
        bias = np.concatenate([0 * bias, bias])
    model.output_layer.weight.copy_(torch.from_numpy(weight))
    model.output_layer.bias.copy_(torch.from_numpy(bias))
