"""How fast this machine is, measured: its GPU, or its CPU."""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch.nn import functional as F

from lit_gpt.checkpoint.load import build_model
from lit_gpt.config import Config
from lit_gpt.device import compiling_pays, default_device, finish_work, host_buffer
from lit_gpt.memory.plan import Setup, adapt, batch_of, fill_with_zeros
from lit_gpt.memory.profile import ProfilingLedger, mark_sections
from lit_gpt.memory.speed import START_OF_BLOCK, Speed

SECONDS = 2.0  # for each figure
COPIED = 2**28  # bytes
FEW_TOKENS, MANY_TOKENS = 128, 2048  # of the products


def probe(setup: Setup) -> Speed:
    """The rates of this machine for a model: a few seconds each for its products, attention, a copy, and Python.

    Args:
        setup: The model, its dtype, and the longest record.
    """
    device = default_device()
    dtype = setup.autocast or setup.dtype
    overlaps = compiling_pays(device)
    products, half_rate_rows = rate_of_products(setup.config, dtype, device)
    attention = rate_of_attention(setup.config, max(setup.lengths), dtype, device)
    bandwidth = rate_of_copies(device)
    speed = Speed(
        name="this machine",
        products={dtype: products},
        attention={dtype: attention},
        bandwidth=bandwidth,
        host_link=rate_from_host(device),
        start=0.0,
        start_of_block=START_OF_BLOCK,
        half_rate_rows=0.0 if overlaps else half_rate_rows,
        overlaps=overlaps,
    )
    return replace(speed, start=seconds_to_start(setup, device))


def seconds_of(act: Callable[[], object], device: torch.device) -> float:
    """The time of an act: the median of as many as fit into SECONDS, three at least, after one that is not counted."""
    act()
    finish_work(device)
    times: list[float] = []
    began = time.perf_counter()
    while len(times) < 3 or time.perf_counter() - began < SECONDS:
        start = time.perf_counter()
        act()
        finish_work(device)
        times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2]


def seconds_of_products(config: Config, tokens: int, dtype: torch.dtype, device: torch.device) -> tuple[float, int]:
    """The time of a block's products, forward and for the gradient of the input, and their operations."""
    shapes = linear_shapes(config)
    weights = [torch.randn(shape, device=device).to(dtype) for shape in shapes]
    inputs = [torch.randn(tokens, shape[1], device=device).to(dtype) for shape in shapes]

    def products() -> None:
        for weight, x in zip(weights, inputs, strict=True):
            y = F.linear(x, weight)
            y @ weight

    n_operations = sum(4 * tokens * rows * columns for rows, columns in shapes)
    return seconds_of(products, device), n_operations


def rate_of_products(config: Config, dtype: torch.dtype, device: torch.device) -> tuple[float, float]:
    """Floating-point operations a second that many tokens approach, and the number of tokens that reach half of it.

    Few tokens and many are measured, and a line is drawn through both times.
    """
    few, _ = seconds_of_products(config, FEW_TOKENS, dtype, device)
    many, n_operations = seconds_of_products(config, MANY_TOKENS, dtype, device)
    rising = (many - few) / (MANY_TOKENS - FEW_TOKENS)
    # a model so small that Python's time hides that of its products: at least half of it is theirs
    a_token = min(max(rising, many / MANY_TOKENS / 2), many / MANY_TOKENS)
    return n_operations / (MANY_TOKENS * a_token), many / a_token - MANY_TOKENS


def linear_shapes(config: Config) -> Sequence[tuple[int, int]]:
    """The shapes of a block's linears, (out, in)."""
    block = build_model(config.replace(n_layer=1)).transformer.h[0]
    return [tuple(param.shape) for param in block.parameters() if param.dim() == 2]


def rate_of_attention(config: Config, length: int, dtype: torch.dtype, device: torch.device) -> float:
    """Floating-point operations a second of causal attention in a record, forward and backward."""
    shape = (1, config.n_head, length, config.head_size)
    q, k, v = (torch.randn(shape, device=device).to(dtype).requires_grad_() for _ in range(3))
    out_grad = torch.randn(shape, device=device).to(dtype)

    def attend() -> None:
        F.scaled_dot_product_attention(q, k, v, is_causal=True).backward(out_grad)

    # half of 4 L^2 in each head forward, and 2.5 times as many backward
    n_operations = 3.5 * 2 * config.n_head * length**2 * config.head_size
    return n_operations / seconds_of(attend, device)


def rate_of_copies(device: torch.device) -> float:
    """Bytes a second that are read and written in the device's memory."""
    source = torch.zeros(COPIED // 4, device=device)
    target = torch.zeros_like(source)
    return 2 * COPIED / seconds_of(lambda: target.copy_(source), device)


def rate_from_host(device: torch.device) -> float:
    """Bytes a second from the host's pinned memory to the device."""
    source = host_buffer(COPIED, device)
    target = torch.empty(COPIED, dtype=torch.uint8, device=device)
    return COPIED / seconds_of(lambda: target.copy_(source, non_blocking=True), device)


def seconds_to_start(setup: Setup, device: torch.device) -> float:
    """What Python takes for an operation: a step of a tiny model, divided by the number of its operations."""
    config = Config(name="tiny", n_layer=2, n_head=2, n_embd=32, intermediate_size=64, vocab_size=64, block_size=64)
    tiny = Setup(config, dtype=torch.float32, lengths=(8,))
    model = build_model(config)
    fill_with_zeros(model, tiny)
    for module in model.modules():
        for param in module._parameters.values():
            if param is not None:
                param.data = param.data.to(device)
    model = adapt(model, tiny).to(device)
    idx, layout = batch_of(tiny.lengths)
    idx, layout = idx.to(device), layout.to(device)

    # before the hooks that count
    seconds = seconds_of(lambda: model(idx, layout=layout).backward(), device)

    # how many operations: on a device where each takes a second to start, and nothing to compute
    instant = {torch.float32: float("inf")}
    counting = Speed("counting", instant, instant, float("inf"), float("inf"), start=1.0, start_of_block=0.0)
    ledger = ProfilingLedger(counting, compiled=False)
    mark_sections(model, ledger)
    with ledger:
        model(idx, layout=layout).backward()
    passes, _ = ledger.profile().work()
    return seconds / passes.host_seconds
