"""Who hangs, and who is gone: each process of a run tells the others, every second, how far it is.

Processes wait for each other in every step. If one hangs, all others wait for it without a word, and what ends them in
the end (a timeout of NCCL's or gloo's) names those that waited. So a thread of each process posts, in the store through
which the processes have found each other, how many exchanges its process has begun, and reads what the others post:

    process 0     heartbeat 411   1,208 exchanges   step 12     waits
    process 1     heartbeat 410   1,207 exchanges   step 12     loops or sleeps: the fewest exchanges
    process 2     heartbeat 202   1,207 exchanges   step 12     stopped or gone: no heartbeat

Where nothing has moved for --timeout_minutes the run ends, and the error names the one that the others wait for. A
process that fails, such as of a broken connection, says which one was gone before: only the launcher of that machine
sees it end, and torchrun may name another one first.

A process that works alone, such as the first one as it saves or answers, looks like one that hangs: the limit has to
be longer than any such work.
"""

import json
import os
import socket
import sys
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lit_gpt.failures import LOOK_FOR_CAUSE, end_failed_process, end_process, how_to_go_on, is_supervised

if TYPE_CHECKING:
    from torch.distributed import Store

EVERY = 1.0
"""Seconds between two posts of a process; fewer if the limit is short."""
FAREWELL = "ended"
"""The place of a process that has ended as it should."""
BEGINNING = "before the first step"

PLACE: list[str] = [BEGINNING]
"""Where the run of this process is, in words; the last entry counts."""
WATCHES: list["Watch"] = []
"""The watch of this process, if it has joined others."""


def note_place(place: str) -> None:
    """Notes where the run is, such as "step 12", for what is said of a process that hangs."""
    PLACE[:] = [place]


def start_watch(store: "Store", rank: int, n_processes: int, n_machines: int, minutes: float) -> None:
    """Starts the watch of this process over the others, once.

    Args:
        store: That of the default group. Its connection is used by one thread at a time, so that we make another one.
        rank: The number of this process.
        n_processes: How many there are.
        n_machines: How many machines they are on.
        minutes: For how long nothing may move.
    """
    if WATCHES:
        return
    own_store = store.clone()  # type: ignore[attr-defined] # torch's annotations lack it
    watch = Watch(own_store, rank, n_processes, n_machines, limit=60 * minutes)
    WATCHES.append(watch)
    LOOK_FOR_CAUSE.append(watch.find_cause)
    watch.post()
    watch.thread.start()


def stop_watch() -> None:
    """Ends the watch, and tells the others that this process does not hang: it has ended."""
    for watch in WATCHES:
        watch.stop()
    WATCHES.clear()
    LOOK_FOR_CAUSE.clear()


@dataclass
class Post:
    """What a process has said last."""

    heartbeat: int
    """How many posts it has written."""
    begun: int
    """How many exchanges it has begun."""
    place: str
    """Where its run is."""
    line: str
    """The line of Python that its main thread is at."""
    host: str
    heard: float = 0.0
    """When the heartbeat was another one for the last time, by the clock of the process that reads."""
    moved: float = 0.0
    """When the exchanges or the place were others for the last time."""


