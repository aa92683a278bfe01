"""How fast a card is: what its maker publishes, times the share of it that steps were measured to reach.

    products        floating-point operations a second in matrix products, dense, with sums in float32
    attention       the same in the kernel of attention
    bandwidth       bytes a second between the card and its own memory, reading and writing together
    host_link       bytes a second from pinned memory of the host to the card
    start           seconds that the host takes to start an operation, with all that Python does for it
    start_of_block  the same for a pass through a compiled block, without its matrix products
    half_rate_rows  a product with so many rows reaches half the rate: Hockney and Jesshope's n 1/2 (Parallel Computers,
                    1988). On a CPU about 75, because each product packs its weights first, however few its rows;
                    0 for the published cards, where reading the weights is what few rows wait for

Published figures are of the data sheets: no sparsity, and bfloat16 products that add up in float32. The shares are
those of one H100 SXM and its host (tutorials/gpu.md); `tests/benchmarks/predicted_speed.py` holds them against the
steps that were measured there. Other cards are taken to reach the same shares, and none has been measured.
"""

import math
from dataclasses import dataclass, replace

import torch

from lit_gpt.errors import InputError

# of what is published for an H100 SXM: 989 TFLOP/s and 3.35 TB/s
PRODUCT_SHARE = 0.70  # chosen: a step's shapes; a product of 8,192 x 8,192 matrices alone was measured at 0.81
ATTENTION_SHARE = 0.24  # 240 TFLOP/s: flash attention forward and backward, 4,096 tokens, 32 heads of 128
BANDWIDTH_SHARE = 0.90  # 3.0 TB/s: a copy of 4 GB
START = 38e-6  # chosen: steps of 1B with few tokens, not compiled, which wait for the host
START_OF_BLOCK = 1.15e-3  # chosen: the same, compiled

# what copies from pinned memory usually reach of the 16 lanes of PCIe 4 and 5, 32 and 64 GB/s; one H100 reached 55
PCIE_4 = 25e9
PCIE_5 = 50e9


@dataclass(frozen=True)
class Speed:
    """The rates of a device."""

    name: str
    products: dict[torch.dtype, float]
    """Operations a second, by the dtype of what is multiplied."""
    attention: dict[torch.dtype, float]
    bandwidth: float
    """Bytes a second."""
    host_link: float
    """Bytes a second."""
    start: float
    """Seconds."""
    start_of_block: float
    """Seconds."""
    half_rate_rows: float = 0.0
    """Rows."""
    overlaps: bool = True
    """Whether the device works while the host starts what comes next."""
    gb: float = 0.0
    """Memory, in GB of 10^9 bytes; 0 where the name does not say it."""

    def product_rate(self, dtype: torch.dtype) -> float:
        """Operations a second; of a dtype without a figure, that of the slowest one."""
        return self.products.get(dtype, min(self.products.values()))

    def seconds_of_product(self, operations: float, rows: int, dtype: torch.dtype) -> float:
        """The arithmetic of a product whose result has so many rows."""
        return operations * (1 + self.half_rate_rows / rows) / self.product_rate(dtype)

    def attention_rate(self, dtype: torch.dtype) -> float:
        return self.attention.get(dtype, min(self.attention.values()))


def published(
    name: str, half_tflops: float, float_tflops: float, bandwidth_gb: float, host_link: float, gb: float
) -> Speed:
    """A card by its data sheet, at the shares that are measured: TFLOP/s in 16 bits and in float32, GB/s."""
    half = PRODUCT_SHARE * half_tflops * 1e12
    single = PRODUCT_SHARE * float_tflops * 1e12
    half_attention = ATTENTION_SHARE * half_tflops * 1e12
    return Speed(
        name=name,
        products={torch.bfloat16: half, torch.float16: half, torch.float32: single},
        attention={torch.bfloat16: half_attention, torch.float16: half_attention, torch.float32: single},
        bandwidth=BANDWIDTH_SHARE * bandwidth_gb * 1e9,
        host_link=host_link,
        start=START,
        start_of_block=START_OF_BLOCK,
        gb=gb,
    )


# where a name could mean two, the first
CARDS = (
    published("L4", 121, 30.3, 300, PCIE_4, gb=24),
    published("A10", 125, 31.2, 600, PCIE_4, gb=24),
    published("RTX 3090", 71, 35.6, 936, PCIE_4, gb=24),
    published("RTX 4090", 165, 82.6, 1008, PCIE_4, gb=24),
    published("RTX 5090", 210, 104.8, 1792, PCIE_5, gb=32),
    published("A100 40GB", 312, 19.5, 1555, PCIE_4, gb=40),
    published("L40S", 362, 91.6, 864, PCIE_4, gb=48),
    published("A100 80GB", 312, 19.5, 2039, PCIE_4, gb=80),
    published("H100 SXM", 989, 67, 3350, PCIE_5, gb=80),
    published("H100 PCIe", 756, 51, 2000, PCIE_5, gb=80),
    published("H200", 989, 67, 4800, PCIE_5, gb=141),
)

# which card is meant by its memory alone: one that many people have or rent
USUAL = {24: "RTX 4090", 32: "RTX 5090", 40: "A100 40GB", 48: "L40S", 80: "H100 SXM", 141: "H200"}


def card_named(name: str) -> Speed:
    """The card that a name means: case, spaces and the maker's name do not matter.

    Raises:
        InputError: there is none of that name.
    """
    wanted = bare(name)
    for card in CARDS:
        if bare(card.name) == wanted:
            return card
    names = ", ".join(card.name for card in CARDS)
    raise InputError(f"--card is {name}, expected one of {names}. Or leave it out, and give --probe on such a machine.")


def bare(name: str) -> str:
    return name.lower().removeprefix("nvidia ").removeprefix("geforce ").replace(" ", "").replace("-", "")


VARIANTS = ("sxm", "pcie", "40gb", "80gb")  # of one model


def card_of_driver(name: str, gb: float) -> Speed | None:
    """The card whose name the driver gives, such as NVIDIA A100-SXM4-80GB; None if no published figures are here."""
    words = name.lower().replace("-", " ").split()
    best = None
    for card in CARDS:
        of_card = card.name.lower().split()
        model = [word for word in of_card if word not in VARIANTS]
        if not set(model) <= set(words):
            continue
        # of variants the one whose name stands there, or whose memory it is
        distance = abs(card.gb - gb) - sum(word in words for word in of_card)
        if best is None or distance < best[0]:
            best = (distance, card)
    return None if best is None else replace(best[1], gb=gb)


def usual_card(gb: float) -> Speed:
    """The card that is meant by its memory alone: the one in USUAL whose memory is nearest."""
    nearest = min(USUAL, key=lambda size: abs(math.log(size / gb)))
    return card_named(USUAL[nearest])
