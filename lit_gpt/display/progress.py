"""Progress on stderr: a bar on a terminal, elsewhere a line now and then."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from lit_gpt.display.words import duration

Item = TypeVar("Item")
SECONDS_BETWEEN_LINES = 10


@contextmanager
def progress_bar(what: str, total: int, done: int = 0) -> Iterator[Callable[[int], None]]:
    """Gives a function that is told how many more of `total` parts are done, and shows it.

    `what` is what they are, such as "loss of base"; `done` were done before.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    n_done = done
    began = said_at = time.monotonic()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        task = bars.add_task(what, total=total, completed=done)

        def show(n_more: int) -> None:
            nonlocal n_done, said_at
            n_done += n_more
            bars.update(task, completed=n_done)
            now = time.monotonic()
            if not console.is_terminal and now - said_at >= SECONDS_BETWEEN_LINES:
                said_at = now
                left = (now - began) / (n_done - done) * (total - n_done)
                print(f"{what}: {n_done:,} of {total:,}, {duration(left)} left", file=sys.stderr, flush=True)

        yield show


def progress(items: Iterable[Item], total: int, what: str, done: int = 0) -> Iterator[Item]:
    """Passes items on, and shows how many of `total` there are; see `progress_bar`."""
    with progress_bar(what, total, done) as show:
        for item in items:
            yield item
            show(1)
