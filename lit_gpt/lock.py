"""One writer for a folder: a second process that wants to write it is refused, and told which one does.

    out/lora/mine/.lock          of a run, in its out_dir: held until the process ends
    checkpoints/.mine.lock       of a folder that is written as a whole (lit_gpt/files.py): held until it is written

The lock is the kernel's (flock), on an open file: it goes with its process, however that ends, also by kill -9. The
file itself says who holds it, and is deleted in the end; a killed process leaves it behind, and the next one takes it.
"""

import atexit
import errno
import functools
import inspect
import json
import os
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from lit_gpt.errors import InputError

P = ParamSpec("P")
Result = TypeVar("Result")

NAME = ".lock"  # of the file in an out_dir
HELD_BY_OTHERS = (errno.EWOULDBLOCK, errno.EACCES)  # EACCES: what NFS may say
NOT_ALLOWED = (errno.EACCES, errno.EPERM, errno.EROFS)
NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
"""What a file system says that cannot lock."""


@dataclass
class Lock:
    """A lock that this process holds."""

    file: Path
    descriptor: int
    new_folders: list[Path]
    """The folders that were made for the file, the outermost first: they go with it if nothing else is in them."""
    at_end: list[Callable[[], None]] = field(default_factory=list)
    """Called before the lock is given back."""


HELD: dict[Path, Lock] = {}
"""The locks of this process, by their files."""


def lock_in(folder: Path) -> Path:
    """The lock of a folder that stays, and in which names come and go: an out_dir."""
    return folder.resolve() / NAME


def lock_beside(folder: Path) -> Path:
    """The lock of a folder whose place another one takes."""
    folder = folder.resolve()
    return folder.with_name(f".{folder.name}.lock")


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Holds the lock of a folder that is to be replaced as a whole, unless this process holds it already.

    A folder that may not be written gets no lock: writing to it says so.

    Raises:
        InputError: another process writes it.
    """
    file = lock_beside(folder)
    if file in HELD:
        yield
        return
    check_free(lock_in(folder), folder)  # a run may be at work in it
    try:
        lock = take(file, folder)
    except OSError as error:
        if error.errno not in NOT_ALLOWED:
            raise
        lock = None
    try:
        yield
    finally:
        if lock is not None:
            release(lock)


def locks(parameter: str) -> Callable[[Callable[P, Result]], Callable[P, Result]]:
    """A decorator: while the function runs, no other process writes the folder that its `parameter` names."""

    def decorate(function: Callable[P, Result]) -> Callable[P, Result]:
        @functools.wraps(function)
        def locked(*args: P.args, **kwargs: P.kwargs) -> Result:
            arguments = inspect.signature(function).bind(*args, **kwargs).arguments
            with only_writer(arguments[parameter]):
                return function(*args, **kwargs)

        return locked

    return decorate


def hold(folder: Path, at_end: Callable[[], None] | None = None) -> None:
    """Holds the lock in a folder, which is made if it is not there, until this process ends.

    `at_end` is called then, while the lock is still held.

    Raises:
        InputError: another process writes there, or this one may not.
    """
    file = lock_in(folder)
    lock = HELD.get(file)
    if lock is None or not is_at(lock.descriptor, file):
        check_free(lock_beside(folder), folder)  # an export may be about to replace it
        try:
            lock = take(file, folder)
        except OSError as error:
            if error.errno not in NOT_ALLOWED:
                raise
            raise InputError(f"{folder} cannot be written to ({error.strerror}). Name another folder.") from None
    if lock is not None and at_end is not None:
        lock.at_end = [at_end]


def take(file: Path, folder: Path) -> Lock | None:
    """Takes the lock `file` of a folder; None, and a line on stderr, if the file system has no locks.

    Raises:
        InputError: another process holds it.
    """
    new_folders = make_folders(file.parent)
    while True:
        descriptor = open_lock(file)
        try:
            can_lock = try_lock(descriptor)
        except BlockingIOError:
            holder = read_holder(descriptor)
            os.close(descriptor)
            raise InputError(in_use(folder, holder)) from None
        if not can_lock:
            os.close(descriptor)
            file.unlink(missing_ok=True)
            print(
                f"The file system of {folder} has no locks: see to it that no other command writes there.",
                file=sys.stderr,
            )
            return None
        # it may have been deleted by the one that held it before
        if is_at(descriptor, file):
            break
        os.close(descriptor)

    # who holds it, for the others
    with suppress(OSError):  # a full disk: the lock holds without
        os.ftruncate(descriptor, 0)
        os.write(descriptor, json.dumps(describe_this_process()).encode())
    lock = Lock(file, descriptor, new_folders)
    HELD[file] = lock
    end_with_process()
    return lock


def open_lock(file: Path) -> int:
    """Opens the file of a lock, which is made if it is not there, and returns its descriptor."""
    while True:
        try:
            return os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        except PermissionError:
            if not file.exists():
                raise
        # somebody else's, who may have left it behind: then it is deleted, and we make one of our own
        clear_stale(file)
        if file.exists():
            return os.open(file, os.O_RDONLY)


@functools.cache
def end_with_process() -> None:
    """Sees to it, once, that locks are given back at the end of this process, and stay with it if it forks."""
    atexit.register(release_all)
    os.register_at_fork(after_in_child=forget_all)


def make_folders(folder: Path) -> list[Path]:
    """Makes a folder and those above it. Returns the ones that were not there, the outermost first."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    return missing[::-1]


