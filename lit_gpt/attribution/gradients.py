"""The gradient of each record's loss with respect to LoRA's factors, short enough to keep, in one backward for many.

    y = W x + s B A x            of a token: x (in,), g = dL/dy (out,)
    dL/dA = s (g B)^T x  (r, in)      dL/dB = s g^T (A x)  (out, r)        summed over the tokens of a record

A hook on each LoRALinear keeps x and g of a micro-batch, whose records lie end to end; products of each record's own
rows give its gradient, and no backward is made for a record alone.

Only the tokens that predict the answer carry gradient. The prompt before them is read once without any, and its keys
and values are held constant: what the prompt's own tokens would add has to travel through attention, and leaving it out
makes the backward as short as the answers.

A gradient has millions of numbers. A sketch of it has a few thousand, and keeps products of gradients in expectation:
each number gets a sign at random, and all that stand `size` apart are added up (count sketch, Charikar, Chen and
Farach-Colton 2002).

    r rank, in and out the widths of a linear, n records of a micro-batch, T tokens that predict an answer
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from lit_gpt.errors import InputError
from lit_gpt.lora import DoRALinear, LoRALinear
from lit_gpt.model.fused import at_least_float32
from lit_gpt.model.gpt import GPT
from lit_gpt.model.kv_cache import KVCache, PackedCache, Piece
from lit_gpt.model.loss import LossAndGradient, loss_of_each, summed_loss
from lit_gpt.model.packing import common_prefix
from lit_gpt.model.rope import rotates_by_length

Record = tuple[torch.Tensor, torch.Tensor]  # its tokens (T,), and whether each is trained, (T,) bool

POSITIONS = 128  # the cache is made longer by so many


class Sketch:
    """Vectors of millions of numbers as `size` numbers whose products are those of the vectors, but for chance.

    The product of two sketches is off by about |u| |v| / sqrt(size). All sketches of one `seed` fit together.
    """

    def __init__(self, size: int, seed: int = 0) -> None:
        self.size = size
        self.seed = seed
        self.signs: dict[str, torch.Tensor] = {}

    def add(self, sketches: torch.Tensor, name: str, parts: torch.Tensor, start: int) -> None:
        """Adds a part of n vectors, (n, numbers), to their sketches, (n, size), in place.

        `name` is that of the part, and `start` where in the vectors it begins.
        """
        n, length = parts.shape
        signs = self.signs.get(name)
        if signs is None:
            generator = torch.Generator().manual_seed(self.seed + start)
            signs = torch.randint(0, 2, (length,), generator=generator, dtype=torch.int8) * 2 - 1
            signs = signs.to(parts.device)
            self.signs[name] = signs
        before = start % self.size
        after = -(before + length) % self.size
        padded = F.pad(parts * signs, (before, after))
        sketches += padded.view(n, -1, self.size).sum(1)


class RecordGradients:
    """Sketches of the gradients of records, and their losses, by a model with LoRA."""

    def __init__(self, model: GPT, sketch: Sketch) -> None:
        """Freezes `model`: what is differentiated are hidden states.

        Raises:
            InputError: no block of the model has LoRA, or in a form whose gradients are not known here.
        """
        self.model = model.eval().requires_grad_(False)  # no dropout
        self.device = next(model.parameters()).device
        self.sketch = sketch
        self.linears = linears_of(model)
        self.shares_prefixes = not rotates_by_length(model)
        self.cache: KVCache | None = None
        self.in_all_rows: list[int] = []  # tokens with which every row of the cache begins

    def of(self, records: Sequence[Record]) -> tuple[torch.Tensor, torch.Tensor]:
        """The sketches (n, size) of the gradients of n records' summed losses, and these losses, (n,)."""
        starts = [first_target(trained) - 1 for _, trained in records]
        cache = self.read_prompts(records, starts)

        # the answers end to end, each behind its prompt in the cache. Of an answer the last token predicts nothing
        tokens, wanted, targets, pieces = [], [], [], []
        T = 0
        for row, ((ids, trained), start) in enumerate(zip(records, starts, strict=True)):
            end = int(trained.nonzero()[-1])
            is_target = trained[start + 1 : end + 1].bool()
            tokens.append(ids[start:end])
            wanted.append(T + is_target.nonzero().squeeze(1))
            targets.append(ids[start + 1 : end + 1][is_target])
            pieces.append(Piece(row, start, end - start))
            T += end - start

        # forward and backward
        packed = PackedCache(cache, pieces)
        losses, rows_of = self.run(packed, torch.cat(tokens), torch.cat(wanted), torch.cat(targets))

        # each record's own rows, (n, longest answer), filled up with a row of zeros, which is number T
        lengths = [piece.length for piece in pieces]
        index = torch.full((len(records), max(lengths)), T)
        for row, numbers in enumerate(torch.arange(T).split(lengths)):
            index[row, : len(numbers)] = numbers
        sketches = self.sketch_products(rows_of, index.to(losses.device))
        of_record = torch.stack([part.sum() for part in losses.split([len(target) for target in targets])])
        return sketches, of_record

    def read_prompts(self, records: Sequence[Record], starts: Sequence[int]) -> KVCache:
        """A cache whose rows hold the first `starts` tokens of each record."""
        prompts = [ids[:start].tolist() for (ids, _), start in zip(records, starts, strict=True)]
        cache = self.room_for(len(records), max(len(ids) for ids, _ in records))
        for row, (ids, _) in enumerate(records):
            cache.text_lengths[row] = len(ids)

        # what all of these begin with is read once, and often stands in the cache already
        if self.shares_prefixes:
            n_shared = common_prefix(min(prompts), max(prompts))
            shared = prompts[0][:n_shared]
            n_there = common_prefix(shared, self.in_all_rows)
            if n_there < n_shared:
                self.read(cache, [(Piece(0, n_there, n_shared - n_there), shared[n_there:])])
                for row in range(1, cache.batch_size):
                    cache.copy_row(0, row, n_shared)
            self.in_all_rows = shared
        n_shared = len(self.in_all_rows)
        rest = []
        for row, prompt in enumerate(prompts):
            if len(prompt) > n_shared:
                rest.append((Piece(row, n_shared, len(prompt) - n_shared), prompt[n_shared:]))
        self.read(cache, rest)
        return cache

    def room_for(self, n_rows: int, length: int) -> KVCache:
        """The cache, with at least so many rows and positions."""
        if self.cache is None or n_rows > self.cache.batch_size or length > self.cache.max_seq_length:
            rounded = -(-length // POSITIONS) * POSITIONS  # so that few records need a larger one
            self.cache = self.model.new_kv_cache(n_rows, min(rounded, self.model.config.block_size))
            self.in_all_rows = []
        return self.cache

    @torch.no_grad()
    def read(self, cache: KVCache, parts: Sequence[tuple[Piece, list[int]]]) -> None:
        """Reads tokens into their rows of the cache."""
        if not parts:
            return
        packed = PackedCache(cache, [piece for piece, _ in parts])
        layout = packed.layout(torch.empty(0, dtype=torch.long, device=self.device))
        tokens = [token for _, tokens in parts for token in tokens]
        self.model.hidden(torch.tensor([tokens], device=self.device), layout=layout, cache=packed)

    def run(
        self, cache: PackedCache, idx: torch.Tensor, wanted: torch.Tensor, target: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, "Rows"]]:
        """Forward and backward of pieces of records.

        Args:
            cache: Says which pieces of which rows they are.
            idx: Their tokens, (T,).
            wanted: Which of these predict a target, (N,).
            target: The targets, (N,).

        Returns:
            The losses of the targets, (N,), and for each linear x and g.
        """
        model = self.model
        layout = cache.layout(wanted.to(self.device))
        idx = idx[None].to(self.device)
        losses: list[torch.Tensor] = []
        rows: dict[str, Rows] = {}
        positions = model.positions(idx, None, layout, cache)
        x = model.transformer.wte(idx, positions.pos).requires_grad_()
        handles = []
        for name, linear in self.linears.items():
            handles.append(linear.register_forward_hook(partial(keep_rows, rows, name)))
        try:
            x = model.run_blocks(x, positions, cache=cache)
            x = model.transformer.ln_f(x[0].index_select(0, layout.target_index))
            loss_and_gradient = partial(keep_losses, losses, model.loss_and_gradient)
            head = model.lm_head
            summed_loss(
                model.logits, loss_and_gradient, head.out_features, head.parameters(), x, target.to(self.device)
            ).backward()
        finally:
            for handle in handles:
                handle.remove()
        return torch.cat(losses), rows

    def sketch_products(self, rows: dict[str, "Rows"], index: torch.Tensor) -> torch.Tensor:
        """The sketches (n, size) of the gradients of n records, whose rows are those at `index` (n, longest answer)."""
        dtype = next(iter(rows.values())).x.dtype
        sketches = torch.zeros(len(index), self.sketch.size, device=self.device, dtype=dtype)
        start = 0
        for name, linear in self.linears.items():
            x, g = rows[name]
            low = linear.scaling * (x @ linear.lora_A.T)  # (T, r)
            low_g = linear.scaling * (g @ linear.lora_B)  # (T, r)
            A_gradients = pick(low_g, index).mT @ pick(x, index)  # (n, r, in)
            B_gradients = pick(g, index).mT @ pick(low, index)  # (n, out, r)
            for factor, gradients in (("A", A_gradients), ("B", B_gradients)):
                flat = gradients.flatten(1)
                self.sketch.add(sketches, f"{name}.lora_{factor}", flat, start)
                start += flat.size(1)
        return sketches


