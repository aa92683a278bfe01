"""The time that is counted for a step, beside what was measured on an H100: the table of tutorials/memory.md.

    python tests/benchmarks/predicted_speed.py        # half a minute

The measured figures are those of tutorials/gpu.md, tokens per second. Three numbers of lit_gpt/memory/speed.py were
chosen on these rows: the share of products, and the host's times. So this says how well one formula describes them, and
not how well it foretells another card. Records of "short" rows are 16 of 60 to 250 tokens, of which half were trained.
"""

import argparse
import random
from dataclasses import dataclass

from lit_gpt import Config
from lit_gpt.display.tables import markdown_table
from lit_gpt.lora import LoRA
from lit_gpt.memory.plan import Setup
from lit_gpt.memory.profile import profile_of
from lit_gpt.memory.speed import card_named
from lit_gpt.quantize import Quantize

QUERY_VALUE = LoRA(r=8, alpha=16, key=False, projection=False, mlp=False)
ALL_LINEARS = LoRA(r=16, alpha=32)
SHORT = tuple(random.Random(0).randint(60, 250) for _ in range(16))


@dataclass(frozen=True)
class Row:
    """A measured step."""

    name: str
    model: str
    lora: LoRA
    lengths: tuple[int, ...]
    compiled: bool
    measured: int
    """Tokens per second."""
    quantize: Quantize | None = None


ROWS = (
    Row("8B, short", "Llama-3.1-8B", QUERY_VALUE, SHORT, True, 18333),
    Row("8B, short, not compiled", "Llama-3.1-8B", QUERY_VALUE, SHORT, False, 14915),
    Row("8B, 4,096", "Llama-3.1-8B", QUERY_VALUE, (4096,), True, 14898),
    Row("8B, 4,096, not compiled", "Llama-3.1-8B", QUERY_VALUE, (4096,), False, 12889),
    Row("8B, short, all linears", "Llama-3.1-8B", ALL_LINEARS, SHORT, True, 15585),
    Row("8B, 4,096, all linears", "Llama-3.1-8B", ALL_LINEARS, (4096,), True, 13023),
    Row("8B, 2 x 4,096", "Llama-3.1-8B", QUERY_VALUE, (4096,) * 2, True, 15114),
    Row("8B in nf4, 2 x 4,096", "Llama-3.1-8B", QUERY_VALUE, (4096,) * 2, True, 14536, "bnb.nf4"),
    Row("1B, short", "Llama-3.2-1B", QUERY_VALUE, SHORT, True, 43921),
    Row("1B, short, not compiled", "Llama-3.2-1B", QUERY_VALUE, SHORT, False, 25245),
    Row("1B, 4 x 2,048", "Llama-3.2-1B", QUERY_VALUE, (2048,) * 4, True, 80382),
    Row("1B, 4 x 2,048, not compiled", "Llama-3.2-1B", QUERY_VALUE, (2048,) * 4, False, 61824),
)


def predicted(row: Row) -> float:
    """Tokens per second, by count."""
    speed = card_named("H100 SXM")
    setup = Setup(Config.from_name(row.model), settings=row.lora, quantize=row.quantize, lengths=row.lengths)
    _, profile = profile_of(setup, speed, row.compiled)
    passes, _ = profile.work()
    return sum(row.lengths) / passes.total(speed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    cells = []
    errors = []
    for row in ROWS:
        speed = predicted(row)
        errors.append(speed / row.measured - 1)
        cells.append((row.name, f"{row.measured:,}", f"{speed:,.0f}", f"{errors[-1]:+.0%}"))
    print(markdown_table(("H100, LoRA", "measured tokens/s", "counted", "off by"), cells, right=(1, 2, 3)))
    mean = sum(map(abs, errors)) / len(errors)
    print(f"\nMean error {mean:.1%}, largest {max(map(abs, errors)):.1%}.")


if __name__ == "__main__":
    main()
