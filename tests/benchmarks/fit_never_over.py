"""What `plan_memory.py --fit` chooses stays within the card: real steps of tiny models on a CPU, or of larger on a GPU.

    python tests/benchmarks/fit_never_over.py                                      # 50 choices, some minutes
    python tests/benchmarks/fit_never_over.py --n 5 --seed 3
    python tests/benchmarks/fit_never_over.py --save .gpu/choices.pickle           # choose for a GPU, and run nothing
    python tests/benchmarks/fit_never_over.py --load .gpu/choices.pickle           # there: run what was chosen

Shapes, methods, records and cards are random. For each, the optimizer step that was chosen is run with real tensors,
all its micro-batches one after the other, twice. On a CPU the peak is counted, and held against the memory that was to
be kept. On a GPU nothing else may run: the allocator gets what it would have on a card of that size, next to the CUDA
context, and a step that needs more fails. A choice is wasteful if one block fewer computed again, or fewer and larger
micro-batches, would fit and be faster, with half a percent to spare: four blocks tell of all that nearly.
"""

import argparse
import gc
import pickle
import random
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch.nn import functional as F

from lit_gpt import GPT, Config
from lit_gpt.checkpoint.load import build_model, parameter_shapes, replace_parameter
from lit_gpt.full import Full
from lit_gpt.lora import LoRA
from lit_gpt.make_optimizer import TRIAL_SETTINGS, make_optimizer
from lit_gpt.memory.fit import EQUAL, Choice, Search, Wish, bytes_needed, groups_of, rank
from lit_gpt.memory.ledger import Ledger, enter_model
from lit_gpt.memory.plan import OUTSIDE_GB, Setup, adapt, batch_of
from lit_gpt.memory.profile import profile_of
from lit_gpt.memory.speed import CARDS, card_named
from lit_gpt.model.loss import LOGITS
from lit_gpt.optimizer_in_backward import OptimizerInBackward
from lit_gpt.quantize import quantize_linears

TIGHT = 0.995


@dataclass(frozen=True)
class Case:
    """A choice, and what a real step of it took."""

    wish: Wish
    choice: Choice
    peak: float
    """Bytes; infinite where the allocator had no more to give."""

    @property
    def is_over(self) -> bool:
        return self.peak > self.wish.usable

    def __str__(self) -> str:
        setup = self.choice.setup
        what = "streamed" if setup.stream_blocks else setup.activation_checkpointing
        return (
            f"{setup.method:10} {setup.config.n_layer:2} blocks  {setup.quantize or setup.dtype!s:14}"
            f" {self.choice.tokens:5} tokens {self.choice.n_passes:2} passes  {what!s:9}"
            f" {self.peak / 1e6:7.2f} of {self.wish.usable / 1e6:7.2f} MB ({self.peak / self.wish.usable:.1%})"
        )


