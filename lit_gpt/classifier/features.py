"""TODO doc of classifier.features"""

from collections.abc import Callable, Iterator
from importlib.util import find_spec

import numpy as np
import torch

from lit_gpt.classifier.head import Classifier
from lit_gpt.classifier.texts import Texts
from lit_gpt.data.dataset import Dataset
from lit_gpt.errors import InputError
from lit_gpt.model.packing import Layout


def in_batches(dataset: Dataset, size: int) -> Iterator[tuple[np.ndarray, torch.Tensor, Layout]]:
    """(which records, their tokens, their layout): each record once, like lengths together."""
    order = np.argsort([dataset.length(i) for i in range(len(dataset))], kind="stable")
    for start in range(0, len(order), size):
        chosen = order[start : start + size]
        yield chosen, *Layout.end_to_end([dataset[i] for i in chosen])


@torch.inference_mode()
def compute(of: Callable[[torch.Tensor, Layout], torch.Tensor], dataset: Dataset, size: int) -> np.ndarray:
    """What `of` (a classifier's `logits` or `features`) gives for each record, (len(dataset), ...) float32."""
    device = of.__self__.head[-1].weight.device
    rows: list[np.ndarray] = [None] * len(dataset)
    for chosen, idx, layout in in_batches(dataset, size):
        for i, row in zip(chosen, of(idx.to(device), layout.to(device)).float().cpu().numpy(), strict=True):
            rows[i] = row
    return np.stack(rows)


def check_scikit_learn() -> None:
    """Raises InputError where it is not installed."""
    if find_spec("sklearn") is None:
        raise InputError("--method features and --sweep need scikit-learn: pip install -e '.[classify]'")


@torch.no_grad()
def fit_logistic_regression(model: Classifier, train_data: Texts, size: int) -> None:
    """Sets the head to a logistic regression on the standardized features of these texts."""
    from sklearn.linear_model import LogisticRegression

    features = compute(model.features, train_data, size).astype(np.float64)
    mean, std = features.mean(0), features.std(0) + 1e-6
    found = LogisticRegression(max_iter=2000, class_weight="balanced" if model.class_weights is not None else None)
    found.fit((features - mean) / std, train_data.labels)
    weight, bias = found.coef_ / std, found.intercept_ - found.coef_ @ (mean / std)
    if len(weight) == 1:  # two classes have one row: the logit of the second
        weight, bias = np.concatenate([0 * weight, weight]), np.concatenate([0 * bias, bias])
    model.head[-1].weight.copy_(torch.from_numpy(weight))
    model.head[-1].bias.copy_(torch.from_numpy(bias))
