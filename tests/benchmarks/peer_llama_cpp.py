"""llama.cpp by llama-cpp-python: the 4-bit file that the sample model was made from, multiplied by its own kernels.

Blocks and head have as many bits as with `--quantize cpu.int4`. `setup_peers.sh` puts the file beside the environment.
"""

import argparse
import itertools
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

from llama_cpp import Llama
from worker import serve

GGUF_PATH = Path(sys.prefix) / "SmolLM2-135M-Instruct.Q4_1.gguf"
N_THREADS = len(os.sched_getaffinity(0))  # as many as torch takes; llama-cpp-python itself would take half of them


def decode(args: argparse.Namespace) -> Callable[[dict], dict]:
    model = Llama(str(GGUF_PATH), n_ctx=1024, n_threads=N_THREADS, n_threads_batch=N_THREADS, verbose=False)

    def continued(question: dict) -> dict:
        model.reset()  # a prompt that begins like the last one is read again
        start = time.perf_counter()
        new = model.generate(question["prompt"], temp=0.0)
        tokens = list(itertools.islice(new, question["new_tokens"]))
        return {"seconds": time.perf_counter() - start, "tokens": tokens}

    return continued


if __name__ == "__main__":
    serve({"decode": decode}, ["llama-cpp-python"], N_THREADS)
