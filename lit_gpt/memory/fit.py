"""The settings with which a step takes the least time within the memory of a card.

What is chosen, unless the user has set it:

    micro-batch         how many tokens are computed at once: more of them make fewer, larger products
    recomputation       which blocks are computed again in backward: less memory, more time
    streaming           frozen blocks in the host's memory: less memory; it costs time if a block is copied more slowly
                        than it is computed
    quantization        frozen blocks in 4 bits, and
    8-bit optimizer     for full fine-tuning: both change the result a little, so they are taken only if nothing else
                        fits, or if all else is much slower

Time and memory of each choice come from the sections of a step (`profile.py`). What is chosen at last is planned as a
whole, and given up if that does not fit.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from lit_gpt.checkpoint.load import build_model
from lit_gpt.data.dataset import Dataset, group_by_tokens, heaviest_first, step_records
from lit_gpt.device import host_bytes_taken
from lit_gpt.errors import InputError
from lit_gpt.memory.plan import EIGHT_BITS, OUTSIDE_GB, Setup, adapt, plan
from lit_gpt.memory.profile import TINY, FewBlocks, Profile, Templates, profile_of
from lit_gpt.memory.speed import Speed, usual_card
from lit_gpt.model.activation_checkpointing import ActivationCheckpointing
from lit_gpt.quantize import quantize_linears
from lit_gpt.runs.methods import METHODS
from lit_gpt.sharding import SPLIT_FLAG
from lit_gpt.train import TrainArgs

# Of what a step makes anew, what the allocator may waste between tensors; its pages of 20 MB, which are never quite
# full, are a part of OUTSIDE_GB (tutorials/memory.md)
WASTE = 0.03

# of the search for the largest batch: more than a step takes
MOST_RECORDS = 128

# a choice that changes the result a little has to be this much faster than the best of the others
MUCH_FASTER = 1.5

# passes of a step that are tried at first; then those around the best
PASSES = (1, 2, 4, 8, 16, 32, 64, 128)

# what streamed blocks may take of the host, if nobody says it: so many times the memory of the card
HOST_PER_CARD = 4

# what streaming costs the host besides the copies: on an H100 0.5 % of a step, and 14 % of one that waits for Python
COST_OF_STREAMING = 1.05

# choices whose times differ by less are equal, and the one with the lower peak is better
EQUAL = 0.005


@dataclass(frozen=True)
class Wish:
    """What is to be trained, and what the user has set."""

    setup: Setup
    """As the flags say."""
    lengths: tuple[int, ...]
    """Tokens of each record of a step, on one device."""
    usable: float
    """Bytes of the card."""
    speed: Speed
    compiled: bool
    """Whether blocks will be compiled."""
    host: float = math.inf
    """Bytes of the host that streamed blocks may take."""
    clips: bool = True
    """Whether gradients are clipped, for which an optimizer that steps in backward needs a pass before."""
    fixed: frozenset[str] = frozenset()
    """Fields of Setup that stay: quantize, activation_checkpointing ..., and lengths, which is the micro-batch."""


@dataclass(frozen=True)
class Choice:
    """Settings, with what they take."""

    setup: Setup
    tokens: int
    """Tokens of the largest micro-batch."""
    n_passes: int
    """Micro-batches of a step."""
    profile: Profile
    seconds: float
    """Time of an optimizer step, of the records that the wish names."""
    host_bytes: int = 0
    """What streamed blocks take of the host's memory; known of what is planned as a whole."""

    @property
    def needed(self) -> float:
        return bytes_needed(self.profile)


def bytes_needed(profile: Profile) -> float:
    """Bytes that have to be there for a step: its peak, and what the allocator may waste of what is made anew."""
    made = profile.peak - profile.before
    return profile.peak + WASTE * made


def flags_of_choice(choice: Choice, wish: "Wish") -> list[str]:
    """The flags of a choice that the user has not set."""
    setup = choice.setup
    words = []
    if "lengths" not in wish.fixed:
        words += ["--train.micro_batch_tokens", str(choice.tokens)]
    if setup.activation_checkpointing != wish.setup.activation_checkpointing and not setup.stream_blocks:
        words += ["--activation_checkpointing", str(setup.activation_checkpointing)]
    if setup.quantize is not None and setup.quantize != wish.setup.quantize:
        words += ["--quantize", setup.quantize]
    if setup.stream_blocks and not wish.setup.stream_blocks:
        words += ["--stream_blocks", "true"]
    if setup.optimizer != wish.setup.optimizer:
        words += ["--optimizer", setup.optimizer]
    if setup.optimizer_in_backward and not wish.setup.optimizer_in_backward:
        words += ["--train.optimizer_in_backward", "true"]
    return words


