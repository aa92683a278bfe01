"""Progress on stderr: a bar on a terminal, elsewhere a line now and then."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from lit_gpt.display.words import duration

Item = TypeVar("Item")
SECONDS_BETWEEN_LINES = 10


def progress(items: Iterable[Item], total: int, what: str, done: int = 0) -> Iterator[Item]:
    """Passes items on, and shows how many of `total` there are; `done` were there before.

    `what` is what they are, such as "loss of base".
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if console.is_terminal:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console, transient=True) as bars:
            task = bars.add_task(what, total=total, completed=done)
            for item in items:
                yield item
                bars.advance(task)
        return

    began = said_at = time.monotonic()
    for n, item in enumerate(items, done + 1):
        yield item
        now = time.monotonic()
        if now - said_at >= SECONDS_BETWEEN_LINES:
            said_at = now
            left = (now - began) / (n - done) * (total - n)
            print(f"{what}: {n:,} of {total:,}, {duration(left)} left", file=sys.stderr, flush=True)
