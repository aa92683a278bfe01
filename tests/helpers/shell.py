"""`python script.py --flags` in a process of its own, for the price of a fork; torchrun likewise, in several processes.

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
import signal
import socket
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
    (result,) = run([script, *flags], [dict(env or os.environ)], cwd, input)
    assert not (check and result.returncode), result.stderr
    return result


def torchrun(script: Path | str, *flags: Any, n_machines: int = 1) -> subprocess.CompletedProcess[str]:
    """Runs a script in two processes, with the variables that torchrun sets, by which they find each other.

    torchrun itself is left out, which starts them and ends them all if one fails: that is tested in
    `tests/test_devices.py` and `tests/test_machines.py`.

    Args:
        script: Its path.
        flags: Its arguments.
        n_machines: 1 for two processes on one machine; 2 for one process on each.

    Returns:
        The outcome, with the output of the first process, and then that of the second.

    Raises:
        AssertionError: one of them ended with another status than 0.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    rendezvous = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, TORCHELASTIC_RUN_ID="none")
    sizes = dict(WORLD_SIZE="2", LOCAL_WORLD_SIZE=str(2 // n_machines), GROUP_WORLD_SIZE=str(n_machines))
    same = dict(os.environ) | rendezvous | sizes
    ranks = [
        dict(RANK=str(rank), LOCAL_RANK=str(rank % (2 // n_machines)), GROUP_RANK=str(rank % n_machines))
        for rank in range(2)
    ]
    results = run([script, *flags], [same | rank for rank in ranks])
    assert [result.returncode for result in results] == [0, 0], [result.stderr for result in results]
    said = ["".join(getattr(result, stream) for result in results) for stream in ("stdout", "stderr")]
    return subprocess.CompletedProcess(results[0].args, 0, *said)


def run(
    words: list[Any], environments: list[dict[str, str]], cwd: Path | None = None, input: str = ""
) -> list[subprocess.CompletedProcess[str]]:
    """Runs a script in a process for each environment, all at once. If one of them fails, the others are ended."""
    argv = [*map(str, words)]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2 * len(environments)) as readers:
        stdin = Path(folder) / "stdin"
        stdin.write_text(input)
        processes, texts = [], []
        for i, env in enumerate(environments):
            pipes = [Path(folder) / f"{name}{i}" for name in ("stdout", "stderr")]
            for pipe in pipes:  # not files: a test may forbid a command to write any
                os.mkfifo(pipe)
            texts.append([readers.submit(pipe.read_text) for pipe in pipes])
            files = [str(stdin), *map(str, pipes)]
            processes.append(dict(argv=argv, cwd=str(cwd or Path.cwd()), env=env, files=files))
        print(json.dumps(processes), file=server().stdin, flush=True)
        statuses = json.loads(server().stdout.readline())
        return [
            subprocess.CompletedProcess(argv, status, stdout.result(), stderr.result())
            for status, (stdout, stderr) in zip(statuses, texts, strict=True)
        ]


@functools.cache
def server() -> subprocess.Popen[str]:
    """The process that forks the commands. It starts with the first of them, and ends with this process."""
    pipe = subprocess.PIPE
    process = subprocess.Popen([sys.executable, __file__], text=True, stdin=pipe, stdout=pipe)
    atexit.register(process.terminate)
    return process


def serve() -> None:
    """Forks the processes of each job; returns in those, which have become what the job asks for."""
    import jsonargparse  # noqa: F401
    import matplotlib.figure  # noqa: F401
    import torch

    import lit_gpt.formats.merge
    import lit_gpt.generate.answers
    import lit_gpt.recipe
    import lit_gpt.runs.report  # noqa: F401
    from lit_gpt import Config
    from lit_gpt.memory.plan import Setup, plan
    from lit_gpt.packages import import_fabric

    import_fabric()
    with contextlib.redirect_stderr(io.StringIO()):  # it misses a package that nobody needs
        import bitsandbytes  # noqa: F401
    Config.from_name("SmolLM2-135M")  # reads the files of all families
    torch.set_num_threads(1)
    if torch.version.cuda is None:
        # Half of the time of a short run is its plan's, and a fifth of that goes into what torch finds out about each
        # operation, once in a process. With CUDA a backward pass starts threads, and a process with threads cannot fork
        with torch.random.fork_rng():
            plan(Setup(Config(n_layer=1, n_head=2, n_embd=16, vocab_size=99), dtype=torch.float32))
    for line in sys.stdin:
        children = []
        for process in json.loads(line):
            child = os.fork()
            if child == 0:
                return become(**process)
            children.append(child)
        print(json.dumps(wait_for(children)), flush=True)
    sys.exit()


def wait_for(children: list[int]) -> list[int]:
    """The statuses of processes; when one has failed, the others, which would wait for it, are ended."""
    statuses: dict[int, int] = {}
    while len(statuses) < len(children):
        child, status = os.wait()
        statuses[child] = os.waitstatus_to_exitcode(status)
        if status != 0:
            for other in set(children) - statuses.keys():
                os.kill(other, signal.SIGKILL)
    return [statuses[child] for child in children]


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
