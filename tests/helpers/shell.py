"""`python script.py --flags` in a process of its own, for the price of a fork.

the tests          python(...)  --- a job, as a line of JSON --->  the server, which is this file, run as a script:
                                                                   it has imported what scripts import, which takes
                                                                   seconds, and has started no thread
                                                                        |  fork
stdout, stderr  <---------- pipes, by name ----------------------  the command: its arguments, folder, environment,
status          <---------- a line of the server ----------------  and streams are those of the job
"""

import atexit
import contextlib
import functools
import io
import json
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any


def python(
    script: Path | str,
    *flags: Any,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    input: str = "",
    check: bool = False,
) -> subprocess.CompletedProcess[str]:
    """Runs a script with these flags, as `subprocess.run` would with its output captured as text.

    Args:
        script: Its path, seen from `cwd`.
        flags: Its arguments.
        cwd: The folder to run it in. None is the current one.
        env: All of its environment. None is ours.
        input: The text that it reads from stdin.
        check: Fail if its status is not 0.
    """
    argv = [str(script), *map(str, flags)]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor() as readers:
        stdin, *pipes = [Path(folder) / name for name in ("stdin", "stdout", "stderr")]
        stdin.write_text(input)
        for pipe in pipes:  # not files: a test may forbid a command to write any
            os.mkfifo(pipe)
        texts = [readers.submit(pipe.read_text) for pipe in pipes]
        files = [str(stdin), *map(str, pipes)]
        job = dict(argv=argv, cwd=str(cwd or Path.cwd()), env=dict(env or os.environ), files=files)
        print(json.dumps(job), file=server().stdin, flush=True)
        status = int(server().stdout.readline())
        result = subprocess.CompletedProcess(argv, status, *(text.result() for text in texts))
    assert not (check and status), result.stderr
    return result


@functools.cache
def server() -> subprocess.Popen[str]:
    """The process that forks the commands. It starts with the first of them, and ends with this process."""
    pipe = subprocess.PIPE
    process = subprocess.Popen([sys.executable, __file__], text=True, stdin=pipe, stdout=pipe)
    atexit.register(process.terminate)
    return process


def serve() -> None:
    """Forks a process for each job; returns in that process, which has become what the job asks for."""
    import jsonargparse  # noqa: F401
    import matplotlib.figure  # noqa: F401
    import torch

    import lit_gpt.recipe  # noqa: F401
    from lit_gpt import Config
    from lit_gpt.memory.plan import Setup, plan
    from lit_gpt.packages import import_fabric

    import_fabric()
    with contextlib.redirect_stderr(io.StringIO()):  # it misses a package that nobody needs
        import bitsandbytes  # noqa: F401
    torch.set_num_threads(1)
    if torch.version.cuda is None:
        # Half of the time of a short run is its plan's, and a fifth of that goes into what torch finds out about each
        # operation, once in a process. With CUDA a backward pass starts threads, and a process with threads cannot fork
        with torch.random.fork_rng():
            plan(Setup(Config(n_layer=1, n_head=2, n_embd=16, vocab_size=99), dtype=torch.float32))
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            return become(**json.loads(line))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
    sys.exit()


def become(argv: list[str], cwd: str, env: dict[str, str], files: list[str]) -> None:
    """Gives the process that was forked the streams, arguments, folder and environment of its job."""
    for stream, name in enumerate(files):
        os.dup2(os.open(name, os.O_RDONLY if stream == 0 else os.O_WRONLY), stream)
    sys.stdin, sys.argv = open(0, closefd=False), argv
    sys.orig_argv = [sys.executable, *argv]
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    sys.path[0] = str(Path(argv[0]).resolve().parent)  # as Python does for a script


if __name__ == "__main__":
    serve()
    runpy.run_path(sys.argv[0], run_name="__main__")
