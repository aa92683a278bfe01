"""Hugging Face's tensor names and ours, both directions from the family's one map.

    model.layers.3.mlp.up_proj . weight      ->     transformer.h.3.mlp.fc_2 . weight
    module with its numbers      leaf               in the map: model.layers.{}.mlp.up_proj, transformer.h.{}.mlp.fc_2

A tensor that the checkpoint fuses is split here, and joined again on the way back:

    stacked   q q q q k k v v        the parts below each other: Phi-3, GPT-2
    grouped   q q k v  q q k v       for every group of heads its queries, keys and values: GPT-NeoX, Falcon
"""

import re
from collections.abc import Iterable, Iterator

import torch

from lit_gpt import families
from lit_gpt.config import Config

Named = tuple[str, torch.Tensor]
NameMap = dict[str, str | tuple[str, ...]]  # see WEIGHTS in lit_gpt/families/__init__.py
NUMBER = r"(?<=\.)\d+(?=\.|$)"


def to_lit(name: str, tensor: torch.Tensor, config: Config) -> list[Named]:
    """Translates one tensor of a checkpoint: one of ours, several for a fused one, none for what no model needs.

    Not needed are the tensors in the family's IGNORED, and the head of a model whose head is its embedding.

    Raises:
        KeyError: the family does not know the name.
    """
    if name.endswith(families.definition(config.family, "IGNORED")):
        return []

    # some checkpoints leave out the prefix of all names
    name_map = name_map_of(config)
    prefix = families.definition(config.family, "PREFIX")
    names = our_names(name, name_map) or our_names(prefix + name, name_map)
    if not names:
        raise KeyError(name)
    if config.tie_embeddings and names[0].startswith("lm_head."):
        return []

    # (in, out) -> (out, in), then its rows to the parts
    if is_transposed(name, config):
        tensor = tensor.T
    parts = split_fused(tensor, names, config) if len(names) > 1 else [tensor]
    return list(zip(names, parts, strict=True))


def to_hf(tensors: Iterable[Named], config: Config) -> Iterator[Named]:
    """Our tensors as the checkpoint has them. The parts of a fused one wait until the last of them has come.

    Raises:
        KeyError: the family does not know a name.
    """
    waiting: dict[str, torch.Tensor] = {}
    for name, tensor in tensors:
        waiting[name] = tensor
        fused_name, part_names = hf_name(name, config)
        if any(part_name not in waiting for part_name in part_names):
            continue
        parts = [waiting.pop(part_name) for part_name in part_names]
        fused = join_fused(parts, part_names, config) if len(parts) > 1 else parts[0]
        if is_transposed(fused_name, config):
            fused = fused.T.contiguous()
        yield fused_name, fused
    assert not waiting, f"parts of fused tensors are missing: {', '.join(waiting)}"


def name_map_of(config: Config) -> NameMap:
    """The family's map of module names; a family with several has a function that chooses by the config."""
    family = families.load(config.family)
    return family.weights(config) if hasattr(family, "weights") else family.WEIGHTS


def part_templates(entry: str | tuple[str, ...]) -> list[str]:
    """Our modules in an entry of the map, such as "transformer.ln_f" or ("stacked", q, k, v)."""
    return [entry] if isinstance(entry, str) else list(entry[1:])


def our_names(name: str, name_map: NameMap) -> list[str]:
    """`model.layers.3.mlp.up_proj.weight` -> [`transformer.h.3.mlp.fc_2.weight`]; empty if the map has no such name."""
    module, _, leaf = name.rpartition(".")
    entry = name_map.get(re.sub(NUMBER, "{}", module))
    if entry is None:
        return []
    numbers = re.findall(NUMBER, module)
    return [f"{template.format(*numbers)}.{leaf}" for template in part_templates(entry)]


def hf_name(name: str, config: Config) -> tuple[str, list[str]]:
    """The checkpoint's name of our tensor, and the names of all of ours that are fused in it, in order.

    Raises:
        KeyError: the family does not know the name.
    """
    module, _, leaf = name.rpartition(".")
    template = re.sub(NUMBER, "{}", module)
    numbers = re.findall(NUMBER, module)
    for hf_module, entry in name_map_of(config).items():
        templates = part_templates(entry)
        if template in templates:
            part_names = [f"{part.format(*numbers)}.{leaf}" for part in templates]
            return f"{hf_module.format(*numbers)}.{leaf}", part_names
    raise KeyError(name)


def is_transposed(name: str, config: Config) -> bool:
    """Whether a checkpoint keeps this tensor as (in, out). Only weights can be; a bias has one dimension."""
    module, _, leaf = name.rpartition(".")
    return leaf == "weight" and module.endswith(families.definition(config.family, "TRANSPOSED"))


def split_fused(tensor: torch.Tensor, part_names: list[str], config: Config) -> list[torch.Tensor]:
    """The parts of a fused weight (rows, in) or bias (rows,), in the order of their names."""
    n_rows = tensor.size(0)
    return [tensor.index_select(0, rows) for rows in fused_rows(part_names, config, n_rows)]


def join_fused(parts: list[torch.Tensor], part_names: list[str], config: Config) -> torch.Tensor:
    """The inverse of `split_fused`."""
    n_rows = sum(part.size(0) for part in parts)
    fused = parts[0].new_empty(n_rows, *parts[0].shape[1:])
    for rows, part in zip(fused_rows(part_names, config, n_rows), parts, strict=True):
        fused[rows] = part
    return fused


def fused_rows(part_names: list[str], config: Config, n_rows: int) -> list[torch.Tensor]:
    """The row numbers of each part in a fused tensor of `n_rows` rows, in the order of the part's own rows."""
    rows = torch.arange(n_rows)
    if fused_layout(part_names, config) == "stacked":
        return list(rows.split(part_sizes(part_names, config, n_rows)))
    # (groups, queries + key + value, head size): the last two of a group are its key and its value
    groups = rows.view(config.n_query_groups, -1, config.head_size)
    n_queries = groups.size(1) - 2
    return [part.flatten() for part in groups.split([n_queries, 1, 1], dim=1)]


def fused_layout(part_names: list[str], config: Config) -> str:
    """How the family's map says that these parts are fused: stacked or grouped."""
    first_module = part_names[0].rpartition(".")[0]
    first_template = re.sub(NUMBER, "{}", first_module)
    for entry in name_map_of(config).values():
        if not isinstance(entry, str) and entry[1] == first_template:
            return entry[0]
    raise KeyError(part_names[0])


def part_sizes(part_names: list[str], config: Config, n_rows: int) -> list[int]:
    """How many rows of a stacked tensor belong to each part. All but q, k and v are of equal size."""
    n_query_rows = config.n_head * config.head_size
    n_key_rows = config.n_query_groups * config.head_size
    attention = {"q": n_query_rows, "k": n_key_rows, "v": n_key_rows}
    modules = [name.split(".")[-2] for name in part_names]
    return [attention.get(module, n_rows // len(part_names)) for module in modules]
