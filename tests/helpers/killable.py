"""finetune/lora.py as a process that gets a signal at a chosen call: `killable.py --flags`, with in the environment

KILL    ["optimizer.step", 9, "after", "SIGKILL"], or null: what is called, which time, whether the signal comes before
        it, after it or half-way through what it writes, and which signal it is; SIGKILL if it is left out
CALLS   the file for how often each such call was passed, written at the end of a run that was not killed
LIMIT   bytes beyond which no file may grow, as on a full disk; optional
"""

import json
import os
import resource
import runpy
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def main() -> None:
    if "LIMIT" in os.environ:
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(os.environ["LIMIT"]), resource.RLIM_INFINITY))
    calls = watch_calls(json.loads(os.environ["KILL"]))
    script = str(ROOT / "finetune/lora.py")
    sys.argv = [script, *sys.argv[1:]]
    try:
        runpy.run_path(script, run_name="__main__")
    finally:
        if "LIMIT" not in os.environ:
            Path(os.environ["CALLS"]).write_text(json.dumps(calls))


def watch_calls(kill: list | None) -> Counter[str]:
    """Makes the process count the calls it could be killed at, and send itself the signal at the one asked for."""
    import safetensors.torch
    import torch
    from lightning_fabric import Fabric

    from lit_gpt.checkpoint.save import SafetensorsWriter
    from lit_gpt.runs.log import Log

    number = getattr(signal, kill[3]) if kill and len(kill) > 3 else signal.SIGKILL
    calls: Counter[str] = Counter()

    def watch(
        owner: Any, attribute: str, label: Callable[..., str | None], half: Callable[..., Any] | None = None
    ) -> None:
        """Watches a function of a module or a class.

        `label` gives the name of a call by its arguments, None for one that does not count; `half` undoes the second
        half of what a call has done.
        """
        original = getattr(owner, attribute)

        def watched(*args: Any, **kwargs: Any) -> Any:
            called = label(*args)
            if called:
                calls[called] += 1
            moment = kill[2] if kill and called == kill[0] and calls[called] == kill[1] else None
            if moment == "before":
                os.kill(os.getpid(), number)
            result = None if moment == "half" and attribute == "rmtree" else original(*args, **kwargs)
            if moment == "half":
                half(*args)
            if moment in ("half", "after"):
                os.kill(os.getpid(), number)
            return result

        setattr(owner, attribute, watched)

    watch(Fabric, "backward", lambda *_: "backward")
    watch(torch.optim.AdamW, "step", lambda *_: "optimizer.step")
    watch(
        Log,
        "write_figures",
        lambda *_: "row",
        lambda log, *_: truncate(log.file.name, os.path.getsize(log.file.name) - 9),
    )
    watch(
        safetensors.torch,
        "save_file",
        lambda _, path, *rest: f"save {path.parent.name}/{path.name}",
        lambda _, path, *rest: truncate(path, os.path.getsize(path) // 2),
    )
    watch(
        SafetensorsWriter,
        "close",
        lambda writer: f"save {writer.path.parent.name}/{writer.path.name}",
        lambda writer: truncate(writer.path, os.path.getsize(writer.path) // 2),
    )
    watch(os, "rename", lambda a, b: f"rename {Path(a).name} {Path(b).name}")
    watch(os, "replace", lambda a, b: f"write {Path(b).name}")
    watch(
        shutil,
        "rmtree",
        lambda path, *_: f"delete {Path(path).name}" if os.path.exists(path) else None,
        lambda path, *_: next(Path(path).iterdir()).unlink(),
    )
    return calls


def truncate(path: Path | str, size: int) -> None:
    os.truncate(path, max(0, size))


if __name__ == "__main__":
    main()