def try_lock(descriptor: int) -> bool:
    """Locks an open file for this process. Returns whether its file system can lock at all.

    Raises:
        BlockingIOError: another process has locked it.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in HELD_BY_OTHERS:
            raise BlockingIOError(error.errno, error.strerror) from error
        if error.errno in NO_LOCKS:
            return False
        raise
    return True


def is_at(descriptor: int, file: Path) -> bool:
    """Whether the open file is the one that has this name now."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(file))
    except FileNotFoundError:
        return False


def release(lock: Lock) -> None:
    """Gives a lock back, and deletes its file."""
    for end in lock.at_end:
        end()
    HELD.pop(lock.file, None)
    # the file goes before the lock: after it another process may hold a file of this name
    if is_at(lock.descriptor, lock.file):
        lock.file.unlink()
    os.close(lock.descriptor)
    with suppress(OSError):  # something is in it, or it is gone
        for folder in reversed(lock.new_folders):
            folder.rmdir()


def release_all() -> None:
    """Gives back every lock, at the end of the process."""
    for lock in list(HELD.values()):
        release(lock)


def forget_all() -> None:
    """Leaves the locks to the parent process, in a process that was forked and may outlive it."""
    for lock in HELD.values():
        os.close(lock.descriptor)
    HELD.clear()


def clear_stale(file: Path) -> None:
    """Deletes the file of a lock that a killed process has left behind."""
    with suppress(InputError):  # it is held
        check_free(file, file, delete=True)


def check_free(file: Path, folder: Path, delete: bool = False) -> None:
    """Raises InputError if another process holds a lock. If nobody does, `delete` removes its file."""
    if file in HELD or not file.exists():
        return
    descriptor = os.open(file, os.O_RDONLY)
    try:
        if try_lock(descriptor) and delete and is_at(descriptor, file):
            file.unlink()
    except BlockingIOError:
        raise InputError(in_use(folder, read_holder(descriptor))) from None
    finally:
        os.close(descriptor)


# ---- who holds it


def describe_this_process() -> dict[str, Any]:
    """The content of a lock's file."""
    return {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "since": f"{datetime.now():%Y-%m-%d %H:%M:%S}",
        "script": sys.argv[0],
    }


def read_holder(descriptor: int) -> dict[str, Any]:
    """What a lock's file says; nothing if its process has not yet written it."""
    try:
        holder = json.loads(os.pread(descriptor, 2**16, 0))
        return {name: holder[name] for name in ("pid", "host", "since", "script")}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def in_use(folder: Path, holder: dict[str, Any]) -> str:
    """The line for a user whose folder another process writes."""
    if not holder:
        return f"{folder} is in use: another process writes it. Wait for its end, or name another folder."
    return (
        f"{folder} is in use: process {holder['pid']} on {holder['host']} has been writing it since {holder['since']}"
        f" ({holder['script']}). Wait for its end, stop it, or name another folder."
    )
