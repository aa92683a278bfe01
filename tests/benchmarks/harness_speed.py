"""How fast lm-evaluation-harness gets its answers from our models, next to its own backend for transformers.

    PYTHONPATH=tests python tests/benchmarks/harness_speed.py                 # on an otherwise idle machine

Which of four docstrings belongs to a name, with five examples before each question: others for each, which is the
harness' default, or the same five for all. The choices are texts, or letters; and in the last task the docstring is
written. Both take turns on the same questions, with the same weights in float32, and must agree on each answer.
transformers is asked with each of --batch_sizes, and its fastest one counts. For letters it computes a question once,
as ours does: what they have in common is only the examples.
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
from helpers.harness_tasks import write_tasks
from worker import check_quiet, machine, print_table, spread

from lit_gpt import Tokenizer
from lit_gpt.checkpoint.load import load_model
from lit_gpt.config import SAMPLE
from lit_gpt.evaluation.kept import Kept
from lit_gpt.harness.harness_model import HarnessModel
from lit_gpt.harness.tasks import TaskArgs, load_tasks

TASKS = {
    "docstring_choices": "loglikelihood",
    "docstring_letters": "loglikelihood",
    "docstring_answers": "generate_until",
}
TOLERANCE = 1e-5  # relative to a log-likelihood, which is a sum over tokens


def ours(checkpoint_dir: Path, batch_tokens: int) -> HarnessModel:
    model = load_model(checkpoint_dir, torch.float32)
    return HarnessModel(
        model,
        Tokenizer(checkpoint_dir),
        Kept(None),
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
    n = len(task.instances) // len(task.eval_docs)
    return [task.instances[i : i + n] for i in range(0, len(task.instances), n)]


def timed(model: Any, kind: str, requests: list[Any]) -> tuple[list[Any], float, float]:
    """(answers, seconds, seconds of all processor cores together)"""
    wall, cpu = time.perf_counter(), time.process_time()
    answers = getattr(model, kind)(requests, disable_tqdm=True)
    return answers, time.perf_counter() - wall, time.process_time() - cpu


def check_alike(answers: list[Any], others: list[Any]) -> float:
    """The largest difference of log-likelihoods; ends with an error if it is more than rounding, or texts differ."""
    largest = 0.0
    for answer, other in zip(answers, others, strict=True):
        if isinstance(answer, str):
            assert answer == other, f"{answer!r} is not {other!r}"
            continue
        (logprob, is_greedy), (their_logprob, was_greedy) = answer, other
        assert abs(logprob - their_logprob) < TOLERANCE * max(1, abs(logprob)), f"{logprob} is not {their_logprob}"
        assert is_greedy == was_greedy, "another greedy answer"
        largest = max(largest, abs(logprob - their_logprob))
    return largest


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
        loaded = load_tasks(TaskArgs(list(TASKS), write_tasks(Path(folder), n_questions)))
        for name, kind in TASKS.items():
            for sampler, examples in (("default", "others"), ("first_n", "the same")):
                asked = questions(loaded.tasks[name], sampler, args.n_shots)
                rounds = [asked[i : i + args.questions] for i in range(0, n_questions, args.questions)]
                found = [one_round(our_model, their_model, kind, part, args.batch_sizes) for part in rounds]
                del found[0]  # it warms up
                for size in args.batch_sizes:
                    rows.append([name, examples, f"transformers, batches of {size}", *figures(found, size, args)])
                rows.append([name, examples, "ours", *figures(found, 0, args)])
    print_table(rows)


def one_round(
    our_model: HarnessModel, their_model: Any, kind: str, asked: list[list[Any]], batch_sizes: list[int]
) -> dict[int, tuple[float, float]]:
    """(seconds, seconds of all cores) by the batch size of transformers; 0 is ours. They have to agree."""
    requests = [request for question in asked for request in question]
    our_model.kept.values.clear()
    answers, *seconds = timed(our_model, kind, requests)
    found = {0: tuple(seconds)}
    for size in batch_sizes:
        their_model.batch_size_per_gpu = size
        their_answers, *seconds = timed(their_model, kind, requests)
        found[size] = tuple(seconds)
        largest = check_alike(answers, their_answers)
        print(f"{requests[0].task_name}: {len(answers)} answers alike, within {largest:.1e}", flush=True)
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
