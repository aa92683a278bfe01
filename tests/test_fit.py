"""Settings that fit, and the time by which they are chosen: `pytest tests/test_fit.py`, about 1 min"""

import math
import random
import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from helpers.runs import write_data
from helpers.scripts import load, script
from helpers.shell import python

from lit_gpt import Config, InputError
from lit_gpt.checkpoint.load import parameter_shapes
from lit_gpt.cli import parse
from lit_gpt.full import Full
from lit_gpt.lora import LoRA
from lit_gpt.memory import probe
from lit_gpt.memory.fit import Search, Wish, bytes_needed, fewest_tokens, filled, groups_of
from lit_gpt.memory.plan import Setup, plan
from lit_gpt.memory.profile import FewBlocks, profile_of
from lit_gpt.memory.sharded import sharded_peak
from lit_gpt.memory.speed import CARDS, Speed, card_named, card_of_driver, usual_card
from lit_gpt.memory.step_time import Clock
from lit_gpt.model.loss import LOGITS

SMALL = Config(
    name="small", n_layer=6, n_head=4, n_query_groups=2, n_embd=64, intermediate_size=160, vocab_size=512,
    block_size=256,
)  # fmt: skip
LORA = Setup(SMALL, settings=LoRA(r=4), lengths=(90, 40, 7))
FEW_BLOCKS = replace(LORA, config=SMALL.replace(n_layer=2))
FULL = Setup(SMALL, "full", Full(), torch.float32, lengths=(90, 40, 7))
# time is that of the arithmetic: how many passes a step takes matters little
CARD = replace(card_named("RTX 4090"), bandwidth=1e18, start=0.0, start_of_block=0.0)
NEVER_OVER = ROOT / "tests/benchmarks/fit_never_over.py"

# a second for each operation, and nothing for memory; and the other way round
ARITHMETIC = Speed("arithmetic", {torch.float32: 1.0}, {torch.float32: 1.0}, float("inf"), 1.0, 0.0, 0.0)
BYTES = Speed("bytes", {torch.float32: float("inf")}, {torch.float32: float("inf")}, 1.0, 1.0, 0.0, 0.0)


# ---- the clock


def seconds(speed: Speed, compiled: bool, *calls: tuple) -> float:
    """What a clock says of operations, each called with its arguments."""
    clock = Clock(speed, compiled)
    for func, *args in calls:
        clock.enter(func, tuple(args), {}, func(*args))
    return clock.reading().seconds


def test_the_clock_counts_operations_and_bytes() -> None:
    a, b = torch.zeros(3, 5), torch.zeros(5, 7)
    product = (torch.ops.aten.mm.default, a, b)
    assert seconds(ARITHMETIC, False, product) == 2 * 3 * 5 * 7
    assert seconds(BYTES, False, product) == 4 * (3 * 5 + 5 * 7 + 3 * 7)
    assert seconds(BYTES, False, (torch.ops.aten.t.default, a)) == 0  # a view
    assert seconds(BYTES, False, (torch.ops.aten.copy_.default, a.clone(), a)) == 2 * 4 * 15
    q = torch.zeros(1, 2, 8, 4)
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    assert seconds(ARITHMETIC, False, (attention, q, q, q, 0.0, False)) == 2 * (2 * 2 * 8 * 8 * 4)
    assert seconds(ARITHMETIC, False, (attention, q, q, q, 0.0, True)) == 2 * 2 * 8 * 8 * 4


def test_a_product_of_few_rows_has_its_start_to_pay() -> None:
    """As many rows as `half_rate_rows` take twice as long as their operations, and ten times as many 1.1 times."""
    slow_to_start = replace(ARITHMETIC, half_rate_rows=30)
    weight = torch.zeros(5, 7)
    for rows, factor in ((30, 2.0), (300, 1.1)):
        product = (torch.ops.aten.mm.default, torch.zeros(rows, 5), weight)
        assert seconds(slow_to_start, False, product) == pytest.approx(factor * seconds(ARITHMETIC, False, product))


