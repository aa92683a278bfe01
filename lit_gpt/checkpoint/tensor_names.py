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
NUMBER = r"(?<=\.)\d+(?=\.|$)"  # a part of a name: 3 in layers.3.mlp, nothing in mlp.fc1


def to_lit(name: str, tensor: torch.Tensor, config: Config) -> list[Named]:
    """Translates one tensor of a checkpoint: one of ours, several for a fused one, none for what no model needs.

    A fused tensor has the rows of all its parts; whoever reads files of others has compared the shapes.

    Raises:
        KeyError: the family does not know the name.
    """
    names = lit_names(name, config)
    if not names:
        return []

    # (in, out) -> (out, in), so that the rows of each part can be taken out; laid out as in a converted copy, since
    # float16 sums otherwise in another order
    if is_transposed(name, config):
        tensor = tensor.T.contiguous()
    if len(names) == 1:
        return [(names[0], tensor)]
    parts = split_fused(tensor, names, config)
    return list(zip(names, parts, strict=True))


def lit_names(name: str, config: Config) -> list[str]:
    """Our names of what a checkpoint's tensor holds; none for what is in the family's IGNORED.

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
    return names


def to_hf(tensors: Iterable[Named], config: Config) -> Iterator[Named]:
    """Our tensors as the checkpoint has them. The parts of a fused one wait until the last of them has come.

    Raises:
        KeyError: the family does not know a name.
    """
    waiting: dict[str, torch.Tensor] = {}
    for name, tensor in tensors:
        # most tensors are a part of their own, which has nothing to wait for
        waiting[name] = tensor
        fused_name, part_names = hf_name(name, config)
        if any(part_name not in waiting for part_name in part_names):
            continue

        # join, and transpose if the checkpoint has (in, out)
        parts = [waiting.pop(part_name) for part_name in part_names]
        fused = parts[0]
        if len(parts) > 1:
            fused = join_fused(parts, part_names, config)
        if is_transposed(fused_name, config):
            fused = fused.T.contiguous()
        yield fused_name, fused
    assert not waiting, f"parts of fused tensors are missing: {', '.join(waiting)}"


def name_map_of(config: Config) -> NameMap:
    """The family's map of module names; a family with several has a function that chooses by the config."""
    family = families.load(config.family)
    if hasattr(family, "weights"):
        return family.weights(config)
    return family.WEIGHTS


def part_templates(entry: str | tuple[str, ...]) -> list[str]:
    """Our modules in an entry of the map, such as "transformer.ln_f" or ("stacked", q, k, v)."""
    if isinstance(entry, str):
        return [entry]
    return list(entry[1:])


def split_name(name: str) -> tuple[str, list[str], str]:
    """`transformer.h.3.attn.q.weight` -> (`transformer.h.{}.attn.q`, [`3`], `weight`)."""
    module, _, leaf = name.rpartition(".")
    template = re.sub(NUMBER, "{}", module)
    numbers = re.findall(NUMBER, module)
    return template, numbers, leaf


def fill_in(templates: Iterable[str], numbers: list[str], leaf: str) -> list[str]:
    """The inverse of `split_name`, for several modules with the same numbers."""
    modules = [template.format(*numbers) for template in templates]
    return [f"{module}.{leaf}" for module in modules]


def our_names(name: str, name_map: NameMap) -> list[str]:
    """`model.layers.3.mlp.up_proj.weight` -> [`transformer.h.3.mlp.fc_2.weight`]; empty if the map has no such name."""
    template, numbers, leaf = split_name(name)
    entry = name_map.get(template)
    if entry is None:
        return []
    return fill_in(part_templates(entry), numbers, leaf)


def hf_name(name: str, config: Config) -> tuple[str, list[str]]:
    """The checkpoint's name of our tensor, and the names of all of ours that are fused in it, in order.

    Raises:
        KeyError: the family does not know the name.
    """
    template, numbers, leaf = split_name(name)
    # the map is read backwards, entry by entry: it has a few dozen
    for hf_template, entry in name_map_of(config).items():
        templates = part_templates(entry)
        if template in templates:
            (fused_name,) = fill_in([hf_template], numbers, leaf)
            return fused_name, fill_in(templates, numbers, leaf)
    raise KeyError(name)


def is_transposed(name: str, config: Config) -> bool:
    """Whether a checkpoint keeps this tensor as (in, out). Only weights can be; a bias has one dimension."""
    module, _, leaf = name.rpartition(".")
    return leaf == "weight" and module.endswith(families.definition(config.family, "TRANSPOSED"))


def split_fused(tensor: torch.Tensor, part_names: list[str], config: Config) -> list[torch.Tensor]:
    """The parts of a fused weight (rows, in) or bias (rows,), in the order of their names."""
    rows_of_parts = fused_rows(part_names, config, n_rows=tensor.size(0))
    return [tensor.index_select(0, rows) for rows in rows_of_parts]


def join_fused(parts: list[torch.Tensor], part_names: list[str], config: Config) -> torch.Tensor:
    """The inverse of `split_fused`."""
    n_rows = sum(part.size(0) for part in parts)
    rows_of_parts = fused_rows(part_names, config, n_rows)
    fused = parts[0].new_empty(n_rows, *parts[0].shape[1:])
    for part, rows in zip(parts, rows_of_parts, strict=True):
        fused[rows] = part
    return fused


def fused_rows(part_names: list[str], config: Config, n_rows: int) -> list[torch.Tensor]:
    """The row numbers of each part in a fused tensor of `n_rows` rows, in the order of the part's own rows."""
    rows = torch.arange(n_rows)
    if fused_layout(part_names, config) == "stacked":
        sizes = part_sizes(part_names, config, n_rows)
        return list(rows.split(sizes))

    # grouped: the last two heads of each group are its key and its value
    groups = rows.view(config.n_query_groups, -1, config.head_size)  # (groups, queries + key + value, head size)
    n_queries = groups.size(1) - 2
    parts = groups.split([n_queries, 1, 1], dim=1)
    return [part.flatten() for part in parts]


def fused_layout(part_names: list[str], config: Config) -> str:
    """How the family's map says that these parts are fused: stacked or grouped."""
    first_template, _, _ = split_name(part_names[0])
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
