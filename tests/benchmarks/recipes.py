"""Flags, memory and minutes for models of today on cards of 24, 40 and 80 GB: the table of tutorials/rented_gpu.md.

    python tests/benchmarks/recipes.py                                      # some minutes, on a CPU
    python tests/benchmarks/recipes.py --page tutorials/rented_gpu.md       # puts the table into the page, too
    python tests/benchmarks/recipes.py --models Llama-3.1-8B-Instruct --share 0.4

A cell is the first recipe that fits, of those that compute least again in backward:

    9,600 block · 17.9 GB · 31 min
    |     |       |         an epoch of 10,000 records of 300 tokens, by count: products / (share * rate of the card)
    |     |       the planned peak (lit_gpt/memory/plan.py), which leaves 1 GB of the card free
    |     --activation_checkpointing, if it is not none
    --train.micro_batch_tokens

Memory is planned: the real code runs a step on tensors without contents. Time is counted: the matrix products of the
linears at a share of the rate that the card's maker gives for bfloat16. Nothing here has been measured.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from lit_gpt import GPT, Config
from lit_gpt.checkpoint.load import build_model
from lit_gpt.display.tables import markdown_table
from lit_gpt.full import Full
from lit_gpt.lora import LoRA
from lit_gpt.memory.ledger import Plan
from lit_gpt.memory.plan import EIGHT_BITS, OUTSIDE_GB, Setup, adapt, plan
from lit_gpt.model.activation_checkpointing import ActivationCheckpointing
from lit_gpt.model.gpt import count_parameters

EPOCH = 10_000 * 300  # tokens
SHARE = 0.4  # of a card's rate: the measured steps of tutorials/gpu.md come to 0.20 to 0.63, of all linears to 0.45


@dataclass(frozen=True)
class Card:
    """A kind of card that can be rented."""

    gb: int
    name: str
    tflops: int
    """Dense bfloat16 products with sums in float32, as its data sheet says."""


CARDS = (Card(80, "H100 SXM", 989), Card(40, "A100", 312), Card(24, "RTX 4090", 165))  # the largest first

LORA = LoRA(r=16)


@dataclass(frozen=True)
class Way:
    """A way to train: what Setup takes, and for which sizes it has a row."""

    title: str
    setup: dict
    least: float = 0
    """Parameters of the smallest model that has a row, in billions."""
    most: float = math.inf
    """Those of the largest."""


WAYS = (
    Way("LoRA", dict(method="lora", settings=LORA)),
    Way("QLoRA", dict(method="lora", settings=LORA, quantize="bnb.nf4"), least=2.5),
    Way("QLoRA, dq, r 8", dict(method="lora", settings=LoRA(r=8), quantize="bnb.nf4-dq"), least=25),
    Way("full", dict(method="full", settings=Full()), most=5),
    Way("full, 8-bit AdamW", dict(method="full", settings=Full(), optimizer=EIGHT_BITS[0]), least=8, most=9),
)

# Gemma 3 of 4B and more also reads images: its text model is known once it has been taken out (tutorials/rented_gpu.md)
GEMMA_3 = dict(vocab_size=262208, sliding_window=1024, block_size=131072)
GEMMA_3_4B = GEMMA_3 | dict(
    n_layer=34, n_head=8, n_query_groups=4, n_embd=2560, intermediate_size=10240, embedding_scale=2560**0.5
)
GEMMA_3_12B = GEMMA_3 | dict(
    n_layer=48, n_head=16, n_query_groups=8, n_embd=3840, intermediate_size=15360, embedding_scale=3840**0.5
)


def gemma_3(name: str, sizes: dict) -> Config:
    """The text model of a larger Gemma 3: like that of 1B, every sixth layer without a window."""
    windows = [layer for layer in range(sizes["n_layer"]) if (layer + 1) % 6]
    return Config.from_name("gemma-3-1b-it", **sizes, sliding_layers=windows).replace(name=name)


MODELS = (
    Config.from_name("Qwen3-0.6B"),
    Config.from_name("Llama-3.2-1B-Instruct"),
    Config.from_name("Llama-3.2-3B-Instruct"),
    Config.from_name("Qwen3-4B"),
    gemma_3("gemma-3-4b-it", GEMMA_3_4B),
    Config.from_name("Mistral-7B-Instruct-v0.3"),
    Config.from_name("Qwen2.5-7B-Instruct"),
    Config.from_name("Llama-3.1-8B-Instruct"),
    Config.from_name("Qwen3-8B"),
    gemma_3("gemma-3-12b-it", GEMMA_3_12B),
    Config.from_name("Mistral-Nemo-Instruct-2407"),
    Config.from_name("phi-4"),
    Config.from_name("Qwen3-14B"),
    Config.from_name("Qwen3-32B"),
)

# Tokens of a micro-batch, the most first: 9,600 are 32 records of 300, a whole step. A record that is longer than the
# limit is computed by itself, and so 2,400 have to fit before blocks are computed again
TOKENS = (9600, 4800, 2400)
FEWER_TOKENS = (1600, 800)  # where only that fits, with the blocks computed again
RECORD = 2400  # tokens are planned as records of up to this length: the same memory as for 300, and fewer of them
CHECKPOINTING: tuple[ActivationCheckpointing, ...] = ("none", "selective", "block")  # what computes least again, first


@dataclass(frozen=True)
class Recipe:
    """What to type, and what it takes."""

    tokens: int
    checkpointing: ActivationCheckpointing
    gb: float


class Recipes:
    """The recipes for a model and a way to train it."""

    def __init__(self, config: Config, way: Way) -> None:
        self.setup = Setup(config, **way.setup)
        self.planned: dict[tuple[ActivationCheckpointing, int], Plan] = {}

    def plan(self, checkpointing: ActivationCheckpointing, tokens: int) -> Plan:
        """The plan of a step, made once."""
        key = (checkpointing, tokens)
        if key not in self.planned:
            record = min(RECORD, tokens)
            lengths = (record,) * (tokens // record)
            setup = replace(
                self.setup,
                activation_checkpointing=checkpointing,
                lengths=lengths,
                accumulates=tokens < TOKENS[0],  # the gradients of one micro-batch wait for the next
            )
            self.planned[key] = plan(setup) if setup.method == "full" else plan_by_blocks(setup)
            print(".", end="", flush=True, file=sys.stderr)
        return self.planned[key]

    def fitting(self, gb: float) -> Recipe | None:
        """The first recipe that fits into `gb`; None if none does."""
        for checkpointing in CHECKPOINTING:
            choice = TOKENS + FEWER_TOKENS if checkpointing == "block" else TOKENS
            fewest = choice[-1]
            smallest = self.plan(checkpointing, fewest)
            if smallest.gb > gb:
                continue
            activations = smallest.parts["activations"] / 1e9
            for tokens in choice:
                # n times the tokens keep n times the activations: what is far too large needs no plan
                more = activations * (tokens / fewest - 1)
                if smallest.gb + 0.9 * more > gb:
                    continue
                peak = self.plan(checkpointing, tokens).gb
                if peak <= gb:
                    return Recipe(tokens, checkpointing, peak)
        return None


def plan_by_blocks(setup: Setup) -> Plan:
    """The plan of LoRA in a model, from those of 4 and of 8 of its blocks, which are all alike.

    It is that of the whole model, which takes as much longer as there are more blocks. Not so where the base trains:
    there gradients pile up in backward while activations go, and the number of blocks decides when the peak is.
    """
    config = setup.config
    few, more = 4, 8
    if config.n_layer <= more:
        return plan(setup)
    of_few = plan(replace(setup, config=config.replace(n_layer=few))).parts
    of_more = plan(replace(setup, config=config.replace(n_layer=more))).parts
    parts = {}
    for part, size in of_few.items():
        of_each = (of_more[part] - size) / (more - few)
        parts[part] = round(size + of_each * (config.n_layer - few))
    return Plan(parts)


def products_per_token(setup: Setup) -> float:
    """Floating-point operations in the linears for each token of a step, if all tokens are trained on.

    A matrix of P numbers takes 2 P of them forward, 2 P for the gradient of its input, and 2 P for its own, if it
    trains. What is computed again in backward takes another 2 P. Attention, which at 300 tokens is a few percent of
    that, norms and the unpacking of 4 bits are what a card's share is short of 1 for.
    """
    model = linears_of(setup)
    n = 0
    for name, linear in model.named_modules():
        if not isinstance(linear, nn.Linear):
            continue
        n += 4 * linear.weight.numel()
        if is_computed_again(name, setup.activation_checkpointing):
            n += 2 * linear.weight.numel()
        if setup.method == "full":
            n += 2 * linear.weight.numel()
    for name, param in model.named_parameters():
        if "lora_" in name:
            n += 6 * param.numel()
    return n


def is_computed_again(name: str, checkpointing: ActivationCheckpointing) -> bool:
    """Whether a linear of that name, such as transformer.h.3.mlp.fc_1, is computed a second time in backward."""
    if checkpointing == "none" or not name.startswith("transformer.h."):
        return False
    if checkpointing == "selective":
        return ".mlp." in name
    n_block = int(name.split(".")[2])
    return checkpointing == "block" or n_block < checkpointing


def linears_of(setup: Setup) -> GPT:
    """The adapted model without memory and, for what is counted here, not quantized."""
    model = build_model(setup.config)
    return adapt(model, replace(setup, activation_checkpointing="none"))


def minutes(setup: Setup, card: Card, share: float) -> float:
    """The time of an epoch on a card, by count."""
    rate = share * card.tflops * 1e12
    return EPOCH * products_per_token(setup) / rate / 60


def row_of(config: Config, way: Way, share: float) -> list[str]:
    """The row of a model: a cell for each card, the smallest first."""
    recipes = Recipes(config, way)
    cells = []
    for card in CARDS:
        recipe = None
        if fewest_bytes(config, way) / 1e9 <= card.gb:
            recipe = recipes.fitting(card.gb - OUTSIDE_GB)
        if recipe is None:
            cells.append("")
            continue
        setup = replace(recipes.setup, activation_checkpointing=recipe.checkpointing)
        words = f"{recipe.tokens:,}"
        if recipe.checkpointing != "none":
            words += f" {recipe.checkpointing}"
        cells.append(f"{words} · {recipe.gb:.1f} GB · {in_words(minutes(setup, card, share))}")
    return [config.name, way.title, *reversed(cells)]


def in_words(n_minutes: float) -> str:
    return "under 1 min" if n_minutes < 1 else f"{n_minutes:.0f} min"


def fewest_bytes(config: Config, way: Way) -> float:
    """Less than a way to train can take: the weights, in half a byte each or two; with their gradients, if they train.

    What is larger than a card needs no plan.
    """
    n = count_parameters(config)
    if way.setup["method"] == "full":
        return 4 * n
    return 2 * n if way.setup.get("quantize") is None else n / 2


def rows_of(models: Sequence[Config], share: float) -> list[list[str]]:
    """All rows; of each model those of the ways that its size is for."""
    rows = []
    for config in models:
        billions = count_parameters(config) / 1e9
        for way in WAYS:
            if not way.least <= billions <= way.most:
                continue
            print(f"{config.name}, {way.title} ", end="", flush=True, file=sys.stderr)
            row = row_of(config, way, share)
            print(" | ".join(["", *row[2:]]), flush=True, file=sys.stderr)
            # a model's name and a way that no card of these is large enough for say nothing
            if any(row[2:]):
                rows.append(row)
    return rows


MARK = "<!-- the table of tests/benchmarks/recipes.py -->"


def put_into(page: Path, table: str, mark: str = MARK) -> None:
    """Puts the table in the place of the one that follows the line `mark` in a page."""
    before, found, after = page.read_text(encoding="utf-8").partition(f"{mark}\n\n")
    if not found:
        raise SystemExit(f"{page} has no line {mark}")
    _, _, rest = after.partition("\n\n")
    page.write_text(f"{before}{found}{table}\n\n{rest}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [config.name for config in MODELS]
    parser.add_argument("--models", nargs="+", choices=names, default=names, metavar="NAME", help="all if left out")
    parser.add_argument("--share", type=float, default=SHARE, help="of a card's bfloat16 rate")
    parser.add_argument("--page", type=Path, help="a page that has a table of these")
    args = parser.parse_args()
    models = [config for config in MODELS if config.name in args.models]
    heads = ["model", "method"]
    for card in reversed(CARDS):
        heads.append(f"{card.gb} GB ({card.name})")
    table = markdown_table(heads, rows_of(models, args.share))
    print(table)
    if args.page:
        put_into(args.page, table)


if __name__ == "__main__":
    main()
