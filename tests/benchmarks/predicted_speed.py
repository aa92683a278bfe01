"""The time that is counted for a step, beside what was measured on an H100: the table of tutorials/memory.md.

    python tests/benchmarks/predicted_speed.py        # a minute

The measured figures are those of tutorials/gpu.md, tokens per second. Three numbers of lit_gpt/memory/speed.py were
chosen on the first twelve rows: the share of products, and the host's times. For these this says how well one formula
describes them. The others were measured later, and say how well it foretells other settings on that card; but that
products in compiled blocks are started one by one was learned from those of 0.6B. No other card is here. Records of
"short" rows have 60 to 250 tokens, of which half were trained.
"""

import argparse
import random
from dataclasses import dataclass

from lit_gpt import Config
from lit_gpt.display.tables import markdown_table
from lit_gpt.lora import LoRA
from lit_gpt.memory.fit import frozen_bytes_of_a_block
from lit_gpt.memory.plan import Setup
from lit_gpt.memory.profile import profile_of
from lit_gpt.memory.speed import card_named
from lit_gpt.model.activation_checkpointing import ActivationCheckpointing
from lit_gpt.quantize import Quantize

QUERY_VALUE = LoRA(r=8, alpha=16, key=False, projection=False, mlp=False)
ALL_LINEARS = LoRA(r=16, alpha=32)


def short(n_records: int) -> tuple[int, ...]:
    chance = random.Random(0)
    return tuple(chance.randint(60, 250) for _ in range(n_records))


SHORT = short(16)


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
    recompute: ActivationCheckpointing = "none"
    streamed: bool = False


CHOSEN_ON = (
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


def qlora(name: str, n_records: int, measured: int, streamed: bool) -> Row:
    """8B in nf4, all linears, records of 2,048 tokens, blocks computed again."""
    lengths = (2048,) * n_records
    return Row(name, "Llama-3.1-8B", ALL_LINEARS, lengths, True, measured, "bnb.nf4", "block", streamed)


def qlora_70b(name: str, n_records: int, measured: int) -> Row:
    lengths = (2048,) * n_records
    return Row(name, "Llama-3.3-70B-Instruct", LoRA(), lengths, True, measured, "bnb.nf4-dq", "block", streamed=True)


MEASURED_LATER = (
    qlora("8B in nf4, recomputed, 2,048", 1, 5824, streamed=False),
    qlora("8B in nf4, recomputed, 2 x 2,048", 2, 9374, streamed=False),
    qlora("8B in nf4, recomputed, 4 x 2,048", 4, 9924, streamed=False),
    qlora("8B in nf4, streamed, 2,048", 1, 5103, streamed=True),
    qlora("8B in nf4, streamed, 2 x 2,048", 2, 9325, streamed=True),
    qlora("8B in nf4, streamed, 4 x 2,048", 4, 9880, streamed=True),
    qlora_70b("70B in nf4-dq, streamed, 2,048", 1, 1103),
    qlora_70b("70B in nf4-dq, streamed, 2 x 2,048", 2, 1274),
    Row("0.6B, 64 short, all linears", "Qwen3-0.6B", ALL_LINEARS, short(64), True, 67453),
    Row("0.6B, 4 x 2,048, all linears", "Qwen3-0.6B", ALL_LINEARS, (2048,) * 4, True, 62325),
    Row(
        "32B in nf4-dq, 8 short, recomputed, not compiled",
        "Qwen3-32B",
        LoRA(),
        short(8),
        False,
        1182,
        "bnb.nf4-dq",
        "block",
    ),
)


def predicted(row: Row) -> float:
    """Tokens per second, by count."""
    speed = card_named("H100 SXM")
    setup = Setup(
        Config.from_name(row.model),
        settings=row.lora,
        quantize=row.quantize,
        lengths=row.lengths,
        activation_checkpointing=row.recompute,
        stream_blocks=row.streamed,
    )
    _, profile = profile_of(setup, speed, row.compiled)
    copy_seconds = frozen_bytes_of_a_block(setup) / speed.host_link if row.streamed else 0.0
    passes, _ = profile.work(copy_seconds)
    return sum(row.lengths) / passes.total(speed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    for what, rows in (("constants chosen on them", CHOSEN_ON), ("measured later", MEASURED_LATER)):
        cells = []
        errors = []
        for row in rows:
            speed = predicted(row)
            errors.append(speed / row.measured - 1)
            cells.append((row.name, f"{row.measured:,}", f"{speed:,.0f}", f"{errors[-1]:+.0%}"))
        print(markdown_table((f"LoRA, {what}", "tokens/s", "counted", "off by"), cells, right=(1, 2, 3)))
        mean = sum(map(abs, errors)) / len(errors)
        print(f"\nMean error {mean:.1%}, largest {max(map(abs, errors)):.1%}.\n")


if __name__ == "__main__":
    main()
