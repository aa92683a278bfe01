"""--train.watch_forgetting and --train.max_forgetting: how far a model has moved from its base while it trains.

The measures are those of `forgetting.py`. What the base says is computed when a run starts or goes on, before its
trained weights are loaded, and kept in the host's memory: 2 bytes for each token of the text and each of the
vocabulary, 125 MB for 1,270 tokens of the sample model. Log-probabilities, and not the states that `forgetting.py`
keeps, since a model whose weights are split gives nothing else. So there is no second model, whatever the method.

A budget is held by the scale of the change: each validation of a model that is beyond it looks for the largest scale
that is within, and measures the model at that scale. Training knows nothing of it. To stop at the budget would be much
worse: tutorials/lora.md has figures.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import nn

from lit_gpt.config import Config
from lit_gpt.data.tokenizer import Tokenizer
from lit_gpt.errors import InputError
from lit_gpt.evaluation.forgetting import general_records, kl_divergence, log_probabilities, read_general_text
from lit_gpt.evaluation.record_losses import Record, eval_mode
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
            records: The paragraphs.
            method: Says how the change is scaled, if it can be.
            budget: The most that may be forgotten, in nats per token of KL.
        """
        self.records = records
        self.method = method
        self.budget = budget
        self.rows: list[Row] = []  # this device's

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
        self.rows = share_of_rows(self.records, fabric.global_rank, fabric.world_size)
        with eval_mode(model):
            for row in self.rows:
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


def share_of_rows(records: list[Record], rank: int, world_size: int) -> list[Row]:
    """This rank's paragraphs in rows of at most 512 tokens, or of one longer paragraph.

    Each rank has as many rows, since unequal numbers would deadlock; the last ones may be without a target.
    """
    groups: list[list[Record]] = []
    room = 0
    for record in records:
        n_tokens = len(record[0])
        if n_tokens > room:
            groups.append([])
            room = TOKENS_AT_ONCE
        groups[-1].append(record)
        room -= n_tokens
    no_target = (torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.bool))
    groups += (-len(groups) % world_size) * [[no_target]]
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
    return GeneralText(chosen, method, train.max_forgetting)
