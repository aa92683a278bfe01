"""Full fine-tuning: train the model's own weights, all of them or some."""

import re
from dataclasses import dataclass

from lit_gpt.errors import InputError
from lit_gpt.model.gpt import GPT
from lit_gpt.name_patterns import check_patterns


@dataclass(frozen=True)
class Full:
    """Which weights train."""

    train_only: int | list[str] | None = None
    """None is all; 4 the last four blocks, the final norm and the head; or patterns of names as in
    transformer.h.3.mlp.fc_1.weight, of which a beginning will do: ["transformer.h.2[0-9]", lm_head]."""


def mark_chosen_as_trainable(model: GPT, full: Full) -> list[str]:
    """Says which parameters train, and returns their names. A head that is the embedding trains as that.

    Raises:
        InputError: a pattern fits no parameter, or there are not so many blocks.
    """
    only, n_layer = full.train_only, model.config.n_layer
    names = [name for name, _ in model.named_parameters()]
    if isinstance(only, int):
        if not 1 <= only <= n_layer:
            raise InputError(f"train_only is {only}, but the model has {n_layer} blocks.")
        blocks = "|".join(map(str, range(n_layer - only, n_layer)))
        head = [r"lm_head\."] if "lm_head.weight" in names else []  # not an embedding of all tokens
        only = [rf"transformer\.h\.({blocks})\.", r"transformer\.ln_f\.", *head]
    if only == []:
        raise InputError("train_only is empty: nothing would train. Leave it out to train all.")
    check_patterns(only or ())
    for pattern in only or ():
        if not any(fits(name, pattern) for name in names):
            raise InputError(f"train_only has {pattern!r}, which no parameter's name begins with. One is {names[-1]}.")
    chosen = [name for name in names if only is None or any(fits(name, pattern) for pattern in only)]
    for name, param in model.named_parameters():
        param.requires_grad = name in set(chosen)
    return chosen


def fits(name: str, pattern: str) -> bool:
    """`transformer.h.1` fits transformer.h.1.attn.q.weight and not transformer.h.10.attn.q.weight."""
    return re.fullmatch(rf"(?:{pattern})(?:(?<=\.).*|\..*)?", name) is not None
