"""Hidden states that are computed once and kept in a file.

Below the first trained block nothing changes, so that its input is the same in each epoch. It is stored as rows, and
the records of a dataset then hold numbers of rows in place of tokens (`Texts.as_row_numbers`):

    tokens     a0 a1 a2 ya b0 b1 yb      the records of a dataset, each with its label at the end
    inputs      0  1  2     4  5         what goes into a block: the row of a token has the token's own number
    features    0           1            normed and pooled, if no block is trained: one row for each record
"""

import hashlib
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import nn

from lit_gpt.checkpoint.save import save_tensors
from lit_gpt.checkpoint.weight_files import read_metadata, read_tensors
from lit_gpt.classifier.features import in_batches
from lit_gpt.classifier.head import Classifier
from lit_gpt.classifier.texts import Texts
from lit_gpt.files import whole_file


@torch.no_grad()
def hidden_rows(model: Classifier, texts: Texts, depths: Collection[int], batch_size: int) -> dict[int, torch.Tensor]:
    """The hidden states at several depths, for all records that `texts` is chosen from, in one pass.

    Depth i below n_layer is the input of block i for every token, (n_tokens, C). Depth n_layer is the pooled feature
    of every record, (n_records, C). Both have the dtype and the device of the model's weights.
    """
    n_layer = model.gpt.config.n_layer
    n_embd = model.gpt.config.n_embd
    weight = model.gpt.transformer.wte.weight
    device = weight.device

    # room for the rows
    rows = {}
    rows_of_block = {}
    for depth in depths:
        is_pooled = depth == n_layer
        n_rows = len(texts.ends) if is_pooled else len(texts.tokens)
        rows[depth] = weight.new_empty(n_rows, n_embd)
        if not is_pooled:
            block = model.gpt.transformer.h[depth]
            rows_of_block[block] = rows[depth]

    # the pass over all records: on which side of the split one is differs from seed to seed
    all_records = texts.choose(np.arange(len(texts.ends)))
    for numbers, idx, layout in in_batches(all_records, batch_size):
        token_numbers = torch.cat([torch.arange(*all_records.span(i)) for i in numbers])
        with inputs_copied_to(rows_of_block, token_numbers.to(device)):
            features = model.features(idx.to(device), layout.to(device))
        if n_layer in rows:
            record_numbers = torch.from_numpy(numbers).to(device)
            rows[n_layer][record_numbers] = features
    return rows


@contextmanager
def inputs_copied_to(rows_of_block: dict[nn.Module, torch.Tensor], numbers: torch.Tensor) -> Iterator[None]:
    """Within it, each block copies its input (1, T, C) to the rows `numbers` (T,) of its tensor, before it runs."""

    def copy_to(rows: torch.Tensor) -> Callable[[nn.Module, tuple], None]:
        def hook(block: nn.Module, inputs: tuple) -> None:
            rows[numbers] = inputs[0][0]

        return hook

    # each hook by a call of `copy_to`: made in this loop, all of them would have the last block's rows
    hooks = []
    for block, rows in rows_of_block.items():
        hooks.append(block.register_forward_pre_hook(copy_to(rows)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def cached_rows(
    file: Path,
    base: str,
    model: Classifier,
    texts: Texts,
    depths: Collection[int],
    depth: int,
    batch_size: int,
) -> tuple[torch.Tensor, float]:
    """The hidden states at `depth`, from `file`, and the seconds that they took.

    If `file` has none for this model and these texts, they are computed first, at all of `depths`, and written.

    Args:
        file: hidden.safetensors of a run.
        base: The fingerprint of the model's weights.
        model: The whole model, before `start_from`.
        texts: All records of the run, on whatever side.
        depths: All depths that the run will ask for.
        depth: One of them.
        batch_size: Records per forward pass.
    """
    # compute, unless the file has them
    key = key_of_rows(base, model, texts)
    header = read_metadata(file) if file.is_file() else {}
    stored_depths = header["depths"].split() if header.get("key") == key else []
    if str(depth) not in stored_depths:
        header = write_hidden_rows(file, key, model, texts, depths, batch_size)

    # read this depth alone: the others stay on the disk
    stored = (tensor for name, tensor in read_tensors([file]) if name == str(depth))
    rows = next(stored).to(model.gpt.transformer.wte.weight.device)

    # the pass went through all blocks for all depths; this one's share of its seconds is that of the blocks below it
    share = depth / model.gpt.config.n_layer
    return rows, float(header["seconds"]) * share


def key_of_rows(base: str, model: Classifier, texts: Texts) -> str:
    """sha256 over all that the rows depend on: the weights and their dtype, the pooling, and the tokens."""
    parts = (
        base,
        model.pool.__name__,
        model.gpt.config.name,
        str(model.gpt.transformer.wte.weight.dtype),
    )
    digest = hashlib.sha256("\n".join(parts).encode())
    digest.update(texts.tokens.tobytes())
    return digest.hexdigest()


def write_hidden_rows(
    file: Path,
    key: str,
    model: Classifier,
    texts: Texts,
    depths: Collection[int],
    batch_size: int,
) -> dict[str, str]:
    """Computes the hidden states at all of `depths`, writes them to `file`, and returns the file's header."""
    began = time.perf_counter()
    rows = hidden_rows(model, texts, depths, batch_size)
    header = {
        "key": key,
        "depths": " ".join(map(str, depths)),
        "seconds": str(time.perf_counter() - began),
    }

    # whole or not there: half a file would be taken for a damaged one by the next run
    tensors = {str(depth): tensor for depth, tensor in rows.items()}
    file.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(file) as temporary:
        save_tensors(tensors, temporary, header)
    return header
