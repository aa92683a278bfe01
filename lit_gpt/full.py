"""Full fine-tuning: train the model's own weights, all of them or some."""

from dataclasses import dataclass

from lit_gpt.errors import InputError
from lit_gpt.model.gpt import GPT
from lit_gpt.name_patterns import check_patterns, matches_beginning
from lit_gpt.ranges import check_range


@dataclass(frozen=True)
class Full:
    """The choice of weights that train."""

    train_only: int | list[str] | None = None
    """None trains all weights; 4 trains the last four blocks, the final norm and the head. Or patterns for the
    beginnings of names as in transformer.h.3.mlp.fc_1.weight: ["transformer.h.2[0-9]", lm_head]."""

    def __post_init__(self) -> None:
        if isinstance(self.train_only, int):
            check_range("--train_only", self.train_only, at_least=1)


def mark_chosen_as_trainable(model: GPT, full: Full) -> list[str]:
    """Sets which parameters train, in place, and returns their names. A head that is the embedding trains as that.

    Raises:
        InputError: a pattern fits no parameter, or there are not so many blocks.
    """
    names = [name for name, _ in model.named_parameters()]
    chosen = chosen_parameters(names, full.train_only, model.config.n_layer)
    for name, param in model.named_parameters():
        param.requires_grad = name in chosen
    return [name for name in names if name in chosen]


def chosen_parameters(names: list[str], train_only: int | list[str] | None, n_layer: int) -> set[str]:
    """Those of a model's parameters that `train_only` chooses; `n_layer` is the number of its blocks."""
    if train_only is None:
        return set(names)
    if isinstance(train_only, int):
        patterns = patterns_of_last_blocks(train_only, n_layer)
        # a head that is the embedding is not among the names: training it would change the embeddings of all tokens
        if "lm_head.weight" in names:
            patterns.append("lm_head")
    else:
        patterns = train_only
        check_patterns(patterns)

    # which names each pattern matches
    if not patterns:
        raise InputError("train_only is empty: nothing would train. Leave it out to train all.")
    chosen = set()
    for pattern in patterns:
        matched = {name for name in names if matches_beginning(name, pattern)}
        if not matched:
            raise InputError(f"train_only has {pattern!r}, which no parameter's name begins with. One is {names[-1]}.")
        chosen |= matched
    return chosen


def patterns_of_last_blocks(n_blocks: int, n_layer: int) -> list[str]:
    """Patterns for the parameters of the last `n_blocks` of `n_layer` blocks, and of the norm that follows them.

    Raises:
        InputError: there are not so many blocks.
    """
    if not 1 <= n_blocks <= n_layer:
        raise InputError(f"train_only is {n_blocks}, but the model has {n_layer} blocks.")
    blocks = [rf"transformer\.h\.{block}" for block in range(n_layer - n_blocks, n_layer)]
    return [*blocks, r"transformer\.ln_f"]
