"""How fast lm-evaluation-harness gets its answers from our models, next to its own backend for transformers.

    PYTHONPATH=tests python tests/benchmarks/harness_speed.py                 # on an otherwise idle machine

The questions are multiple choice with five examples before each: which of four docstrings belongs to a name. The
examples are others for each question, the harness' default, or the first five for all of them; the answers are texts,
or letters. Both take turns on the same questions, with the same weights in float32, and must agree on each choice.
transformers is asked with each of --batch_sizes, and its fastest one counts.
"""

import argparse
import logging
import os
import statistics
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from helpers.harness_tasks import N_CHOICES, write_tasks
from worker import check_quiet, machine, print_table, spread

from lit_gpt import Tokenizer
from lit_gpt.checkpoint.load import load_model
from lit_gpt.config import SAMPLE
from lit_gpt.evaluation.harness import TaskArgs, load_tasks
from lit_gpt.evaluation.harness_model import HarnessModel
from lit_gpt.evaluation.kept_answers import KeptAnswers

TASKS = ("docstring_choices", "docstring_letters")
TOLERANCE = 1e-4


def ours(checkpoint_dir: Path, batch_tokens: int) -> HarnessModel:
    model = load_model(checkpoint_dir, torch.float32)
    return HarnessModel(
        model,
        Tokenizer(checkpoint_dir),
        KeptAnswers(None),
        lambda what, n: nullcontext(lambda n_done: None),
        batch_tokens=batch_tokens,
    )


def theirs(checkpoint_dir: Path) -> Any:
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=str(checkpoint_dir), dtype="float32", device="cpu")


def questions(task: Any, sampler: str, n_shots: int) -> list[list[Any]]:
    """The requests of each document of a task."""
    from lm_eval.api.samplers import get_sampler

    task.sampler = get_sampler(sampler)(list(task.fewshot_docs()))
    task.set_config("num_fewshot", n_shots)
    task.set_fewshot_seed(1234)
    task.build_all_requests()
    instances = task.instances
    return [instances[i : i + N_CHOICES] for i in range(0, len(instances), N_CHOICES)]


def timed(model: Any, requests: list[Any]) -> tuple[list[tuple[float, bool]], float, float]:
    """(answers, seconds, seconds of all processor cores together)"""
    wall, cpu = time.perf_counter(), time.process_time()
    answers = model.loglikelihood(requests, disable_tqdm=True)
    return answers, time.perf_counter() - wall, time.process_time() - cpu


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--checkpoint_dir", type=Path, default=SAMPLE)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--questions", type=int, default=8, help="in a round")
    parser.add_argument("--n_shots", type=int, default=5)
    parser.add_argument("--batch_tokens", type=int, default=4096, help="of ours")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 8], help="of transformers")
    parser.add_argument("--force", action="store_true", help="run although the machine is busy")
    args = parser.parse_args()
    check_quiet(args.force)
    print(machine())
    os.environ["HF_HUB_OFFLINE"] = "1"
    logging.getLogger("lm_eval").setLevel(logging.ERROR)

    our_model = ours(args.checkpoint_dir, args.batch_tokens)
    their_model = theirs(args.checkpoint_dir)
    rows = [["task", "examples", "", "questions/s", "times as fast", "by processor time"]]
    with tempfile.TemporaryDirectory() as folder:
        n_questions = (args.rounds + 1) * args.questions
        loaded = load_tasks(TaskArgs(TASKS, write_tasks(Path(folder), n_questions)))
        for name in TASKS:
            for sampler, examples in (("default", "others"), ("first_n", "the same")):
                asked = questions(loaded.tasks[name], sampler, args.n_shots)
                rounds = [asked[i : i + args.questions] for i in range(0, n_questions, args.questions)]
                found = [one_round(our_model, their_model, part, args.batch_sizes) for part in rounds][
                    1:
                ]  # one warms up
                for size in args.batch_sizes:
                    rows.append([name, examples, f"transformers, batches of {size}", *figures(found, size, args)])
                rows.append([name, examples, "ours", *figures(found, 0, args)])
    print_table(rows)


def one_round(
    our_model: HarnessModel, their_model: Any, asked: list[list[Any]], batch_sizes: list[int]
) -> dict[int, tuple[float, float]]:
    """(seconds, seconds of all cores) by the batch size of transformers; 0 is ours. They have to agree."""
    requests = [request for question in asked for request in question]
    our_model.kept.answers.clear()
    answers, *seconds = timed(our_model, requests)
    found = {0: tuple(seconds)}
    for size in batch_sizes:
        their_model.batch_size_per_gpu = size
        their_answers, *seconds = timed(their_model, requests)
        found[size] = tuple(seconds)
        for (logprob, is_greedy), (other, was_greedy) in zip(answers, their_answers, strict=True):
            assert abs(logprob - other) < TOLERANCE * max(1, abs(other)), f"{logprob} is not {other}"
            assert is_greedy == was_greedy, "another greedy answer"
    return found


def figures(found: list[dict[int, tuple[float, float]]], size: int, args: argparse.Namespace) -> list[str]:
    """Questions per second, and how many times faster ours are than the fastest of transformers."""
    speed = spread([args.questions / one[size][0] for one in found], 2)
    if size:
        return [speed, "", ""]
    ratios = []
    for clock in (0, 1):
        best = min(args.batch_sizes, key=lambda size: statistics.median(one[size][clock] for one in found))
        ratios.append(spread([one[best][clock] / one[0][clock] for one in found], 2))
    return [speed, *ratios]


if __name__ == "__main__":
    main()
