"""What fits where: models of 1B to 70B on 1, 2 and 8 cards of 24, 40 and 80 GB. The table of tutorials/memory.md.

    python tests/benchmarks/what_fits.py                                      # some minutes, on a CPU
    python tests/benchmarks/what_fits.py --models Llama-3.1-8B --page tutorials/memory.md

A cell has the most tokens of a micro-batch that a card takes, 1k (1,024) to 64k:

    4k              all is kept
    16k again       with --activation_checkpointing block
    64k streamed    with --stream_blocks true, on a single card alone, where the others end below 16k; the host needs
                    the memory of the model
    -               not even 1k

With several cards, each holds a share of the model (--strategy fsdp) and reads records of its own. Full fine-tuning is
in bfloat16 with AdamW; LoRA has rank 8 on all linears, QLoRA the same over nf4. All of it is counted, by the plan of
four blocks and by the shares of `lit_gpt/memory/sharded.py`; 1 GB of each card is left for CUDA, and 3 % of what a step
makes for what the allocator wastes.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from recipes import put_into

from lit_gpt import Config
from lit_gpt.display.tables import markdown_table
from lit_gpt.full import Full
from lit_gpt.lora import LoRA
from lit_gpt.memory.fit import WASTE, bytes_needed, usable_bytes
from lit_gpt.memory.plan import Setup
from lit_gpt.memory.profile import FewBlocks, Profile
from lit_gpt.memory.sharded import ANY_SPEED, sharded_peak_of, whole_bytes

MODELS = ("Llama-3.2-1B", "Llama-3.2-3B", "Llama-3.1-8B", "Qwen3-14B", "Qwen3-32B", "Llama-3.3-70B-Instruct")
WAYS = {
    "LoRA": dict(method="lora", settings=LoRA()),
    "QLoRA": dict(method="lora", settings=LoRA(), quantize="bnb.nf4"),
    "full": dict(method="full", settings=Full()),
}
CARDS = (24, 40, 80)
COUNTS = (1, 2, 8)
TOKENS = tuple(1024 * 2**i for i in range(7))
ENOUGH = 16384  # tokens, with which streaming is not needed
MARK = "<!-- the table of tests/benchmarks/what_fits.py -->"


class Model:
    """A model and a way to train it, with its profiles."""

    def __init__(self, config: Config, way: str) -> None:
        # a step of several micro-batches: its gradients are there all the time
        self.setup = Setup(config.replace(block_size=max(TOKENS)), accumulates=True, **WAYS[way])
        self.n_layer = config.n_layer
        self.may_stream = way != "full"
        self.resident = FewBlocks(self.setup, ANY_SPEED)
        self.whole = whole_bytes(self.setup)
        self.made: dict[tuple[int, str], Profile] = {}
        if self.may_stream:
            self.streamed = FewBlocks(replace(self.setup, stream_blocks=True), ANY_SPEED)

    def profile(self, tokens: int, how: str) -> Profile:
        """The profile of a record of so many tokens: none, again or streamed."""
        if (tokens, how) not in self.made:
            few = self.streamed if how == "streamed" else self.resident
            templates = few.templates((tokens,), "streamed" if how == "streamed" else "some")
            if how == "streamed":
                self.made[tokens, how] = templates.of_more_blocks(self.n_layer, self.n_layer)
            else:
                # both come of the same four blocks
                self.made[tokens, "none"] = templates.of_more_blocks(self.n_layer, 0)
                self.made[tokens, "again"] = templates.of_more_blocks(self.n_layer, self.n_layer)
        return self.made[tokens, how]

    def needed(self, tokens: int, how: str, n_devices: int) -> float:
        """Bytes of a card."""
        profile = self.profile(tokens, how)
        if n_devices == 1:
            return bytes_needed(profile)
        made = profile.peak - profile.before
        return sharded_peak_of(profile, self.whole, n_devices, accumulates=True) + WASTE * made

    def longest(self, how: str, n_devices: int, usable: float) -> int:
        """The most tokens that fit; 0 if none do."""
        longest = 0
        for tokens in TOKENS:
            if self.needed(tokens, how, n_devices) > usable:
                break
            longest = tokens
        return longest

    def cell(self, card: int, n_devices: int) -> str:
        """The text of a cell: the ways, each with the most tokens, that take more than the one before."""
        usable = usable_bytes(card)
        best = 0
        words = []
        for how in ("none", "again", "streamed"):
            is_wanted = self.may_stream and n_devices == 1 and best < ENOUGH
            if how == "streamed" and not is_wanted:
                continue
            longest = self.longest(how, n_devices, usable)
            if longest > best:
                best = longest
                words.append(f"{longest // 1024}k" + ("" if how == "none" else f" {how}"))
        return ", ".join(words) or "-"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS, metavar="NAME", help="all if left out")
    parser.add_argument("--page", type=Path, help="a page that has such a table")
    args = parser.parse_args()
    heads = ["model", "method"]
    for card in CARDS:
        heads += [f"{n} x {card} GB" for n in COUNTS]
    rows = []
    for name in args.models:
        for way in WAYS:
            model = Model(Config.from_name(name), way)
            row = [name, way]
            for card in CARDS:
                row += [model.cell(card, n) for n in COUNTS]
            print(" | ".join(row), file=sys.stderr, flush=True)
            rows.append(row)
    table = markdown_table(heads, rows)
    print(table)
    if args.page:
        put_into(args.page, table, MARK)


if __name__ == "__main__":
    main()