def random_wish(chance: random.Random, is_large: bool) -> Wish:
    """A model, a way to train it, the records of a step, and a card between what is needed at least and at most."""
    n_head = chance.choice((8, 16, 32) if is_large else (2, 4))
    head_size = 64 if is_large else 32
    config = Config(
        name="large" if is_large else "tiny",
        n_layer=chance.randint(2, 7),
        n_head=n_head,
        n_query_groups=chance.choice((n_head // 4, n_head) if is_large else (1, n_head)),
        n_embd=head_size * n_head,
        intermediate_size=chance.choice((1408, 2816, 5632) if is_large else (96, 160, 256)),
        vocab_size=chance.choice((4000, 32000) if is_large else (300, 1000)),
        block_size=4096 if is_large else 512,
        tie_embeddings=chance.random() < 0.3,
    )
    method = chance.choice(("lora", "lora", "full", "adapter") if config.n_layer > 2 else ("lora", "full"))
    settings = {"lora": LoRA(r=chance.choice((4, 16))), "full": Full()}.get(method)
    dtype = torch.bfloat16 if is_large else chance.choice((torch.float32, torch.bfloat16))
    setup = Setup(config, method, settings, dtype=dtype)
    n_records = chance.choice((1, 2, 5))
    shortest, longest = (100, 2000) if is_large else (20, 200)
    if chance.random() < 0.5:
        lengths = (chance.randint(shortest, longest),) * n_records
    else:
        lengths = tuple(chance.randint(shortest, longest) for _ in range(n_records))
    speed = card_named("H100 SXM") if is_large else replace(chance.choice(CARDS), overlaps=chance.random() < 0.5)
    wish = Wish(
        setup=replace(setup, lengths=lengths),
        lengths=lengths,
        usable=0,
        speed=speed,
        compiled=False,
        # the 8-bit ones are for GPUs
        fixed=frozenset() if is_large else frozenset({"optimizer"}),
    )

    # the card
    _, most = profile_of(replace(setup, lengths=lengths), speed)
    smallest = replace(setup, lengths=(max(lengths),), activation_checkpointing="block", accumulates=True)
    _, least = profile_of(smallest, speed)
    share = chance.uniform(0.0, 1.1)
    low = 1.001 * bytes_needed(least)
    return replace(wish, usable=low + share * max(0, bytes_needed(most) - low))


# ---- real steps


def peak_on_cpu(choice: Choice, groups: Sequence[Sequence[int]]) -> float:
    """The peak of an optimizer step with tensors that are there: the second one, whose optimizer has its memory."""
    model = prepared(choice.setup, torch.device("cpu"))
    ledger = Ledger()
    enter_model(model, ledger)
    with ledger:
        take_steps(model, choice.setup, groups, torch.device("cpu"))
    return ledger.peak


def peak_under_cap(choice: Choice, groups: Sequence[Sequence[int]], usable: float) -> float:
    """The peak of the same step on a GPU of which `usable` bytes are planned for: infinite if it fails."""
    device = torch.device("cuda")
    gc.collect()  # wrapped methods of models are cycles
    torch.cuda.empty_cache()
    free, everything = torch.cuda.mem_get_info()
    context = everything - free - torch.cuda.memory_reserved()
    workspaces = torch.cuda.memory_allocated()
    model = prepared(choice.setup, device)  # at once on the device, also where blocks go to the host from there
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.set_per_process_memory_fraction((usable + OUTSIDE_GB * 1e9 - context) / everything)
    try:
        take_steps(model, choice.setup, groups, device)
    except torch.OutOfMemoryError:
        return float("inf")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    return torch.cuda.max_memory_allocated() - workspaces


def prepared(setup: Setup, device: torch.device) -> GPT:
    """The adapted model with random weights on a device, which quantized linears make codes of."""
    model = build_model(setup.config)
    quantize_linears(model, setup.quantize)
    for name, shape in parameter_shapes(setup.config).items():
        weight = torch.empty(shape, dtype=setup.dtype, device=device).normal_(float(len(shape) == 1), 0.02)
        replace_parameter(model, name, weight, setup.dtype)
    if setup.config.tie_embeddings:
        model.lm_head.weight = model.transformer.wte.weight
    return adapt(model.to(device), setup)


def take_steps(model: GPT, setup: Setup, groups: Sequence[Sequence[int]], device: torch.device) -> None:
    """Two optimizer steps of these micro-batches."""
    optimizer = make_optimizer(model, TRIAL_SETTINGS, setup.optimizer)
    in_backward = OptimizerInBackward(optimizer, max_norm=1.0) if setup.optimizer_in_backward else None
    fabric: Any = SimpleNamespace(device=device, backward=torch.Tensor.backward)  # what the second pass asks of it
    batches = [batch_of(group) for group in groups]
    for _ in range(2):
        for idx, layout in batches:
            model(idx.to(device), layout=layout.to(device)).backward()
        if in_backward is not None:
            in_backward.step(fabric, model, batches[0], n_targets=1)
            continue
        optimizer.step()
        optimizer.zero_grad()


def warm_up() -> None:
    """Lets cuBLAS take its workspaces, forward and backward: they are of what is outside of a plan."""
    x = torch.randn(64, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    bias = torch.zeros(64, device="cuda", dtype=torch.bfloat16)
    F.linear(F.linear(x, x, bias), x).sum().backward()
    torch.cuda.synchronize()


def tried(wish: Wish, choice: Choice, on_gpu: bool) -> Case:
    """The real step of a choice."""
    groups = groups_of(wish.lengths, choice.tokens)
    assert len(groups) == choice.n_passes, "the step has as many passes as were planned"
    peak = peak_under_cap(choice, groups, wish.usable) if on_gpu else peak_on_cpu(choice, groups)
    return Case(wish, choice, peak)


def wasteful(case: Case) -> str | None:
    """A larger choice that would have fitted and been faster; None if there is none."""
    search = Search(replace(case.wish, usable=float("inf")))
    setup = case.choice.setup
    how = setup.activation_checkpointing
    if how != "none" and not setup.stream_blocks:
        n_again = {"block": setup.config.n_layer, "selective": 0}.get(how, how)
        fewer = replace(setup, activation_checkpointing=n_again - 1 if n_again > 1 else "none")
        _, profile = profile_of(fewer, case.wish.speed)
        if bytes_needed(profile) <= TIGHT * case.wish.usable:
            return f"{fewer.activation_checkpointing} would fit, too"
    search.wish = replace(case.wish, fixed=case.wish.fixed | {"activation_checkpointing", "quantize", "stream_blocks"})
    for larger in search.choices_of(setup):
        faster = rank(larger)[0] < rank(case.choice)[0] and larger.seconds < case.choice.seconds * (1 - EQUAL)
        if larger.tokens > case.choice.tokens and faster:
            return f"{larger.tokens} tokens would fit, too, and be faster"
    return None


def choices(args: argparse.Namespace) -> Iterator[tuple[Wish, Choice]]:
    """Wishes, and the best choice for each: those of a file, or new ones."""
    if args.load is not None:
        yield from pickle.loads(args.load.read_bytes())
        return
    chance = random.Random(args.seed)
    for _ in range(args.n):
        wish = random_wish(chance, is_large=args.save is not None)
        choice, _ = Search(wish).best()
        yield wish, choice


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=50, help="how many choices")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", type=Path, help="write choices for a GPU there, of 0.1 to 4 GB a step; run nothing")
    parser.add_argument("--load", type=Path, help="run what --save has written; a pickle, so never a stranger's file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.save is not None:
        chosen = list(choices(args))
        args.save.write_bytes(pickle.dumps(chosen))
        print(f"{len(chosen)} choices in {args.save}")
        return

    on_gpu = args.load is not None
    if on_gpu:
        print(f"on {torch.cuda.get_device_name()}")
        warm_up()
    else:
        LOGITS.update(dict.fromkeys(LOGITS, 2**16))  # so that the loss of a few hundred tokens comes in chunks, too
    began = time.perf_counter()
    cases = []
    n_wasteful = 0
    for number, (wish, choice) in enumerate(choices(args), 1):
        case = tried(wish, choice, on_gpu)
        waste = None if on_gpu else wasteful(case)
        n_wasteful += waste is not None
        cases.append(case)
        remark = f"{'  OVER' if case.is_over else ''}{f'  wasteful: {waste}' if waste else ''}"
        print(f"{number:3} {case}{remark}", flush=True)
    shares = sorted(case.peak / case.wish.usable for case in cases)
    n_over = sum(case.is_over for case in cases)
    print(
        f"{len(cases)} choices, {n_over} over, {n_wasteful} wasteful; a step took {shares[0]:.1%} to {shares[-1]:.1%}"
        f" of the memory, {shares[len(shares) // 2]:.1%} in the middle; {time.perf_counter() - began:.0f} s"
    )
    sys.exit(1 if n_over else 0)


if __name__ == "__main__":
    main()
