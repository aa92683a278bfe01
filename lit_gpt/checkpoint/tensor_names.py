"""Hugging Face's tensor names and ours, both directions from the family's one map.

What a checkpoint fuses is split here, and joined again on the way back:

    stacked   q q q q k k v v        the parts below each other: Phi-3, GPT-2
    grouped   q q k v  q q k v       for every group of heads its queries, keys and values: GPT-NeoX, Falcon"""

import re
from collections.abc import Iterable, Iterator

import torch

from lit_gpt import families
from lit_gpt.config import Config

Named = tuple[str, torch.Tensor]
NUMBER = r"(?<=\.)\d+(?=\.|$)"


def to_lit(name: str, tensor: torch.Tensor, config: Config) -> list[Named]:
    """A checkpoint's tensor under our names; nothing for what no model needs (IGNORED, the head of a tied model).

    Raises:
        KeyError: the family does not know the name.
    """
    if name.endswith(families.fact(config.family, "IGNORED")):
        return []
    prefix = families.fact(config.family, "PREFIX")
    names = translate(name, weights(config)) or translate(prefix + name, weights(config))
    if names is None:
        raise KeyError(name)
    if config.tie_embeddings and names[0].startswith("lm_head."):
        return []
    if is_transposed(name, families.fact(config.family, "TRANSPOSED")):
        tensor = tensor.T
    parts = split(tensor, names, config) if len(names) > 1 else [tensor]
    return list(zip(names, parts, strict=True))


def to_hf(tensors: Iterable[Named], config: Config) -> Iterator[Named]:
    """Our tensors as the checkpoint has them. The parts of a fused one wait for each other.

    Raises:
        KeyError: the family does not know a name.
    """
    transposed, waiting = families.fact(config.family, "TRANSPOSED"), {}
    for name, tensor in tensors:
        theirs, together = hf_name(name, config)
        waiting[name] = tensor
        if all(other in waiting for other in together):
            parts = [waiting.pop(other) for other in together]
            tensor = join(parts, together, config) if len(parts) > 1 else parts[0]
            yield theirs, tensor.T.contiguous() if is_transposed(theirs, transposed) else tensor
    assert not waiting, f"parts of fused tensors are missing: {', '.join(waiting)}"


def hf_name(name: str, config: Config) -> tuple[str, list[str]]:
    """The checkpoint's name of our tensor, and all of ours that are fused in it, in order."""
    module, _, leaf = name.rpartition(".")
    numbers = re.findall(NUMBER, module)
    for theirs, ours in weights(config).items():
        together = [ours] if isinstance(ours, str) else ours[1:]
        if re.sub(NUMBER, "{}", module) in together:
            return f"{theirs.format(*numbers)}.{leaf}", [f"{one.format(*numbers)}.{leaf}" for one in together]
    raise KeyError(name)


def weights(config: Config) -> dict[str, str | tuple[str, ...]]:
    """The family's map, and where it has several, that of this model."""
    family = families.load(config.family)
    return family.weights(config) if hasattr(family, "weights") else family.WEIGHTS


def translate(name: str, weights: dict[str, str | tuple[str, ...]]) -> list[str] | None:
    """`model.layers.3.mlp.up_proj.weight` -> [`transformer.h.3.mlp.fc_2.weight`]; several for a fused tensor."""
    module, _, leaf = name.rpartition(".")
    ours = weights.get(re.sub(NUMBER, "{}", module))
    together = [ours] if isinstance(ours, str) else (ours or ("",))[1:]
    return [f"{one.format(*re.findall(NUMBER, module))}.{leaf}" for one in together] or None


def is_transposed(name: str, modules: tuple[str, ...]) -> bool:
    """Whether a checkpoint keeps this weight as (in, out)."""
    return name.rpartition(".")[0].endswith(modules) and name.endswith(".weight")


def sizes(names: list[str], config: Config, total: int) -> list[int]:
    """How many rows of a fused tensor belong to each of its parts."""
    q, kv = config.n_head * config.head_size, config.n_query_groups * config.head_size
    attention = {"q": q, "k": kv, "v": kv}
    return [attention.get(name.split(".")[-2], total // len(names)) for name in names]


def fused_rows(names: list[str], config: Config, total: int) -> list[torch.Tensor]:
    """Which rows of a fused tensor of `total` rows belong to each of its parts, in the order of the part."""
    rows = torch.arange(total)
    if kind_of(names, config) == "stacked":
        return list(rows.split(sizes(names, config, total)))
    groups = rows.view(config.n_query_groups, -1, config.head_size)  # (groups, queries + key + value, head size)
    return [part.flatten() for part in groups.split([groups.size(1) - 2, 1, 1], dim=1)]


def kind_of(names: list[str], config: Config) -> str:
    first = re.sub(NUMBER, "{}", names[0].rpartition(".")[0])
    return next(ours[0] for ours in weights(config).values() if not isinstance(ours, str) and ours[1] == first)


def split(tensor: torch.Tensor, names: list[str], config: Config) -> list[torch.Tensor]:
    return [tensor.index_select(0, rows) for rows in fused_rows(names, config, tensor.size(0))]


def join(parts: list[torch.Tensor], names: list[str], config: Config) -> torch.Tensor:
    total = sum(part.size(0) for part in parts)
    fused = parts[0].new_empty(total, *parts[0].shape[1:])
    for rows, part in zip(fused_rows(names, config, total), parts, strict=True):
        fused[rows] = part
    return fused