@dataclass
class Watch:
    """The thread that posts and reads, and what it knows of the others."""

    store: "Store"
    rank: int
    n_processes: int
    n_machines: int
    limit: float
    """Seconds in which something has to move."""
    posts: dict[int, Post] = field(default_factory=dict)
    heartbeat: int = 0
    is_over: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        # a daemon: the end of the interpreter does not wait for it
        self.thread = threading.Thread(target=self.watch, name="watch", daemon=True)
        self.every = min(EVERY, self.limit / 10)

    def watch(self) -> None:
        """Posts and reads until the run ends, or something has to be said."""
        reached = time.monotonic()
        while not self.is_over.wait(self.every):
            try:
                self.post()
                self.read()
                verdict = self.verdict()
                reached = time.monotonic()
            except RuntimeError as error:  # the store: its process or machine is gone
                if time.monotonic() - reached < self.limit:
                    continue
                verdict = f"The machine of process 0, {self.host_of(0)}, cannot be reached ({error})."
            if verdict and not self.is_over.is_set():
                self.end_run(verdict)

    def stop(self) -> None:
        """Ends the thread. It must not be in the store's code when the interpreter ends, which would abort."""
        self.is_over.set()
        self.thread.join(timeout=30)
        note_place(FAREWELL)
        try:
            self.post()
        except RuntimeError:  # the store is gone: nobody is left to be told
            return

    # ---- posts

    def post(self) -> None:
        """Tells the others how far this process is."""
        self.heartbeat += 1
        post = dict(
            heartbeat=self.heartbeat,
            begun=exchanges_begun(),
            place=PLACE[-1],
            line=line_of_main_thread(),
            host=socket.gethostname(),
        )
        self.store.set(key_of(self.rank), json.dumps(post))

    def read(self) -> None:
        """Reads what all have posted, and notes what has changed."""
        now = time.monotonic()
        texts = self.store.multi_get([key_of(rank) for rank in range(self.n_processes)])
        for rank, text in enumerate(texts):
            post = Post(**json.loads(text), heard=now, moved=now)
            before = self.posts.get(rank)
            if before and post.heartbeat == before.heartbeat:
                post.heard = before.heard
            if before and (post.begun, post.place) == (before.begun, before.place):
                post.moved = before.moved
            self.posts[rank] = post

    def verdict(self) -> str | None:
        """Who hangs, in a sentence: as another process has said already, or if nothing has moved for the limit."""
        if self.store.check(["verdict"]):
            return self.store.get("verdict").decode()
        posts = self.posts.values()
        still_for = time.monotonic() - max(post.moved for post in posts)
        if still_for < self.limit or any(post.place == FAREWELL for post in posts):
            return None
        # all read and quantize a large model, and exchange nothing meanwhile
        same = len({post.begun for post in posts}) == 1
        if same and all(post.place == BEGINNING for post in posts) and not self.silent(self.limit / 2):
            return None
        # all say what the first one says
        return self.store.compare_set("verdict", "", self.who_hangs()).decode()

    def who_hangs(self) -> str:
        """The sentence for a run in which nothing has moved for the limit."""
        limit = minutes_in_words(self.limit)
        furthest = max(self.posts.values(), key=lambda post: post.begun)
        place = in_words(furthest.place)

        # those that do not even post: stopped, or cut off
        ranks = self.silent(self.limit / 2)
        what = f"nothing has been heard for {limit} ({place})"
        # or those that the others wait for
        if not ranks:
            fewest = min(post.begun for post in self.posts.values())
            ranks = [rank for rank, post in self.posts.items() if post.begun == fewest]
            what = f"nothing has been done for {limit} ({place}, at {self.posts[ranks[0]].line})"
        if len(ranks) == self.n_processes:
            return (
                f"All {self.n_processes} processes have waited for each other for {limit} ({place}): a device or the"
                " network hangs."
            )
        hangs = "hangs" if len(ranks) == 1 else "hang"
        return f"{self.names_of(ranks)} {hangs}: {what}, and the others wait. --timeout_minutes is the limit."

    def names_of(self, ranks: list[int]) -> str:
        """Processes and their machines, for a sentence."""
        return " and ".join(f"process {rank} on {self.host_of(rank)}" for rank in ranks)

    def silent(self, seconds: float) -> list[int]:
        """The processes of which nothing has been heard for so long."""
        now = time.monotonic()
        return [rank for rank, post in self.posts.items() if now - post.heard > seconds and post.place != FAREWELL]

    def host_of(self, rank: int) -> str:
        """The name of the machine of a process, as far as that has been heard."""
        return self.posts[rank].host if rank in self.posts else "an unknown machine"

    # ---- ends

    def end_run(self, verdict: str) -> None:
        """Ends this process for a verdict. One process of each machine says it."""
        line = f"error: {verdict[0].upper()}{verdict[1:]}{how_to_go_on()}"
        # a supervisor prints the first record it gets. Others print what each process prints
        if is_supervised() or self.is_first_to_say(verdict):
            LOOK_FOR_CAUSE.clear()
            end_failed_process(line, status=1, names_cause=True)
        end_process(1)

    def is_first_to_say(self, what: str) -> bool:
        """Whether no other process of this machine has said it."""
        try:
            return self.store.add(f"{machine()}: {what}", 1) == 1
        except RuntimeError:
            return True  # twice is better than not at all

    def find_cause(self, text: str, status: int) -> str:
        """A line about the process whose end broke the connections of this one, which fails with `text`.

        Empty if there is none, if the text is of something that the user can mend, or if our own supervisor has started
        all processes: it sees which one ends first, and says it.
        """
        if is_supervised() and self.n_machines == 1:
            return ""
        last_line = text.strip().splitlines()[-1]
        mine = f"process {self.rank} on {socket.gethostname()} failed: {last_line}"
        try:
            first = self.store.compare_set("first failure", "", mine).decode()
        except RuntimeError:
            first = f"the machine of process 0, {self.host_of(0)}, was gone."
        if status != 1:
            return ""
        if first != mine:
            return f"\nBefore that, {first}"
        # one that was killed has said nothing: then it is silent from now on
        self.is_over.wait(3 * self.every)
        ranks = [rank for rank in self.silent(2 * self.every) if rank != self.rank]
        if not ranks:
            return ""
        return f"\nBefore that, {self.names_of(ranks)} ended without a word: see what its launcher says there."


def key_of(rank: int) -> str:
    """The key of a process's posts in the store."""
    return f"post of {rank}"


def machine() -> str:
    """A name that tells the machine of this process from the others of the run; host names may be the same on all."""
    number = os.environ.get("GROUP_RANK") or os.environ.get("SLURM_NODEID") or ""
    return f"{socket.gethostname()} {number}"


def exchanges_begun() -> int:
    """How many exchanges with other processes this one has begun, in all groups."""
    from torch.distributed import distributed_c10d

    groups: list[Any] = list(distributed_c10d._world.pg_map)
    return sum(group._get_sequence_number_for_group() for group in groups)


def line_of_main_thread() -> str:
    """The line of Python that the main thread is at, such as "train.py line 310": of ours, if one of ours is there."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    innermost = frame
    while frame is not None and "site-packages" in frame.f_code.co_filename:
        frame = frame.f_back
    frame = frame or innermost
    if frame is None:
        return "an unknown line"
    return f"{os.path.basename(frame.f_code.co_filename)} line {frame.f_lineno}"


def in_words(place: str) -> str:
    """Where a process is, as a part of a sentence: "in step 12", or "before the first step"."""
    return f"in {place}" if place.startswith("step") else place


def minutes_in_words(seconds: float) -> str:
    """A limit as a user reads it: "30 minutes", or "3 seconds"."""
    if seconds < 60:
        return f"{seconds:g} seconds"
    return "1 minute" if seconds == 60 else f"{seconds / 60:g} minutes"