class Rows(NamedTuple):
    """What a linear's gradient is made of, for each token of a micro-batch, in float32."""

    x: torch.Tensor  # its input, (T, in)
    g: torch.Tensor  # the gradient of its output, (T, out)


def keep_rows(
    rows: dict[str, Rows], name: str, linear: nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor
) -> None:
    """A forward hook of a linear: its input, and later the gradient of its output, go to `rows`."""
    x = inputs[0].detach()

    def keep(gradient: torch.Tensor) -> None:
        dtype = at_least_float32(x.dtype)
        rows[name] = Rows(x[0].to(dtype), gradient[0].to(dtype))

    output.register_hook(keep)


def keep_losses(
    losses: list[torch.Tensor], loss_and_gradient: LossAndGradient, logits: torch.Tensor, target: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`loss_and_gradient`, with the loss of each target added to `losses`."""
    losses.append(loss_of_each(logits, target))
    return loss_and_gradient(logits, target)


def pick(rows: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Rows of a matrix (T, width), (n, length, width); row T is zeros."""
    with_zeros = F.pad(rows, (0, 0, 0, 1))
    return with_zeros[index]


def first_target(trained: torch.Tensor) -> int:
    """Which token of a record is the first that is trained, and is predicted by another one."""
    return 1 + int(trained[1:].nonzero()[0])


def linears_of(model: GPT) -> dict[str, LoRALinear]:
    """The linears in the blocks of a model that carry LoRA, by their names.

    Raises:
        InputError: there are none, or they are of a kind that is not known here.
    """
    linears = {}
    for name, module in model.transformer.h.named_modules(prefix="transformer.h"):
        if isinstance(module, LoRALinear):
            linears[name] = module
    if not linears:
        raise InputError("No block of this model carries LoRA, whose gradients tell which records did what.")
    if any(isinstance(linear, DoRALinear) for linear in linears.values()):
        raise InputError("This model was trained with --lora.dora. Which records did what is known for plain LoRA.")
    if any(".experts." in name for name in linears):
        raise InputError("The experts of this model carry LoRA. Which records did what is known for the other linears.")
    return linears
