"""Forgetting: how far a model is from its base on a general text, which has nothing to do with the data.

Two measures, each in nats per token, for every paragraph of the text:

    loss              -log p(token): it rises by as much as the text has become less likely
    KL to the base    sum over the vocabulary of p_base log(p_base / p): how differently the model predicts at all

The loss may fall while a model forgets: most data teach something about any text. The KL divergence is 0 for the base
alone. It is by how much the loss rises on a text that the base itself writes.

The base need not be in memory beside the model. `remember_base` keeps its last hidden states, 2 KB a token where its
log-probabilities would be 200, and the head that makes these of those:

    with lora_scaled(model, 0):                    LoRA and adapters: the same weights, switched off
        base = remember_base(model, records)
    forgetting(model, base, records).kl.mean
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

import torch

from lit_gpt.data.dataset import group_by_tokens
from lit_gpt.data.read_files import open_text
from lit_gpt.data.tokenizer import Tokenizer
from lit_gpt.errors import InputError
from lit_gpt.evaluation.record_losses import BATCH_TOKENS, Record, eval_mode, ids_of_records, length_of
from lit_gpt.model.fused import at_least_float32
from lit_gpt.model.gpt import GPT
from lit_gpt.model.loss import chunks, rows_at_once
from lit_gpt.model.packing import Layout
from lit_gpt.scores.record_scores import RecordScores, losses


class Forgetting(NamedTuple):
    """The two measures, for each paragraph."""

    loss: RecordScores
    kl: RecordScores


@dataclass(frozen=True)
class RememberedBase:
    """What the base says about a text."""

    states: list[torch.Tensor]
    """For each batch of paragraphs what the head makes logits of, (N, C)."""
    logits: Callable[[torch.Tensor], torch.Tensor]
    """From (n, C) to (n, V), by weights that training leaves alone."""


# ---- the text


def read_general_text(path: Path | None = None) -> str:
    """The text in a file; None is the one in this folder: a page of prose, facts, dialogue, code and figures.

    Raises:
        InputError: there is no such file, or it is not UTF-8.
    """
    with open_text(path or Path(str(files("lit_gpt.evaluation") / "general_text.txt"))) as file:
        return file.read()


def general_records(text: str, tokenizer: Tokenizer, block_size: int) -> list[Record]:
    """Each paragraph of a text as a record, of at most `block_size` tokens, in which all but the first are targets.

    A paragraph of a single token is left out: no token is predicted without one before it.

    Raises:
        InputError: nothing is left.
    """
    parts = [part.strip() for part in text.split("\n\n")]
    encoded = [tokenizer.encode(part)[:block_size] for part in parts if part]
    records = [(ids, torch.arange(len(ids)) > 0) for ids in encoded if len(ids) > 1]
    if not records:
        raise InputError("The general text has no paragraph of two tokens or more: nothing to measure forgetting on.")
    return records


# ---- the measures


@torch.no_grad()
def remember_base(model: GPT, records: Sequence[Record]) -> RememberedBase:
    """What this model, which is the base at this moment, says about records.

    Of the head, weights that train are copied, and frozen ones shared.
    """
    with eval_mode(model):
        states = [states_of_targets(model, idx, layout) for idx, layout in batches_of(model, records)]
    frozen = {id(param): param for param in model.lm_head.parameters() if not param.requires_grad}
    head = copy.deepcopy(model.lm_head, memo=frozen).eval()
    scale_logits = model.scale_logits
    return RememberedBase(states, lambda x: scale_logits(head(x)))


@torch.no_grad()
def forgetting(model: GPT, base: RememberedBase, records: Sequence[Record]) -> Forgetting:
    """The loss of the model on each record, and how far it is from the base, which remembers the same records."""
    loss_totals: list[float] = []
    kl_totals: list[float] = []
    n_targets: list[int] = []
    with eval_mode(model):
        for (idx, layout), base_states in zip(batches_of(model, records), base.states, strict=True):
            states = states_of_targets(model, idx, layout)
            loss, kl = losses_and_kl(model.logits, states, base.logits, base_states, layout.target)
            counts = [n for _, n in layout.targets_of]
            loss_totals += [part.sum().item() for part in loss.double().split(counts)]
            kl_totals += [part.sum().item() for part in kl.double().split(counts)]
            n_targets += counts
    ids = ids_of_records(records)
    return Forgetting(losses(loss_totals, n_targets, ids), losses(kl_totals, n_targets, ids, "KL to the base"))


def losses_and_kl(
    head: Callable[[torch.Tensor], torch.Tensor],
    states: torch.Tensor,
    base_head: Callable[[torch.Tensor], torch.Tensor],
    base_states: torch.Tensor,
    target: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """-log p(target) and the KL divergence at each of N positions, both (N,), without the logits of all in memory.

    Args:
        head: From states (n, C) to logits (n, V).
        states: Those of the model, (N, C).
        base_head: From the base's states to its logits.
        base_states: (N, C).
        target: (N,)
    """
    losses_of_parts = []
    kl_of_parts = []
    vocab_size = head(states[:1]).size(-1)
    # float32 whatever the model is: three tensors of (n, V) are made of each part
    for rows in chunks(len(target), rows_at_once(vocab_size, torch.float32)):
        log_p = log_probabilities(head(states[rows]))
        losses_of_parts.append(-log_p.gather(1, target[rows, None]).squeeze(1))
        kl_of_parts.append(kl_divergence(log_probabilities(base_head(base_states[rows])), log_p))
    return torch.cat(losses_of_parts), torch.cat(kl_of_parts)


def kl_divergence(base_log_p: torch.Tensor, log_p: torch.Tensor) -> torch.Tensor:
    """KL(base || model) of log-probabilities (n, V), for each row: (n,), in nats."""
    return (base_log_p.exp() * (base_log_p - log_p)).sum(-1)


def log_probabilities(logits: torch.Tensor) -> torch.Tensor:
    """(n, V) of logits (n, V), in float32 or wider."""
    return logits.log_softmax(-1, dtype=at_least_float32(logits.dtype))


def batches_of(model: GPT, records: Sequence[Record]) -> list[tuple[torch.Tensor, Layout]]:
    """The records in their order, some of them end to end in each row of tokens (1, T), on the model's device."""
    device = next(model.parameters()).device
    groups = group_by_tokens(records, length_of, BATCH_TOKENS)
    batches = [Layout.end_to_end(group) for group in groups]
    return [(idx.to(device), layout.to(device)) for idx, layout in batches]


def states_of_targets(model: GPT, idx: torch.Tensor, layout: Layout) -> torch.Tensor:
    """What the head makes the logits of each target of, (N, C)."""
    x = model.hidden(idx, layout=layout)
    return model.transformer.ln_f(x[0].index_select(0, layout.target_index))
