"""A step in sections: what each adds to memory, how far it rises in between, and how long it takes.

    section     forward 0   forward 1   head   backward 1   backward 0   step
    net              +40         +40    +10          -30          -50    -10      bytes, from its begin to its end
    rise             +55         +55    +70          +25          +25     +5      at the highest, above its begin

Blocks are alike, and a step of many is the step of few with some sections repeated: memory and time of a model with 80
blocks come from one with 4, for any number of blocks that are computed again (`of_more_blocks`).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from lit_gpt.memory.ledger import Ledger, Plan
from lit_gpt.memory.plan import Setup, plan
from lit_gpt.memory.speed import Speed
from lit_gpt.memory.step_time import Clock, Work
from lit_gpt.model.activation_checkpointing import ActivationCheckpointing
from lit_gpt.model.gpt import GPT

# kinds of sections; those of a block have its number
FORWARD, HEAD, BACKWARD, STEP = "forward", "head", "backward", "step"

TINY = 8  # tokens, where only the number of blocks matters


@dataclass(frozen=True)
class Section:
    """A part of a step."""

    kind: str
    block: int | None
    net: int
    """Bytes that it adds."""
    rise: int
    """Bytes of its highest moment, above those at its begin."""
    work: Work


@dataclass(frozen=True)
class Profile:
    """A step in sections."""

    before: int
    """Bytes at its begin: the model, the optimizer, and gradients of an earlier micro-batch."""
    sections: tuple[Section, ...]

    @property
    def peak(self) -> int:
        """Bytes at the highest moment."""
        alive = self.before
        highest = alive
        for section in self.sections:
            highest = max(highest, alive + section.rise)
            alive += section.net
        return highest

    def work(self, copy_seconds: float = 0.0) -> tuple[Work, Work]:
        """The work of a micro-batch, and of the optimizer's step. Each pass of a block takes `copy_seconds` at least:
        those of copying the next one to the device."""
        passes = Work()
        step = Work()
        for section in self.sections:
            if section.kind == STEP:
                step += section.work
            elif section.block is None:
                passes += section.work
            else:
                passes += section.work.at_least(copy_seconds)
        return passes, step


class ProfilingLedger(Ledger):
    """A ledger that knows the sections of a step, and has a clock."""

    def __init__(self, speed: Speed, compiled: bool) -> None:
        super().__init__()
        self.clock = Clock(speed, compiled)
        self.has_begun = False
        self.marks: list[tuple[str, int | None, int, Work]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if self.has_begun:
            self.clock.enter(func, args, kwargs or {}, out)
        return out

    def mark(self, kind: str, block: int | None = None) -> None:
        """A section begins here."""
        # the step in which the optimizer takes its memory is none of it
        self.has_begun |= kind == FORWARD
        if not self.has_begun:
            return
        self.marks.append((kind, block, len(self.events), self.clock.reading()))
        self.clock.enter_section(in_block=block is not None)

    def profile(self) -> Profile:
        """The sections from the forward pass to the optimizer's step."""
        first = self.marks[0][2]
        before = sum(size for _, size in self.events[:first])
        ends = [*self.marks[1:], ("end", None, len(self.events), self.clock.reading())]
        sections = []
        for (kind, block, begin, work), (_, _, end, work_after) in zip(self.marks, ends, strict=True):
            net = 0
            rise = 0
            for _, size in self.events[begin:end]:
                net += size
                rise = max(rise, net)
            sections.append(Section(kind, block, net, rise, work_after - work))
        return Profile(before, tuple(sections))


@contextmanager
def marking(ledger: ProfilingLedger, setup: Setup) -> Iterator[None]:
    """The optimizer's step becomes a section, unless it is a part of backward."""
    if setup.optimizer_in_backward:
        yield
        return
    handle = register_optimizer_step_pre_hook(lambda *_: ledger.mark(STEP))
    try:
        yield
    finally:
        handle.remove()


def mark_sections(model: GPT, ledger: ProfilingLedger) -> None:
    """Hooks that tell the ledger when a section begins: a pass, a block's forward, the head, a block's backward."""

    def after(_model: nn.Module, _args: tuple, loss: torch.Tensor) -> None:
        loss.register_hook(lambda _: ledger.mark(HEAD))

    model.register_forward_pre_hook(lambda *_: ledger.mark(FORWARD))
    model.register_forward_hook(after)
    model.transformer.ln_f.register_forward_pre_hook(lambda *_: ledger.mark(HEAD))
    for i, block in enumerate(model.transformer.h):
        mark_block(block, i, ledger)


