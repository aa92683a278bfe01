"""How many operations a training step of LoRA takes for Llama 3.1 8B, here and in the peers, on the same records.

    bash tests/benchmarks/setup_peers.sh               # once
    python tests/benchmarks/operations.py

Counted by PyTorch's FlopCounterMode on tensors without contents, in bfloat16: a multiplication and an addition are two
operations. Rank 8 on query and value. Two steps: 16 instruction records of 60 to 250 tokens, of which the first 30 are
the same in all and the second half is trained; and one record of 4,096 tokens, all trained.

    frozen        products with the frozen weights of the blocks, and the gradients of their inputs
    attention     scores and sums of values, in backward four products. All scores of a rectangle count, those that a
                  mask hides, too, in every program alike: flash attention leaves about half of them out, and computes
                  the scores once more in backward
    head          logits, and the gradient of their input
    lora          products with A and B, and their gradients

Ours takes the gradient of the head while the loss is computed: it counts as forward.
"""

import argparse
import json
import random
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from worker import Worker, about, peers_dir, print_table, read_records

KINDS = ("frozen", "attention", "head", "lora")
LORA_RANKS = (8, 16)  # litgpt has the A of query and value in one
# as transformers' LlamaConfig has them; the other programs know the model by its name
LLAMA_8B = dict(
    vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=8, max_position_embeddings=131072, rms_norm_eps=1e-5, tie_word_embeddings=False,
)  # fmt: skip
N_PARAMETERS = 8_030_261_248
WAYS = {"ours": ["shared", "packed"], "hf": ["trainer", "lean", "flat"], "litgpt": ["chunked"]}


def short_records() -> list[dict]:
    chance = random.Random(1)
    records = []
    for _ in range(16):
        length = chance.randint(60, 250)
        ids = [*range(30), *(chance.randrange(100_000) for _ in range(length - 30))]
        half = length // 2
        records.append({"ids": ids, "trained": [0] * half + [1] * (length - half)})
    return records


def long_record() -> list[dict]:
    chance = random.Random(1)
    return [{"ids": [chance.randrange(100_000) for _ in range(4096)], "trained": [1] * 4096}]


# The worker's end. Only `counter` needs torch.


class NoModules(nullcontext):
    """Stands in for what tells FlopCounterMode in which module an operation is.

    That hooks into gradients, and stops at those that are taken in a forward pass, as our loss does (PyTorch 2.13).
    """

    parents = ("Global",)


def counter(
    args: argparse.Namespace,
    model: Any,
    micro_batches: Callable[[list[int], str, int], list[Any]],
    micro_batch_loss: Callable[[Any, str, int], Any],
) -> Callable[[dict], dict]:
    """Answers with the operations of one step, by kind. The arguments are those of `optimizer_steps` in worker.py."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils.flop_counter import FlopCounterMode, flop_registry

    class ByKind(TorchDispatchMode):
        """Adds up what FlopCounterMode counts, by what each operation is for."""

        def __init__(self) -> None:
            super().__init__()
            self.operations = Counter()

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            out = func(*args, **kwargs)
            packet = func._overloadpacket
            if packet in flop_registry:
                self.operations[kind_of(packet, args)] += flop_registry[packet](*args, **kwargs, out_val=out)
            return out

    def kind_of(packet: Any, args: Sequence[Any]) -> str:
        sizes = {size for arg in args if isinstance(arg, torch.Tensor) for size in arg.shape}
        if LLAMA_8B["vocab_size"] in sizes:
            return "head"
        if packet in (torch.ops.aten.bmm, torch.ops.aten.baddbmm):
            return "attention"
        return "frozen" if sizes.isdisjoint(LORA_RANKS) else "lora"

    n_frozen = sum(param.numel() for param in model.parameters() if not param.requires_grad)
    assert n_frozen == N_PARAMETERS, f"{n_frozen:,} parameters"
    records = read_records(args.work_dir / "records.jsonl")
    numbers = list(range(len(records)))
    trained = sum(sum(record.targets()) for record in records)

    def count(question: dict) -> dict:
        forward, backward = ByKind(), ByKind()
        all_kinds = FlopCounterMode(display=False)
        all_kinds.mod_tracker = NoModules()
        with all_kinds:
            for batch in micro_batches(numbers, question["setting"], question["micro_batch"]):
                with forward:
                    loss = micro_batch_loss(batch, question["setting"], trained)
                with backward:
                    loss.backward()
        total = forward.operations.total() + backward.operations.total()
        assert total == all_kinds.get_total_flops(), "FlopCounterMode has counted something else"
        return {"forward": forward.operations, "backward": backward.operations}

    return count


# The benchmark's end.


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers_dir", type=Path, default=peers_dir())
    parser.add_argument("--programs", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--out", type=Path, help="write all counts to this JSON file")
    args = parser.parse_args()
    args.checkpoint_dir = Path()  # none is read

    steps = {
        "16 short": (short_records(), (16, 4, 1)),
        "one of 4,096": (long_record(), (1,)),
    }
    counts = []
    for name, (records, micro_batch_sizes) in steps.items():
        n_tokens = sum(len(record["ids"]) for record in records)
        with tempfile.TemporaryDirectory(prefix="operations.") as folder:
            (Path(folder) / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
            for program in args.programs:
                with Worker(program, "operations", args, Path(folder)) as worker:
                    print(f"{name}, {n_tokens:,} tokens, {program}: {about(worker)}", flush=True)
                    for setting in WAYS[program]:
                        for size in micro_batch_sizes:
                            answer = worker.ask(setting=setting, micro_batch=size)
                            step = {"records": name, "program": program, "setting": setting, "micro_batch": size}
                            counts.append(step | {"tokens": n_tokens} | answer)
    if args.out:
        args.out.write_text(json.dumps(counts, indent=1) + "\n")
    print("\nTFLOP of a step; GFLOP for each token of the records")
    keys = ("records", "program", "setting", "micro_batch")
    rows = [[str(count[key]) for key in keys] + figures(count) for count in counts]
    print_table([[*keys, *KINDS, "forward", "backward", "all", "GFLOP/token"], *rows])


def figures(count: dict) -> list[str]:
    """TFLOP by kind, by pass, and of all; GFLOP for each token of the records."""
    forward, backward = Counter(count["forward"]), Counter(count["backward"])
    both = forward + backward
    by_kind = [f"{both[kind] / 1e12:.3f}" for kind in KINDS]
    by_pass = [f"{number.total() / 1e12:.2f}" for number in (forward, backward, both)]
    return [*by_kind, *by_pass, f"{both.total() / count['tokens'] / 1e9:.2f}"]


if __name__ == "__main__":
    main()
