"""What `plan_memory.py --fit` chooses stays within the card: real steps of tiny models on a CPU, counted.

    python tests/benchmarks/fit_never_over.py                 # 50 choices, some minutes
    python tests/benchmarks/fit_never_over.py --n 5 --seed 3

Shapes, methods, records and cards are random. For each, the optimizer step that was chosen is run with real tensors,
all its micro-batches one after the other, twice, and its peak is held against the memory that was to be kept. A choice
is wasteful if one block fewer computed again, or fewer and larger micro-batches, would fit and be faster, with half a
percent to spare: four blocks tell of all that nearly.
"""

import argparse
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from lit_gpt import GPT, Config
from lit_gpt.checkpoint.load import build_model
from lit_gpt.full import Full
from lit_gpt.lora import LoRA
from lit_gpt.make_optimizer import TRIAL_SETTINGS, make_optimizer
from lit_gpt.memory.fit import EQUAL, Choice, Search, Wish, bytes_needed, groups_of, rank
from lit_gpt.memory.ledger import Ledger, enter_model
from lit_gpt.memory.plan import Setup, adapt, batch_of, fill_with_zeros
from lit_gpt.memory.profile import profile_of
from lit_gpt.memory.speed import CARDS
from lit_gpt.quantize import QuantizedLinear, quantize_linears

TIGHT = 0.995


@dataclass(frozen=True)
class Case:
    """A choice, and what a real step of it took."""

    wish: Wish
    choice: Choice
    peak: int
    """Bytes."""

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


def random_wish(chance: random.Random) -> Wish:
    """A model, a way to train it, the records of a step, and a card between what is needed at least and at most."""
    n_head = chance.choice((2, 4))
    config = Config(
        name="tiny",
        n_layer=chance.randint(2, 7),
        n_head=n_head,
        n_query_groups=chance.choice((1, n_head)),
        n_embd=32 * n_head,
        intermediate_size=chance.choice((96, 160, 256)),
        vocab_size=chance.choice((300, 1000)),
        block_size=512,
        tie_embeddings=chance.random() < 0.3,
    )
    method = chance.choice(("lora", "lora", "full", "adapter") if config.n_layer > 2 else ("lora", "full"))
    settings = {"lora": LoRA(r=chance.choice((4, 16))), "full": Full()}.get(method)
    setup = Setup(config, method, settings, dtype=chance.choice((torch.float32, torch.bfloat16)))
    n_records = chance.choice((1, 2, 5))
    if chance.random() < 0.5:
        lengths = (chance.randint(20, 200),) * n_records
    else:
        lengths = tuple(chance.randint(20, 200) for _ in range(n_records))
    speed = replace(chance.choice(CARDS), overlaps=chance.random() < 0.5)
    wish = Wish(
        setup=replace(setup, lengths=lengths),
        lengths=lengths,
        usable=0,
        speed=speed,
        compiled=False,
        fixed=frozenset({"optimizer"}),  # the 8-bit ones are for GPUs
    )

    # the card
    _, most = profile_of(replace(setup, lengths=lengths), speed)
    smallest = replace(setup, lengths=(max(lengths),), activation_checkpointing="block", accumulates=True)
    _, least = profile_of(smallest, speed)
    share = chance.uniform(0.0, 1.1)
    low = 1.001 * bytes_needed(least)
    return replace(wish, usable=low + share * max(0, bytes_needed(most) - low))


def real_peak(setup: Setup, groups: Sequence[Sequence[int]]) -> int:
    """The peak of an optimizer step with tensors that are there: the second one, whose optimizer has its memory."""
    model = prepared(setup)
    optimizer = make_optimizer(model, TRIAL_SETTINGS, setup.optimizer)
    ledger = Ledger()
    enter_model(model, ledger)
    batches = [batch_of(group) for group in groups]
    with ledger:
        for _ in range(2):
            for idx, layout in batches:
                model(idx, layout=layout).backward()
            optimizer.step()
            optimizer.zero_grad()
    return ledger.peak


def prepared(setup: Setup) -> GPT:
    """The model with tensors that are there."""
    model = build_model(setup.config)
    quantize_linears(model, setup.quantize)
    fill_with_zeros(model, setup)
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            module.load_weight(torch.randn(module.out_features, module.in_features))
    return adapt(model, setup)


def tried(wish: Wish) -> Case:
    """The best choice for a wish, and its real step."""
    choice, _ = Search(wish).best()
    groups = groups_of(wish.lengths, choice.tokens)
    assert len(groups) == choice.n_passes, "the step has as many passes as were planned"
    return Case(wish, choice, real_peak(choice.setup, groups))


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=50, help="how many choices")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    chance = random.Random(args.seed)
    began = time.perf_counter()
    shares = []
    n_over = 0
    n_wasteful = 0
    for number in range(1, args.n + 1):
        case = tried(random_wish(chance))
        waste = wasteful(case)
        shares.append(case.peak / case.wish.usable)
        n_over += case.is_over
        n_wasteful += waste is not None
        print(
            f"{number:3} {case}{'  OVER' if case.is_over else ''}{f'  wasteful: {waste}' if waste else ''}", flush=True
        )
    shares.sort()
    print(
        f"{args.n} choices, {n_over} over, {n_wasteful} wasteful; a step took {shares[0]:.1%} to {shares[-1]:.1%} of"
        f" the memory, {shares[len(shares) // 2]:.1%} in the middle; {time.perf_counter() - began:.0f} s"
    )
    sys.exit(1 if n_over else 0)


if __name__ == "__main__":
    main()