def lengths_of_step(data_dir: Path, train: TrainArgs, n_devices: int) -> tuple[int, ...]:
    """The lengths of the records that one of several devices has in the heaviest step."""
    data = Dataset(data_dir, "train")
    size = train.global_batch_size
    first = heaviest_first(data, size, train.seed)[0]
    records = step_records(len(data), first, size, train.seed)
    lengths = sorted((data.length(i) for i in records), reverse=True)
    return tuple(lengths[::n_devices])


def usable_bytes(card_gb: float) -> float:
    return (card_gb - OUTSIDE_GB) * 1e9


# ---- micro-batches


def groups_of(lengths: Sequence[int], limit: int) -> list[list[int]]:
    """Records, of which nothing but their lengths is known, in micro-batches of at most `limit` tokens."""
    return group_by_tokens(sorted(lengths, reverse=True), int, limit)


def fewest_tokens(lengths: Sequence[int], n_passes: int) -> int:
    """The fewest tokens of a micro-batch with which a step takes at most so many passes."""
    low = max(max(lengths), -(sum(lengths) // -n_passes))
    high = max(sum(lengths), low)
    # more tokens never take more passes, but for rare lengths: the bound that is found holds
    while low < high:
        middle = (low + high) // 2
        if len(groups_of(lengths, middle)) <= n_passes:
            high = middle
        else:
            low = middle + 1
    return high


def filled(group: Sequence[int], limit: int, longest: int) -> tuple[int, ...]:
    """A micro-batch that has as many tokens as it may have, of records like those of a group."""
    rest = max(limit - sum(group), 0)
    more = [longest] * (rest // longest)
    if rest % longest:
        more.append(rest % longest)
    return (*group, *more)


def largest_batch(setup: Setup, gb: float, limit: int = MOST_RECORDS) -> int:
    """How many records of the first one's length fit into `gb`, up to `limit`; 0 if none does.

    Peaks grow by about as much with each record: a line through two of them says which to try next. They are put
    together from four blocks; what is found is planned as a whole.
    """
    profiles = Profiles(setup, usual_card(gb), compiled=False)
    peaks: dict[int, float] = {}  # GB, by the number of records
    fits = 0
    too_many = limit + 1
    n = 1
    while too_many - fits > 1:
        # try
        peaks[n] = profiles(with_records(setup, n)).peak / 1e9
        if peaks[n] <= gb:
            fits = n
        else:
            too_many = n

        # which next: where the line through the two largest numbers tried so far reaches `gb`
        n = 8
        if len(peaks) > 1:
            a, b = sorted(peaks)[-2:]
            slope = (peaks[b] - peaks[a]) / (b - a)
            if slope > 0:
                n = int(b + (gb - peaks[b]) / slope)
            else:
                n = 2 * b
        n = max(n, fits + 1)
        n = min(n, too_many - 1)
    while fits and plan(with_records(setup, fits)).gb > gb:
        fits -= 1
    return fits


def with_records(setup: Setup, n: int) -> Setup:
    """The setup with a micro-batch of `n` records as long as its first one."""
    return replace(setup, lengths=(setup.lengths[0],) * n)


# ---- ways to train: what changes the memory, but for micro-batch and recomputation


def ways(wish: Wish, changes_result: bool) -> Iterator[Setup]:
    """Setups with another quantization, optimizer or place of the blocks; those that change the result, or the rest."""
    setup = wish.setup
    if not changes_result:
        yield setup
    elif METHODS[setup.method].trains_base:
        is_default = setup.optimizer == "torch.optim.AdamW"
        # bitsandbytes' optimizers are for GPUs
        if "optimizer" not in wish.fixed and is_default and wish.speed.overlaps:
            yield replace(setup, optimizer=EIGHT_BITS[0])
    elif "quantize" not in wish.fixed and setup.quantize is None:
        yield replace(setup, quantize="bnb.nf4")
        yield replace(setup, quantize="bnb.nf4-dq")


# ---- the search


class Search:
    """The choices for a wish, and the best of them."""

    def __init__(self, wish: Wish) -> None:
        self.wish = wish
        self.config = wish.setup.config
        self.smallest: Choice | None = None  # that was seen, whether it fits or not
        self.fits_unchanged: Choice | None = None  # the best that does not change the result
        self.has_tried_streaming = wish.setup.stream_blocks

    def best(self) -> tuple[Choice, Choice | None]:
        """The best choice and the second best, both planned as a whole.

        Raises:
            InputError: nothing fits; or see `plan`.
        """
        choices = self.choices(changes_result=False)
        first = self.first_that_fits(choices)
        self.fits_unchanged = first
        if first is None or self.is_short_of_memory(first):
            others = self.choices(changes_result=True)
            other = self.first_that_fits(others)
            if other is not None and (first is None or other.seconds * MUCH_FASTER < first.seconds):
                first, choices = other, others
        if first is None:
            raise InputError(self.why_nothing_fits())
        rest = [choice for choice in choices if differs(choice.setup, first.setup)]
        return first, self.first_that_fits(rest)

    def is_short_of_memory(self, choice: Choice) -> bool:
        """Whether a choice could be faster if there were more memory."""
        return choice.n_passes > 1 or choice.setup.activation_checkpointing != "none"

    def choices(self, changes_result: bool) -> list[Choice]:
        """What fits by the sections of small models, the fastest first."""
        choices: list[Choice] = []
        for setup in ways(self.wish, changes_result):
            if choices and setup.quantize == "bnb.nf4-dq":
                break  # it is for models that do not fit without it
            resident = self.choices_of(setup)
            choices += resident
            # streamed blocks are computed again: where there is room for all, they only cost
            if self.may_stream(setup) and (not resident or self.is_short_of_memory(min(resident, key=rank))):
                self.has_tried_streaming = True
                choices += self.choices_of(replace(setup, stream_blocks=True))
            if self.may_step_in_backward(setup) and (not resident or self.is_short_of_memory(min(resident, key=rank))):
                choices += self.choices_of(replace(setup, optimizer_in_backward=True))
        return sorted(choices, key=rank)

    def may_stream(self, setup: Setup) -> bool:
        """Whether streaming is left to choose, and the device copies while it computes."""
        is_open = "stream_blocks" not in self.wish.fixed and not setup.stream_blocks
        how = setup.activation_checkpointing
        is_open &= "activation_checkpointing" not in self.wish.fixed or how == "block"
        if not is_open or not self.wish.speed.overlaps or METHODS[setup.method].trains_base:
            return False
        return self.config.n_layer * host_bytes_taken(frozen_bytes_of_a_block(setup)) <= self.wish.host

    def may_step_in_backward(self, setup: Setup) -> bool:
        """Whether gradients may be used up as they come, which saves most where the base trains."""
        is_open = "optimizer_in_backward" not in self.wish.fixed and not setup.optimizer_in_backward
        return is_open and METHODS[setup.method].trains_base

    def choices_of(self, setup: Setup) -> list[Choice]:
        """For sizes of a micro-batch that fit, the choices with as little recomputation as possible."""
        profiles = Profiles(setup, self.wish.speed, self.wish.compiled)
        if "lengths" in self.wish.fixed:
            lengths = list(setup.lengths)
            n_passes = max(1, round(sum(self.wish.lengths) / sum(lengths)))
            if setup.optimizer_in_backward and n_passes > 1:
                return []
            return self.recomputations(setup, profiles, [lengths] * n_passes)

        # the smallest first: if one does not fit, larger ones do not
        by_limit: dict[int, list[Choice]] = {}
        if setup.optimizer_in_backward:  # it cannot add up the gradients of several micro-batches
            self.add_size(1, setup, profiles, by_limit)
            return [choice for choices in by_limit.values() for choice in choices]
        for n_passes in reversed(PASSES):
            if not self.add_size(n_passes, setup, profiles, by_limit):
                break

        # around the best
        if by_limit:
            fastest = min((choice for choices in by_limit.values() for choice in choices), key=rank)
            for n_passes in range(fastest.n_passes // 2 + 1, 2 * fastest.n_passes):
                self.add_size(n_passes, setup, profiles, by_limit)
        return [choice for choices in by_limit.values() for choice in choices]

    def add_size(self, n_passes: int, setup: Setup, profiles: "Profiles", by_limit: dict[int, list[Choice]]) -> bool:
        """Adds the choices with the micro-batches of so many passes; false if there are none."""
        limit = fewest_tokens(self.wish.lengths, n_passes)
        if limit not in by_limit:
            groups = groups_of(self.wish.lengths, limit)
            batch = setup_with_batch(setup, groups, limit, max(self.wish.lengths))
            choices = self.recomputations(batch, profiles, groups)
            if not choices:
                return False
            by_limit[limit] = choices
        return True

    def recomputations(self, setup: Setup, profiles: "Profiles", groups: list[list[int]]) -> list[Choice]:
        """The choices of what is computed again, for one size of a micro-batch: the least that fits of each kind."""
        found = []
        kinds: list[Sequence[ActivationCheckpointing]]
        if setup.stream_blocks:
            kinds = [["block"]]
        elif "activation_checkpointing" in self.wish.fixed:
            kinds = [[setup.activation_checkpointing]]
        else:
            kinds = [range(self.config.n_layer + 1), ["selective"]]
        for kind in kinds:
            choice = self.least(setup, profiles, groups, kind)
            if choice is not None:
                found.append(choice)
            if choice is not None and choice.setup.activation_checkpointing == "none":
                break  # the other kind only costs
        return found

    def least(
        self, setup: Setup, profiles: "Profiles", groups: list[list[int]], kind: Sequence[ActivationCheckpointing]
    ) -> Choice | None:
        """The first choice of a kind that fits; more computed again takes less memory."""

        def tried(index: int) -> Choice:
            return self.choice(setup, profiles, groups, named(kind[index], self.config.n_layer))

        fitting = tried(len(kind) - 1)
        if fitting.needed > self.wish.usable:
            return None
        low = 0
        high = len(kind) - 1  # fits
        while low < high:
            middle = (low + high) // 2
            choice = tried(middle)
            if choice.needed <= self.wish.usable:
                fitting = choice
                high = middle
            else:
                low = middle + 1
        return fitting

    def choice(
        self, setup: Setup, profiles: "Profiles", groups: list[list[int]], how: ActivationCheckpointing
    ) -> Choice:
        """A choice, with its profile and its time."""
        setup = replace(setup, activation_checkpointing=how)
        copied = profiles.block_bytes / self.wish.speed.host_link if setup.stream_blocks else 0.0
        choice = self.timed(setup, profiles(setup), profiles.tiny(setup), groups, copied)
        if self.smallest is None or choice.needed < self.smallest.needed:
            self.smallest = choice
        return choice

    def timed(
        self, setup: Setup, profile: Profile, tiny: Profile, groups: list[list[int]], copy_seconds: float
    ) -> Choice:
        """A choice whose profile is known. Smaller micro-batches take a time between its own and that of a tiny one.

        Copying a streamed block takes `copy_seconds`.
        """
        speed = self.wish.speed
        tokens = sum(setup.lengths)
        passes, step = profile.work(copy_seconds)
        if setup.optimizer_in_backward and self.wish.clips:
            passes = passes * 2  # a first pass measures the norm
        least, _ = tiny.work(copy_seconds)
        seconds = step.total(speed)
        for group in groups:
            share = (sum(group) - TINY) / max(tokens - TINY, 1)
            seconds += least.total(speed) + share * (passes.total(speed) - least.total(speed))
        return Choice(setup, tokens, len(groups), profile, seconds)

    def first_that_fits(self, choices: Sequence[Choice]) -> Choice | None:
        """The first choice whose plan as a whole fits, with the figures of that plan."""
        for choice in choices:
            whole = self.whole(choice)
            if whole.needed <= self.wish.usable and whole.host_bytes <= self.wish.host:
                return whole
        return None

    def whole(self, choice: Choice) -> Choice:
        """The same choice, planned with all blocks."""
        planned, profile = profile_of(choice.setup, self.wish.speed, self.wish.compiled)
        return replace(choice, profile=profile, host_bytes=planned.host_bytes)

    def why_result_changes(self, choice: Choice) -> str | None:
        """Why a choice quantizes, or keeps the optimizer's state in 8 bits; None if it does not."""
        setup = choice.setup
        if setup.quantize != self.wish.setup.quantize:
            what = f"--quantize {setup.quantize}"
            all_else = "16 bits" if setup.dtype.itemsize == 2 else "32 bits"
        elif setup.optimizer != self.wish.setup.optimizer:
            what = f"--optimizer {setup.optimizer}"
            all_else = "the optimizer's whole state"
        else:
            return None
        reason = "does not fit" if self.fits_unchanged is None else "would be much slower for want of memory"
        return f"{what} changes the result a little: {all_else} {reason}."

    def why_nothing_fits(self) -> str:
        """The smallest plan, and what would help."""
        assert self.smallest is not None, "a choice has been tried"
        smallest = self.smallest
        tokens = smallest.tokens
        gb = smallest.needed / 1e9
        # on a card that could, if the host had the memory
        may_help = not METHODS[smallest.setup.method].trains_base and not self.has_tried_streaming
        streaming = " --stream_blocks true needs less, and memory of the host: see --host_gb." if may_help else ""
        return (
            f"Nothing fits: the smallest plan, {tokens:,} tokens at once, takes {gb:.1f} GB, and"
            f" {self.wish.usable / 1e9:.1f} are usable."
            f" {'Give up a flag that you have set, or take' if self.wish.fixed else 'Take'} a smaller model, shorter"
            f" records, or more cards with {SPLIT_FLAG}.{streaming}"
        )


def rank(choice: Choice) -> tuple[float, float]:
    """What is fastest comes first; of choices that take nearly the same time, the one that needs least memory."""
    seconds = choice.seconds * (COST_OF_STREAMING if choice.setup.stream_blocks else 1.0)
    return round(math.log(seconds) / EQUAL), choice.needed


def differs(setup: Setup, other: Setup) -> bool:
    """Whether two setups differ in more than a few tokens or blocks."""
    return what_is_chosen(setup) != what_is_chosen(other)


def what_is_chosen(setup: Setup) -> tuple:
    return (*way_of(setup), sum(setup.lengths), setup.activation_checkpointing)


def way_of(setup: Setup) -> tuple:
    return setup.quantize, setup.optimizer, setup.optimizer_in_backward, setup.stream_blocks


def named(how: ActivationCheckpointing, n_layer: int) -> ActivationCheckpointing:
    """No block and all blocks by the names that they have."""
    if how == 0:
        return "none"
    return "block" if how == n_layer else how


def setup_with_batch(setup: Setup, groups: list[list[int]], limit: int, longest: int) -> Setup:
    """The setup with the largest micro-batch that `limit` allows."""
    heaviest = max(groups, key=sum)
    return replace(setup, lengths=filled(heaviest, limit, longest), accumulates=len(groups) > 1)


class Profiles:
    """The profiles of a way to train, made once each."""

    def __init__(self, setup: Setup, speed: Speed, compiled: bool) -> None:
        self.speed = speed
        self.compiled = compiled
        self.n_layer = setup.config.n_layer
        self.made: dict[tuple, Profile] = {}
        self.templates: dict[tuple, Templates] = {}
        self.few_blocks: dict[bool, FewBlocks] = {}
        self.is_uniform = self.n_layer > FewBlocks.n_few + 1 and blocks_train_alike(setup)
        self.block_bytes = frozen_bytes_of_a_block(setup)

    def __call__(self, setup: Setup) -> Profile:
        how = setup.activation_checkpointing
        key = (setup.lengths, setup.accumulates, how)
        if key not in self.made:
            if self.is_uniform:
                self.made[key] = self.from_few(setup)
            else:
                _, self.made[key] = profile_of(setup, self.speed, self.compiled)
        return self.made[key]

    def tiny(self, setup: Setup) -> Profile:
        """The profile of a few tokens: what a micro-batch costs however small it is."""
        if not self.is_uniform:
            return self(replace(setup, lengths=(TINY,), activation_checkpointing="none"))
        few = self.few(setup)
        templates = Templates(few.of_few, few.of_few, few.of_one_more, alike=False)
        return templates.of_more_blocks(self.n_layer, 0)

    def few(self, setup: Setup) -> FewBlocks:
        if setup.accumulates not in self.few_blocks:
            self.few_blocks[setup.accumulates] = FewBlocks(setup, self.speed, self.compiled)
        return self.few_blocks[setup.accumulates]

    def from_few(self, setup: Setup) -> Profile:
        """The profile by those of four blocks."""
        how = setup.activation_checkpointing
        kind: Literal["selective", "streamed", "some"] = "some"
        if setup.stream_blocks:
            kind = "streamed"
        elif how == "selective":
            kind = "selective"
        key = (setup.lengths, setup.accumulates, kind)
        if key not in self.templates:
            self.templates[key] = self.few(setup).templates(setup.lengths, kind)
        n_again = how if isinstance(how, int) else {"none": 0, "selective": 0, "block": self.n_layer}[how]
        return self.templates[key].of_more_blocks(self.n_layer, n_again)


def blocks_train_alike(setup: Setup) -> bool:
    """Whether the same trains in all blocks, so that few of them tell of all."""
    if setup.method == "full" and setup.settings is not None and setup.settings.train_only is not None:
        return False
    model = adapt(build_model(setup.config), replace(setup, activation_checkpointing="none", stream_blocks=False))
    kinds = set()
    for block in model.transformer.h:
        shapes = [tuple(param.shape) for param in block.parameters() if param.requires_grad]
        kinds.add(tuple(shapes))
    return len(kinds) == 1


def frozen_bytes_of_a_block(setup: Setup) -> int:
    """The bytes of what does not train in the first block: what is copied where blocks are streamed."""
    model = build_model(setup.config.replace(n_layer=1))
    quantize_linears(model, setup.quantize)
    n_bytes = 0
    for param in model.transformer.h[0].parameters():
        size = param.element_size() if not param.is_floating_point() else setup.dtype.itemsize
        n_bytes += param.numel() * size
    return n_bytes
