"""How many tokens per second greedy decoding makes, here and in the peers: batch 1, float32, prefill included.

    bash tests/benchmarks/setup_peers.sh            # once
    python tests/benchmarks/decode_throughput.py

The programs take turns on an otherwise idle machine. Every round has another prompt; all must continue it alike.
"""

import json
import statistics
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

from records import make_records
from worker import Worker, benchmark_arguments, check_quiet, machine, print_table, spread

SETTINGS = {"ours": ["cache"], "hf": ["dynamic", "static"], "litgpt": ["cache"]}


def main() -> None:
    parser = benchmark_arguments("Speed of greedy decoding next to litgpt and transformers.")
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
        about = {program: worker.about for program, worker in workers.items()}

    speed = {way: [args.new_tokens / answer["seconds"] for answer in answers[way]] for way in ways}
    transformers = [statistics.median(speed[way]) for way in ways if way[0] == "hf"]
    rows = [["", "setting", "tokens/s", "of transformers' faster", "peak GiB", "versions"]]
    for way in ways:
        ratio = f"{statistics.median(speed[way]) / max(transformers):.2f}" if transformers else "-"
        peak = f"{max(answer['peak_gb'] for answer in answers[way]):.2f}"
        versions = ", ".join(f"{name} {number}" for name, number in about[way[0]]["versions"].items())
        rows.append([*way, spread(speed[way], 1), ratio, peak, versions])
    print_table(rows)
    if args.out:
        args.out.write_text(json.dumps({" ".join(way): answers[way] for way in ways} | {"about": about}, indent=1))
    different = compare({" ".join(way): [answer["tokens"] for answer in answers[way]] for way in ways})
    print("\n".join(different) or f"all programs continue all {args.rounds} prompts with the same tokens")
    sys.exit(bool(different))


def compare(tokens: dict[str, list[list[int]]]) -> list[str]:
    """One line per continuation that is not the first program's."""
    first, *others = tokens
    lines = []
    for other in others:
        for i, (a, b) in enumerate(zip(tokens[first], tokens[other], strict=True)):
            if a != b:
                at = next((j for j, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
                lines.append(f"prompt {i}: {other} leaves {first} at new token {at} of {len(a)} and {len(b)}")
    return lines


if __name__ == "__main__":
    main()
