"""How many tokens per second greedy decoding makes, here and in the peers: batch 1, prefill included.

    bash tests/benchmarks/setup_peers.sh            # once
    python tests/benchmarks/decode_throughput.py

The programs take turns on an otherwise idle machine. Every round has another prompt; those that compute in float32
must all continue it alike. Of those that multiply by codes it tells how many tokens they have in common with float32.
"""

import json
import statistics
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

from records import make_records
from worker import Worker, about, benchmark_arguments, check_quiet, machine, print_table, spread

SETTINGS = {
    "ours": ["float32", "int8", "int4"],
    "hf": ["dynamic", "static"],
    "litgpt": ["cache"],
    "llama_cpp": ["Q4_1"],
}
CODES = ("int8", "int4", "Q4_1")  # settings whose weights or arithmetic are rounded


def main() -> None:
    parser = benchmark_arguments("Speed of greedy decoding next to litgpt and transformers.", list(SETTINGS))
    parser.add_argument("--prompt_tokens", type=int, default=100)
    parser.add_argument("--new_tokens", type=int, default=100)
    args = parser.parse_args()
    check_quiet(args.force)
    print(machine())
    if args.data:
        records = [json.loads(line) for line in args.data.read_text().splitlines()]
    else:
        records = make_records(args.checkpoint_dir, args.kind, 1 + args.rounds * args.prompt_tokens // 40)
    ids = [token for record in records for token in record["ids"]]
    prompts = [ids[i * args.prompt_tokens :][: args.prompt_tokens] for i in range(args.rounds)]

    with tempfile.TemporaryDirectory(prefix="decode_throughput.") as folder, ExitStack() as running:
        workers = {p: running.enter_context(Worker(p, "decode", args, Path(folder))) for p in args.programs}
        ways = [(program, setting) for program in workers for setting in SETTINGS[program]]
        for program, setting in ways:
            workers[program].ask(setting=setting, prompt=prompts[0], new_tokens=args.new_tokens)  # warm up
        answers = {way: [] for way in ways}
        for prompt in prompts:
            for program, setting in ways:
                answer = workers[program].ask(setting=setting, prompt=prompt, new_tokens=args.new_tokens)
                answers[program, setting].append(answer)
        versions = {program: about(worker) for program, worker in workers.items()}

    speed = {way: [args.new_tokens / answer["seconds"] for answer in answers[way]] for way in ways}
    transformers = [statistics.median(speed[way]) for way in ways if way[0] == "hf"]
    rows = [["", "setting", "tokens/s", "of transformers' faster", "versions"]]
    for way in ways:
        ratio = f"{statistics.median(speed[way]) / max(transformers):.2f}" if transformers else "-"
        rows.append([*way, spread(speed[way], 1), ratio, versions[way[0]]])
    print_table(rows)
    if args.out:
        args.out.write_text(
            json.dumps({" ".join(way): answers[way] for way in ways} | {"versions": versions}, indent=1)
        )
    compare(answers, args.new_tokens)


def compare(answers: dict[tuple[str, str], list[dict]], new_tokens: int) -> None:
    """Prints where the programs differ; ends with an error if those do that compute in float32."""
    exact = [way for way in answers if way[1] not in CODES]
    first = exact[0] if exact else next(iter(answers))
    different = False
    for way in answers:
        n_alike = 0
        for i, (answer, other) in enumerate(zip(answers[first], answers[way], strict=True)):
            same = [x == y for x, y in zip(answer["tokens"], other["tokens"], strict=True)]
            n_alike += [*same, False].index(False)
            if way in exact and not all(same):
                different = True
                print(f"prompt {i}: {' '.join(way)} leaves {' '.join(first)} at new token {same.index(False)}")
        if way not in exact:
            print(f"{' '.join(way)}: the first {n_alike / len(answers[way]):.0f} tokens of an answer are as in float32")
    if different:
        sys.exit("The programs do not continue the prompts alike.")
    n_prompts = len(answers[first])
    print(f"all in float32 continue all {n_prompts} prompts with the same {new_tokens} tokens")


if __name__ == "__main__":
    main()