@pytest.mark.parametrize(
    ("few", "many", "of_a_token", "half_rate_rows"),
    [
        (0.128 + 0.5, 2.048 + 0.5, 0.001, 500),  # half a second, and a thousandth for each token
        (0.128, 2.048, 0.001, 0),
        (0.064, 2.048, 0.001, 0),  # many tokens take more than they should
        (2.0, 2.048, 0.0005, 2048),  # and here Python is all that was measured
    ],
)
def test_the_line_through_few_and_many_tokens(
    few: float, many: float, of_a_token: float, half_rate_rows: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = {128: (few, 128 * 100), 2048: (many, 2048 * 100)}
    monkeypatch.setattr(probe, "seconds_of_products", lambda config, tokens, *_: measured[tokens])
    rate, rows = probe.rate_of_products(SMALL, torch.float32, torch.device("cpu"))
    assert (rate, rows) == pytest.approx((100 / of_a_token, half_rate_rows), abs=1e-6)


@pytest.mark.parametrize(("compiled", "passes"), [(False, 6), (True, 2)])
def test_compiled_operations_read_and_write_once(compiled: bool, passes: int) -> None:
    """Three of them in a row, whose results in between are gone by the end."""
    clock = Clock(BYTES, compiled)
    x = torch.zeros(10)
    for _ in range(3):
        y = torch.ops.aten.neg.default(x)
        clock.enter(torch.ops.aten.neg.default, (x,), {}, y)
        x = y
        del y
    assert clock.reading().seconds == passes * 40


def test_products_of_a_step_are_counted_again_where_they_are_computed_again() -> None:
    """6 operations a weight and token where all trains, and 8 where blocks are computed twice: all but the last product
    of each, which nothing in backward asks for."""
    setup = replace(FULL, lengths=(64,), config=SMALL.replace(tie_embeddings=False))
    in_blocks = SMALL.n_layer * (64 * 64 * 2 + 2 * 64 * 32 + 3 * 64 * 160)
    head = 64 * 512
    last_products = SMALL.n_layer * 64 * 160
    of_products = replace(ARITHMETIC, attention={torch.float32: float("inf")})
    for how, again in (("none", 0), ("block", in_blocks - last_products)):
        _, profile = profile_of(replace(setup, activation_checkpointing=how), of_products)
        passes, _ = profile.work()
        # the first token is no target
        assert passes.seconds == pytest.approx(64 * (6 * in_blocks + 2 * again) + 63 * 6 * head, rel=0.002)


# ---- a step in sections


def test_the_peak_of_the_sections_is_that_of_the_plan() -> None:
    for setup in (LORA, FULL, replace(FULL, activation_checkpointing=4, accumulates=True)):
        planned, profile = profile_of(setup, CARD)
        assert profile.peak == sum(planned.parts.values()) == sum(plan(setup).parts.values())


@pytest.mark.parametrize("setup", [LORA, replace(FULL, accumulates=True)], ids=["lora", "full"])
def test_few_blocks_tell_of_many(setup: Setup) -> None:
    few = FewBlocks(setup, CARD)
    for how, kind, n_again in (
        ("none", "some", 0),
        (4, "some", 4),
        ("block", "some", 6),
        ("selective", "selective", 0),
    ):
        _, whole = profile_of(replace(setup, activation_checkpointing=how), CARD)
        found = few.templates(setup.lengths, kind).of_more_blocks(SMALL.n_layer, n_again)
        assert found.peak == pytest.approx(whole.peak, rel=0.01), how
        assert found.peak >= 0.999 * whole.peak
        assert found.work()[0].total(CARD) == pytest.approx(whole.work()[0].total(CARD), rel=0.03), how


def test_gradients_of_an_earlier_micro_batch_are_there() -> None:
    setup = replace(FULL, activation_checkpointing="none", lengths=(200, 200))
    more = plan(replace(setup, accumulates=True)).gb - plan(setup).gb
    n = sum(math.prod(shape) for shape in parameter_shapes(setup.config).values())
    assert more == pytest.approx(4 * n / 1e9, rel=0.15)


def test_a_smaller_micro_batch_never_takes_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest one is planned, also where its loss takes another slice of rows."""
    monkeypatch.setitem(LOGITS, FEW_BLOCKS.dtype, 100 * 4000)
    setup = replace(FEW_BLOCKS, config=FEW_BLOCKS.config.replace(vocab_size=4000), activation_checkpointing="block")
    peaks = [plan(replace(setup, lengths=(n,))).gb for n in (80, 100, 130, 190)]
    assert peaks == sorted(peaks)


# ---- micro-batches


def test_micro_batches_are_those_of_the_loop() -> None:
    lengths = (50, 40, 30, 20, 10)
    assert groups_of(lengths, 90) == [[50, 40], [30, 20, 10]]
    assert fewest_tokens(lengths, 1) == 150 and fewest_tokens(lengths, 2) == 90 and fewest_tokens(lengths, 5) == 50
    assert filled([50, 40], 150, 50) == (50, 40, 50, 10)


# ---- the search


def wish(setup: Setup, usable: float, **others) -> Wish:
    settings = {"speed": CARD, "compiled": False, "fixed": frozenset({"stream_blocks"})} | others
    return Wish(setup, lengths=(60,) * 2, usable=usable, **settings)


def needed(setup: Setup, how="none", records: int = 2) -> float:
    accumulates = records < 2
    setup = replace(setup, activation_checkpointing=how, lengths=(60,) * records, accumulates=accumulates)
    return bytes_needed(profile_of(setup, CARD)[1])


def test_where_there_is_room_nothing_is_given_up() -> None:
    first, second = Search(wish(FEW_BLOCKS, 1e12)).best()
    assert first.setup.quantize is None and first.setup.activation_checkpointing == "none"
    assert second is not None and second.seconds >= 0.99 * first.seconds


def test_16_bits_come_before_4_and_4_before_nothing() -> None:
    """On a card that is too small for the weights in 16 bits."""
    wide = replace(LORA, config=SMALL.replace(n_layer=3, n_embd=256, intermediate_size=640))
    smallest = needed(wide, "block", 1)
    first, _ = Search(wish(wide, 1.001 * smallest)).best()
    assert first.setup.quantize is None
    search = Search(wish(wide, 0.9 * smallest))
    first, _ = search.best()
    assert first.setup.quantize == "bnb.nf4" and "16 bits does not fit" in search.why_result_changes(first)
    with pytest.raises(InputError, match="Nothing fits: the smallest plan, 60 tokens at once, takes"):
        Search(wish(wide, 0.9 * smallest, fixed=frozenset({"quantize", "stream_blocks"}))).best()
    streamed, _ = Search(wish(wide, 0.9 * smallest, fixed=frozenset({"quantize"}))).best()
    assert streamed.setup.stream_blocks and streamed.host_bytes > 0


def test_what_is_set_stays() -> None:
    room = needed(FEW_BLOCKS)
    fixed = frozenset({"activation_checkpointing", "lengths", "stream_blocks"})
    setup = replace(FEW_BLOCKS, activation_checkpointing="block", lengths=(60,), accumulates=True)
    first, second = Search(wish(setup, room, fixed=fixed)).best()
    assert first.setup == setup and second is None


@pytest.mark.parametrize("seed", [2])
def test_a_choice_is_never_over_and_not_wasteful(seed: int) -> None:
    """A real step of what is chosen; `tests/benchmarks/fit_never_over.py` has fifty of them."""
    never_over = load(NEVER_OVER)
    wanted = never_over.random_wish(random.Random(seed), is_large=False)
    choice, _ = Search(wanted).best()
    case = never_over.tried(wanted, choice, on_gpu=False)
    assert not case.is_over, str(case)
    assert never_over.wasteful(case) is None, str(case)


# ---- several devices


def test_a_share_is_smaller_and_never_smaller_than_its_slices() -> None:
    whole = plan(FULL).gb
    peaks = [sharded_peak(replace(FULL, activation_checkpointing="block"), n) / 1e9 for n in (2, 4, 8)]
    assert whole > peaks[0] > peaks[1] > peaks[2] > whole / 8


# ---- cards


def test_cards() -> None:
    assert card_named("nvidia rtx 4090") is card_named("RTX4090")
    assert usual_card(24).name == "RTX 4090" and usual_card(78).name == "H100 SXM"
    drivers = {
        "NVIDIA A100-SXM4-80GB": "A100 80GB", "NVIDIA A100-PCIE-40GB": "A100 40GB", "NVIDIA H100 PCIe": "H100 PCIe",
        "NVIDIA H100 80GB HBM3": "H100 SXM", "NVIDIA GeForce RTX 3090": "RTX 3090", "NVIDIA L4": "L4",
        "NVIDIA L40S": "L40S", "NVIDIA A10": "A10", "NVIDIA A10G": None, "Tesla T4": None, "NVIDIA H200": "H200",
    }  # fmt: skip
    memory = {card.name: card.gb for card in CARDS}
    for name, expected in drivers.items():
        found = card_of_driver(name, memory.get(expected, 24))
        assert (found and found.name) == expected, name


# ---- the script


def said(*words: str) -> str:
    result = python(ROOT / "scripts/plan_memory.py", *words)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_the_script_prints_a_command_that_the_recipe_takes(tiny_dir: Path, tmp_path: Path) -> None:
    write_data(tmp_path / "data", tiny_dir, n_train=40)
    flags = f"--checkpoint_dir {tiny_dir} --data_dir {tmp_path}/data --train.global_batch_size 2"
    output = said(*flags.split(), "--card_gb", "1.2", "--fit")
    (line,) = re.findall(r"^    python finetune/lora.py (.*)$", output, re.MULTILINE)
    words = shlex.split(line)
    assert words[: len(flags.split())] == flags.split() and "--train.micro_batch_tokens" in words
    settings = parse(script("finetune/lora.py").main, words)
    assert settings["train"].micro_batch_tokens > 0
    assert re.search(r"\nPeak of a step: 0\.\d\d GB[^\n]*\.\nTime: [\d,]+ tokens/s, .* for an epoch\.\n", output)


def test_what_the_config_file_sets_is_fixed(tmp_path: Path) -> None:
    planner = script("scripts/plan_memory.py")
    (tmp_path / "recipe.yaml").write_text("quantize: bnb.nf4\ntrain:\n  micro_batch_size: 1\n")
    assert planner.fixed_by(["--config", f"{tmp_path}/recipe.yaml"]) == {"quantize", "lengths"}
    assert planner.fixed_by([f"--config={tmp_path}/recipe.yaml", "--optimizer=x.y"]) >= {"quantize", "optimizer"}
    assert planner.fixed_by(["--train.global_batch_size", "4"]) == frozenset()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--card_gb 24 --card T4 --fit", "--card is T4, expected one of L4, A10"),
        ("--model_name pythia-14m --tokens 64 --card_gb 1.01 --fit", "Nothing fits: the smallest plan, 64 tokens"),
        ("--model_name pythia-14m --tokens 64 --devices 2 --strategy fsdp --card_gb 24 --fit", "leave out --strategy"),
    ],
)
def test_what_cannot_be_fitted(words: str, message: str) -> None:
    result = python(ROOT / "scripts/plan_memory.py", *words.split())
    assert result.returncode == 2 and result.stderr.count("\n") == 1 and message in result.stderr