def mark_block(block: nn.Module, i: int, ledger: ProfilingLedger) -> None:
    def before(*_: Any) -> None:
        ledger.mark(FORWARD, i)

    def after(_block: nn.Module, _args: tuple, x: torch.Tensor) -> None:
        # its backward begins when the gradient of its output is there
        if x.requires_grad:
            x.register_hook(lambda _: ledger.mark(BACKWARD, i))

    block.register_forward_pre_hook(before)
    block.register_forward_hook(after)


def profile_of(setup: Setup, speed: Speed, compiled: bool = False) -> tuple[Plan, Profile]:
    """The plan of a step, and its sections; the peak of both is the same.

    Raises:
        InputError: see `plan`.
    """
    ledger = ProfilingLedger(speed, compiled)
    with marking(ledger, setup):
        planned = plan(setup, ledger, lambda model: mark_sections(model, ledger))
    return planned, ledger.profile()


class FewBlocks:
    """Profiles of models with any number of blocks, put together from those of a model with four.

    Of four blocks two are computed again and two are not; each stands for others in its place:

        block                         0         1         2         3
                                      again     again     kept      kept
        in a model of 80 blocks       the first the next  others    the last
    """

    n_few = 4

    def __init__(self, setup: Setup, speed: Speed, compiled: bool = False) -> None:
        self.setup = setup
        self.speed = speed
        self.compiled = compiled
        # what the number of blocks decides, and the number of tokens does not
        self.of_few = self.profile(2, self.n_few, (TINY,))
        self.of_one_more = self.profile(2, self.n_few + 1, (TINY,))

    def profile(self, how: ActivationCheckpointing, n_layer: int, lengths: tuple[int, ...]) -> Profile:
        """The profile of a small model."""
        config = self.setup.config.replace(n_layer=n_layer)
        setup = replace(self.setup, config=config, activation_checkpointing=how, lengths=lengths)
        _, profile = profile_of(setup, self.speed, self.compiled)
        return profile

    def templates(self, lengths: tuple[int, ...], kind: Literal["selective", "streamed", "some"]) -> "Templates":
        """The sections of a micro-batch: with the MLPs of all blocks computed again, with all blocks, or with some."""
        profile = self.profile("selective" if kind == "selective" else 2, self.n_few, lengths)
        return Templates(profile, self.of_few, self.of_one_more, alike=kind != "some")


@dataclass(frozen=True)
class Templates:
    """The sections of four blocks, of which those of more are made."""

    profile: Profile
    of_few: Profile
    of_one_more: Profile
    alike: bool
    """Whether all four blocks keep the same."""

    def of_more_blocks(self, n_layer: int, n_again: int) -> Profile:
        """The profile of a model with `n_layer` blocks, of which the first `n_again` are computed again."""
        sections = {(section.kind, section.block): section for section in self.profile.sections}
        heads = [section for section in self.profile.sections if section.kind == HEAD]
        forward = [sections[FORWARD, self.template(i, n_layer, n_again)] for i in range(n_layer)]
        backward = [sections[BACKWARD, self.template(i, n_layer, n_again)] for i in reversed(range(n_layer))]
        more = n_layer - FewBlocks.n_few
        before = self.profile.before + more * (self.of_one_more.before - self.of_few.before)
        steps = [self.step(section, i, more) for i, section in enumerate(self.steps(self.profile))]
        return Profile(before, (sections[FORWARD, None], *forward, *heads, *backward, *steps))

    def template(self, i: int, n_layer: int, n_again: int) -> int:
        """Which of the four blocks stands for block `i`."""
        if self.alike and i == 0:
            return 0
        if i < n_again:
            return 0 if i == 0 else 1
        return 3 if i == n_layer - 1 else 2

    @staticmethod
    def steps(profile: Profile) -> list[Section]:
        return [section for section in profile.sections if section.kind == STEP]

    def step(self, section: Section, i: int, more: int) -> Section:
        """The optimizer's step, with `more` blocks."""
        few = self.steps(self.of_few)[i]
        one_more = self.steps(self.of_one_more)[i]
        return Section(
            STEP,
            None,
            net=section.net + more * (one_more.net - few.net),
            rise=section.rise + more * (one_more.rise - few.rise),
            work=section.work + (one_more.work - few.work) * more,
        )
