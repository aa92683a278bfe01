"""TODO doc of classifier.cached_states"""

import hashlib
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from lit_gpt.checkpoint.load import read_metadata, read_tensors
from lit_gpt.checkpoint.save import save_tensors
from lit_gpt.classifier.features import in_batches
from lit_gpt.classifier.head import Classifier, pool_last
from lit_gpt.classifier.texts import Texts

# ---- what lies below the first trained block is computed once


class Places(nn.Module):
    """Stands for the embedding: its tokens are rows of what was computed, and it only remembers which."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight[:1] * 0, persistent=False)

    def forward(self, idx: torch.Tensor, pos: torch.Tensor) -> torch.Tensor:
        self.idx = idx
        return self.weight[idx * 0]


class Rows(nn.Module):
    """Stands for the last of the frozen blocks: gives what it gave, (rows, C), for the tokens that are asked for."""

    def __init__(self, block: nn.Module, rows: torch.Tensor, places: Places) -> None:
        super().__init__()
        self.rope, self.window = block.rope, block.window
        self.register_buffer("rows", rows, persistent=False)
        self.places = (places,)  # a tuple, since it is no part of this module

    def forward(self, x: torch.Tensor, *others: Any) -> torch.Tensor:
        return self.rows[self.places[0].idx]


class Passed(nn.Module):
    """A frozen block before that one."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.rope, self.window = block.rope, block.window

    def forward(self, x: torch.Tensor, *others: Any) -> torch.Tensor:
        return x


@torch.no_grad()
def hidden_rows(model: Classifier, texts: Texts, depths: Collection[int], size: int) -> dict[int, torch.Tensor]:
    """What reaches some of the blocks, in one pass over all records.

    A depth below n_layer gives the input of that block for every token of the data, (n_tokens, C); n_layer gives the
    pooled feature of every record, (n_records, C).
    """
    blocks, weight = model.gpt.transformer.h, model.gpt.transformer.wte.weight
    like = dict(dtype=weight.dtype, device=weight.device)
    rows = {
        d: torch.empty(len(texts.tokens if d < len(blocks) else texts.ends), weight.size(1), **like) for d in depths
    }
    places = torch.empty(0)

    def keep(depth: int) -> Callable[[nn.Module, tuple], None]:
        def hook(module: nn.Module, inputs: tuple) -> None:
            rows[depth][places] = inputs[0][0]

        return hook

    hooks = [blocks[depth].register_forward_pre_hook(keep(depth)) for depth in rows if depth < len(blocks)]
    everything = texts.choose(np.arange(len(texts.ends)))
    for chosen, idx, layout in in_batches(everything, size):
        places = torch.from_numpy(np.concatenate([np.arange(*everything.span(i)) for i in chosen])).to(weight.device)
        features = model.features(idx.to(weight.device), layout.to(weight.device))
        if len(blocks) in rows:
            rows[len(blocks)][torch.from_numpy(chosen).to(weight.device)] = features
    for hook in hooks:
        hook.remove()
    return rows


def start_at(model: Classifier, depth: int, rows: torch.Tensor) -> None:
    """Makes a model begin at block `depth`, in place, on the tokens of `Texts.as_places(depth == n_layer)`."""
    transformer = model.gpt.transformer
    transformer.wte = Places(transformer.wte.weight)
    for i in range(depth):
        block = transformer.h[i]
        transformer.h[i] = Passed(block) if i < depth - 1 else Rows(block, rows, transformer.wte)
    if depth == len(transformer.h):  # the rows are features
        transformer.ln_f, model.pool = nn.Identity(), pool_last


def cached_rows(
    file: Path, base: str, model: Classifier, texts: Texts, depths: Collection[int], depth: int, size: int
) -> tuple[torch.Tensor, float]:
    """`hidden_rows` at `depth`, and the seconds they took to compute; `file` keeps those of all `depths`.

    `base` is the fingerprint of the model's weights.
    """
    what = (base, model.pool.__name__, model.gpt.config.name, str(model.gpt.transformer.wte.weight.dtype))
    key = hashlib.sha256("\n".join(what).encode() + texts.tokens.tobytes()).hexdigest()
    header = read_metadata(file) if file.is_file() else {}
    if header.get("key") != key or str(depth) not in header["depths"].split():
        started = time.perf_counter()
        rows = hidden_rows(model, texts, depths, size)
        seconds = time.perf_counter() - started
        header = {"key": key, "depths": " ".join(map(str, depths)), "seconds": str(seconds)}
        file.parent.mkdir(parents=True, exist_ok=True)
        save_tensors({str(at): values for at, values in rows.items()}, file.with_suffix(".tmp"), header)
        file.with_suffix(".tmp").replace(file)
    (rows,) = (values for name, values in read_tensors([file]) if name == str(depth))
    weight = model.gpt.transformer.wte.weight
    share = depth / model.gpt.config.n_layer  # of the blocks that the one pass went through
    return rows.to(weight.device), float(header["seconds"]) * share
