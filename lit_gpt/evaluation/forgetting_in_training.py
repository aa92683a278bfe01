"""--train.watch_forgetting and --train.max_forgetting: how far a model has moved from its base while it trains.

The measures are those of `forgetting.py`. What the base says is computed when a run starts or goes on, before its
trained weights are loaded, and kept in the host's memory: 2 bytes for each token of the text and each of the
vocabulary, 125 MB for 1,270 tokens of the sample model. Log-probabilities, and not the states that `forgetting.py`
keeps, since a model whose weights are split gives nothing else. So there is no second model, whatever the method.

A budget is held twice. Each step adds the KL on two paragraphs to the loss, with a weight that rises slowly while it is
beyond the budget, and falls while it is within (dual ascent): a weight that followed fast made steps so rough that more
was forgotten, see tutorials/lora.md. What the term has seen says little about other texts: every other paragraph is
for the term, and the rest measure. And each validation of a model that is beyond the budget looks for the largest scale
of the change that is within, and measures the model at that scale; training knows nothing of that.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import nn

from lit_gpt.config import Config
from lit_gpt.data.dataset import empty_record, group_by_tokens
from lit_gpt.data.tokenizer import Tokenizer
from lit_gpt.errors import InputError
from lit_gpt.evaluation.forgetting import general_records, kl_divergence, log_probabilities, read_general_text
from lit_gpt.evaluation.record_losses import Record, eval_mode, length_of
from lit_gpt.model.gpt import GPT
from lit_gpt.model.packing import Layout
from lit_gpt.runs.methods import Method
from lit_gpt.sharding import SPLIT_FLAG, is_sharded, let_go_of_wholes, sum_over_devices

if TYPE_CHECKING:
    from lightning_fabric import Fabric

    from lit_gpt.train import TrainArgs

TOKENS_OF_TEXT = 2048  # of a text are read; with 128,000 tokens in the vocabulary what is kept takes 524 MB
TOKENS_AT_ONCE = 512  # in a forward pass, or a longer paragraph alone
HALVINGS = 6  # of the scales between 0 and 1: the last two are 1/64 apart
PER_STEP = 2  # paragraphs of the term
RATE = 0.05  # by which the logarithm of the weight follows, in each step
LEAST_EXCESS = -0.5  # of the KL over the budget, as a share of it, that the weight follows
MOST_EXCESS = 1.0


@dataclass
class Row:
    """Paragraphs end to end in a row of tokens, and what the base says to them."""

    idx: torch.Tensor  # (1, T)
    layout: Layout
    base: torch.Tensor | None = None  # log-probabilities, float16 (N, V), on the host


class GeneralText:
    """A text by which a run measures what it forgets, and holds it within a budget if there is one.

    The paragraphs are shared among the devices. All processes must call what computes.
    """

    def __init__(self, records: list[Record], method: Method, budget: float | None = None) -> None:
        """
        Args:
            records: The paragraphs. With a budget every other one is for the term, and is not measured on.
            method: Says how the change is scaled, if it can be.
            budget: The most that may be forgotten, in nats per token of KL.
        """
        self.records = records if budget is None else records[1::2]
        self.records_of_term = [] if budget is None else records[0::2]
        self.method = method
        self.budget = budget
        self.rows: list[Row] = []  # this device's
        self.rows_of_term: list[Row] = []  # one for each paragraph of the term, empty if another device has it

    @torch.no_grad()
    def remember_base(self, fabric: "Fabric", model: nn.Module) -> None:
        """Keeps what a model says to the text, before anything has been trained.

        Raises:
            InputError: the budget would scale norms, and they are split among devices.
        """
        trains_norms = self.method.filter("transformer.ln_f.weight", None)
        if self.budget is not None and self.method.scale is not None and trains_norms and is_sharded(fabric):
            raise InputError(
                f"train.max_forgetting cannot scale norms that are split among devices, and {self.method.title} trains"
                f" them. Leave out {SPLIT_FLAG}."
            )
        rank, world_size = fabric.global_rank, fabric.world_size
        self.rows = share_of_rows(group_by_tokens(self.records, length_of, TOKENS_AT_ONCE), rank, world_size)
        for i, record in enumerate(self.records_of_term):
            own = record if i % world_size == rank else empty_record()
            self.rows_of_term.append(Row(*Layout.end_to_end([own])))
        with eval_mode(model):
            for row in (*self.rows, *self.rows_of_term):
                idx, layout = row.idx.to(fabric.device), row.layout.to(fabric.device)
                row.base = model(idx, layout=layout, judge=half_log_probabilities).cpu()
        let_go_of_wholes(model)  # weights that a run goes on with may be loaded next

    @torch.no_grad()
    def measure(self, fabric: "Fabric", model: nn.Module) -> tuple[float, float]:
        """The mean loss of the text, and the mean KL of the model to the base, in nats per token."""
        total = torch.zeros(3, device=fabric.device)  # summed loss, summed KL, and of how many tokens
        with eval_mode(model):
            for row in self.rows:
                assert row.base is not None, "`remember_base` comes first"
                idx, layout = row.idx.to(fabric.device), row.layout.to(fabric.device)
                total[:2] += model(idx, layout=layout, judge=AgainstBase(row.base)).sum(0)
                total[2] += layout.n_targets
        loss, kl, n_targets = sum_over_devices(fabric, total).tolist()
        return loss / n_targets, kl / n_targets

    def term(self, fabric: "Fabric", model: nn.Module, step: int) -> torch.Tensor:
        """The mean KL on the next paragraphs, a scalar with its gradient: this device's part of it.

        The paragraphs take turns, by the step alone, and the parts of all devices add up.
        """
        n = len(self.rows_of_term)
        chosen = sorted({(PER_STEP * step + i) % n for i in range(PER_STEP)})
        n_targets = sum(len(self.records_of_term[i][0]) - 1 for i in chosen)
        total = torch.zeros((), device=fabric.device)
        for i in chosen:
            row = self.rows_of_term[i]
            assert row.base is not None, "`remember_base` comes first"
            idx, layout = row.idx.to(fabric.device), row.layout.to(fabric.device)
            total = total + model(idx, layout=layout, judge=AgainstBase(row.base))[:, 1].sum()
        return total / n_targets

    def next_weight(self, weight: float, kl: float) -> float:
        """The weight of the term in the next step, after one in which the KL was `kl`; as it is without a budget."""
        if self.budget is None:
            return weight
        excess = kl / self.budget - 1
        return weight * math.exp(RATE * max(LEAST_EXCESS, min(MOST_EXCESS, excess)))

    @contextmanager
    def within_budget(self, fabric: "Fabric", model: nn.Module, unwrapped: nn.Module) -> Iterator[dict[str, float]]:
        """Within it the change is scaled down as far as the budget demands; after it all weights are what they were.

        Gives what was measured, by the names of columns of metrics.csv. `unwrapped` is the model inside of `model`.
        """
        loss, kl = self.measure(fabric, model)
        if self.budget is None:
            yield {"general_loss": loss, "general_kl": kl}
            return
        if kl <= self.budget or self.method.scale is None:
            yield {"general_loss": loss, "general_kl": kl, "scale": 1.0}
            return

        # the largest scale that is within the budget, between one that is and one that is not
        gpt = cast(GPT, unwrapped)
        within = 0.0
        beyond = 1.0
        for _ in range(HALVINGS):
            middle = (within + beyond) / 2
            with weights_scaled(gpt, self.method, middle):
                _, kl = self.measure(fabric, model)
            if kl <= self.budget:
                within = middle
            else:
                beyond = middle

        with weights_scaled(gpt, self.method, within):
            loss, kl = self.measure(fabric, model)
            yield {"general_loss": loss, "general_kl": kl, "scale": within}


@contextmanager
def weights_scaled(model: GPT, method: Method, scale: float) -> Iterator[None]:
    """Within it the trained weights have this scale themselves, so that they can be saved; then they are as before."""
    assert method.scale is not None and method.fix_scale is not None, "the method cannot be scaled"
    let_go_of_wholes(model)
    trained = [param for name, param in model.named_parameters() if method.filter(name, param)]
    before = [param.detach().clone() for param in trained]
    method.scale(model, scale)
    method.fix_scale(model)
    try:
        yield
    finally:
        let_go_of_wholes(model)
        with torch.no_grad():
            for param, values in zip(trained, before, strict=True):
                param.copy_(values)


class AgainstBase:
    """A `model.loss.Judge` of one row of tokens: for each target its loss, and the KL to what the base said, (n, 2)."""

    def __init__(self, base: torch.Tensor) -> None:
        """`base` (N, V) are the log-probabilities of the base."""
        self.base = base
        self.n_judged = 0  # the model hands over its logits in pieces

    def __call__(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        base = self.base[self.n_judged : self.n_judged + len(target)]
        self.n_judged += len(target)
        # normalized anew: rounded to float16, they add up to 1 no longer
        base_log_p = log_probabilities(base.to(logits.device).float())
        log_p = log_probabilities(logits)
        loss = -log_p.gather(-1, target[:, None]).squeeze(-1)
        return torch.stack((loss, kl_divergence(base_log_p, log_p)), dim=-1)


def half_log_probabilities(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """A `model.loss.Judge`: the log-probabilities of all tokens, float16 (n, V)."""
    return log_probabilities(logits).half()


def share_of_rows(groups: list[list[Record]], rank: int, world_size: int) -> list[Row]:
    """This rank's groups, each in a row of tokens.

    Each rank has as many rows, since unequal numbers would deadlock; the last ones may be without a target.
    """
    groups = groups + (-len(groups) % world_size) * [[empty_record()]]
    return [Row(*Layout.end_to_end(group)) for group in groups[rank::world_size]]


def general_text_of(train: "TrainArgs", tokenizer: Tokenizer, config: Config, method: Method) -> GeneralText | None:
    """The first 2,048 tokens of the text that --train.general_text names, or of our own; None if nobody asks for one.

    Raises:
        InputError: there is no such file, or nothing in it to predict.
    """
    if not train.watches_forgetting:
        return None
    chosen: list[Record] = []
    room = TOKENS_OF_TEXT
    for ids, trained in general_records(read_general_text(train.general_text), tokenizer, config.block_size):
        if room > 1:
            chosen.append((ids[:room], trained[:room]))
            room -= len(ids)
    if train.max_forgetting is not None and len(chosen) == 1:
        raise InputError(
            "The general text has one paragraph, but train.max_forgetting needs two: one to hold, and one to measure."
            " Part it by an empty line."
        )
    return GeneralText(chosen, method, train.max_forgetting)
