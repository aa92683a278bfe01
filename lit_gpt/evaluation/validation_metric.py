"""--train.metric: answers to validation records, judged while a run trains, so that `best` is best at what counts."""

from typing import TYPE_CHECKING, cast

import torch
from torch import nn

from lit_gpt.data.dataset import Dataset
from lit_gpt.data.tokenizer import Tokenizer
from lit_gpt.evaluation.metrics import EXPECTED, PROMPT, Metric, read_metric
from lit_gpt.generate.answers import answers
from lit_gpt.model.gpt import GPT
from lit_gpt.sharding import is_sharded, sum_over_devices

if TYPE_CHECKING:
    from lightning_fabric import Fabric

    from lit_gpt.train import TrainArgs


class ValidationMetric:
    """The mean of a metric over the greedy answers to the first n records of a dataset.

    An answer may be twice as long as the longest that is expected: a model that does not stop would else take most of
    the time of a validation, with tokens that make no answer right.
    """

    def __init__(self, metric: Metric, tokenizer: Tokenizer, dataset: Dataset, n: int) -> None:
        self.metric = metric
        self.tokenizer = tokenizer
        self.dataset = dataset
        self.n = min(n, len(dataset))
        expected = [len(dataset.question(i)[1]) for i in range(self.n)]
        self.max_new_tokens = 2 * max(expected, default=1)

    @property
    def name(self) -> str:
        return self.metric.name

    def measure(self, fabric: "Fabric", model: nn.Module) -> float:
        """The mean, by answers of the first process, or of all if the model is split. All processes must call it."""
        total = 0.0
        if fabric.is_global_zero or is_sharded(fabric):
            gpt = cast(GPT, model)
            answered = answers(gpt, self.tokenizer, self.dataset, self.n, self.max_new_tokens, quiet=True)
            for i, one in enumerate(answered):
                record = {PROMPT: one.question, EXPECTED: one.expected}
                total += self.metric.judge(record, one.answer, f"validation record {i}")
        if fabric.world_size > 1:
            own = total if fabric.is_global_zero else 0.0
            total = sum_over_devices(fabric, torch.tensor(own, dtype=torch.float64, device=fabric.device)).item()
        return total / self.n


def validation_metric(train: "TrainArgs", tokenizer: Tokenizer, val_data: Dataset) -> ValidationMetric | None:
    """The metric that --train.metric names; None if it names none.

    Raises:
        InputError: there is no such metric, see `read_metric`.
    """
    if train.metric is None:
        return None
    return ValidationMetric(read_metric(train.metric), tokenizer, val_data, train.metric_records)
